"""Quantized numbers, and products of integers with sums in 32 bits."""

from __future__ import annotations

from typing import Any

from trimtab.backends.mlir.rules.contraction import linear_product, matrix_product
from trimtab.backends.mlir.rules.convolution import window_products
from trimtab.backends.mlir.rules.registry import lowers
from trimtab.backends.mlir.scalar import Scalar, cast, constant, function, maximum, minimum, select
from trimtab.backends.mlir.tensors import Code, Tensor
from trimtab.ir import ops
from trimtab.ir.dtypes import DType


def _present(*operands: Tensor | None) -> list[Tensor]:
    return [operand for operand in operands if operand is not None]


@lowers(ops.Quantize)
def _quantize(op: Any, code: Code, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    def element(value: Scalar, scale: Scalar, *zero: Scalar) -> Scalar:
        value = function("roundeven", value / scale)
        if zero:
            value = value + cast(zero[0], DType.F32)
        low, high = (constant(float(bound), DType.F32) for bound in (op.low, op.high))
        # A NaN is not larger than the bound.
        value = select(value > low, value, low)
        return cast(cast(select(value < high, value, high), DType.I32), op.dtype)

    return code.elementwise(op.result.type, _present(x, scale, zero), element)


@lowers(ops.Dequantize)
def _dequantize(op: Any, code: Code, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    def element(value: Scalar, scale: Scalar, *zero: Scalar) -> Scalar:
        value = cast(value, DType.I32)
        if zero:
            value = value - cast(zero[0], DType.I32)
        return cast(value, DType.F32) * scale

    return code.elementwise(op.result.type, _present(x, scale, zero), element)


@lowers(ops.Requantize)
def _requantize(op: Any, code: Code, x: Tensor, multiplier: Tensor, shift: Tensor) -> Tensor:
    def element(value: Scalar, multiplier: Scalar, shift: Scalar) -> Scalar:
        places = cast(shift, DType.I64)
        half = constant(1, DType.I64) << (places - 1)
        rounded = ((cast(value, DType.I64) * cast(multiplier, DType.I64) + half) >> places) + op.zero
        return cast(minimum(maximum(rounded, op.low), op.high), op.dtype)

    return code.elementwise(op.result.type, [x, multiplier, shift], element)


@lowers(ops.LinearInteger)
def _linear(op: Any, code: Code, x: Tensor, weight: Tensor) -> Tensor:
    return linear_product(op, code, x, weight)


@lowers(ops.MatmulInteger)
def _matmul(op: Any, code: Code, x: Tensor, y: Tensor) -> Tensor:
    return matrix_product(op, code, x, y)


@lowers(ops.ConvInteger)
def _convolution(op: Any, code: Code, x: Tensor, weight: Tensor, zero: Tensor | None) -> Tensor:
    if zero is not None:
        wide = x.type.with_dtype(DType.I32)
        x = code.elementwise(wide, [x, code.reshape(zero, ())], lambda e, z: cast(e, DType.I32) - cast(z, DType.I32))
    return window_products(op, code, x, weight, None)


@lowers(ops.LinearGroupwise)
def _groupwise(
    op: Any, code: Code, x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None
) -> Tensor:
    rows, groups = scale.shape
    parts = code.reshape(weight, (rows, groups, op.group))
    factors = [code.reshape(t, (rows, groups, 1)) for t in _present(scale, zero)]

    def widen(value: Scalar, scale: Scalar, *zero: Scalar) -> Scalar:
        value = cast(value, DType.F32)
        return (value - cast(zero[0], DType.F32) if zero else value) * scale

    wide = code.elementwise(scale.type.with_shape(rows, groups, op.group), [parts, *factors], widen)
    return linear_product(op, code, x, code.reshape(wide, weight.shape), bias)
