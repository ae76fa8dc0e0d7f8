"""Quantized numbers, and exact products of integers.

A real number r is held as an integer q with ``r = (q - zero) * scale``. Products of integers are separate ops from
those of real numbers, so that no rewrite of one is taken for a rewrite of the other; what turns their sums into real
numbers, or into integers again, are ops on elements, which a kernel applies on the way.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.errors import VerificationError
from trimtab.ir.core import Value
from trimtab.ir.dims import Dim, product
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op


class Quantize(Op):
    """``clamp(round(x / scale) + zero, low, high)`` as ``dtype``, halves to even; a NaN becomes ``low``.

    x is f32, scale f32, zero of any integer type; scale and zero broadcast to x. The bounds lie in the range of
    ``dtype``: 0 to 63 in u8 are 6 bits. As ONNX's QuantizeLinear: the division is rounded to f32 before it is rounded
    to an integer, and the zero point is added after that. A scale lies between 2^-64 and 2^64: with another one
    compiled code may take a quotient that is a unit in the last place off.
    """

    elementwise: ClassVar[bool] = True
    x: Value
    scale: Value
    zero: Value | None = None
    dtype: DType
    low: int
    high: int

    @staticmethod
    def reference(
        x: Tensor, scale: Tensor, zero: Tensor | None, *, dtype: torch.dtype, low: int, high: int
    ) -> Tensor:  # fmt: skip
        y = torch.round(x / scale)
        y = y if zero is None else y + zero.to(y.dtype)
        y = torch.where(y > low, y, torch.full_like(y, low)).clamp(max=high)
        return y.to(torch.int32).to(dtype)


class Dequantize(Op):
    """``(x - zero) * scale``: x of any integer type of at most 32 bits, scale f32, zero as x or wider, result f32.

    Scale and zero broadcast to x. The difference is taken in 32 bits and wraps; it is rounded to f32 before it is
    multiplied.
    """

    elementwise: ClassVar[bool] = True
    x: Value
    scale: Value
    zero: Value | None = None

    @staticmethod
    def reference(x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        wide = x.to(torch.int32)
        wide = wide if zero is None else wide - zero.to(torch.int32)
        return wide.to(scale.dtype) * scale


class Requantize(Op):
    """``clamp(((x * multiplier + 2^(shift - 1)) >> shift) + zero, low, high)`` as ``dtype``, without floating numbers.

    x i32, multiplier i32, shift i32 from 1 to 62, both broadcast to x; the product has 64 bits and the shift is
    arithmetic, so halves are rounded up. As B. Jacob et al., "Quantization and Training of Neural Networks
    for Efficient Integer-Arithmetic-Only Inference", 2018, with one rounding.
    """

    elementwise: ClassVar[bool] = True
    x: Value
    multiplier: Value
    shift: Value
    zero: int = 0
    dtype: DType
    low: int
    high: int

    @staticmethod
    def reference(
        x: Tensor, multiplier: Tensor, shift: Tensor, *, zero: int, dtype: torch.dtype, low: int, high: int
    ) -> Tensor:  # fmt: skip
        places = shift.to(torch.int64)
        half = torch.bitwise_left_shift(torch.ones_like(places), places - 1)
        y = torch.bitwise_right_shift(x.to(torch.int64) * multiplier.to(torch.int64) + half, places)
        return (y + zero).clamp(low, high).to(dtype)


class LinearInteger(Op):
    """``y = x W^T`` of integers: x u8 or i8 ``[..., K]``, weight i8 ``[N, K]``, result i32 ``[..., N]``.

    Sums are exact for K up to 65,793 and wrap beyond that.
    """

    x: Value
    weight: Value

    @staticmethod
    def reference(x: Tensor, weight: Tensor) -> Tensor:
        _check_bytes(x, weight)
        return _wrapped(F.linear(x.double(), weight.double()))

    def macs(self) -> Dim:
        return self.x.type.elements * self.weight.type.shape[0]


class MatmulInteger(Op):
    """Matrix product of integers, u8 or i8, over the last two axes, with i32 results; the others broadcast."""

    x: Value
    y: Value

    @staticmethod
    def reference(x: Tensor, y: Tensor) -> Tensor:
        _check_bytes(x, y)
        return _wrapped(torch.matmul(x.double(), y.double()))

    def macs(self) -> Dim:
        return self.result.type.elements * self.x.type.shape[-1]


class ConvInteger(Op):
    """Cross-correlation of integers: x u8 or i8 ``[B, C, H, W]``, weight i8 ``[O, C/groups, kh, kw]``, result i32.

    ``zero``, one integer of x's type, is subtracted from x before the borders of zeros are added. Where the sums are
    corrected for the zero point afterwards, ``border`` fills the borders with it: an integer of x's type, for which
    there is no ``zero``. With ``channels_last``, x is ``[B, H, W, C]`` and the result ``[B, H', W', O]``; the weight is
    the same.
    """

    x: Value
    weight: Value
    zero: Value | None = None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    border: int = 0
    channels_last: bool = False

    @staticmethod
    def reference(
        x: Tensor, weight: Tensor, zero: Tensor | None, *, stride: tuple[int, ...], padding: tuple[int, ...],
        dilation: tuple[int, ...], groups: int, border: int, channels_last: bool,
    ) -> Tensor:  # fmt: skip
        _check_bytes(x, weight)
        centred = x.double() if zero is None else x.double() - zero.double()
        centred = centred.permute(0, 3, 1, 2) if channels_last else centred
        # With the border subtracted it is zero, as F.conv2d has it; every window then lacks border * sum(weights).
        sums = F.conv2d(centred - border, weight.double(), None, stride, padding, dilation, groups)
        y = _wrapped(sums + border * weight.double().sum((1, 2, 3))[:, None, None])
        return y.permute(0, 2, 3, 1) if channels_last else y

    def verify(self) -> None:
        limits = torch.iinfo(self.x.type.dtype.to_torch())
        if (self.border and self.zero is not None) or not limits.min <= self.border <= limits.max:
            raise VerificationError(
                "conv_integer has a border that it cannot have",
                values={"border": self.border, "x": self.x.type, "zero": self.zero},
                rule="the border is an integer of x's type, and 0 where there is a zero point",
                location=self.location,
            )

    def macs(self) -> Dim:
        return self.result.type.elements * product(self.weight.type.shape[1:])


class LinearGroupwise(Op):
    """``y = x W^T + b`` with weights quantized in groups.

    ``W[n, k] = (weight[n, k] - zero[n, g]) * scale[n, g]``, where ``g = k // group``.

    x ``[..., K]`` f32, weight i4, u4, i8 or u8 ``[N, K]``, scale f32 ``[N, K / group]``, zero of any integer type and
    the shape of scale, bias ``[N]``. The weights are widened as they are read, never as a whole. ONNX Runtime's
    MatMulNBits is the same with its own order of bytes.
    """

    x: Value
    weight: Value
    scale: Value
    zero: Value | None = None
    bias: Value | None = None
    group: int

    @staticmethod
    def reference(
        x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, *, group: int
    ) -> Tensor:  # fmt: skip
        parts = weight.unflatten(-1, (-1, group)).to(scale.dtype)
        parts = parts if zero is None else parts - zero.unsqueeze(-1).to(scale.dtype)
        return F.linear(x, (parts * scale.unsqueeze(-1)).flatten(-2).to(x.dtype), bias)

    def macs(self) -> Dim:
        return self.x.type.elements * self.weight.type.shape[0]


def _check_bytes(*operands: Tensor) -> None:
    for operand in operands:
        if operand.dtype not in (torch.int8, torch.uint8):
            raise TypeError(f"products of integers take i8 and u8, not {operand.dtype}")


def _wrapped(sums: Tensor) -> Tensor:
    """Sums that are exact in float64, in 32 bits."""
    return sums.to(torch.int64).to(torch.int32)
