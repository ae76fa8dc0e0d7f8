"""Scalars inside the bodies of structured ops: arithmetic that knows the element type it computes in.

MLIR's integers have no sign and its ops have one form for floats and one for integers. A :class:`Scalar` carries the
element type of the IR, so that rules write ``a * b + c`` and the right op is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch_mlir import ir
from torch_mlir.dialects import arith, math

from trimtab.ir.dtypes import DType

_SIGNED = (DType.I64, DType.I32, DType.I16, DType.I8)


def element_type(dtype: DType | None) -> Any:
    """MLIR's type of an element; None stands for ``index``, the type of sizes and places."""
    if dtype is None:
        return ir.IndexType.get()
    floats = {DType.F64: ir.F64Type, DType.F32: ir.F32Type, DType.F16: ir.F16Type, DType.BF16: ir.BF16Type}
    if dtype in floats:
        return floats[dtype].get()
    return ir.IntegerType.get_signless(1 if dtype is DType.BOOL else dtype.bits)


def work_type(dtype: DType) -> DType:
    """The type arithmetic is done in: half types compute in float32 and round once, as torch does."""
    return DType.F32 if dtype in (DType.F16, DType.BF16) else dtype


@dataclass(frozen=True)
class Scalar:
    """One element.

    Attributes:
        value: the MLIR value.
        dtype: its type in the IR; None for an index.
    """

    value: Any
    dtype: DType | None

    @property
    def is_float(self) -> bool:
        return self.dtype is not None and self.dtype.is_floating

    @property
    def is_signed(self) -> bool:
        return self.dtype is None or self.dtype in _SIGNED

    def __add__(self, other: Scalar | float) -> Scalar:
        return self._apply(other, arith.addf, arith.addi)

    def __radd__(self, other: float) -> Scalar:
        return self + other

    def __sub__(self, other: Scalar | float) -> Scalar:
        return self._apply(other, arith.subf, arith.subi)

    def __rsub__(self, other: float) -> Scalar:
        return constant(other, self.dtype) - self

    def __mul__(self, other: Scalar | float) -> Scalar:
        return self._apply(other, arith.mulf, arith.muli)

    def __rmul__(self, other: float) -> Scalar:
        return self * other

    def __truediv__(self, other: Scalar | float) -> Scalar:
        """The quotient; that of integers is rounded towards zero."""
        return self._apply(other, arith.divf, arith.divsi if self.is_signed else arith.divui)

    def __rtruediv__(self, other: float) -> Scalar:
        return constant(other, self.dtype) / self

    def __floordiv__(self, other: Scalar | float) -> Scalar:
        """The quotient of integers rounded downwards."""
        return self._apply(other, None, arith.floordivsi if self.is_signed else arith.divui)

    def __mod__(self, other: Scalar | float) -> Scalar:
        """The remainder of integers or floats, with the sign of the dividend."""
        return self._apply(other, arith.remf, arith.remsi if self.is_signed else arith.remui)

    def __neg__(self) -> Scalar:
        return Scalar(arith.negf(self.value), self.dtype) if self.is_float else 0 - self

    def __and__(self, other: Scalar) -> Scalar:
        return self._apply(other, None, arith.andi)

    def __or__(self, other: Scalar) -> Scalar:
        return self._apply(other, None, arith.ori)

    def __xor__(self, other: Scalar) -> Scalar:
        return self._apply(other, None, arith.xori)

    def __invert__(self) -> Scalar:
        return self ^ constant(True if self.dtype is DType.BOOL else -1, self.dtype)

    def __lshift__(self, other: Scalar) -> Scalar:
        return self._apply(other, None, arith.shli)

    def __rshift__(self, other: Scalar) -> Scalar:
        return self._apply(other, None, arith.shrsi if self.is_signed else arith.shrui)

    def __lt__(self, other: Scalar | float) -> Scalar:
        return self.compare("lt", other)

    def __le__(self, other: Scalar | float) -> Scalar:
        return self.compare("le", other)

    def __gt__(self, other: Scalar | float) -> Scalar:
        return self.compare("gt", other)

    def __ge__(self, other: Scalar | float) -> Scalar:
        return self.compare("ge", other)

    def equals(self, other: Scalar | float) -> Scalar:
        return self.compare("eq", other)

    def differs(self, other: Scalar | float) -> Scalar:
        """Whether the two differ; a NaN differs from everything."""
        return self.compare("ne", other)

    def compare(self, relation: str, other: Scalar | float) -> Scalar:
        """A bool; comparisons with NaN are false but for ``ne``, as in IEEE 754."""
        right = self._other(other).value
        if self.is_float:
            predicate = getattr(arith.CmpFPredicate, "UNE" if relation == "ne" else f"O{relation.upper()}")
            return Scalar(arith.cmpf(predicate, self.value, right), DType.BOOL)
        sign = "" if relation in ("eq", "ne") else "s" if self.is_signed else "u"
        predicate = getattr(arith.CmpIPredicate, relation if not sign else sign + relation)
        return Scalar(arith.cmpi(predicate, self.value, right), DType.BOOL)

    def _other(self, other: Scalar | float) -> Scalar:
        return other if isinstance(other, Scalar) else constant(other, self.dtype)

    def _apply(self, other: Scalar | float, floats: Callable[..., Any] | None, integers: Callable[..., Any]) -> Scalar:
        right = self._other(other).value
        build = floats if self.is_float else integers
        if build is None:
            raise TypeError(f"the op {integers.__name__} is for integers, and not for {self.dtype}")
        return Scalar(build(self.value, right), self.dtype)


