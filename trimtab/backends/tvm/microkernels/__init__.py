"""Micro-kernels: the inner loops of matrix products as LLVM IR text, generated from a description of the processor."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.backends.tvm.microkernels import amx, fixed_point
from trimtab.backends.tvm.microkernels.isa import (
    AMX,
    AVX2,
    AVX512,
    AVX512_BF16,
    AVX512_VNNI,
    AVX_VNNI,
    NEON,
    NEON_DOTPROD,
    NEON_I8MM,
    PORTABLE,
    InstructionSet,
)
from trimtab.backends.tvm.microkernels.llvm_text import LINE_BYTES, Writer
from trimtab.backends.tvm.microkernels.products import ScaledProduct
from trimtab.backends.tvm.microkernels.rounding import PARAMETERS as ROUNDING_PARAMETERS
from trimtab.backends.tvm.microkernels.rounding import rounding_body, vector_body
from trimtab.backends.tvm.microkernels.tiles import RegisterTile, accumulator_sets, fits, preferred_tiles
from trimtab.backends.tvm.microkernels.transposition import PARAMETERS as TRANSPOSITION_PARAMETERS
from trimtab.backends.tvm.microkernels.transposition import transposition_body
from trimtab.backends.tvm.microkernels.vector_kernel import VectorKernel
from trimtab.errors import BackendError

__all__ = ["MicroKernel", "microkernel", "InstructionSet", "AMX", "AVX2", "AVX512", "AVX512_BF16", "AVX512_VNNI",
           "AVX_VNNI", "NEON", "NEON_DOTPROD", "NEON_I8MM", "PORTABLE", "ROUNDED_TOGETHER", "RegisterTile",
           "claiming", "fixed_point_conversion", "fixed_point_kernel",
           "preferred_tiles", "rounding", "vector_rounding", "vector_rounding_name", "transposition"]  # fmt: skip

UNROLL = 4
"""Steps in an iteration of the loop over the depth."""


@dataclass(frozen=True)
class Phases:
    """Symbols of three functions that return 0; what runs between their calls must leave the sums' registers alone.

    Attributes:
        begin: ``i32 (ptr C, i64 ldc, i32 accumulate)`` makes the sums.
        steps: ``i32 (ptr A, i64 lda, ptr B, i64 depth, ptr next)`` adds products to them, any number of times.
        end: ``i32 (ptr C, i64 ldc)`` stores them.
    """

    begin: str
    steps: str
    end: str


@dataclass(frozen=True)
class MicroKernel:
    """``C = A B`` or ``C += A B`` for one register tile, as LLVM IR text.

    The function is ``i32 name(ptr A, i64 lda, ptr B, ptr C, i64 ldc, i64 depth, i32 accumulate, ptr next)`` and returns
    0. A is row-major [rows, depth] of ``a_dtype``, ``lda`` elements from row to row, unaligned. B is a packed panel
    [depth / group, columns, group] of ``b_dtype``. C is row-major [rows, columns] of ``c_dtype``,
    ``ldc`` elements from row to row, unaligned; accumulate = 0 overwrites it, 1 adds to it. ``next`` is what the caller
    will read soon, such as the next panel: while it computes, the kernel asks for ``prefetch_lines`` lines of 64 bytes
    from there for every ``prefetch_depth`` of the depth. It need not be a valid address. A kernel for a panel's only
    tile asks for the panel itself instead, ahead of where it reads.

    With ``a_dtype`` ``f32`` and integers in B, the function has two more parameters, ``ptr scales`` and ``i64 group``:
    scales are f32 [depth / group, columns], 4-byte aligned, one factor per column and ``group`` consecutive k. A group
    divides the depth. With ``b_dtype`` ``i4`` or ``u4`` the panel has bytes [depth / 2, columns], the even k in the low
    half, and a group is even.

    TVM inlines the function where it is called and drops the attributes, so the target must have the features too.

    Attributes:
        name: symbol, unique per instruction set, kind, rows and columns.
        text: a whole LLVM module, without triple and data layout; several modules may link the same one.
        features: CPU features the code needs, in LLVM's names.
        rows: rows of the tile.
        columns: columns of the tile, which are those of a panel.
        group: consecutive k that are interleaved in B.
        a_dtype: ``f32``, ``bf16``, ``u8`` or ``s8``.
        b_dtype: ``f32``, ``f16``, ``bf16``, ``s8``, ``u8``, ``i4`` or ``u4``.
        c_dtype: ``f32`` or ``i32``.
        depth_step: the depth must be a multiple of this.
        prefetch_depth: the depth after which more lines of ``next`` are prefetched; 0 when none are.
        prefetch_lines: how many lines at a time.
        setup: symbol of an ``i32 ()`` function to call in each thread before a run of tiles of this shape; it returns
            0, or a negative error number of the system. Empty when nothing is to be set up.
        teardown: the same for the end of the run.
        phases: the same product in functions of its own, where sums may stay in registers between calls.
    """

    name: str
    text: str
    features: tuple[str, ...]
    rows: int
    columns: int
    group: int
    a_dtype: str
    b_dtype: str
    c_dtype: str
    depth_step: int
    prefetch_depth: int = 0
    prefetch_lines: int = 1
    setup: str = ""
    teardown: str = ""
    phases: Phases | None = None


def microkernel(isa: InstructionSet, kind: str, rows: int, columns: int, sharing: int = 0) -> MicroKernel:
    """The micro-kernel of ``rows`` x ``columns`` for ``kind`` of data on ``isa``.

    Args:
        kind: a key of ``isa.products``, e.g. ``f32``, ``bf16``, ``u8*s8``, ``f32*i4``.
        columns: a multiple of ``isa.lanes``.
        sharing: how many tiles take turns with a panel and ask together for as much as a panel holds; 0 for many.

    Raises:
        BackendError: the instruction set has no such product, or the tile is not a tile of it.
    """
    product = isa.products.get(kind)
    if product is None:
        raise BackendError(
            "no micro-kernel",
            values={"instruction set": isa.name, "kind": kind, "known": [*isa.products]},
            rule="each instruction set multiplies certain kinds of data",
            fix="use one of the known kinds",
        )
    tile = RegisterTile(rows, columns // isa.lanes)
    if columns % isa.lanes or rows < 1 or columns < 1 or not fits(isa, kind, tile):
        raise BackendError(
            "no micro-kernel for such a tile",
            values={"instruction set": isa.name, "kind": kind, "rows": rows, "columns": columns},
            rule=f"columns come in multiples of {isa.lanes}, and a step must fit {isa.registers} registers",
            fix="use one of preferred_tiles, or fewer rows or columns",
        )
    name = f"trimtab_{isa.name}_{kind.replace('*', '_')}_{rows}x{columns}"
    features = tuple(dict.fromkeys((*isa.features, *product.features)))
    parameters = "ptr noalias %a, i64 %lda, ptr noalias %b, ptr noalias %c, i64 %ldc, i64 %depth, i32 %accumulate"
    parameters += ", ptr %next"
    globals: list[str] = []
    setup = teardown = ""
    phases = None
    prefetch_depth, prefetch_lines = 0, 1
    functions: list[tuple[str, Writer]] = []
    if isinstance(product, amx.TileProduct):
        body = Writer()
        prefetch_depth, prefetch_lines = product.depth_step, -(-columns // (sharing or amx.FEW_TILES))
        name += f"_ahead{prefetch_lines}"
        code = amx.TileKernel(product, rows, columns, prefetch_lines)
        code.whole(body)
        phases = Phases(f"{name}_begin", f"{name}_steps", f"{name}_end")
        begin, steps, end = Writer(), Writer(), Writer()
        code.begin(begin)
        code.steps(steps)
        code.end(end)
        for writer in (begin, steps):
            writer.do("ret i32 0")
        functions += [
            (f"i32 @{phases.begin}({amx.BEGIN_PARAMETERS})", begin),
            (f"i32 @{phases.steps}({amx.STEPS_PARAMETERS})", steps),
            (f"i32 @{phases.end}({amx.END_PARAMETERS})", end),
        ]
        setup, teardown = f"trimtab_amx_configure_{rows}x{columns}", "trimtab_amx_release"
        prepare, release = Writer(), Writer()
        globals.append(amx.setup_text(prepare, rows, columns))
        amx.teardown_text(release)
        functions += [(f"i32 @{setup}()", prepare), (f"i32 @{teardown}()", release)]
    else:
        alone = sharing == 1
        panel_lines = UNROLL * columns * product.b_bytes // LINE_BYTES
        if alone:
            name += "_alone"
        else:
            prefetch_depth = UNROLL * product.group
            if sharing and panel_lines > sharing:
                prefetch_lines = -(-panel_lines // sharing)
                name += f"_ahead{prefetch_lines}"
        sets = accumulator_sets(isa, kind, tile)
        body = VectorKernel(isa, product, rows, tile.vectors, sets, UNROLL, prefetch_lines, alone).generate()
        if isinstance(product, ScaledProduct):
            parameters += ", ptr noalias %scales, i64 %group"
    functions.append((f"i32 @{name}({parameters})", body))
    text = _module(_width(isa), features, functions, globals)
    types = (product.a_dtype, product.b_dtype, product.c_dtype)
    return MicroKernel(name, text, features, rows, columns, product.group, *types, product.depth_step,
                       prefetch_depth, prefetch_lines, setup, teardown, phases)  # fmt: skip


def rounding(isa: InstructionSet) -> tuple[str, str]:
    """Name and LLVM module of a function that rounds a row of f32 to bf16, to the nearest and to the even one of two.

    The function is ``i32 name(ptr A, ptr B, i64 vectors)``, a vector having ``isa.lanes`` numbers.
    """
    name = f"trimtab_round_bf16_{isa.lanes}"
    signature = f"i32 @{name}({ROUNDING_PARAMETERS})"
    return name, _module(_width(isa), isa.features, [(signature, rounding_body(isa.lanes))], [])


def claiming() -> tuple[str, str]:
    """Name and LLVM module of ``i32 name(ptr A)``, which asks for the line of A, to be written, in the first cache."""
    f = Writer()
    f.prefetch("%a", level=1, written=True)
    f.do("ret i32 0")
    name = "trimtab_claim"
    return name, _module("", (), [(f"i32 @{name}(ptr %a)", f)], [])


ROUNDED_TOGETHER = (2, 4, 8, 16, 32)
"""Lanes for which there are functions that round a vector."""


def vector_rounding_name(lanes: int) -> str:
    """The function ``<lanes x i16> name(<lanes x float>)`` that rounds a vector to bf16."""
    return f"trimtab_round_bf16_x{lanes}"


def vector_rounding(has_instruction: bool) -> str:
    """LLVM module of the functions that round vectors of :data:`ROUNDED_TOGETHER` lanes of f32 to the bits of bf16.

    Args:
        has_instruction: whether the target rounds vectors to bf16 by an instruction.
    """
    functions = [
        (f"<{lanes} x i16> @{vector_rounding_name(lanes)}(<{lanes} x float> %a)", vector_body(lanes, has_instruction))
        for lanes in ROUNDED_TOGETHER
    ]
    return _module("", (), functions, [])


def transposition(isa: InstructionSet) -> tuple[str, str]:
    """Name and LLVM module of a function that transposes rows of 32-bit words into ``isa.lanes`` columns of a panel.

    The function is ``i32 name(ptr A, i64 lda, i64 rows, i64 depth, ptr B, i64 ldb)``: ``B[d, i] = A[i, d]``, strides
    and sizes in words. Columns past the last row repeat it; ``rows`` is at least 1, ``depth`` at least ``isa.lanes``.
    """
    name = f"trimtab_transpose_{isa.lanes}"
    signature = f"i32 @{name}({TRANSPOSITION_PARAMETERS})"
    return name, _module(_width(isa), isa.features, [(signature, transposition_body(isa.lanes))], [])


def fixed_point_conversion(isa: InstructionSet) -> tuple[str, str]:
    """Name and LLVM module of a function that converts a row of f32 to digits (:mod:`.fixed_point`)."""
    name = "trimtab_fixed_point_digits"
    signature = f"i32 @{name}({fixed_point.CONVERSION_PARAMETERS})"
    return name, _module(_width(isa), isa.features, [(signature, fixed_point.conversion_body())], [])


def fixed_point_kernel(isa: InstructionSet, weights: str, rows: int, columns: int, zeros: str = "") -> tuple[str, str]:
    """Name and LLVM module of the product of a tile with weights of 4 or 8 bits (:mod:`.fixed_point`).

    Args:
        isa: one with :func:`~.fixed_point.has_fixed_point`.
        weights: ``i4``, ``u4``, ``s8`` or ``u8``.
        zeros: type of the zero points, ``s8`` or ``u8``; empty for none.
    """
    name = f"trimtab_{isa.name}_fixed_{weights}_{zeros and zeros + '_'}{rows}x{columns}"
    body = fixed_point.kernel_body(isa, fixed_point.INTEGERS[weights], rows, columns // isa.lanes, zeros)
    features = tuple(dict.fromkeys((*isa.features, *isa.products["u8*s8"].features)))
    return name, _module(_width(isa), features, [(f"i32 @{name}({fixed_point.PARAMETERS})", body)], [])


def _width(isa: InstructionSet) -> str:
    return f'"prefer-vector-width"="{8 * isa.vector_bytes}"'


def _module(width: str, features: tuple[str, ...], functions: list[tuple[str, Writer]], globals: list[str]) -> str:
    declarations = sorted({line for _, body in functions for line in body.declarations})
    definitions = [body.function(signature, "#0") for signature, body in functions]
    # TVM keeps no code of a function that is not inlined.
    attributes = ["alwaysinline", "nounwind", width]
    if features:
        attributes.append(f'"target-features"="{",".join("+" + feature for feature in features)}"')
    return "\n".join([*globals, *declarations, *definitions, f"attributes #0 = {{ {' '.join(attributes)} }}", ""])
