"""Converters of ``torch.ops.quantized_decomposed``: what PT2E quantization (torch.ao, torchao) puts into a graph.

The integers are those of torch's reference implementation, ``torch/ao/quantization/fx/_decomposed.py``. It multiplies
by the inverse of the scale, which it takes in double precision where the scale is a number, and rounds the product:
not always to the integer that a division by the scale gives. Per token it adds the zero point before it rounds.
"""

from __future__ import annotations

from typing import Any

import torch

from trimtab.frontend.torch_export.call import Call
from trimtab.frontend.torch_export.registry import Refusal, converts
from trimtab.ir import ops
from trimtab.ir.core import Value
from trimtab.ir.dtypes import DType

_NAMESPACE = "quantized_decomposed"
_SMALL = (DType.I8, DType.U8, DType.I16, DType.U16)
"""Integers that f32 holds, with every difference of two of them."""
_TYPES = (*_SMALL, DType.I32)


@converts(f"{_NAMESPACE}.quantize_per_tensor.default", f"{_NAMESPACE}.quantize_per_tensor.tensor")
def quantize_per_tensor(
    call: Call, x: Value, scale: Any, zero_point: Any, quant_min: int, quant_max: int, dtype: torch.dtype
) -> Value:
    """A scale that is a tensor of one element counts as the number in it."""
    if isinstance(scale, Value):
        one = call.operand(1.0, DType.F64)
        wide = call(ops.Reshape(call.cast(scale, DType.F64), shape=()))
        inverse = call.cast(call(ops.Div(one, wide)), DType.F32)
    else:
        inverse = call.operand(1.0 / scale, DType.F32)
    zero = call(ops.Reshape(zero_point, shape=())) if isinstance(zero_point, Value) else zero_point
    scaled = call(ops.Mul(call.cast(x, DType.F32), inverse))
    return _rounded(call, scaled, zero, quant_min, quant_max, dtype)


@converts(f"{_NAMESPACE}.quantize_per_channel.default")
def quantize_per_channel(
    call: Call, x: Value, scales: Value, zero_points: Value, axis: int, quant_min: int, quant_max: int,
    dtype: torch.dtype,
) -> Value:  # fmt: skip
    inverse = call(ops.Div(call.operand(1.0, scales.type.dtype), scales))
    scaled = call(ops.Mul(*call.promoted(call.cast(x, DType.F32), _along(call, inverse, axis, x))))
    return _rounded(call, scaled, _along(call, zero_points, axis, x), quant_min, quant_max, dtype)


@converts(f"{_NAMESPACE}.quantize_per_token.default")
def quantize_per_token(
    call: Call, x: Value, scales: Value, zero_points: Value, quant_min: int, quant_max: int, dtype: torch.dtype
) -> Value:
    """Scales and zero points ``[..., 1]``; the zero point joins the sum before it is rounded."""
    inverse = call(ops.Div(call.operand(1.0, scales.type.dtype), scales))
    scaled = call(ops.Mul(*call.promoted(x, inverse)))
    shifted = call(ops.Add(*call.promoted(scaled, zero_points)))
    return _rounded(call, shifted, None, quant_min, quant_max, dtype)


def _rounded(call: Call, x: Value, zero: Value | int | None, low: int, high: int, dtype: torch.dtype) -> Value:
    """``clamp(round(x) + zero, low, high)`` as ``dtype``, in the precision of x."""
    wanted = next((found for found in _TYPES if found.to_torch() == dtype), None)
    if wanted is None:
        raise Refusal(f"quantized numbers of type {dtype}")
    if isinstance(zero, int):
        zero = None if zero == 0 else call.operand(zero, DType.I32)
    if zero is not None and zero.type.dtype is DType.I64:
        zero = call.cast(zero, DType.I32)
    floating_zero = zero is not None and zero.type.dtype.is_floating
    if x.type.dtype is DType.F32 and wanted in (DType.I8, DType.U8) and not floating_zero:
        one = call.operand(1.0, DType.F32)
        return call(ops.Quantize(x, one, zero, dtype=wanted, low=low, high=high))
    y = call(ops.Round(x))
    if zero is not None:
        y = call(ops.Add(*call.promoted(y, zero)))
    y = call(ops.Clamp(y, min=float(low), max=float(high)))
    # Floating numbers become 32-bit integers first: that conversion is the same everywhere.
    return call.cast(call.cast(y, DType.I32), wanted)


