"""Elementwise ops of two operands, which broadcast as in numpy.

Operands have one dtype; frontends insert casts where a source language promotes.  Comparisons and logic give bool.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from trimtab.errors import VerificationError
from trimtab.ir.core import Value
from trimtab.ir.op import Op


class _Binary(Op):
    elementwise: ClassVar[bool] = True
    x: Value
    y: Value

    def verify(self) -> None:
        if self.x.type.dtype is not self.y.type.dtype:
            raise VerificationError(
                f"{self.name} has operands of two dtypes",
                values={"x": self.x.type, "y": self.y.type},
                rule="operands of an elementwise op share one dtype",
                fix="insert a cast",
                location=self.location,
            )


class _Commutative(_Binary):
    commutative: ClassVar[bool] = True


class Add(_Commutative):
    """``x + y``; logical or for bool."""

    @staticmethod
    def reference(x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Sub(_Binary):
    """``x - y``."""

    @staticmethod
    def reference(x: Tensor, y: Tensor) -> Tensor:
        return x - y


class Mul(_Commutative):
    """``x * y``; logical and for bool."""

    @staticmethod
    def reference(x: Tensor, y: Tensor) -> Tensor:
        return x * y


class Div(_Binary):
    """``x / y``. ``rounding`` "trunc" rounds the quotient towards zero and "floor" downwards; integers need one."""

    rounding: Literal["none", "trunc", "floor"] = "none"

    @staticmethod
    def reference(x: Tensor, y: Tensor, *, rounding: str) -> Tensor:
        return torch.div(x, y, rounding_mode=None if rounding == "none" else rounding)

    def verify(self) -> None:
        super().verify()
        if self.rounding == "none" and not self.x.type.dtype.is_floating:
            raise VerificationError(
                "div of integers without rounding",
                values={"x": self.x.type},
                rule="true division is for floating types",
                fix='cast the operands, or set rounding to "trunc" or "floor"',
                location=self.location,
            )


class Pow(_Binary):
    """``x^y``."""

    @staticmethod
    def reference(x: Tensor, y: Tensor) -> Tensor:
        return torch.pow(x, y)


class Remainder(_Binary):
    """``x - floor(x / y) * y``: the sign of y."""

    @staticmethod
    def reference(x: Tensor, y: Tensor) -> Tensor:
        return torch.remainder(x, y)


class Fmod(_Binary):
    """``x - trunc(x / y) * y``: the sign of x."""

    @staticmethod
    def reference(x: Tensor, y: Tensor) -> Tensor:
        return torch.fmod(x, y)


class Maximum(_Commutative):
    """The larger; NaN if either is NaN."""

    @staticmethod
    def reference(x: Tensor, y: Tensor) -> Tensor:
        return torch.maximum(x, y)


class Minimum(_Commutative):
    """The smaller; NaN if either is NaN."""

    @staticmethod
    def reference(x: Tensor, y: Tensor) -> Tensor:
        return torch.minimum(x, y)


class Atan2(_Binary):
    """Angle of the point (y, x) in radians: ``atan2(x, y)`` with x the ordinate."""

    @staticmethod
    def reference(x: Tensor, y: Tensor) -> Tensor:
        return torch.atan2(x, y)


class Eq(_Commutative):
    """``x == y``; result bool."""

    @staticmethod
    def reference(x: Tensor, y: Tensor) -> Tensor:
        return torch.eq(x, y)


class Ne(_Commutative):
    """``x != y``; result bool."""

    @staticmethod
    def reference(x: Tensor, y: Tensor) -> Tensor:
        return torch.ne(x, y)


class Lt(_Binary):
    """``x < y``; result bool."""

    @staticmethod
    def reference(x: Tensor, y: Tensor) -> Tensor:
        return torch.lt(x, y)


class Le(_Binary):
    """``x <= y``; result bool."""

    @staticmethod
    def reference(x: Tensor, y: Tensor) -> Tensor:
        return torch.le(x, y)


class Gt(_Binary):
    """``x > y``; result bool."""

    @staticmethod
    def reference(x: Tensor, y: Tensor) -> Tensor:
        return torch.gt(x, y)


class Ge(_Binary):
    """``x >= y``; result bool."""

    @staticmethod
    def reference(x: Tensor, y: Tensor) -> Tensor:
        return torch.ge(x, y)


class LogicalAnd(_Commutative):
    """Both non-zero; result bool."""

    @staticmethod
    def reference(x: Tensor, y: Tensor) -> Tensor:
        return torch.logical_and(x, y)


class LogicalOr(_Commutative):
    """Either non-zero; result bool."""

    @staticmethod
    def reference(x: Tensor, y: Tensor) -> Tensor:
        return torch.logical_or(x, y)


class LogicalXor(_Commutative):
    """Exactly one non-zero; result bool."""

    @staticmethod
    def reference(x: Tensor, y: Tensor) -> Tensor:
        return torch.logical_xor(x, y)


class BitwiseAnd(_Commutative):
    """Bit by bit and; integers and bool."""

    @staticmethod
    def reference(x: Tensor, y: Tensor) -> Tensor:
        return torch.bitwise_and(x, y)


class BitwiseOr(_Commutative):
    """Bit by bit or; integers and bool."""

    @staticmethod
    def reference(x: Tensor, y: Tensor) -> Tensor:
        return torch.bitwise_or(x, y)


class BitwiseXor(_Commutative):
    """Bit by bit exclusive or; integers and bool."""

    @staticmethod
    def reference(x: Tensor, y: Tensor) -> Tensor:
        return torch.bitwise_xor(x, y)


class ShiftLeft(_Binary):
    """x shifted left by y bits; integers."""

    @staticmethod
    def reference(x: Tensor, y: Tensor) -> Tensor:
        return torch.bitwise_left_shift(x, y)


class ShiftRight(_Binary):
    """x shifted right by y bits, keeping the sign; integers."""

    @staticmethod
    def reference(x: Tensor, y: Tensor) -> Tensor:
        return torch.bitwise_right_shift(x, y)


class Where(Op):
    """x where ``condition`` (bool) holds, else y; all three broadcast."""

    elementwise: ClassVar[bool] = True
    condition: Value
    x: Value
    y: Value

    @staticmethod
    def reference(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return torch.where(condition, x, y)

    def verify(self) -> None:
        if self.x.type.dtype is not self.y.type.dtype:
            raise VerificationError(
                "where has branches of two dtypes",
                values={"x": self.x.type, "y": self.y.type},
                rule="both branches share one dtype",
                fix="insert a cast",
                location=self.location,
            )
