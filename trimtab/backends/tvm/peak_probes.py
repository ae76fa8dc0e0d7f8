"""Loops whose speed is that of the processor's multiply units or of its memory, as LLVM text.

A multiplying loop does nothing but one instruction on accumulators that stay in registers, enough of them that the
latency of one hides behind the others; operands stay in registers too.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

KINDS = ("f32", "bf16", "int8")
"""Kinds of multiplicands; sums are kept in f32, f32 and i32."""

READ_BLOCK = 1024
"""Bytes that one iteration of the reading loop reads."""

# Every byte of every operand: 0.75 as f32 and bf16, 63 as int8; neither zeros nor denormal numbers, which some
# processors multiply faster or slower than others.
_FILL = 63


def _bytes_constant(*values: int) -> str:
    text = "".join(f"\\{value:02X}" for value in values)
    return f'private constant [{len(values)} x i8] c"{text}", align 64'


# Palette 1: eight tiles of 16 rows of 64 bytes.
_TILE_SETUP = f"""\
@tile_config = {_bytes_constant(1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[16] * 8, *[0] * 8)}
@tile_row = {_bytes_constant(*[_FILL] * 64)}
declare void @llvm.x86.ldtilecfg(ptr)
declare void @llvm.x86.tilezero(i8 immarg)
declare void @llvm.x86.tileloadd64(i8 immarg, ptr, i64)
declare void @llvm.x86.tilerelease()"""


@dataclass(frozen=True)
class Instruction:
    """A multiply-accumulate instruction.

    Attributes:
        kind: the multiplicands, one of :data:`KINDS`.
        name: mnemonic and, for vectors, their width in bits.
        features: CPU features it needs, in LLVM's names.
        accumulator: LLVM type of the sums.
        operand: LLVM type of the multiplicands.
        function: the LLVM intrinsic; empty for a matrix instruction, see ``tile``.
        macs: multiply-accumulates per instruction.
        accumulators: independent sums per loop; what fits the registers beside two operands.
        tile: a matrix instruction of AMX.
    """

    kind: str
    name: str
    features: tuple[str, ...]
    accumulator: str
    operand: str
    function: str
    macs: int
    accumulators: int = 12
    tile: bool = False

    @property
    def macs_per_iteration(self) -> int:
        return self.macs * self.accumulators


_AMX = ("amx-tile",)
INSTRUCTIONS = (
    Instruction("f32", "vfmadd 512", ("avx512f",), "<16 x float>", "<16 x float>", "llvm.fma.v16f32", 16, 24),
    Instruction("f32", "vfmadd 256", ("avx2", "fma"), "<8 x float>", "<8 x float>", "llvm.fma.v8f32", 8),
    Instruction("f32", "fmla 128", ("neon",), "<4 x float>", "<4 x float>", "llvm.fma.v4f32", 4, 24),
    Instruction("bf16", "tdpbf16ps", (*_AMX, "amx-bf16"), "", "", "llvm.x86.tdpbf16ps", 16 * 16 * 32, 4, True),
    Instruction("bf16", "vdpbf16ps 512", ("avx512f", "avx512bf16"), "<16 x float>", "<32 x bfloat>",
                "llvm.x86.avx512bf16.dpbf16ps.512", 32, 24),
    Instruction("bf16", "bfmmla 128", ("neon", "bf16"), "<4 x float>", "<8 x bfloat>", "llvm.aarch64.neon.bfmmla",
                16, 24),
    Instruction("int8", "tdpbusd", (*_AMX, "amx-int8"), "", "", "llvm.x86.tdpbusd", 16 * 16 * 64, 4, True),
    Instruction("int8", "vpdpbusd 512", ("avx512f", "avx512vnni"), "<16 x i32>", "<64 x i8>",
                "llvm.x86.avx512.vpdpbusd.512", 64, 24),
    Instruction("int8", "vpdpbusd 256", ("avx2", "avxvnni"), "<8 x i32>", "<32 x i8>",
                "llvm.x86.avx512.vpdpbusd.256", 32),
    Instruction("int8", "smmla 128", ("neon", "i8mm"), "<4 x i32>", "<16 x i8>",
                "llvm.aarch64.neon.smmla.v4i32.v16i8", 32, 24),
    Instruction("int8", "sdot 128", ("neon", "dotprod"), "<4 x i32>", "<16 x i8>",
                "llvm.aarch64.neon.sdot.v4i32.v16i8", 16, 24),
)  # fmt: skip
"""The instructions with a probe."""


def usable_instructions(features: Collection[str]) -> list[Instruction]:
    """The instructions that a processor with ``features`` has."""
    return [each for each in INSTRUCTIONS if set(each.features) <= set(features)]


def loop_text(instruction: Instruction) -> str:
    """An LLVM module with the function ``void loop(i64 unused, i64 iterations)``, which repeats an instruction."""
    return _tile_loop(instruction) if instruction.tile else _vector_loop(instruction)


def _vector_loop(instruction: Instruction) -> str:
    sums, operand, count = instruction.accumulator, instruction.operand, instruction.accumulators
    is_fma = instruction.function.startswith("llvm.fma")
    signature = [operand, operand, sums] if is_fma else [sums, operand, operand]
    # Volatile: the compiler must not know the operands, nor drop a sum.
    lines = [
        f"declare {sums} @{instruction.function}({', '.join(signature)})",
        "define void @loop(i64 %address, i64 %n) {",
        "entry:",
        "  %operands = alloca [64 x i8], align 64",
        f"  %kept = alloca {sums}, align 64",
        f"  store volatile [64 x i8] [{', '.join([f'i8 {_FILL}'] * 64)}], ptr %operands, align 64",
        f"  %a = load volatile {operand}, ptr %operands, align 64",
        f"  %b = load volatile {operand}, ptr %operands, align 64",
        "  br label %loop",
        "loop:",
        "  %i = phi i64 [0, %entry], [%next, %loop]",
    ]
    lines += [f"  %s{j} = phi {sums} [zeroinitializer, %entry], [%t{j}, %loop]" for j in range(count)]
    for j in range(count):
        names = ["%a", "%b", f"%s{j}"] if is_fma else [f"%s{j}", "%a", "%b"]
        given = ", ".join(f"{type} {name}" for type, name in zip(signature, names, strict=True))
        lines.append(f"  %t{j} = call {sums} @{instruction.function}({given})")
    lines += _loop_end()
    lines += [f"  store volatile {sums} %t{j}, ptr %kept, align 64" for j in range(count)]
    return "\n".join([*lines, "  ret void", "}"])


def _tile_loop(instruction: Instruction) -> str:
    """Tiles 0 to 3 are sums of the products of tiles 4 and 5 with 6 and 7."""
    call = f"  call void @{instruction.function}(i8 "
    lines = [
        _TILE_SETUP,
        f"declare void @{instruction.function}(i8 immarg, i8 immarg, i8 immarg)",
        "define void @loop(i64 %address, i64 %n) {",
        "entry:",
        "  call void @llvm.x86.ldtilecfg(ptr @tile_config)",
        *(f"  call void @llvm.x86.tilezero(i8 {tile})" for tile in range(4)),
        *(f"  call void @llvm.x86.tileloadd64(i8 {tile}, ptr @tile_row, i64 0)" for tile in range(4, 8)),
        "  br label %loop",
        "loop:",
        "  %i = phi i64 [0, %entry], [%next, %loop]",
        *(f"{call}{tile}, i8 {4 + tile // 2}, i8 {6 + tile % 2})" for tile in range(4)),
        *_loop_end(),
        "  call void @llvm.x86.tilerelease()",
        "  ret void",
        "}",
    ]
    return "\n".join(lines)


def read_text(width: int) -> str:
    """An LLVM module with the function ``void loop(i64 address, i64 blocks)``, which reads memory.

    Vector loads of ``width`` bytes, :data:`READ_BLOCK` bytes an iteration, xored into eight sums.
    """
    vector = f"<{width // 8} x i64>"
    loads = READ_BLOCK // width
    lines = [
        "define void @loop(i64 %address, i64 %n) {",
        "entry:",
        f"  %kept = alloca {vector}, align 64",
        "  %data = inttoptr i64 %address to ptr",
        "  br label %loop",
        "loop:",
        "  %i = phi i64 [0, %entry], [%next, %loop]",
    ]
    lines += [f"  %s0_{j} = phi {vector} [zeroinitializer, %entry], [%s{loads // 8}_{j}, %loop]" for j in range(8)]
    lines += [f"  %offset = mul i64 %i, {READ_BLOCK}", "  %block = getelementptr i8, ptr %data, i64 %offset"]
    for k in range(loads):
        step, j = divmod(k, 8)
        lines += [
            f"  %p{k} = getelementptr i8, ptr %block, i64 {k * width}",
            f"  %x{k} = load {vector}, ptr %p{k}, align {width}",
            f"  %s{step + 1}_{j} = xor {vector} %s{step}_{j}, %x{k}",
        ]
    lines += _loop_end()
    last = loads // 8
    lines += [f"  %all1 = xor {vector} %s{last}_0, %s{last}_1"]
    lines += [f"  %all{j} = xor {vector} %all{j - 1}, %s{last}_{j}" for j in range(2, 8)]
    return "\n".join([*lines, f"  store volatile {vector} %all7, ptr %kept, align 64", "  ret void", "}"])


def _loop_end() -> list[str]:
    return [
        "  %next = add i64 %i, 1",
        "  %done = icmp eq i64 %next, %n",
        "  br i1 %done, label %exit, label %loop",
        "exit:",
    ]