@converts(f"{_NAMESPACE}.dequantize_per_tensor.default", f"{_NAMESPACE}.dequantize_per_tensor.tensor")
def dequantize_per_tensor(
    call: Call, x: Value, scale: Any, zero_point: Any, quant_min: int, quant_max: int, dtype: torch.dtype,
    out_dtype: torch.dtype | None = None,
) -> Value:  # fmt: skip
    target = DType.F32 if out_dtype is None else DType.from_torch(out_dtype)
    if isinstance(scale, Value):
        scale = call(ops.Reshape(call.cast(scale, DType.F32), shape=()))
    else:
        scale = call.operand(scale, DType.F32)
    zero = call(ops.Reshape(zero_point, shape=())) if isinstance(zero_point, Value) else zero_point
    if target is DType.F32 and x.type.dtype in _SMALL:
        return _dequantized(call, x, scale, zero)
    # The reference rounds x to the type of the result, then the difference, then the product, each computed in f32.
    wide = call.cast(call.cast(x, target), DType.F32)
    difference = call.cast(call(ops.Sub(wide, call.operand(zero, DType.F32))), target)
    return call.cast(call(ops.Mul(call.cast(difference, DType.F32), scale)), target)


@converts(f"{_NAMESPACE}.dequantize_per_channel.default")
def dequantize_per_channel(
    call: Call, x: Value, scales: Value, zero_points: Value | None, axis: int, quant_min: int, quant_max: int,
    dtype: torch.dtype, out_dtype: torch.dtype | None = None,
) -> Value:  # fmt: skip
    zero = None if zero_points is None else _along(call, zero_points, axis, x)
    y = _difference_times(call, x, _along(call, scales, axis, x), zero)
    return call.cast(y, DType.F32 if out_dtype is None else DType.from_torch(out_dtype))


@converts(f"{_NAMESPACE}.dequantize_per_token.default")
def dequantize_per_token(
    call: Call, x: Value, scales: Value, zero_points: Value, quant_min: int, quant_max: int, dtype: torch.dtype,
    output_dtype: torch.dtype,
) -> Value:  # fmt: skip
    return call.cast(_difference_times(call, x, scales, zero_points), DType.from_torch(output_dtype))


def _difference_times(call: Call, x: Value, scales: Value, zero: Value | None) -> Value:
    """``(x - zero) * scales`` by torch's rules of promotion."""
    floating_zero = zero is not None and zero.type.dtype.is_floating
    if scales.type.dtype is DType.F32 and x.type.dtype in _SMALL and not floating_zero:
        return _dequantized(call, x, scales, zero)
    difference = x if zero is None else call(ops.Sub(*call.promoted(x, zero)))
    return call(ops.Mul(*call.promoted(difference, scales)))


def _dequantized(call: Call, x: Value, scale: Value, zero: Value | int | None) -> Value:
    if isinstance(zero, int):
        zero = None if zero == 0 else call.operand(zero, DType.I32)
    return call(ops.Dequantize(x, scale, None if zero is None else call.cast(zero, DType.I32)))


def _along(call: Call, vector: Value, axis: int, x: Value) -> Value:
    """One element for each slice of x along ``axis``, in a shape that broadcasts to x."""
    rank, axis = x.type.rank, call.axis(axis, x)
    return call(ops.Reshape(vector, shape=(*[1] * axis, vector.type.shape[0], *[1] * (rank - 1 - axis))))
