"""Reading at places given by integer tensors. Negative indices count from the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.backends.mlir.rules.registry import lowers
from trimtab.backends.mlir.scalar import Scalar, cast, maximum, minimum, select
from trimtab.backends.mlir.tensors import Code, Tensor
from trimtab.ir import ops
from trimtab.ir.dims import Dim


def place(code: Code, index: Scalar, size: Dim) -> Scalar:
    """``index`` as a place in an axis: counted from the end when negative, and clamped into it."""
    extent, at = Scalar(code.size(size), None), cast(index, None)
    at = select(at < 0, at + extent, at)
    return minimum(maximum(at, 0), extent - 1)


@lowers(ops.Embedding)
def _embedding(op: Any, code: Code, table: Tensor, indices: Tensor) -> Tensor:
    def element(at: Sequence[Scalar]) -> Scalar:
        return code.load(table, [place(code, code.load(indices, at[:-1]), table.shape[0]), at[-1]])

    return code.compute(op.result.type, element)


@lowers(ops.IndexSelect)
def _index_select(op: Any, code: Code, x: Tensor, indices: Tensor) -> Tensor:
    def element(at: Sequence[Scalar]) -> Scalar:
        end = op.dim + indices.rank
        row = place(code, code.load(indices, at[op.dim : end]), x.shape[op.dim])
        return code.load(x, [*at[: op.dim], row, *at[end:]])

    return code.compute(op.result.type, element)


@lowers(ops.Gather)
def _gather(op: Any, code: Code, x: Tensor, indices: Tensor) -> Tensor:
    def element(at: Sequence[Scalar]) -> Scalar:
        row = place(code, code.load(indices, at), x.shape[op.dim])
        return code.load(x, [row if axis == op.dim else i for axis, i in enumerate(at)])

    return code.compute(op.result.type, element)


@lowers(ops.Index)
def _index(op: Any, code: Code, x: Tensor, indices: list[Tensor]) -> Tensor:
    rank = max(tensor.rank for tensor in indices)
    shape = op.result.type.shape[op.dim : op.dim + rank]

    def element(at: Sequence[Scalar]) -> Scalar:
        own = at[op.dim : op.dim + rank]
        rows = [
            place(code, code.load_broadcast(tensor, own, shape), x.shape[op.dim + number])
            for number, tensor in enumerate(indices)
        ]
        return code.load(x, [*at[: op.dim], *rows, *at[op.dim + rank :]])

    return code.compute(op.result.type, element)
