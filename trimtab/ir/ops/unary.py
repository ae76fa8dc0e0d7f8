"""Elementwise ops of one operand. Results have the operand's shape."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.ir.core import Value
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op


class _Unary(Op):
    elementwise: ClassVar[bool] = True
    x: Value


class Neg(_Unary):
    """``-x``."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return -x


class Abs(_Unary):
    """``|x|``."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return torch.abs(x)


class Sign(_Unary):
    """-1, 0 or 1; NaN stays NaN."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return torch.sign(x) if not x.dtype.is_floating_point else torch.where(torch.isnan(x), x, torch.sign(x))


class Exp(_Unary):
    """``e^x``."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return torch.exp(x)


class Log(_Unary):
    """Natural logarithm."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return torch.log(x)


class Log1p(_Unary):
    """``log(1 + x)``, accurate near 0."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return torch.log1p(x)


class Expm1(_Unary):
    """``e^x - 1``, accurate near 0."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return torch.expm1(x)


class Sqrt(_Unary):
    """Square root."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return torch.sqrt(x)


class Rsqrt(_Unary):
    """``1 / sqrt(x)``."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return torch.rsqrt(x)


class Reciprocal(_Unary):
    """``1 / x``."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return torch.reciprocal(x)


class Sin(_Unary):
    """Sine of radians."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return torch.sin(x)


class Cos(_Unary):
    """Cosine of radians."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return torch.cos(x)


class Tan(_Unary):
    """Tangent of radians."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return torch.tan(x)


class Asin(_Unary):
    """Arc sine, in radians."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return torch.asin(x)


class Acos(_Unary):
    """Arc cosine, in radians."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return torch.acos(x)


class Atan(_Unary):
    """Arc tangent, in radians."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return torch.atan(x)


class Sinh(_Unary):
    """Hyperbolic sine."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return torch.sinh(x)


class Cosh(_Unary):
    """Hyperbolic cosine."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return torch.cosh(x)


class Tanh(_Unary):
    """Hyperbolic tangent."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return torch.tanh(x)


class Asinh(_Unary):
    """Inverse hyperbolic sine."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return torch.asinh(x)


class Acosh(_Unary):
    """Inverse hyperbolic cosine."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return torch.acosh(x)


class Atanh(_Unary):
    """Inverse hyperbolic tangent."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return torch.atanh(x)


class Erf(_Unary):
    """The error function."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return torch.erf(x)


class Sigmoid(_Unary):
    """``1 / (1 + e^-x)``."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return torch.sigmoid(x)


class Relu(_Unary):
    """``max(x, 0)``."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return torch.relu(x)


class Silu(_Unary):
    """``x * sigmoid(x)``, also called swish."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return F.silu(x)


class Mish(_Unary):
    """``x * tanh(softplus(x))``."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return F.mish(x)


class HardSigmoid(_Unary):
    """``clamp(x / 6 + 1/2, 0, 1)``."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return F.hardsigmoid(x)


class HardSwish(_Unary):
    """``x * hard_sigmoid(x)``."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return F.hardswish(x)


class Floor(_Unary):
    """Largest integer not above x."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return torch.floor(x)


class Ceil(_Unary):
    """Smallest integer not below x."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return torch.ceil(x)


class Round(_Unary):
    """Nearest integer, halves to even."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return torch.round(x)


class Trunc(_Unary):
    """x without its fraction."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return torch.trunc(x)


class IsNan(_Unary):
    """Whether x is NaN; result bool."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return torch.isnan(x)


class IsInf(_Unary):
    """Whether x is plus or minus infinity; result bool."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return torch.isinf(x)


class LogicalNot(_Unary):
    """``x == 0``; result bool."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return torch.logical_not(x)


class BitwiseNot(_Unary):
    """Complement of every bit; logical not for bool."""

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return torch.bitwise_not(x)


class Gelu(_Unary):
    """Gaussian error linear unit ``x * Phi(x)``. The approximations are Hendrycks and Gimpel's (arXiv 1606.08415):
    ``approximate="tanh"`` is ``0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`` and ``"sigmoid"``, also known as
    quick GELU, ``x * sigmoid(1.702 x)``."""

    approximate: Literal["none", "tanh", "sigmoid"] = "none"

    @staticmethod
    def reference(x: Tensor, *, approximate: str) -> Tensor:
        return x * torch.sigmoid(1.702 * x) if approximate == "sigmoid" else F.gelu(x, approximate=approximate)


class LeakyRelu(_Unary):
    """``x`` where positive, else ``negative_slope * x``."""

    negative_slope: float = 0.01

    @staticmethod
    def reference(x: Tensor, *, negative_slope: float) -> Tensor:
        return F.leaky_relu(x, negative_slope)


class Elu(_Unary):
    """``scale * x`` where positive, else ``scale * alpha * (e^(input_scale * x) - 1)``; covers ELU, SELU and CELU."""

    alpha: float = 1.0
    scale: float = 1.0
    input_scale: float = 1.0

    @staticmethod
    def reference(x: Tensor, *, alpha: float, scale: float, input_scale: float) -> Tensor:
        negative = torch.expm1(torch.clamp_max(x, 0) * input_scale) * (alpha * scale)
        return torch.where(x > 0, x * scale, negative).to(x.dtype)


class Softplus(_Unary):
    """``log(1 + e^(beta x)) / beta``; the identity where ``beta x > threshold``."""

    beta: float = 1.0
    threshold: float = 20.0

    @staticmethod
    def reference(x: Tensor, *, beta: float, threshold: float) -> Tensor:
        return F.softplus(x, beta, threshold)


class Clamp(_Unary):
    """``min(max(x, min), max)``; a bound that is none does not apply; NaN stays NaN. Result has x's dtype."""

    min: float | int | None = None
    max: float | int | None = None

    @staticmethod
    def reference(x: Tensor, *, min: float | None, max: float | None) -> Tensor:
        return x if min is None and max is None else torch.clamp(x, min, max).to(x.dtype)


class Cast(_Unary):
    """x converted to ``dtype``: floats to integers round towards zero, anything non-zero to bool is true."""

    dtype: DType

    @staticmethod
    def reference(x: Tensor, *, dtype: torch.dtype) -> Tensor:
        return x.to(dtype)
