"""Quantize and dequantize as elementwise ops, and products of quantized matrices."""

from __future__ import annotations

from trimtab.frontend.onnx.element_types import dtype_of, name_of
from trimtab.frontend.onnx.node import Node
from trimtab.frontend.onnx.ops.convolution import convolve
from trimtab.frontend.onnx.registry import onnx_op
from trimtab.ir import ops
from trimtab.ir.core import Value
from trimtab.ir.dtypes import DType

_RANGES = {DType.I8: (-128, 127), DType.U8: (0, 255), DType.I16: (-32768, 32767), DType.U16: (0, 65535)}


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
    """f32 x to integers; scale and zero point broadcast to x."""
    y = node.emit(ops.Round(node.emit(ops.Div(x, scale))))
    if zero is not None:
        y = node.emit(ops.Add(y, node.cast(zero, DType.F32)))
    low, high = _RANGES[dtype]
    y = node.emit(ops.Clamp(y, min=float(low), max=float(high)))
    return node.cast(node.cast(y, DType.I32), dtype)


@onnx_op("DequantizeLinear", since=10)
def dequantize_linear(node: Node) -> Value:
    """``(x - zero_point) * scale``."""
    x, scale, zero = node.input(0), node.input(1), node.optional(2)
    if x.type.dtype not in (*_RANGES, DType.I32):
        node.refuse("the quantized type", "use int8, uint8, int16, uint16 or int32", type=x.type.dtype)
    node.ignore("axis")
    wide = node.cast(x, DType.I32)
    if zero is not None:
        wide = node.emit(ops.Sub(wide, _spread(node, node.cast(zero, DType.I32), x)))
    y = node.emit(ops.Mul(node.cast(wide, DType.F32), _spread(node, node.cast(scale, DType.F32), x)))
    code = node.int_attr("output_dtype", 0)
    target = dtype_of(code) if code else scale.type.dtype
    return node.cast(y, target or scale.type.dtype)


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


@onnx_op("QLinearMatMul", since=10)
def qlinear_matmul(node: Node) -> Value:
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = (node.input(i) for i in range(8))

    def centred(x: Value, zero: Value, rows: bool) -> Value:
        zero = node.cast(zero, DType.I32)
        if rows and zero.type.rank == 1 and zero.type.shape != (1,):
            zero = node.reshape(zero, (*zero.type.shape, 1))
        return node.emit(ops.Sub(node.cast(x, DType.I32), zero))

    def factor(scale: Value, rows: bool) -> Value:
        if scale.type.shape == (1,):
            scale = node.reshape(scale, ())
        if rows and scale.type.rank == 1:
            scale = node.reshape(scale, (*scale.type.shape, 1))
        return node.cast(scale, DType.F32)

    total = node.cast(node.emit(ops.Matmul(centred(a, a_zero, True), centred(b, b_zero, False))), DType.F32)
    real = node.emit(ops.Mul(total, node.emit(ops.Mul(factor(a_scale, True), factor(b_scale, False)))))
    return quantize(node, real, factor(y_scale, True), y_zero, y_zero.type.dtype)


@onnx_op("QLinearConv", since=10)
def qlinear_conv(node: Node) -> Value:
    """Exact sums in double precision, bias in units of both scales, then requantized."""
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero = (node.input(i) for i in range(8))
    bias = node.optional(8)

    def per_channel(value: Value, axis: int) -> Value:
        if value.type.rank == 0 or value.type.shape == (1,):
            return node.reshape(value, ())
        return node.reshape(value, (*value.type.shape, *[1] * (x.type.rank - 1 - axis)))

    def centred(value: Value, zero: Value) -> Value:
        return node.cast(node.emit(ops.Sub(node.cast(value, DType.I32), node.cast(zero, DType.I32))), DType.F64)

    total = convolve(
        node, centred(x, per_channel(x_zero, 0)), centred(w, per_channel(w_zero, 0)),
        None if bias is None else node.cast(bias, DType.F64),
    )  # fmt: skip
    scale = node.emit(ops.Mul(per_channel(x_scale, 1), per_channel(w_scale, 1)))
    real = node.emit(ops.Mul(node.cast(total, DType.F32), scale))
    return quantize(node, real, per_channel(y_scale, 0), per_channel(y_zero, 0), y_zero.type.dtype)
