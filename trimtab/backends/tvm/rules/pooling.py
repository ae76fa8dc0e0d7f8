"""Pooling of ``[B, C, H, W]`` and ``[B, H, W, C]`` tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import te, tirx

from trimtab.backends.tvm.codegen.comparison import is_float
from trimtab.backends.tvm.rules.contraction import rounded
from trimtab.backends.tvm.rules.convolution import window_places
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


def _in_planes(op: Any, values: Sequence[Any]) -> tuple[Any, ...]:
    """What belongs to the axes of a tensor, in the order ``[B, C, H, W]``."""
    batch, *others = values
    return (batch, others[-1], *others[:-1]) if op.channels_last else (batch, *others)


def _sizes(op: Any, x: Operand) -> tuple[Expr, ...]:
    """Height and width."""
    return _in_planes(op, x.shape)[2:]


def _reader(op: Any, x: Operand) -> Callable[..., Expr]:
    """The element of x at (batch, channel, row, column)."""
    return lambda b, c, *at: x(b, *at, c) if op.channels_last else x(b, c, *at)


@dataclass(frozen=True)
class _Windows:
    """Which elements each result is made of, per spatial axis; the names are those of the ops' attributes."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def axes(self) -> list[Any]:
        return [te.reduce_axis((i64(0), i64(size)), "w") for size in self.kernel]

    def element(self, op: Any, x: Operand, indices: tuple[Expr, ...], axes: list[Any], fill: Expr) -> Expr:
        """An element of a window in the type of ``fill``, which stands for the padding."""
        batch, channel, *spatial = _in_planes(op, indices)
        places, read = window_places(self, spatial, axes), _reader(op, x)
        return guarded(places, _sizes(op, x), lambda at: cast(read(batch, channel, *at), str(fill.ty.dtype)), fill)


@lowers(ops.MaxPool2d)
def _max_pool(op: Any, scope: Scope, x: Operand) -> Any:
    work = work_type(x.dtype)
    low = const(-math.inf, work) if is_float(work) else tirx.min_value(work)
    windows = _Windows(op.kernel, op.stride, op.padding, op.dilation)
    axes = windows.axes()

    def element(*indices: Expr) -> Expr:
        return reducer("max")(windows.element(op, x, indices, axes, low), axis=axes)

    return rounded(op, scope, compute(scope.shape(op.result.type.shape), element, "max_pool"))


@lowers(ops.AvgPool2d)
def _avg_pool(op: Any, scope: Scope, x: Operand) -> Any:
    return _mean_of_windows(op, scope, x, _Windows(op.kernel, op.stride, op.padding), op.count_include_pad)


def _mean_of_windows(op: Any, scope: Scope, x: Operand, windows: _Windows, count_include_pad: bool) -> Any:
    work, axes = work_type(x.dtype), windows.axes()

    def element(*indices: Expr) -> Expr:
        return te.sum(windows.element(op, x, indices, axes, const(0, work)), axis=axes)

    shape = scope.shape(op.result.type.shape)
    total = compute(shape, element, "pool_sum", materialize=True)

    def mean(*indices: Expr) -> Expr:
        count: Expr = i64(1)
        for n, (at, size) in enumerate(zip(_in_planes(op, indices)[2:], _sizes(op, x), strict=True)):
            # Windows that ceil_mode lets hang over the padded edge are cut there, as in torch.
            start = at * i64(windows.stride[n]) - i64(windows.padding[n])
            stop = tirx.min(start + i64(windows.kernel[n]), size + i64(windows.padding[n]))
            if not count_include_pad:
                start, stop = tirx.max(start, i64(0)), tirx.min(stop, size)
            count = count * (stop - start)
        return total(*indices) / tirx.Cast(work, count)

    return rounded(op, scope, compute(shape, mean, op.name))


@lowers(ops.AdaptiveAvgPool2d)
def _adaptive_avg_pool(op: Any, scope: Scope, x: Operand) -> Any:
    sizes = _in_planes(op, op.x.type.shape)[2:]
    if all(isinstance(size, int) and size % parts == 0 for size, parts in zip(sizes, op.size, strict=True)):
        kernel = (sizes[0] // op.size[0], sizes[1] // op.size[1])
        return _mean_of_windows(op, scope, x, _Windows(kernel, kernel), True)
    work = work_type(x.dtype)
    shape = scope.shape(op.result.type.shape)

    def bounds(n: int, at: Expr) -> tuple[Expr, Expr]:
        size, parts = _sizes(op, x)[n], i64(op.size[n])
        start = tirx.floordiv(at * size, parts)
        return start, tirx.floordiv((at + i64(1)) * size + parts - i64(1), parts)

    # A window covers at most ceil(size / parts) + 1 elements; the rest of the fixed range is masked.
    extents = [_widest(op, x, n) for n in range(2)]
    axes = [te.reduce_axis((i64(0), extent), "w") for extent in extents]

    def element(*indices: Expr) -> Expr:
        batch, channel, *spatial = _in_planes(op, indices)
        read, places, inside = _reader(op, x), [], None
        for n, (at, axis) in enumerate(zip(spatial, axes, strict=True)):
            start, stop = bounds(n, at)
            places.append(start + axis.var)
            inside = places[-1] < stop if inside is None else tirx.And(inside, places[-1] < stop)
        value = guarded(places, _sizes(op, x), lambda at: cast(read(batch, channel, *at), work), const(0, work), inside)
        return te.sum(value, axis=axes)

    total = compute(shape, element, "pool_sum", materialize=True)

    def mean(*indices: Expr) -> Expr:
        count: Expr = i64(1)
        for n, at in enumerate(_in_planes(op, indices)[2:]):
            start, stop = bounds(n, at)
            count = count * (stop - start)
        return total(*indices) / tirx.Cast(work, count)

    return rounded(op, scope, compute(shape, mean, "adaptive_avg_pool"))


def _widest(op: Any, x: Operand, n: int) -> Expr:
    size, parts = _in_planes(op, op.x.type.shape)[2 + n], op.size[n]
    if isinstance(size, int):
        return i64(max((((at + 1) * size + parts - 1) // parts) - (at * size) // parts for at in range(parts)))
    return tirx.floordiv(_sizes(op, x)[n] + i64(parts - 1), i64(parts)) + i64(1)
