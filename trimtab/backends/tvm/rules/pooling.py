"""Pooling of ``[B, C, H, W]`` tensors."""

from __future__ import annotations

import math
from typing import Any

from tvm import te, tirx

from trimtab.backends.tvm.codegen.comparison import is_float
from trimtab.backends.tvm.rules.contraction import rounded
from trimtab.backends.tvm.rules.reduction import reducer
from trimtab.backends.tvm.rules.registry import (
    Expr,
    Operand,
    Scope,
    cast,
    compute,
    const,
    guarded,
    i64,
    lowers,
    work_type,
)
from trimtab.ir import ops


def _window(
    op: Any, x: Operand, indices: tuple[Expr, ...], axes: list[Any], dilation: tuple[int, int], fill: Expr
) -> Expr:
    """An element of a window in the type of ``fill``, which stands for the padding."""
    batch, channel, *spatial = indices
    places = [
        at * i64(op.stride[n]) - i64(op.padding[n]) + axis.var * i64(dilation[n])
        for n, (at, axis) in enumerate(zip(spatial, axes, strict=True))
    ]
    return guarded(places, x.shape[2:], lambda at: cast(x(batch, channel, *at), str(fill.ty.dtype)), fill)


@lowers(ops.MaxPool2d)
def _max_pool(op: Any, scope: Scope, x: Operand) -> Any:
    work = work_type(x.dtype)
    low = const(-math.inf, work) if is_float(work) else tirx.min_value(work)
    axes = [te.reduce_axis((i64(0), i64(size)), "w") for size in op.kernel]

    def element(*indices: Expr) -> Expr:
        return reducer("max")(_window(op, x, indices, axes, op.dilation, low), axis=axes)

    return rounded(op, scope, compute(scope.shape(op.result.type.shape), element, "max_pool"))


@lowers(ops.AvgPool2d)
def _avg_pool(op: Any, scope: Scope, x: Operand) -> Any:
    work = work_type(x.dtype)
    axes = [te.reduce_axis((i64(0), i64(size)), "w") for size in op.kernel]

    def element(*indices: Expr) -> Expr:
        return te.sum(_window(op, x, indices, axes, (1, 1), const(0, work)), axis=axes)

    shape = scope.shape(op.result.type.shape)
    total = compute(shape, element, "pool_sum", materialize=True)

    def mean(*indices: Expr) -> Expr:
        count: Expr = i64(1)
        for n, at in enumerate(indices[2:]):
            # Windows that ceil_mode lets hang over the padded edge are cut there, as in torch.
            start = at * i64(op.stride[n]) - i64(op.padding[n])
            stop = tirx.min(start + i64(op.kernel[n]), x.shape[2 + n] + i64(op.padding[n]))
            if not op.count_include_pad:
                start, stop = tirx.max(start, i64(0)), tirx.min(stop, x.shape[2 + n])
            count = count * (stop - start)
        return total(*indices) / tirx.Cast(work, count)

    return rounded(op, scope, compute(shape, mean, "avg_pool"))


@lowers(ops.AdaptiveAvgPool2d)
def _adaptive_avg_pool(op: Any, scope: Scope, x: Operand) -> Any:
    work = work_type(x.dtype)
    shape = scope.shape(op.result.type.shape)

    def bounds(n: int, at: Expr) -> tuple[Expr, Expr]:
        size, parts = x.shape[2 + n], i64(op.size[n])
        start = tirx.floordiv(at * size, parts)
        return start, tirx.floordiv((at + i64(1)) * size + parts - i64(1), parts)

    # A window covers at most ceil(size / parts) + 1 elements; the rest of the fixed range is masked.
    extents = [_widest(op, x, n) for n in range(2)]
    axes = [te.reduce_axis((i64(0), extent), "w") for extent in extents]

    def element(batch: Expr, channel: Expr, *spatial: Expr) -> Expr:
        places, inside = [], None
        for n, (at, axis) in enumerate(zip(spatial, axes, strict=True)):
            start, stop = bounds(n, at)
            places.append(start + axis.var)
            inside = places[-1] < stop if inside is None else tirx.And(inside, places[-1] < stop)
        value = guarded(places, x.shape[2:], lambda at: cast(x(batch, channel, *at), work), const(0, work), inside)
        return te.sum(value, axis=axes)

    total = compute(shape, element, "pool_sum", materialize=True)

    def mean(*indices: Expr) -> Expr:
        count: Expr = i64(1)
        for n, at in enumerate(indices[2:]):
            start, stop = bounds(n, at)
            count = count * (stop - start)
        return total(*indices) / tirx.Cast(work, count)

    return rounded(op, scope, compute(shape, mean, "adaptive_avg_pool"))


def _widest(op: Any, x: Operand, n: int) -> Expr:
    size, parts = op.x.type.shape[2 + n], op.size[n]
    if isinstance(size, int):
        return i64(max((((at + 1) * size + parts - 1) // parts) - (at * size) // parts for at in range(parts)))
    return tirx.floordiv(x.shape[2 + n] + i64(parts - 1), i64(parts)) + i64(1)
