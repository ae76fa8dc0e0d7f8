"""Norms and softmax, row by row in float32, without going through wider sums or naive decompositions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from trimtab.backends.mlir.rules.registry import lowers
from trimtab.backends.mlir.scalar import Scalar, cast, constant, function, maximum, select, work_type
from trimtab.backends.mlir.tensors import Code, Tensor
from trimtab.ir import ops
from trimtab.ir.dims import product


def mean_over(code: Code, x: Tensor, axes: Sequence[int], body: Any = lambda e: e) -> Tensor:
    """The mean of ``body(element)`` over ``axes``, kept with size 1, in the working type."""
    total = code.reduce(x, axes, 0, work_type(x.dtype), lambda e, so_far: so_far + body(e), keepdim=True)
    count = cast(Scalar(code.size(product(x.shape[axis] for axis in axes)), None), total.dtype)
    return code.elementwise(total.type, [total], lambda sum: sum / count)


def _normalised(
    op: Any, code: Code, x: Tensor, axes: Sequence[int], weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias``: two passes, as the reference does."""
    mean = mean_over(code, x, axes)
    centred = code.elementwise(x.type.with_dtype(work_type(x.dtype)), [x, mean], lambda e, m: e - m)
    variance = mean_over(code, centred, axes, lambda e: e * e)
    affine = [t for t in (weight, bias) if t is not None]

    def body(e: Scalar, v: Scalar, *rest: Scalar) -> Scalar:
        value = e * function("rsqrt", v + op.eps)
        if weight is not None:
            value = value * rest[0]
        return value if bias is None else value + rest[-1]

    return code.elementwise(x.type, [centred, variance, *affine], body)


@lowers(ops.LayerNorm)
def _layer_norm(op: Any, code: Code, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return _normalised(op, code, x, range(x.rank - op.axes, x.rank), weight, bias)


@lowers(ops.RmsNorm)
def _rms_norm(op: Any, code: Code, x: Tensor, weight: Tensor | None) -> Tensor:
    square = mean_over(code, x, range(x.rank - op.axes, x.rank), lambda e: e * e)

    def body(e: Scalar, s: Scalar, *rest: Scalar) -> Scalar:
        value = e * function("rsqrt", s + op.eps)
        return value * rest[0] if rest else value

    return code.elementwise(x.type, [x, square, *([weight] if weight is not None else [])], body)


@lowers(ops.GroupNorm)
def _group_norm(op: Any, code: Code, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    batch, channels, *spatial = x.shape
    within = channels // op.groups
    grouped = code.reshape(x, (batch, op.groups, within, *spatial))

    def by_group(vector: Tensor | None) -> Tensor | None:
        return None if vector is None else code.reshape(vector, (op.groups, within, *[1] * len(spatial)))

    axes = range(2, grouped.rank)
    made = _normalised(op, code, grouped, axes, by_group(weight), by_group(bias))
    return code.reshape(made, x.shape)


@lowers(ops.BatchNorm)
def _batch_norm(
    op: Any, code: Code, x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    vectors = [
        code.reshape(v, (v.shape[0], *[1] * (x.rank - 2))) for v in (mean, variance, weight, bias) if v is not None
    ]

    def body(e: Scalar, m: Scalar, v: Scalar, *rest: Scalar) -> Scalar:
        scale = function("rsqrt", v + op.eps)
        if weight is not None:
            scale = scale * rest[0]
        value = (e - m) * scale
        return value if bias is None else value + rest[-1]

    return code.elementwise(x.type, [x, *vectors], body)


def exponentials(code: Code, x: Tensor, axis: int, empty_rows: bool = False) -> tuple[Tensor, Tensor]:
    """``e^(x - max)`` along ``axis`` in the working type, and the sums of it with size 1.

    With ``empty_rows`` a row of minus infinities gives zeros instead of NaN.
    """
    work = work_type(x.dtype)
    top = code.reduce(x, [axis], -math.inf, work, maximum, keepdim=True)

    def power(e: Scalar, m: Scalar) -> Scalar:
        return function("exp", e - (select(m.equals(-math.inf), constant(0, work), m) if empty_rows else m))

    powers = code.elementwise(x.type.with_dtype(work), [x, top], power)
    return powers, code.reduce(powers, [axis], 0, work, lambda e, so_far: so_far + e, keepdim=True)


@lowers(ops.Softmax)
def _softmax(op: Any, code: Code, x: Tensor) -> Tensor:
    powers, total = exponentials(code, x, op.dim)
    return code.elementwise(op.result.type, [powers, total], lambda e, t: e / t)


@lowers(ops.LogSoftmax)
def _log_softmax(op: Any, code: Code, x: Tensor) -> Tensor:
    work = work_type(x.dtype)
    top = code.reduce(x, [op.dim], -math.inf, work, maximum, keepdim=True)
    total = code.reduce(
        code.elementwise(x.type.with_dtype(work), [x, top], lambda e, m: function("exp", e - m)),
        [op.dim], 0, work, lambda e, so_far: so_far + e, keepdim=True,
    )  # fmt: skip
    return code.elementwise(op.result.type, [x, top, total], lambda e, m, t: e - m - function("log", t))
