"""What the kernel generators need to know about a processor."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.backends.tvm import microkernels
from trimtab.backends.tvm.microkernels import InstructionSet
from trimtab.backends.tvm.microkernels.tiles import good_heights

_BYTES = {"float64": 8, "int64": 8, "uint64": 8, "float32": 4, "int32": 4, "uint32": 4, "float16": 2, "bfloat16": 2,
          "int16": 2, "uint16": 2, "int8": 1, "uint8": 1, "bool": 1}  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """Vector width, register tiles and parallelism of a target.

    Attributes:
        vector_bytes: width of a vector register.
        tiles: register tiles to choose from as (rows, vectors per row), the preferred one first.
        chains: independent accumulators needed to keep the multiply units busy.
        threads: worker threads the code will run with; 0 is never valid here.
        serial_work: multiply-adds (or elements) below which a parallel launch costs more than it gains.
        cache_bytes: second-level cache of a core.
        instruction_sets: those that micro-kernels may use, the fastest first.
    """

    vector_bytes: int
    tiles: tuple[tuple[int, int], ...]
    chains: int = 10
    threads: int = 2
    serial_work: int = 65536
    cache_bytes: int = 1 << 20
    instruction_sets: tuple[InstructionSet, ...] = ()

    def lanes(self, dtype: str) -> int:
        """Elements of ``dtype`` in a vector register."""
        return max(1, self.vector_bytes // self.element_bytes(dtype))

    @staticmethod
    def element_bytes(dtype: str) -> int:
        """Bytes of an element of ``dtype``, a name of TVM's."""
        return _BYTES.get(dtype, 4)

    def instruction_set(self, kind: str, depth: int | None, group: int = 1) -> InstructionSet | None:
        """The fastest instruction set that multiplies ``kind`` of data, with vectors as wide as the machine's: panels
        are made for these.

        Args:
            depth: length of the sums; None when it is not known, which suits only products that take any.
            group: how many consecutive k are interleaved in the second factor.
        """
        for isa in self.instruction_sets:
            found = isa.products.get(kind) if isa.vector_bytes >= self.vector_bytes else None
            if found and found.group == group and (found.depth_step == 1 or (depth and depth % found.depth_step == 0)):
                return isa
        return None

    @property
    def has_fma(self) -> bool:
        """Whether the processor multiplies and adds with one rounding."""
        known = {feature for isa in self.instruction_sets for feature in isa.features}
        return bool(known & {"fma", "avx512f", "neon"})

    @property
    def rounds_to_bf16(self) -> bool:
        """Whether an instruction rounds a vector of f32 to bf16."""
        return any("avx512bf16" in p.features for isa in self.instruction_sets for p in isa.products.values())


def _tiles(isa: InstructionSet) -> tuple[tuple[int, int], ...]:
    return tuple((tile.rows, tile.vectors) for tile in good_heights(isa, "f32"))


AVX512 = Machine(64, _tiles(microkernels.AVX512))
AVX2 = Machine(32, _tiles(microkernels.AVX2))
NEON = Machine(16, _tiles(microkernels.NEON), chains=8)
SCALAR = Machine(16, _tiles(microkernels.PORTABLE), chains=4)
