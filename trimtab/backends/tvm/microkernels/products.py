"""How one step along the depth is multiplied and added: by kind of data and by what the instruction set offers.

A step covers ``group`` consecutive k.  Its part of a row of A is spread over a whole register (every lane sees the
same k), its part of a vector of B columns is one register, and a multiply-add takes both into an accumulator with one
lane per column.  Some products need more than one register for either (``parts``), because they widen on the way;
matrix instructions take several rows at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.backends.tvm.microkernels.llvm_text import Writer

BITS = {"f32": 32, "f16": 16, "bf16": 16, "u8": 8, "s8": 8, "i4": 4, "u4": 4}
_TYPES = {"f32": "float", "f16": "half", "bf16": "i16", "u8": "i8", "s8": "i8"}


@dataclass(frozen=True)
class Product:
    """Base of the products on vector registers.

    Attributes:
        a_dtype: element type of A.
        b_dtype: element type of B.
        c_dtype: ``f32`` or ``i32``.
        group: consecutive k in a step, interleaved in B.
        features: CPU features beyond those of the instruction set.
        parts: registers for a step's part of a row of A, and of a vector of B.
        temporaries: registers besides those and the accumulators.
        rows_at_once: rows of A in a register, and so of an accumulator, which has ``lanes / rows_at_once`` columns.
        chains: independent accumulators that keep the units busy, where it is not the number of the instruction set.
    """

    a_dtype: str
    b_dtype: str
    c_dtype: str
    group: int = 1
    features: tuple[str, ...] = ()
    parts: int = 1
    temporaries: int = 0
    rows_at_once: int = 1
    chains: int = 0

    @property
    def a_bytes(self) -> int:
        """Bytes of A per row and step."""
        return self.group * BITS[self.a_dtype] // 8

    @property
    def b_bytes(self) -> int:
        """Bytes of B per column and step."""
        return self.group * BITS[self.b_dtype] // 8

    @property
    def depth_step(self) -> int:
        return self.group

    def load_a(self, f: Writer, lanes: int, *rows: str) -> list[str]:
        """The parts of A for one step, from the places of ``rows_at_once`` rows in memory."""
        raise NotImplementedError

    def load_b(self, f: Writer, lanes: int, pointer: str) -> list[str]:
        """The parts of B for one step and the columns of an accumulator."""
        raise NotImplementedError

    def multiply_add(self, f: Writer, lanes: int, accumulator: str, a: str, b: str) -> str:
        """The accumulator with the product of a part of A and the same part of B added."""
        raise NotImplementedError


@dataclass(frozen=True)
class FloatProduct(Product):
    """Converts A and B to f32 where they are not, and multiplies and adds in f32.

    Attributes:
        converts_half: whether the instruction set converts f16 to f32; else it is done in integer arithmetic.
    """

    converts_half: bool = True

    def load_a(self, f: Writer, lanes: int, *rows: str) -> list[str]:
        value = f.load(_TYPES[self.a_dtype], rows[0], 1)
        if self.a_dtype == "bf16":
            bits = f.let(f"shl i32 {f.let(f'zext i16 {value} to i32')}, 16")
            value = f.let(f"bitcast i32 {bits} to float")
        return [f.splat(lanes, "float", value)]

    def load_b(self, f: Writer, lanes: int, pointer: str) -> list[str]:
        if self.b_dtype == "f32":
            return [f.load(f"<{lanes} x float>", pointer, 1)]
        if self.b_dtype == "f16" and self.converts_half:
            half = f.load(f"<{lanes} x half>", pointer, 1)
            return [f.let(f"fpext <{lanes} x half> {half} to <{lanes} x float>")]
        bits, real = f"<{lanes} x i32>", f"<{lanes} x float>"
        narrow = f.load(f"<{lanes} x i16>", pointer, 1)
        wide = f.let(f"zext <{lanes} x i16> {narrow} to {bits}")
        if self.b_dtype == "bf16":
            return [f.let(f"bitcast {bits} {f.let(f'shl {bits} {wide}, splat (i32 16)')} to {real}")]
        return [_half_to_float(f, bits, real, wide)]

    def multiply_add(self, f: Writer, lanes: int, accumulator: str, a: str, b: str) -> str:
        real = f"<{lanes} x float>"
        return f.call(real, f"llvm.fmuladd.v{lanes}f32", (real, a), (real, b), (real, accumulator))


def _half_to_float(f: Writer, bits: str, real: str, half: str) -> str:
    """f16 in the low bits of each lane to f32: an exact multiplication moves the exponent, and normalizes too."""
    magnitude = f.let(f"and {bits} {half}, splat (i32 32767)")
    shifted = f.let(f"bitcast {bits} {f.let(f'shl {bits} {magnitude}, splat (i32 13)')} to {real}")
    scaled = f.let(f"fmul {real} {shifted}, splat (float 0x46F0000000000000)")  # 2 ** 112
    value = f.let(f"bitcast {real} {scaled} to {bits}")
    special = f.let(f"icmp uge {bits} {magnitude}, splat (i32 31744)")
    lanes = bits.split(" ")[0].removeprefix("<")
    infinite = f.let(f"or {bits} {value}, splat (i32 2139095040)")
    value = f.let(f"select <{lanes} x i1> {special}, {bits} {infinite}, {bits} {value}")
    sign = f.let(f"shl {bits} {f.let(f'and {bits} {half}, splat (i32 32768)')}, splat (i32 16)")
    return f.let(f"bitcast {bits} {f.let(f'or {bits} {value}, {sign}')} to {real}")


@dataclass(frozen=True)
class ScaledProduct(Product):
    """f32 times integers of which a group of consecutive k of a column shares a scale.

    The products of a group are added up before they are multiplied by the scale.

    Attributes:
        signed: whether the integers are.
    """

    signed: bool = True

    def load_a(self, f: Writer, lanes: int, *rows: str) -> list[str]:
        return [f.splat(lanes, "float", f.load("float", f.offset(rows[0], 4 * k), 1)) for k in range(self.group)]

    def load_b(self, f: Writer, lanes: int, pointer: str) -> list[str]:
        return [f.integers(lanes, pointer, self.signed)]

    def multiply_add(self, f: Writer, lanes: int, accumulator: str, a: str, b: str) -> str:
        real = f"<{lanes} x float>"
        return f.call(real, f"llvm.fmuladd.v{lanes}f32", (real, a), (real, b), (real, accumulator))


@dataclass(frozen=True)
class NibbleProduct(ScaledProduct):
    """4-bit weights: two k in a byte of B, the even one in the low half.

    Attributes:
        permutation: an instruction that picks lanes of a register by the low four bits of its indices. It turns a
            weight into f32 by a table of all sixteen, where otherwise shifts and a conversion are needed.
    """

    permutation: str = ""

    def load_b(self, f: Writer, lanes: int, pointer: str) -> list[str]:
        bits, real = f"<{lanes} x i32>", f"<{lanes} x float>"
        extend = "sext" if self.signed else "zext"
        pairs = f.let(f"{extend} <{lanes} x i8> {f.load(f'<{lanes} x i8>', pointer, 1)} to {bits}")
        if self.permutation:
            table = "<" + ", ".join(f"float {n - 16 if self.signed and n > 7 else n}.0" for n in range(16)) + ">"
            indices = (pairs, f.let(f"lshr {bits} {pairs}, splat (i32 4)"))
            return [f.call(real, self.permutation, (real, table), (bits, index)) for index in indices]
        if self.signed:
            even = f.let(f"ashr {bits} {f.let(f'shl {bits} {pairs}, splat (i32 28)')}, splat (i32 28)")
            odd = f.let(f"ashr {bits} {pairs}, splat (i32 4)")
        else:
            even = f.let(f"and {bits} {pairs}, splat (i32 15)")
            odd = f.let(f"lshr {bits} {pairs}, splat (i32 4)")
        return [f.let(f"sitofp {bits} {value} to {real}") for value in (even, odd)]


@dataclass(frozen=True)
class DotProduct(Product):
    """One instruction that multiplies ``group`` neighbours of each 32-bit lane and adds all to the lane.

    Attributes:
        intrinsic: name of the instruction; its operands after the accumulator are A and B.
        operand: type of a register of A or B as the intrinsic wants it.
        swapped: the operands are B and A.
        toggles_b: the instruction wants B unsigned. Toggling the sign bits adds 128 to each value of B, so 128 times
            the sum of the row of A is to be subtracted, which is exact in wrapping arithmetic.
    """

    intrinsic: str = ""
    operand: str = ""
    swapped: bool = False
    toggles_b: bool = False

    def load_a(self, f: Writer, lanes: int, *rows: str) -> list[str]:
        spread = f.splat(lanes, "i32", f.load("i32", rows[0], 1))
        return [f.let(f"bitcast <{lanes} x i32> {spread} to {self.operand}")]

    def load_b(self, f: Writer, lanes: int, pointer: str) -> list[str]:
        if not self.toggles_b:
            return [f.load(self.operand, pointer, 1)]
        value = f.load(f"<{lanes * 4} x i8>", pointer, 1)
        return [f.let(f"xor {self.operand} {value}, splat (i8 -128)")]

    def multiply_add(self, f: Writer, lanes: int, accumulator: str, a: str, b: str) -> str:
        result = f"<{lanes} x {'float' if self.c_dtype == 'f32' else 'i32'}>"
        first, second = (b, a) if self.swapped else (a, b)
        return f.call(result, self.intrinsic, (result, accumulator), (self.operand, first), (self.operand, second))


@dataclass(frozen=True)
class PairProduct(Product):
    """8-bit integers widened to 16 bits and multiplied by ``pmaddwd``, which adds neighbours in 32 bits.

    A 32-bit lane holds four k. Shifts leave the even ones and the odd ones as two 16-bit numbers each, so that both
    parts end in the lane of their column. (``pmaddubsw`` would add neighbours in 16 bits and saturate.)
    """

    intrinsic: str = ""

    def load_a(self, f: Writer, lanes: int, *rows: str) -> list[str]:
        return self._widen(f, lanes, f.splat(lanes, "i32", f.load("i32", rows[0], 1)), self.a_dtype == "s8")

    def load_b(self, f: Writer, lanes: int, pointer: str) -> list[str]:
        return self._widen(f, lanes, f.load(f"<{lanes} x i32>", pointer, 1), self.b_dtype == "s8")

    def _widen(self, f: Writer, lanes: int, value: str, signed: bool) -> list[str]:
        halves = f"<{2 * lanes} x i16>"
        both = f.let(f"bitcast <{lanes} x i32> {value} to {halves}")
        shift = "ashr" if signed else "lshr"
        even = f.let(f"{shift} {halves} {f.let(f'shl {halves} {both}, splat (i16 8)')}, splat (i16 8)")
        return [even, f.let(f"{shift} {halves} {both}, splat (i16 8)")]

    def multiply_add(self, f: Writer, lanes: int, accumulator: str, a: str, b: str) -> str:
        words, halves = f"<{lanes} x i32>", f"<{2 * lanes} x i16>"
        return f.let(f"add {words} {accumulator}, {f.call(words, self.intrinsic, (halves, a), (halves, b))}")


@dataclass(frozen=True)
class WidenedProduct(Product):
    """8-bit integers widened to 32 bits by way of 16, in a form that LLVM finds widening multiply-adds for."""

    def load_a(self, f: Writer, lanes: int, *rows: str) -> list[str]:
        value = f.let(f"{'sext' if self.a_dtype == 's8' else 'zext'} i8 {f.load('i8', rows[0], 1)} to i16")
        spread = f.splat(lanes, "i16", value)
        return [f.let(f"sext <{lanes} x i16> {spread} to <{lanes} x i32>")]

    def load_b(self, f: Writer, lanes: int, pointer: str) -> list[str]:
        widen = "sext" if self.b_dtype == "s8" else "zext"
        half = f.let(f"{widen} <{lanes} x i8> {f.load(f'<{lanes} x i8>', pointer, 1)} to <{lanes} x i16>")
        return [f.let(f"sext <{lanes} x i16> {half} to <{lanes} x i32>")]

    def multiply_add(self, f: Writer, lanes: int, accumulator: str, a: str, b: str) -> str:
        words = f"<{lanes} x i32>"
        return f.let(f"add {words} {accumulator}, {f.let(f'mul {words} {a}, {b}')}")


@dataclass(frozen=True)
class MatrixProduct(Product):
    """One instruction that multiplies two rows of A by two columns of B over eight k: ``smmla`` and ``usmmla``.

    An accumulator is 2 x 2, row after row. A row without a partner is taken twice.

    Attributes:
        intrinsic: name of the instruction; its operands after the accumulator are A and B.
    """

    intrinsic: str = ""

    def load_a(self, f: Writer, lanes: int, *rows: str) -> list[str]:
        pair = "poison"
        for lane, row in enumerate(rows):
            pair = f.let(f"insertelement <2 x i64> {pair}, i64 {f.load('i64', row, 1)}, i64 {lane}")
        return [f.let(f"bitcast <2 x i64> {pair} to <16 x i8>")]

    def load_b(self, f: Writer, lanes: int, pointer: str) -> list[str]:
        return [f.load("<16 x i8>", pointer, 1)]

    def multiply_add(self, f: Writer, lanes: int, accumulator: str, a: str, b: str) -> str:
        return f.call("<4 x i32>", self.intrinsic, ("<4 x i32>", accumulator), ("<16 x i8>", a), ("<16 x i8>", b))
