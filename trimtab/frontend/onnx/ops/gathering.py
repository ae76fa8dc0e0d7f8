"""Operators that read at positions given as data, and those that find positions."""

from __future__ import annotations

import torch

from trimtab.frontend.onnx.node import Node
from trimtab.frontend.onnx.ops.unsigned import WIDENED
from trimtab.frontend.onnx.registry import onnx_op
from trimtab.ir import ops
from trimtab.ir.core import Value
from trimtab.ir.dims import Dim, bounds
from trimtab.ir.dtypes import DType


@onnx_op("Gather", since=1)
def gather(node: Node) -> Value:
    x, indices = node.input(0), node.input(1)
    axis = node.axis_in(node.int_attr("axis", 0), x.type.rank)
    known = node.content(1)
    if isinstance(known, torch.Tensor):
        size = x.type.shape[axis]
        low, high = bounds(size)
        if known.numel() and (int(known.max()) >= high or int(known.min()) < -high):
            node.inconsistent("an index is out of range", axis=axis, size=size)
        if known.dim() == 0 and x.type.dtype not in WIDENED:
            index = int(known)
            if low > (index if index >= 0 else -index - 1):
                return node.emit(ops.Select(x, dim=axis, index=index if index >= 0 else size + index))
    elif x.type.rank == 2 and axis == 0 and x.type.dtype.is_floating and node.emitter.is_constant(x):
        return node.emit(ops.Embedding(x, indices))
    return node.emit(ops.IndexSelect(x, indices, dim=axis))


@onnx_op("GatherElements", since=11)
def gather_elements(node: Node) -> Value:
    x = node.input(0)
    return node.emit(ops.Gather(x, node.input(1), dim=node.axis_in(node.int_attr("axis", 0), x.type.rank)))


@onnx_op("GatherND", since=11)
def gather_nd(node: Node) -> Value:
    x, indices = node.input(0), node.input(1)
    batch = node.int_attr("batch_dims", 0)
    shape = indices.type.shape
    if not shape or not isinstance(shape[-1], int):
        node.refuse("indices whose last axis has a dynamic size")
    depth = shape[-1]
    if not 0 <= batch < min(len(shape), x.type.rank) or not 1 <= depth <= x.type.rank - batch:
        node.inconsistent("indices fit the data", batch_dims=batch)
    return node.emit(ops.Index(x, [*batch_positions(node, shape, batch), *columns(node, indices, depth)]))


def columns(node: Node, indices: Value, depth: int) -> list[Value]:
    """The ``depth`` components of index tuples stored along the last axis."""
    last = indices.type.rank - 1
    return [node.emit(ops.Select(indices, dim=last, index=i)) for i in range(depth)]


def batch_positions(node: Node, shape: tuple[Dim, ...], batch: int) -> list[Value]:
    """For each of the first ``batch`` axes the positions along it, to be broadcast with index components."""
    found = []
    for axis in range(batch):
        size = shape[axis]
        places = node.emit(ops.Arange(length=size, dtype=DType.I64))
        found.append(node.reshape(places, tuple(size if dim == axis else 1 for dim in range(len(shape) - 1))))
    return found


@onnx_op("ArgMax", "ArgMin", since=1)
def arg_extremum(node: Node) -> Value:
    x = node.input(0)
    if x.type.dtype in WIDENED:
        x = node.cast(x, DType.I64) if x.type.dtype is not DType.U64 else node.refuse("unsigned 64-bit integers")
    axis = node.axis_in(node.int_attr("axis", 0), x.type.rank)
    keepdim = node.flag("keepdims", True)
    make = ops.Argmax if node.op == "ArgMax" else ops.Argmin
    if not node.flag("select_last_index"):
        return node.emit(make(x, dim=axis, keepdim=keepdim))
    # The last of equal elements is the first one counted from the end.
    first = node.emit(make(node.emit(ops.Flip(x, dims=(axis,))), dim=axis, keepdim=keepdim))
    last = node.emitter.dims((x.type.shape[axis] - 1,), scalar=True)
    return node.emit(ops.Sub(last, first))


@onnx_op("TopK", since=10)
def top_k(node: Node) -> tuple[Value, ...]:
    """Equal elements come in the order of their positions, so this is a stable sort, cut to k."""
    x = node.input(0)
    (k,) = node.dims(1, "k")
    node.ignore("sorted")
    axis = node.axis_in(node.int_attr("axis", -1), x.type.rank)
    if bounds(k)[0] < 0 or bounds(x.type.shape[axis] - k)[1] < 0:
        node.inconsistent("k lies between 0 and the size of the axis", k=k, size=x.type.shape[axis])
    dtype = x.type.dtype
    if dtype is DType.U64:
        node.refuse("unsigned 64-bit integers", "use int64")
    wide = node.cast(x, DType.I64) if dtype in WIDENED else x
    values, indices = node.emit_all(ops.Sort(wide, dim=axis, descending=node.flag("largest", True)))
    values, indices = (node.emit(ops.Slice(v, dim=axis, start=0, stop=k)) for v in (values, indices))
    return node.cast(values, dtype), indices


@onnx_op("Compress", "NonZero", "Unique", "NonMaxSuppression", since=1)
def data_dependent(node: Node) -> Value:
    node.refuse("the shape of the result depends on data", "keep this operator outside the compiled model",
                rule="shapes follow from the inputs' shapes alone")  # fmt: skip
