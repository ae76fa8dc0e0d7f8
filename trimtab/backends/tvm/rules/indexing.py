"""Ops that read or write at positions given by data.

Compiled code does not check indices: out-of-range reads are clamped into the tensor and out-of-range writes are
dropped, so wrong data gives wrong numbers but never touches foreign memory.  The reference raises an error instead.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from trimtab.backends.tvm.codegen.expression import let
from trimtab.backends.tvm.rules.registry import (
    Expr,
    Operand,
    Scope,
    cast,
    compute,
    i64,
    lowers,
)
from trimtab.ir import ops


def position(index: Expr, size: Expr) -> Expr:
    """A data index as an int64 position in an axis: negative ones count from the end, others are clamped."""

    def clamped(wide: Expr) -> Expr:
        wrapped = tirx.Select(wide < i64(0), wide + size, wide)
        return tirx.max(i64(0), tirx.min(wrapped, size - i64(1)))

    return let(cast(index, "int64"), clamped, "index")


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


@lowers(ops.Gather, broadcasts=("indices",))
def _gather(op: Any, scope: Scope, x: Operand, indices: Operand) -> Any:
    def element(*at: Expr) -> Expr:
        source = list(at)
        source[op.dim] = position(indices.broadcast(at, op.result.type.shape), x.shape[op.dim])
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
