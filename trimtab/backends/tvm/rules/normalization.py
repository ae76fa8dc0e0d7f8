"""Normalisations: row kernels whose statistics and result share one loop over rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import te, tirx

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
    work_type,
)
from trimtab.ir import ops


def _count(extents: Sequence[Expr], dtype: str) -> Expr:
    total: Expr = i64(1)
    for extent in extents:
        total = total * extent
    return tirx.Cast(dtype, total)


def _split(x: Operand, axes: int) -> tuple[list[Expr], list[Expr]]:
    """The extents of the leading axes and of those that are normalised, ``x.shape[-axes:]`` as in the reference."""
    tail = x.shape[-axes:]
    return x.shape[: x.rank - len(tail)], tail


@lowers(ops.LayerNorm)
def _layer_norm(op: Any, scope: Scope, x: Operand, weight: Operand | None, bias: Operand | None) -> Any:
    work, result = work_type(x.dtype), tvm_dtype(op.result.type.dtype)
    rows, tail = _split(x, op.axes)
    count = _count(tail, work)

    def reduction(value: Any, name: str) -> Any:
        axes = [te.reduce_axis((i64(0), extent), "k") for extent in tail]
        return compute(rows, lambda *r: te.sum(value(r, [a.var for a in axes]), axis=axes), name)

    def element(r: Sequence[Expr], k: Sequence[Expr]) -> Expr:
        return cast(x(*r, *k), work)

    total = reduction(element, "sum")
    rough = compute(rows, lambda *r: total(*r) / count, "rough_mean", materialize=True)
    # A second sum removes the rounding of the first, which counts when the mean is large beside the spread.
    rest = reduction(lambda r, k: element(r, k) - rough(*r), "rest")
    mean = compute(rows, lambda *r: rough(*r) + rest(*r) / count, "mean", materialize=True)

    def squared(r: Sequence[Expr], k: Sequence[Expr]) -> Expr:
        centered = element(r, k) - mean(*r)
        return centered * centered

    squares = reduction(squared, "squares")
    one = const(1, work)
    scale = compute(
        rows, lambda *r: one / te.sqrt(squares(*r) / count + const(op.eps, work)), "scale", materialize=True
    )

    def normalized(*indices: Expr) -> Expr:
        r, k = indices[: len(rows)], indices[len(rows) :]
        value = (element(r, k) - mean(*r)) * scale(*r)
        if weight is not None:
            value = value * cast(weight(*k), work)
        if bias is not None:
            value = value + cast(bias(*k), work)
        return cast(value, result)

    return compute(x.shape, normalized, "layer_norm")


@lowers(ops.RmsNorm)
def _rms_norm(op: Any, scope: Scope, x: Operand, weight: Operand | None) -> Any:
    work, result = work_type(x.dtype), tvm_dtype(op.result.type.dtype)
    rows, tail = _split(x, op.axes)
    count = _count(tail, work)
    axes = [te.reduce_axis((i64(0), extent), "k") for extent in tail]

    def square(*r: Expr) -> Expr:
        value = cast(x(*r, *(a.var for a in axes)), work)
        return te.sum(value * value, axis=axes)

    squares = compute(rows, square, "squares")
    scale = compute(
        rows, lambda *r: const(1, work) / te.sqrt(squares(*r) / count + const(op.eps, work)), "scale", materialize=True
    )

    def normalized(*indices: Expr) -> Expr:
        r, k = indices[: len(rows)], indices[len(rows) :]
        value = cast(x(*indices), work) * scale(*r)
        return cast(value if weight is None else value * cast(weight(*k), work), result)

    return compute(x.shape, normalized, "rms_norm")


@lowers(ops.GroupNorm)
def _group_norm(op: Any, scope: Scope, x: Operand, weight: Operand | None, bias: Operand | None) -> Any:
    work, result = work_type(x.dtype), tvm_dtype(op.result.type.dtype)
    batch, channels, *spatial = x.shape
    size = op.x.type.shape[1] // op.groups
    tail = [i64(size), *spatial]
    count = _count(tail, work)
    rows = [batch, i64(op.groups)]

    def reduction(value: Any, name: str) -> Any:
        axes = [te.reduce_axis((i64(0), extent), "k") for extent in tail]
        return compute(rows, lambda b, g: te.sum(value(b, g, *(a.var for a in axes)), axis=axes), name)

    def element(b: Expr, g: Expr, c: Expr, *s: Expr) -> Expr:
        return cast(x(b, g * i64(size) + c, *s), work)

    total = reduction(element, "sum")
    rough = compute(rows, lambda b, g: total(b, g) / count, "rough_mean", materialize=True)
    rest = reduction(lambda b, g, c, *s: element(b, g, c, *s) - rough(b, g), "rest")
    mean = compute(rows, lambda b, g: rough(b, g) + rest(b, g) / count, "mean", materialize=True)

    def squared(b: Expr, g: Expr, c: Expr, *s: Expr) -> Expr:
        centered = element(b, g, c, *s) - mean(b, g)
        return centered * centered

    squares = reduction(squared, "squares")
    one = const(1, work)
    scale = compute(
        rows, lambda b, g: one / te.sqrt(squares(b, g) / count + const(op.eps, work)), "scale", materialize=True
    )

    def normalized(b: Expr, channel: Expr, *s: Expr) -> Expr:
        g = tirx.floordiv(channel, i64(size))
        value = (cast(x(b, channel, *s), work) - mean(b, g)) * scale(b, g)
        if weight is not None:
            value = value * cast(weight(channel), work)
        if bias is not None:
            value = value + cast(bias(channel), work)
        return cast(value, result)

    return compute([batch, channels, *spatial], normalized, "group_norm")


@lowers(ops.BatchNorm)
def _batch_norm(
    op: Any, scope: Scope, x: Operand, mean: Operand, variance: Operand, weight: Operand | None, bias: Operand | None
) -> Any:
    work, result = work_type(x.dtype), tvm_dtype(op.result.type.dtype)

    def normalized(*indices: Expr) -> Expr:
        channel = indices[1]
        scale = const(1, work) / te.sqrt(cast(variance(channel), work) + const(op.eps, work))
        if weight is not None:
            scale = scale * cast(weight(channel), work)
        value = (cast(x(*indices), work) - cast(mean(channel), work)) * scale
        return cast(value if bias is None else value + cast(bias(channel), work), result)

    return compute(x.shape, normalized, "batch_norm")
