"""Resampling of images, after the definitions in torch's ``UpSample.h`` (half-pixel centres, a = -0.75 for bicubic)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import te, tirx

from trimtab.backends.tvm.rules.contraction import rounded
from trimtab.backends.tvm.rules.registry import (
    Expr,
    Operand,
    Scope,
    cast,
    compute,
    const,
    i64,
    lowers,
    work_type,
)
from trimtab.ir import ops


def _ratio(op: Any, x: Operand, size: Expr, n: int, work: str) -> Expr:
    """Source pixels per target pixel along spatial axis n."""
    source = tirx.Cast(work, x.shape[2 + n])
    if op.align_corners and op.mode != "nearest":
        steps = tirx.Cast(work, tirx.max(size - i64(1), i64(1)))
        return tirx.Select(size > i64(1), (source - const(1, work)) / steps, const(0, work))
    if op.scale[n]:
        return const(1.0 / op.scale[n], work)
    return source / tirx.Cast(work, size)


def _cubic_arms(distance: Expr, a: float) -> tuple[Expr, Expr]:
    """The cubic convolution kernel (Keys, 1981) at a distance in [1, 2] and at one in [0, 1]."""

    def c(value: float) -> Expr:
        return const(value, str(distance.ty.dtype))

    far = ((c(a) * distance - c(5 * a)) * distance + c(8 * a)) * distance - c(4 * a)
    near = ((c(a + 2) * distance - c(a + 3)) * distance) * distance + c(1)
    return far, near


def _cubic(t: Expr, a: float) -> list[Expr]:
    """Weights of the four neighbours, at distances 1 + t, t, 1 - t and 2 - t."""
    one, two = const(1, str(t.ty.dtype)), const(2, str(t.ty.dtype))
    places = (t + one, t, one - t, two - t)
    return [_cubic_arms(place, a)[0 if n in (0, 3) else 1] for n, place in enumerate(places)]


def _clamp(place: Expr, size: Expr) -> Expr:
    return tirx.max(i64(0), tirx.min(place, size - i64(1)))


@lowers(ops.Resize2d)
def _resize(op: Any, scope: Scope, x: Operand) -> Any:
    work = work_type(x.dtype) if op.x.type.dtype.is_floating else "float32"
    size = scope.shape(op.size)
    if op.mode == "nearest":
        return _nearest(op, scope, x, size)
    if op.antialias:
        return _antialiased(op, scope, x, size, work)
    ratios = [_ratio(op, x, size[n], n, work) for n in range(2)]
    half = const(0.5, work)

    def source(n: int, at: Expr) -> Expr:
        place = tirx.Cast(work, at)
        if op.align_corners:
            return place * ratios[n]
        centred = (place + half) * ratios[n] - half
        return tirx.max(centred, const(0, work)) if op.mode == "bilinear" else centred

    def taps(n: int, at: Expr) -> list[tuple[Expr, Expr]]:
        """Neighbours along axis n with their weights."""
        place = source(n, at)
        base = te.floor(place)
        first = tirx.Cast("int64", base)
        t = place - base
        extent = x.shape[2 + n]
        if op.mode == "bilinear":
            first = tirx.min(first, extent - i64(1))
            t = place - tirx.Cast(work, first)
            t = tirx.max(const(0, work), tirx.min(t, const(1, work)))
            return [(first, const(1, work) - t), (tirx.min(first + i64(1), extent - i64(1)), t)]
        return [(_clamp(first + i64(k - 1), extent), weight) for k, weight in enumerate(_cubic(t, -0.75))]

    def element(batch: Expr, channel: Expr, row: Expr, column: Expr) -> Expr:
        total = None
        for y, wy in taps(0, row):
            line = None
            for z, wz in taps(1, column):
                term = cast(x(batch, channel, y, z), work) * wz
                line = term if line is None else line + term
            term = line * wy
            total = term if total is None else total + term
        return total

    return _finish(op, scope, compute(scope.shape(op.result.type.shape), element, "resize"))


def _finish(op: Any, scope: Scope, tensor: Any) -> Any:
    if op.x.type.dtype.is_floating:
        return rounded(op, scope, tensor)
    low, high = tirx.min_value(op.x.type.dtype.value), tirx.max_value(op.x.type.dtype.value)
    return rounded(
        op, scope, compute(tensor.shape, lambda *i: tirx.max(low, tirx.min(te.nearbyint(tensor(*i)), high)), "round")
    )


def _nearest(op: Any, scope: Scope, x: Operand, size: list[Expr]) -> Any:
    # torch computes the source position of nearest in float32 whatever the element type.
    ratios = [_ratio(op, x, size[n], n, "float32") for n in range(2)]

    def place(n: int, at: Expr) -> Expr:
        return _clamp(tirx.Cast("int64", te.floor(tirx.Cast("float32", at) * ratios[n])), x.shape[2 + n])

    def element(batch: Expr, channel: Expr, row: Expr, column: Expr) -> Expr:
        return x(batch, channel, place(0, row), place(1, column))

    return compute(scope.shape(op.result.type.shape), element, "resize_nearest")


def _antialiased(op: Any, scope: Scope, x: Operand, size: list[Expr], work: str) -> Any:
    """Separable filter widened by the reduction factor, weights normalised, as Pillow and torch do."""
    support = 1.0 if op.mode == "bilinear" else 2.0
    value: Callable[..., Expr] = lambda *i: cast(x(*i), work)  # noqa: E731
    shape = list(x.shape)
    for n in (1, 0):
        value, shape = _filter_axis(op, x, size, n, support, value, shape, work)
    return _finish(op, scope, compute(shape, lambda *i: value(*i), "resize_antialias"))


def _filter_axis(
    op: Any,
    x: Operand,
    size: list[Expr],
    n: int,
    support: float,
    value: Callable[..., Expr],
    shape: list[Expr],
    work: str,
) -> tuple[Callable[..., Expr], list[Expr]]:
    scale = _ratio(op, x, size[n], n, work)
    extent = x.shape[2 + n]
    stretch = tirx.max(scale, const(1, work))
    radius = const(support, work) * stretch
    static, target = op.x.type.shape[2 + n], op.size[n]
    if not isinstance(static, int) or not isinstance(target, int):
        taps = extent
    else:
        factor = (
            (1.0 / op.scale[n])
            if op.scale[n] and not op.align_corners
            else ((static - 1) / max(target - 1, 1) if op.align_corners else static / target)
        )
        taps = i64(min(static, math.ceil(support * max(factor, 1.0)) * 2 + 1))
    shape = [*shape[: 2 + n], size[n], *shape[3 + n :]]

    def centre(at: Expr) -> Expr:
        return scale * (tirx.Cast(work, at) + const(0.5, work))

    def first(at: Expr) -> Expr:
        return tirx.max(i64(0), tirx.Cast("int64", te.trunc(centre(at) - radius + const(0.5, work))))

    def last(at: Expr) -> Expr:
        return tirx.min(extent, tirx.Cast("int64", te.trunc(centre(at) + radius + const(0.5, work))))

    def weight(at: Expr, tap: Expr) -> Expr:
        place = first(at) + tap
        distance = te.abs((tirx.Cast(work, place) - centre(at) + const(0.5, work)) / stretch)
        if op.mode == "bilinear":
            shaped = tirx.max(const(0, work), const(1, work) - distance)
        else:
            far, near = _cubic_arms(distance, -0.5)
            shaped = tirx.Select(
                distance < const(1, work), near, tirx.Select(distance < const(2, work), far, const(0, work))
            )
        return tirx.Select(place < last(at), shaped, const(0, work))

    axis = te.reduce_axis((i64(0), taps), "t")
    total = compute([size[n]], lambda at: te.sum(weight(at, axis.var), axis=axis), "weights", materialize=True)
    tap = te.reduce_axis((i64(0), taps), "t")

    def element(*indices: Expr) -> Expr:
        at = indices[2 + n]
        source = list(indices)
        source[2 + n] = tirx.min(first(at) + tap.var, extent - i64(1))
        return te.sum(value(*source) * weight(at, tap.var), axis=tap)

    summed = compute(shape, element, "filtered", materialize=True)
    scaled = compute(shape, lambda *i: summed(*i) / total(i[2 + n]), "normalized", materialize=True)
    return (lambda *i: scaled(*i)), shape
