"""Ops that read or write at positions given by data.

Compiled code does not check indices: out-of-range reads are clamped into the tensor and out-of-range writes are
dropped, so wrong data gives wrong numbers but never touches foreign memory.  The reference raises an error instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx

from trimtab.backends.tvm.codegen.loops import loop, sequence
from trimtab.backends.tvm.codegen.rows import combine
from trimtab.backends.tvm.rules.registry import (
    Expr,
    Operand,
    Scope,
    Target,
    cast,
    compute,
    i64,
    loops_for,
    lowers,
    work_type,
)
from trimtab.ir import ops


def position(index: Expr, size: Expr) -> Expr:
    """A data index as an int64 position in an axis: negative ones count from the end, others are clamped."""
    wide = cast(index, "int64")
    wrapped = tirx.Select(wide < i64(0), wide + size, wide)
    return tirx.max(i64(0), tirx.min(wrapped, size - i64(1)))


@lowers(ops.Embedding)
def _embedding(op: Any, scope: Scope, table: Operand, indices: Operand) -> Any:
    rank = indices.rank

    def element(*at: Expr) -> Expr:
        return table.packed(position(indices(*at[:rank]), table.shape[0]), at[-1])

    return compute(scope.shape(op.result.type.shape), element, "embedding")


@lowers(ops.IndexSelect)
def _index_select(op: Any, scope: Scope, x: Operand, indices: Operand) -> Any:
    rank = indices.rank

    def element(*at: Expr) -> Expr:
        row = position(indices(*at[op.dim : op.dim + rank]), x.shape[op.dim])
        return x(*at[: op.dim], row, *at[op.dim + rank :])

    return compute(scope.shape(op.result.type.shape), element, "index_select")


@lowers(ops.Gather)
def _gather(op: Any, scope: Scope, x: Operand, indices: Operand) -> Any:
    def element(*at: Expr) -> Expr:
        source = list(at)
        source[op.dim] = position(indices(*at), x.shape[op.dim])
        return x(*source)

    return compute(scope.shape(op.result.type.shape), element, "gather")


@lowers(ops.Index)
def _index(op: Any, scope: Scope, x: Operand, indices: list[Operand]) -> Any:
    rank = max(operand.rank for operand in indices)

    def element(*at: Expr) -> Expr:
        common = at[op.dim : op.dim + rank]
        rows = [position(operand.broadcast(common), x.shape[op.dim + n]) for n, operand in enumerate(indices)]
        return x(*at[: op.dim], *rows, *at[op.dim + rank :])

    return compute(scope.shape(op.result.type.shape), element, "index")


def _nest(extents: Sequence[Expr], body: Any) -> Any:
    def level(places: list[Expr]) -> Any:
        if len(places) == len(extents):
            return body(places)
        return loop(extents[len(places)], lambda v: level([*places, v]), name="i")

    return level([])


def _copy(x: Operand, out: Target) -> Any:
    return _nest(out.shape, lambda at: out.store(at, x(*at)))


def _update(kind: str, old: Expr, new: Expr) -> Expr:
    """An element of a scatter; half types are combined in float32."""
    work = work_type(str(old.ty.dtype))
    if kind == "none":
        return new
    if str(old.ty.dtype) == "bool":
        return tirx.Or(old, new) if kind in ("add", "amax") else tirx.And(old, new)
    names = {"amax": "max", "amin": "min"}
    return cast(combine(names.get(kind, kind), cast(old, work), cast(new, work)), str(old.ty.dtype))


@loops_for(ops.Scatter)
def _scatter(op: Any, scope: Scope, outs: list[Target], x: Operand, indices: Operand, updates: Operand) -> Any:
    (out,) = outs

    def write(at: list[Expr]) -> Any:
        wide = cast(indices(*at), "int64")
        size = out.shape[op.dim]
        place = tirx.Select(wide < i64(0), wide + size, wide)
        target = list(at)
        target[op.dim] = tirx.max(i64(0), tirx.min(place, size - i64(1)))
        store = out.store(target, _update(op.reduce, out.load(*target), updates(*at)))
        return tirx.IfThenElse(tirx.And(place >= i64(0), place < size), store, None)

    return sequence(_copy(x, out), _nest(indices.shape, write))


@loops_for(ops.IndexPut)
def _index_put(op: Any, scope: Scope, outs: list[Target], x: Operand, indices: list[Operand], updates: Operand) -> Any:
    (out,) = outs
    rank = max(operand.rank for operand in indices)
    common: list[Expr] = []
    for axis in range(rank):
        sizes = [o for o in indices if o.rank >= rank - axis]
        # Of the extents that broadcast along this axis the one that is not 1 counts.
        best = next((o for o in sizes if o.type.shape[axis - rank] != 1), sizes[0])
        common.append(best.shape[axis - rank])

    def write(at: list[Expr]) -> Any:
        inside: Expr = tirx.const(True, "bool")
        rows: list[Expr] = []
        for n, operand in enumerate(indices):
            wide, size = cast(operand.broadcast(at[:rank]), "int64"), out.shape[n]
            place = tirx.Select(wide < i64(0), wide + size, wide)
            inside = tirx.And(inside, tirx.And(place >= i64(0), place < size))
            rows.append(tirx.max(i64(0), tirx.min(place, size - i64(1))))
        target = [*rows, *at[rank:]]
        value = updates.broadcast(at)
        store = out.store(target, _update("add" if op.accumulate else "none", out.load(*target), value))
        return tirx.IfThenElse(inside, store, None)

    return sequence(_copy(x, out), _nest([*common, *out.shape[len(indices) :]], write))
