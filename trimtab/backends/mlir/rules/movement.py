"""Ops that move elements: shapes, slices, joins, borders."""

from __future__ import annotations

from typing import Any

from torch_mlir.dialects import arith

from trimtab.backends.mlir.rules.registry import lowers
from trimtab.backends.mlir.scalar import Scalar, cast, constant, maximum, minimum, select
from trimtab.backends.mlir.tensors import Code, Tensor
from trimtab.ir import ops
from trimtab.ir.dims import Dim
from trimtab.ir.dtypes import DType


@lowers(ops.Reshape)
def _reshape(op: Any, code: Code, x: Tensor) -> Tensor:
    return code.reshape(x, op.shape)


@lowers(ops.Permute)
def _permute(op: Any, code: Code, x: Tensor) -> Tensor:
    return code.permute(x, op.dims)


@lowers(ops.Expand)
def _expand(op: Any, code: Code, x: Tensor) -> Tensor:
    return code.elementwise(op.result.type, [x], lambda e: e)


def _cut(code: Code, x: Tensor, dim: int, start: Dim, length: Dim, step: int = 1) -> Tensor:
    starts = [start if axis == dim else 0 for axis in range(x.rank)]
    shape = [length if axis == dim else size for axis, size in enumerate(x.shape)]
    if dim == x.rank - 1 and (step != 1 or length == 1) and x.shape[dim] != length:
        # Read by another loop, such a slice is a memory access with strides inside, at which IREE 3.13 can fail.
        first = Scalar(code.size(start), None)
        type = x.type.with_shape(*shape)
        return code.compute(type, lambda at: code.load(x, [*at[:-1], at[-1] * step + first]))
    return code.slice(x, starts, shape, [step if axis == dim else 1 for axis in range(x.rank)])


@lowers(ops.Slice)
def _slice(op: Any, code: Code, x: Tensor) -> Tensor:
    return _cut(code, x, op.dim, op.start, op.result.type.shape[op.dim], op.step)


@lowers(ops.Select)
def _select(op: Any, code: Code, x: Tensor) -> Tensor:
    return code.reshape(_cut(code, x, op.dim, op.index, 1), op.result.type.shape)


@lowers(ops.Split)
def _split(op: Any, code: Code, x: Tensor) -> list[Tensor]:
    parts, start = [], 0
    for size in op.sizes:
        parts.append(_cut(code, x, op.dim, start, size))
        start = start + size
    return parts


@lowers(ops.Concat)
def _concat(op: Any, code: Code, values: list[Tensor]) -> Tensor:
    type = op.result.type
    joined, start = Tensor(code.empty(type), type), 0
    for piece in values:
        joined = code.insert(piece, joined, [start if axis == op.dim else 0 for axis in range(type.rank)])
        start = start + piece.shape[op.dim]
    return joined


@lowers(ops.Pad)
def _pad(op: Any, code: Code, x: Tensor) -> Tensor:
    if op.mode == "constant":
        cropped = [size + min(a, 0) + min(b, 0) for a, size, b in zip(op.before, x.shape, op.after, strict=True)]
        if tuple(cropped) != x.shape:
            x = code.slice(x, [-min(low, 0) for low in op.before], cropped, [1] * x.rank)
        return code.pad(x, [max(low, 0) for low in op.before], [max(high, 0) for high in op.after], op.value)
    sizes = [Scalar(code.size(size), None) for size in x.shape]

    def source(at: Scalar, axis: int) -> Scalar:
        size, place = sizes[axis], at - op.before[axis]
        if not op.before[axis] and not op.after[axis]:
            return at
        if op.mode == "edge":
            return minimum(maximum(place, 0), size - 1)
        if op.mode == "wrap":
            return wrapped(place, size)
        period = maximum((size - 1) * 2, 1)
        place = wrapped(place, period)
        return select(place < size, place, period - place)

    return code.compute(op.result.type, lambda at: code.load(x, [source(i, axis) for axis, i in enumerate(at)]))


def wrapped(place: Scalar, size: Scalar) -> Scalar:
    """``place`` modulo ``size``, never negative."""
    return Scalar(arith.remsi(arith.addi(arith.remsi(place.value, size.value), size.value), size.value), None)


@lowers(ops.Tile)
def _tile(op: Any, code: Code, x: Tensor) -> Tensor:
    skipped = op.result.type.rank - x.rank
    sizes = [Scalar(code.size(size), None) for size in x.shape]
    return code.compute(
        op.result.type,
        lambda at: code.load(x, [i % size for i, size in zip(at[skipped:], sizes, strict=True)]),
    )


@lowers(ops.Flip)
def _flip(op: Any, code: Code, x: Tensor) -> Tensor:
    sizes = [Scalar(code.size(size), None) for size in x.shape]
    return code.compute(
        op.result.type,
        lambda at: code.load(x, [sizes[axis] - 1 - i if axis in op.dims else i for axis, i in enumerate(at)]),
    )


@lowers(ops.Roll)
def _roll(op: Any, code: Code, x: Tensor) -> Tensor:
    shifts = dict.fromkeys(range(x.rank), 0)
    for shift, dim in zip(op.shifts, op.dims, strict=True):
        shifts[dim] += shift
    sizes = [Scalar(code.size(size), None) for size in x.shape]
    return code.compute(
        op.result.type,
        lambda at: code.load(
            x, [wrapped(i - shifts[axis], sizes[axis]) if shifts[axis] else i for axis, i in enumerate(at)]
        ),
    )


@lowers(ops.Tril, ops.Triu)
def _triangle(op: Any, code: Code, x: Tensor) -> Tensor:
    lower = isinstance(op, ops.Tril)

    def element(at: Any) -> Scalar:
        distance = cast(at[-1], DType.I64) - cast(at[-2], DType.I64)
        kept = distance <= op.diagonal if lower else distance >= op.diagonal
        return select(kept, code.load(x, at), constant(0, x.dtype))

    return code.compute(op.result.type, element)
