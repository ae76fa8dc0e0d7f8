"""Products of f32 with weights of 4 and 8 bits by instructions that multiply bytes.

Widening weights to f32 takes several instructions for a register of results, and reading them from memory less time
than that.  So the other factor is converted instead, once for all columns: in each group of k that shares scales, x is
an integer of 24 bits times a factor, ``x = s * (65536 d0 + 256 d1 + d2)``, with digits of -128 to 127.  The sums of
digits times weights are exact in 32 bits.  The error of x is at most 2^-23 of the largest one of its group, which is of
the size of the rounding errors of a sum in f32.  A group with an infinity or NaN becomes NaN as a whole.

This is block floating point, in which J. H. Wilkinson analysed the first computers ("Rounding Errors in Algebraic
Processes", 1963), and one number as several digits for narrow multipliers, as in S. Markidis et al., "NVIDIA Tensor
Core Programmability, Performance & Precision", 2018.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.backends.tvm.microkernels.isa import InstructionSet
from trimtab.backends.tvm.microkernels.llvm_text import LINE_BYTES, Writer
from trimtab.backends.tvm.microkernels.products import DotProduct

DIGITS = 3
BLOCK = 16
"""k that are converted together; groups are multiples of it."""
QUAD = 4
SUM_WORDS = DIGITS + 1
"""Words that the conversion writes for a group: the sums of its digits, and its factor."""
AHEAD_BYTES = 4096
"""How far ahead of where it reads weights a kernel asks for lines, as long as memory takes: measured."""
_LARGEST = "0x415E848000000000"  # 8,000,000: what is left of 24 bits when the digits below the first are rounded up
_SMALLEST = "0x39B4484C00000000"  # about 1e-30: its quotient is finite
_REGISTERS = 32
CONVERSION_PARAMETERS = "ptr noalias %a, ptr noalias %digits, ptr noalias %sums, i64 %groups, i64 %group"
PARAMETERS = (
    "ptr noalias %digits, i64 %row, ptr noalias %sums, i64 %sum_row, ptr noalias %b, ptr noalias %c, i64 %ldc, "
    "i64 %groups, i64 %group, ptr noalias %scales, ptr noalias %zeros"
)


@dataclass(frozen=True)
class Integers:
    """Weights as they are stored.

    Attributes:
        bits: 4 or 8.
        signed: whether they are signed.
    """

    bits: int
    signed: bool

    @property
    def offset(self) -> int:
        """What is to be added to a weight to have it unsigned: toggling its highest bit does that."""
        return (1 << (self.bits - 1)) if self.signed else 0


INTEGERS = {"i4": Integers(4, True), "u4": Integers(4, False), "s8": Integers(8, True), "u8": Integers(8, False)}


def has_fixed_point(isa: InstructionSet) -> bool:
    """Whether the instruction set has the product, and the registers to keep three sums for each result."""
    product = isa.products.get("u8*s8")
    plain = isinstance(product, DotProduct) and not product.toggles_b and not product.swapped
    return plain and isa.registers >= _REGISTERS


def most_fixed_point_rows(vectors: int) -> int:
    """Rows of a tile whose sums fit the registers."""
    return (_REGISTERS - 2 * vectors - 2) // ((DIGITS + 1) * vectors)


def conversion_body() -> Writer:
    """The body of ``i32 f(CONVERSION_PARAMETERS)``, which turns ``groups * group`` f32 into digits.

    Digits are bytes [depth / 16, 3, 16], the first digits first; sums are words [groups, 4]: the sums of the digits of
    a group as i32, then the factor as f32.
    """
    f = Writer()
    real, whole, narrow = f"<{BLOCK} x float>", f"<{BLOCK} x i32>", f"<{BLOCK} x i8>"
    blocks = f.let(f"sdiv exact i64 %group, {BLOCK}")

    def group(values: list[str]) -> list[str]:
        a, digits, sums = values

        def measure(values: list[str]) -> list[str]:
            a, largest, spoilt = values
            x = f.load(real, a, 4)
            size = f.call(real, f"llvm.fabs.v{BLOCK}f32", (real, x))
            larger = f.let(f"fcmp ogt {real} {size}, {largest}")
            largest = f.let(f"select <{BLOCK} x i1> {larger}, {real} {size}, {real} {largest}")
            # 0 for every number but infinities and NaN.
            nothing = f.let(f"fmul {real} {x}, zeroinitializer")
            return [f.offset(a, 4 * BLOCK), largest, f.let(f"fadd {real} {spoilt}, {nothing}")]

        start = [("ptr", a), (real, f"splat (float {_SMALLEST})"), (real, "zeroinitializer")]
        _, size, spoilt = f.loop(blocks, start, measure)
        most = f.call("float", f"llvm.vector.reduce.fmax.v{BLOCK}f32", (real, size))
        ratio = f.splat(BLOCK, "float", f.let(f"fdiv float {_LARGEST}, {most}"))
        zero = f.call("float", f"llvm.vector.reduce.fadd.v{BLOCK}f32", ("float", "0.0"), (real, spoilt))

        def convert(values: list[str]) -> list[str]:
            a, digits, *totals = values
            x = f.let(f"fmul {real} {f.load(real, a, 4)}, {ratio}")
            rest = f.call(whole, f"llvm.fptosi.sat.v{BLOCK}i32.v{BLOCK}f32",
                          (real, f.call(real, f"llvm.rint.v{BLOCK}f32", (real, x))))  # fmt: skip
            for place in reversed(range(DIGITS)):
                digit = f.let(f"ashr {whole} {f.let(f'shl {whole} {rest}, splat (i32 24)')}, splat (i32 24)")
                totals[place] = f.let(f"add {whole} {totals[place]}, {digit}")
                f.store(narrow, f.let(f"trunc {whole} {digit} to {narrow}"), f.offset(digits, place * BLOCK), 1)
                rest = f.let(f"ashr {whole} {f.let(f'sub {whole} {rest}, {digit}')}, splat (i32 8)")
            return [f.offset(a, 4 * BLOCK), f.offset(digits, DIGITS * BLOCK), *totals]

        start = [("ptr", a), ("ptr", digits), *[(whole, "zeroinitializer")] * DIGITS]
        a, digits, *totals = f.loop(blocks, start, convert)
        for place, total in enumerate(totals):
            f.store("i32", f.call("i32", f"llvm.vector.reduce.add.v{BLOCK}i32", (whole, total)),
                    f.offset(sums, 4 * place), 4)  # fmt: skip
        factor = f.let(f"fadd float {f.let(f'fdiv float {most}, {_LARGEST}')}, {zero}")
        f.store("float", factor, f.offset(sums, 4 * DIGITS), 4)
        return [a, digits, f.offset(sums, 4 * SUM_WORDS)]

    f.loop("%groups", [("ptr", "%a"), ("ptr", "%digits"), ("ptr", "%sums")], group)
    f.do("ret i32 0")
    return f


def kernel_body(isa: InstructionSet, integers: Integers, rows: int, vectors: int, zeros: str) -> Writer:
    """The body of ``i32 f(PARAMETERS)``: a tile of the product from converted rows and a panel of weights.

    Rows of digits lie ``row`` bytes apart, those of sums ``sum_row`` bytes. The panel is ``[depth / 4, columns, 4]``
    bytes, or for 4 bits ``[depth / 8, columns, 4]`` with k and k + 4 in the halves of a byte. C is f32, ``ldc``
    elements from row to row, and is overwritten. Scales are f32 ``[groups, columns]``, zero points bytes of that shape.

    Args:
        zeros: type of the zero points, ``s8`` or ``u8``; empty for none.
    """
    f, lanes = Writer(), isa.lanes
    product = isa.products["u8*s8"]
    assert isinstance(product, DotProduct)
    real, whole, bytes = f"<{lanes} x float>", f"<{lanes} x i32>", product.operand
    columns = vectors * lanes
    per_load = 8 if integers.bits == 4 else QUAD
    digit_rows = [f.offset("%digits", f.let(f"mul i64 %row, {r}") if r else 0) for r in range(rows)]
    sum_rows = [f.offset("%sums", f.let(f"mul i64 %sum_row, {r}") if r else 0) for r in range(rows)]
    blocks = f.let(f"sdiv exact i64 %group, {BLOCK}")

    def centres(zero: str) -> list[str]:
        """What is to be subtracted from the unsigned weights of each vector, negated."""
        found = []
        for v in range(vectors):
            narrow = f.load(f"<{lanes} x i8>", f.offset(zero, v * lanes), 1)
            wide = f.let(f"{'sext' if zeros == 's8' else 'zext'} <{lanes} x i8> {narrow} to {whole}")
            found.append(f.let(f"sub {whole} splat (i32 {-integers.offset}), {wide}"))
        return found

    def unsigned(pointer: str) -> list[str]:
        """The weights of consecutive quads of k."""
        word = f.load(bytes, pointer, 1)
        if integers.bits == 8:
            return [f.let(f"xor {bytes} {word}, splat (i8 -128)") if integers.signed else word]
        pairs = f"<{lanes * 2} x i16>"
        high = f.let(f"lshr {pairs} {f.let(f'bitcast {bytes} {word} to {pairs}')}, splat (i16 4)")
        halves = [f.let(f"and {bytes} {half}, splat (i8 15)") for half in
                  (word, f.let(f"bitcast {pairs} {high} to {bytes}"))]  # fmt: skip
        return [f.let(f"xor {bytes} {half}, splat (i8 8)") for half in halves] if integers.signed else halves

    def block(values: list[str]) -> list[str]:
        place, b, *sums = values
        size = columns * QUAD
        for load in range(BLOCK // per_load):
            for line in range(0, size, LINE_BYTES):
                f.prefetch(f.offset(b, AHEAD_BYTES + load * size + line), level=1)
            parts = [unsigned(f.offset(b, load * size + v * lanes * QUAD)) for v in range(vectors)]
            for quad in range(per_load // QUAD):
                at = (load * per_load // QUAD + quad) * QUAD
                for r in range(rows):
                    for digit in range(DIGITS):
                        word = f.load("i32", f.offset(f.offset(digit_rows[r], place), digit * BLOCK + at), 1)
                        spread = f.let(f"bitcast {whole} {f.splat(lanes, 'i32', word)} to {bytes}")
                        for v in range(vectors):
                            n = (r * vectors + v) * DIGITS + digit
                            sums[n] = f.call(whole, product.intrinsic, (whole, sums[n]), (bytes, parts[v][quad]),
                                             (bytes, spread))  # fmt: skip
        return [f.let(f"add i64 {place}, {DIGITS * BLOCK}"), f.offset(b, BLOCK // per_load * size), *sums]

    def group(values: list[str]) -> list[str]:
        place, b, sum_place, scales, zero, *totals = values
        negated = centres(zero) if zeros else []
        for line in range(0, columns * 4, LINE_BYTES):
            f.prefetch(f.offset(scales, AHEAD_BYTES // 4 + line), level=1)
        start: list[str] = []
        for r in range(rows):
            held = [f.load("i32", f.offset(f.offset(sum_rows[r], sum_place), 4 * digit), 4) for digit in range(DIGITS)]
            for v in range(vectors):
                for total in held:
                    if zeros:
                        start.append(f.let(f"mul {whole} {negated[v]}, {f.splat(lanes, 'i32', total)}"))
                    elif integers.offset:
                        start.append(f.splat(lanes, "i32", f.let(f"mul i32 {total}, {-integers.offset}")))
                    else:
                        start.append("zeroinitializer")
        place, b, *sums = f.loop(blocks, [("i64", place), ("ptr", b), *((whole, value) for value in start)], block)
        for r in range(rows):
            factor = f.load("float", f.offset(f.offset(sum_rows[r], sum_place), 4 * DIGITS), 4)
            for v in range(vectors):
                n = r * vectors + v
                value = ""
                for sum in sums[n * DIGITS : (n + 1) * DIGITS]:
                    digit = f.let(f"sitofp {whole} {sum} to {real}")
                    value = digit if not value else f.call(
                        real, f"llvm.fmuladd.v{lanes}f32", (real, value), (real, "splat (float 256.0)"), (real, digit)
                    )  # fmt: skip
                scale = f.load(real, f.offset(scales, v * lanes * 4), 4)
                scale = f.let(f"fmul {real} {scale}, {f.splat(lanes, 'float', factor)}")
                totals[n] = f.call(
                    real, f"llvm.fmuladd.v{lanes}f32", (real, value), (real, scale), (real, totals[n])
                )  # fmt: skip
        return [place, b, f.let(f"add i64 {sum_place}, {4 * SUM_WORDS}"), f.offset(scales, columns * 4),
                f.offset(zero, columns), *totals]  # fmt: skip

    state = [("i64", "0"), ("ptr", "%b"), ("i64", "0"), ("ptr", "%scales"), ("ptr", "%zeros")]
    _, _, _, _, _, *totals = f.loop("%groups", [*state, *[(real, "zeroinitializer")] * (rows * vectors)], group)
    stride = f.let("mul i64 %ldc, 4")
    for r in range(rows):
        c = f.offset("%c", f.let(f"mul i64 {stride}, {r}") if r else 0)
        for v in range(vectors):
            f.store(real, totals[r * vectors + v], f.offset(c, v * lanes * 4), 4)
    f.do("ret i32 0")
    return f
