"""Numbers to integers and back."""

from __future__ import annotations

from trimtab.frontend.onnx.element_types import dtype_of, name_of
from trimtab.frontend.onnx.node import Node
from trimtab.frontend.onnx.registry import onnx_op
from trimtab.ir import ops
from trimtab.ir.core import Value
from trimtab.ir.dtypes import DType

_RANGES = {DType.I8: (-128, 127), DType.U8: (0, 255), DType.I16: (-32768, 32767), DType.U16: (0, 65535)}
_BYTES = (DType.I8, DType.U8)


@onnx_op("QuantizeLinear", since=10)
def quantize_linear(node: Node) -> Value:
    """``saturate(round(x / scale) + zero_point)``, halves to even."""
    x, zero = node.input(0), node.optional(2)
    node.ignore("saturate", "axis", "precision")
    code = node.int_attr("output_dtype", 0)
    dtype = zero.type.dtype if zero is not None else dtype_of(code) if code else DType.U8
    if dtype not in _RANGES:
        node.refuse(
            "the quantized type", "use int8, uint8, int16 or uint16", output_dtype=name_of(code) if code else dtype
        )
    scale = _spread(node, node.cast(node.input(1), DType.F32), x)
    zero = None if zero is None else _spread(node, zero, x)
    return quantize(node, node.cast(x, DType.F32), scale, zero, dtype)


def quantize(node: Node, x: Value, scale: Value, zero: Value | None, dtype: DType) -> Value:
    """f32 x to integers of ``dtype``, over its whole range; scale, f32, and zero point broadcast to x."""
    low, high = _RANGES[dtype]
    if dtype in _BYTES:
        zero = None if zero is None or is_zero(node, zero) else zero
        return node.emit(ops.Quantize(x, scale, zero, dtype=dtype, low=low, high=high))
    y = node.emit(ops.Round(node.emit(ops.Div(x, scale))))
    if zero is not None:
        y = node.emit(ops.Add(y, node.cast(zero, DType.F32)))
    y = node.emit(ops.Clamp(y, min=float(low), max=float(high)))
    return node.cast(node.cast(y, DType.I32), dtype)


@onnx_op("DequantizeLinear", since=10)
def dequantize_linear(node: Node) -> Value:
    """``(x - zero_point) * scale``."""
    x, scale, zero = node.input(0), node.input(1), node.optional(2)
    if x.type.dtype not in (*_RANGES, DType.I32):
        node.refuse("the quantized type", "use int8, uint8, int16, uint16 or int32", type=x.type.dtype)
    node.ignore("axis")
    zero = None if zero is None or is_zero(node, zero) else _spread(node, zero, x)
    y = node.emit(ops.Dequantize(x, _spread(node, node.cast(scale, DType.F32), x), zero))
    code = node.int_attr("output_dtype", 0)
    target = dtype_of(code) if code else scale.type.dtype
    return node.cast(y, target or scale.type.dtype)


@onnx_op("DynamicQuantizeLinear", since=11)
def dynamic_quantize_linear(node: Node) -> tuple[Value, Value, Value]:
    """x, which with zero spans 0 to 255, as u8, with its scale and zero point.

    Where all of x is zero, the definition divides by zero; the scale is 1 there, as in ONNX Runtime.
    """
    x = node.input(0)
    axes = tuple(range(x.type.rank))
    nothing = node.scalar(0.0, x)
    low = node.emit(ops.Minimum(node.emit(ops.Amin(x, dims=axes)), nothing))
    high = node.emit(ops.Maximum(node.emit(ops.Amax(x, dims=axes)), nothing))
    span = node.emit(ops.Sub(high, low))
    step = node.emit(ops.Div(span, node.scalar(255.0, x)))
    scale = node.emit(ops.Where(node.emit(ops.Eq(span, nothing)), node.scalar(1.0, x), step))
    offset = node.emit(ops.Sub(nothing, node.emit(ops.Div(low, scale))))
    offset = node.emit(ops.Round(node.emit(ops.Clamp(offset, min=0.0, max=255.0))))
    zero = node.cast(node.cast(offset, DType.I32), DType.U8)
    return quantize(node, x, scale, zero, DType.U8), scale, zero


def is_zero(node: Node, value: Value) -> bool:
    """Whether ``value`` is known to be zero everywhere."""
    import torch

    found = node.emitter.content(value)
    return isinstance(found, torch.Tensor) and not bool(found.to(torch.int32).any())


def _spread(node: Node, value: Value, x: Value) -> Value:
    """A scale or zero point for all of x, per slice along ``axis``, or per block, in a shape that broadcasts to x."""
    if value.type.rank == 0 or value.type.shape == (1,):
        return node.reshape(value, ())
    axis = node.axis_in(node.int_attr("axis", 1), x.type.rank)
    block = node.int_attr("block_size", 0)
    if value.type.rank == 1 and not block:
        shape = [1] * x.type.rank
        return node.reshape(value, (*shape[:axis], value.type.shape[0], *shape[axis + 1 :]))
    if value.type.rank != x.type.rank or block < 1:
        node.inconsistent("scales per tensor, per axis, or per block")
    parts = value.type.shape
    tall = node.reshape(value, (*parts[: axis + 1], 1, *parts[axis + 1 :]))
    tall = node.emit(ops.Expand(tall, shape=(*parts[: axis + 1], block, *parts[axis + 1 :])))
    wide = node.reshape(tall, (*parts[:axis], parts[axis] * block, *parts[axis + 1 :]))
    size = x.type.shape[axis]
    return wide if wide.type.shape[axis] == size else node.emit(ops.Slice(wide, dim=axis, start=0, stop=size))
