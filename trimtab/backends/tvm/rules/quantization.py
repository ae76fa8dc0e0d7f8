"""Quantized numbers, and products of integers: sums in 32 bits, which micro-kernels take where they fit."""

from __future__ import annotations

from typing import Any

from tvm import te, tirx

from trimtab.backends.tvm.codegen.division import divided_by_one
from trimtab.backends.tvm.codegen.expression import let
from trimtab.backends.tvm.rules.contraction import matrix_product
from trimtab.backends.tvm.rules.convolution import padded, window_sums
from trimtab.backends.tvm.rules.elementwise import select
from trimtab.backends.tvm.rules.registry import (
    Expr,
    Operand,
    Scope,
    cast,
    compute,
    const,
    i64,
    lowers,
    tvm_dtype,
)
from trimtab.ir import ops

SUM = "int32"
"""The type of sums of products of bytes."""


@lowers(ops.Quantize)
def _quantize(op: Any, scope: Scope, x: Operand, scale: Operand, zero: Operand | None) -> Any:
    shape = op.result.type.shape
    one = all(size == 1 for size in scale.type.shape)

    def element(*at: Expr) -> Expr:
        value, unit = x.broadcast(at, shape), scale.broadcast(at, shape)
        value = te.nearbyint(divided_by_one(value, unit, scope.machine) if one else value / unit)
        if zero is not None:
            value = value + cast(zero.broadcast(at, shape), "float32")
        low, high = const(float(op.low), "float32"), const(float(op.high), "float32")
        # In this order of the operands a NaN gives the bound.
        bounded = let(value, lambda v: select(v > low, v, low))
        bounded = let(bounded, lambda v: select(v < high, v, high))
        return cast(tirx.Cast(SUM, bounded), tvm_dtype(op.dtype))

    return compute(scope.shape(shape), element, op.name)


@lowers(ops.Dequantize)
def _dequantize(op: Any, scope: Scope, x: Operand, scale: Operand, zero: Operand | None) -> Any:
    shape = op.result.type.shape

    def element(*at: Expr) -> Expr:
        value = cast(x.broadcast(at, shape), SUM)
        if zero is not None:
            value = value - cast(zero.broadcast(at, shape), SUM)
        return _rounded(tirx.Cast("float32", value) * scale.broadcast(at, shape))

    return compute(scope.shape(shape), element, op.name)


def _rounded(product: Expr) -> Expr:
    """``product`` with its own rounding: LLVM would add to it what follows before it rounds both together."""
    return tirx.call_llvm_pure_intrin("float32", "llvm.arithmetic.fence", product)


@lowers(ops.Requantize)
def _requantize(op: Any, scope: Scope, x: Operand, multiplier: Operand, shift: Operand) -> Any:
    shape = op.result.type.shape

    def element(*at: Expr) -> Expr:
        places = cast(shift.broadcast(at, shape), "int64")
        half = tirx.shift_left(i64(1), places - i64(1))
        exact = cast(x.broadcast(at, shape), "int64") * cast(multiplier.broadcast(at, shape), "int64")
        value = tirx.shift_right(exact + half, places) + i64(op.zero)
        return cast(tirx.max(tirx.min(value, i64(op.high)), i64(op.low)), tvm_dtype(op.dtype))

    return compute(scope.shape(shape), element, op.name)


@lowers(ops.LinearInteger)
def _linear(op: Any, scope: Scope, x: Operand, weight: Operand) -> Any:
    k = te.reduce_axis((i64(0), x.shape[-1]), "k")

    def term(*at: Expr) -> Expr:
        *rows, column = at
        return te.sum(cast(x(*rows, k.var), SUM) * cast(weight.packed(column, k.var), SUM), axis=k)

    return compute(scope.shape(op.result.type.shape), term, "linear")


@lowers(ops.MatmulInteger, absorbs_permute=True)
def _matmul(op: Any, scope: Scope, x: Operand, y: Operand) -> Any:
    return matrix_product(op, scope, x, y, SUM)


@lowers(ops.ConvInteger)
def _convolution(op: Any, scope: Scope, x: Operand, weight: Operand, zero: Operand | None) -> Any:
    first = 1 if op.channels_last else 2
    if zero is None:
        read = padded(x, op.padding, op.padding, first, x.dtype if weight.layout.group > 1 else SUM, op.border)
        return window_sums(op, scope, read, weight, SUM)
    shape = op.x.type.shape
    zero_at = [i64(0)] * zero.rank
    centred = compute(
        scope.shape(shape), lambda *at: cast(x(*at), SUM) - cast(zero(*zero_at), SUM), "centred", materialize=True
    )
    read = padded(Operand(op.x.type, scope.shape(shape), centred), op.padding, op.padding, first, SUM)
    return window_sums(op, scope, read, weight, SUM)
