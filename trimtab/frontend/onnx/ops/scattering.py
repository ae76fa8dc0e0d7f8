"""Operators that write at positions given as data."""

from __future__ import annotations

from trimtab.frontend.onnx.node import Node
from trimtab.frontend.onnx.ops.gathering import columns
from trimtab.frontend.onnx.registry import onnx_op
from trimtab.ir import ops
from trimtab.ir.core import Value
from trimtab.ir.dims import product
from trimtab.ir.dtypes import DType

_REDUCTIONS = {"none": "none", "add": "add", "mul": "mul", "max": "amax", "min": "amin"}


@onnx_op("ScatterElements", "Scatter", since=9)
def scatter_elements(node: Node) -> Value:
    x, indices, updates = node.input(0), node.input(1), node.input(2)
    axis = node.axis_in(node.int_attr("axis", 0), x.type.rank)
    return node.emit(ops.Scatter(x, indices, updates, dim=axis, reduce=_reduction(node)))


@onnx_op("ScatterND", since=11)
def scatter_nd(node: Node) -> Value:
    """Index tuples become positions in the flattened leading axes."""
    x, indices, updates = node.input(0), node.input(1), node.input(2)
    reduction = _reduction(node)
    depth = indices.type.shape[-1] if indices.type.rank else None
    if not isinstance(depth, int) or not 1 <= depth <= x.type.rank:
        node.inconsistent("the last axis of indices counts leading axes of the data")
    parts = columns(node, indices, depth)
    if reduction in ("none", "add"):
        return node.emit(ops.IndexPut(x, parts, updates, accumulate=reduction == "add"))
    flat: Value | None = None
    for part, size in zip(parts, x.type.shape, strict=False):
        count = node.emitter.dims((size,), scalar=True)
        wide = node.cast(part, DType.I64)
        negative = node.emit(ops.Lt(wide, node.scalar(0, DType.I64)))
        wide = node.emit(ops.Where(negative, node.emit(ops.Add(wide, count)), wide))
        flat = wide if flat is None else node.emit(ops.Add(node.emit(ops.Mul(flat, count)), wide))
    assert flat is not None
    rows, rest = indices.type.shape[:-1], x.type.shape[depth:]
    shape = (product(rows), product(rest))
    positions = node.emit(ops.Expand(node.reshape(flat, (shape[0], 1)), shape=shape))
    table = node.reshape(x, (product(x.type.shape[:depth]), shape[1]))
    written = node.emit(ops.Scatter(table, positions, node.reshape(updates, shape), dim=0, reduce=reduction))
    return node.reshape(written, x.type.shape)


@onnx_op("TensorScatter", since=24)
def tensor_scatter(node: Node) -> Value:
    """Write ``update`` into a cache ``[B, ..., steps, ...]`` from position ``write_indices[b]`` on."""
    cache, update = node.input(0), node.input(1)
    axis = node.axis_in(node.int_attr("axis", -2), cache.type.rank)
    mode = node.string_attr("mode", "linear")
    if axis == 0 or mode not in ("linear", "circular"):
        node.inconsistent("axis is not the batch, mode is linear or circular", axis=axis, mode=mode)
    shape, steps = update.type.shape, update.type.shape[axis]
    place = node.emit(ops.Arange(length=steps, dtype=DType.I64))
    place = node.reshape(place, tuple(steps if dim == axis else 1 for dim in range(len(shape))))
    starts = node.optional(2)
    if starts is not None:
        column = node.reshape(starts, (shape[0], *[1] * (len(shape) - 1)))
        place = node.emit(ops.Add(column, place))
    if mode == "circular":
        size = node.emitter.dims((cache.type.shape[axis],), scalar=True)
        place = node.emit(ops.Remainder(place, size))
    return node.emit(ops.Scatter(cache, node.emit(ops.Expand(place, shape=shape)), update, dim=axis))


def _reduction(node: Node) -> str:
    found = node.string_attr("reduction", "none")
    if found not in _REDUCTIONS:
        node.inconsistent("unknown reduction", reduction=found)
    return _REDUCTIONS[found]