def constant(value: float | int | bool, dtype: DType | None) -> Scalar:
    """A constant of an element type."""
    type = element_type(dtype)
    if dtype is not None and dtype.is_floating:
        return Scalar(arith.constant(type, ir.FloatAttr.get(type, float(value))), dtype)
    if dtype is DType.BOOL:
        return Scalar(arith.constant(type, ir.IntegerAttr.get(type, int(bool(value)))), dtype)
    number = int(value)
    if dtype is not None and number >= 1 << (dtype.bits - 1):
        number -= 1 << dtype.bits  # attributes hold the bits as a signed number
    return Scalar(arith.constant(type, ir.IntegerAttr.get(type, number)), dtype)


def select(condition: Scalar, then: Scalar, otherwise: Scalar | float) -> Scalar:
    """``then`` where ``condition`` holds. Both are computed."""
    other = then._other(otherwise)
    return Scalar(arith.select(condition.value, then.value, other.value), then.dtype)


def maximum(a: Scalar, b: Scalar | float) -> Scalar:
    """The larger; NaN if either is NaN."""
    return a._apply(b, arith.maximumf, arith.maxsi if a.is_signed else arith.maxui)


def minimum(a: Scalar, b: Scalar | float) -> Scalar:
    """The smaller; NaN if either is NaN."""
    return a._apply(b, arith.minimumf, arith.minsi if a.is_signed else arith.minui)


def function(name: str, *arguments: Scalar) -> Scalar:
    """A function of MLIR's math dialect, such as ``exp``, of floats."""
    build = getattr(math, name)
    return Scalar(build(*(argument.value for argument in arguments)), arguments[0].dtype)


def cast(x: Scalar, dtype: DType | None) -> Scalar:
    """``x`` converted as torch does: floats to integers towards zero, anything but 0 to true."""
    if x.dtype is dtype:
        return x
    if dtype is DType.BOOL:
        return x.differs(0)
    type, value = element_type(dtype), x.value
    if x.dtype is None or dtype is None:
        if x.is_float or (dtype is not None and dtype.is_floating):
            return cast(cast(x, DType.I64), dtype)
        return Scalar((arith.index_castui if x.dtype is DType.BOOL else arith.index_cast)(type, value), dtype)
    if x.is_float and dtype.is_floating:
        if x.dtype.bits == dtype.bits:
            return cast(cast(x, DType.F32), dtype)
        return Scalar((arith.extf if x.dtype.bits < dtype.bits else arith.truncf)(type, value), dtype)
    if x.is_float:
        return Scalar((arith.fptosi if dtype in _SIGNED else arith.fptoui)(type, value), dtype)
    if dtype.is_floating:
        return Scalar((arith.sitofp if x.is_signed else arith.uitofp)(type, value), dtype)
    own = 1 if x.dtype is DType.BOOL else x.dtype.bits
    if own == dtype.bits:
        return Scalar(value, dtype)
    if own > dtype.bits:
        return Scalar(arith.trunci(type, value), dtype)
    return Scalar((arith.extsi if x.is_signed else arith.extui)(type, value), dtype)
