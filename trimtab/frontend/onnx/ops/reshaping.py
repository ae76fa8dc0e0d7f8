"""Operators that change shape without choosing elements: reshape, transpose, expand, concat, and shapes as data."""

from __future__ import annotations

from collections.abc import Iterable

from trimtab.frontend.onnx.node import Node
from trimtab.frontend.onnx.registry import onnx_op
from trimtab.ir import ops
from trimtab.ir.core import Value
from trimtab.ir.dims import Dim, bounds, floordiv, product
from trimtab.ir.dtypes import DType


@onnx_op("Shape", since=1)
def shape(node: Node) -> Value:
    x = node.input(0)
    rank = x.type.rank
    start, end = node.int_attr("start", 0), node.int_attr("end", rank)
    first, last = (min(max(i + rank if i < 0 else i, 0), rank) for i in (start, end))
    return node.emitter.dims(x.type.shape[first:last])


@onnx_op("Size", since=1)
def size(node: Node) -> Value:
    return node.emitter.dims((node.input(0).type.elements,), scalar=True)


@onnx_op("Reshape", since=5)
def reshape(node: Node) -> Value:
    x = node.input(0)
    wanted = list(node.dims(1, "the shape"))
    keep_zero = node.flag("allowzero")
    for axis, dim in enumerate(wanted):
        if dim == 0 and not keep_zero:
            if axis >= x.type.rank:
                node.inconsistent("a 0 in the shape copies an axis that the input lacks", shape=_text(wanted))
            wanted[axis] = x.type.shape[axis]
    if wanted.count(-1) > 1 or any(isinstance(dim, int) and dim < -1 for dim in wanted):
        node.inconsistent("the shape has several unknown sizes or negative ones", shape=_text(wanted))
    if -1 in wanted:
        axis = wanted.index(-1)
        rest = product(dim for dim in wanted if dim != -1)
        total = x.type.elements
        if rest == 0 or (isinstance(rest, int) and isinstance(total, int) and total % rest):
            node.inconsistent("the elements do not fill the shape", shape=_text(wanted), elements=total)
        wanted[axis] = floordiv(total, rest)
    return node.reshape(x, wanted)


@onnx_op("Flatten", since=1)
def flatten(node: Node) -> Value:
    x = node.input(0)
    axis = node.int_attr("axis", 1)
    if not -x.type.rank <= axis <= x.type.rank:
        node.inconsistent("axis is out of range", axis=axis)
    axis = axis + x.type.rank if axis < 0 else axis
    return node.reshape(x, (product(x.type.shape[:axis]), product(x.type.shape[axis:])))


@onnx_op("Squeeze", since=1)
def squeeze(node: Node) -> Value:
    x = node.input(0)
    axes = _axes(node)
    if axes is None:
        dropped = {dim for dim, size in enumerate(x.type.shape) if size == 1}
    else:
        dropped = set(node.axes_in(axes, x.type.rank))
        for dim in dropped:
            low, high = bounds(x.type.shape[dim])
            if high < 1 or low > 1:
                node.inconsistent("an axis to drop has more than one element", axis=dim)
    return node.reshape(x, [size for dim, size in enumerate(x.type.shape) if dim not in dropped])


@onnx_op("Unsqueeze", since=1)
def unsqueeze(node: Node) -> Value:
    x = node.input(0)
    axes = _axes(node) or ()
    rank = x.type.rank + len(axes)
    added = set(node.axes_in(axes, rank))
    rest = iter(x.type.shape)
    return node.reshape(x, [1 if dim in added else next(rest) for dim in range(rank)])


def _axes(node: Node) -> tuple[int, ...] | None:
    """Axes are an attribute up to opset 12 and an input from then on."""
    return node.ints_attr("axes", None) if node.version < 13 else node.ints_input(1, "axes")


@onnx_op("Transpose", since=1)
def transpose(node: Node) -> Value:
    x = node.input(0)
    given = node.ints_attr("perm", None)
    order = tuple(reversed(range(x.type.rank))) if given is None else node.axes_in(given, x.type.rank)
    if len(order) != x.type.rank:
        node.inconsistent("perm names every axis once", perm=given)
    return x if order == tuple(range(x.type.rank)) else node.emit(ops.Permute(x, dims=order))


@onnx_op("Expand", since=8)
def expand(node: Node) -> Value:
    """Broadcast against a shape: where the shape says 1, the input's size stays."""
    x = node.input(0)
    wanted = list(node.dims(1, "the shape"))
    ones: list[Dim] = [1] * max(len(wanted), x.type.rank)
    own = ones[: max(len(wanted) - x.type.rank, 0)] + list(x.type.shape)
    wanted = ones[: len(own) - len(wanted)] + wanted
    target: list[Dim] = [size if size != 1 and dim == 1 else dim for size, dim in zip(own, wanted, strict=True)]
    for axis, (size, dim) in enumerate(zip(own, target, strict=True)):
        if size not in (1, dim):
            node.inconsistent("the input does not broadcast to the shape", axis=axis, size=size, wanted=dim)
    return x if tuple(target) == x.type.shape else node.emit(ops.Expand(x, shape=tuple(target)))


@onnx_op("Tile", since=6)
def tile(node: Node) -> Value:
    x = node.input(0)
    repeats = node.dims(1, "repeats")
    if len(repeats) != x.type.rank or any(bounds(n)[0] < 0 for n in repeats):
        node.inconsistent("one non-negative count per axis", repeats=_text(repeats))
    return x if all(n == 1 for n in repeats) else node.emit(ops.Tile(x, repeats=repeats))


@onnx_op("Concat", since=4)
def concat(node: Node) -> Value:
    values = node.all_inputs()
    if len({value.type.rank for value in values}) != 1:
        node.inconsistent("joined values have one rank")
    axis = node.axis_in(node.int_attr("axis"), values[0].type.rank)
    return values[0] if len(values) == 1 else node.emit(ops.Concat(values, dim=axis))


@onnx_op("DepthToSpace", since=1)
def depth_to_space(node: Node) -> Value:
    x, block = node.input(0), node.int_attr("blocksize")
    batch, channels, height, width = _image(node, x)
    mode = node.string_attr("mode", "DCR")
    rest = floordiv(channels, block * block)
    if mode == "DCR":
        x, order = node.reshape(x, (batch, block, block, rest, height, width)), (0, 3, 4, 1, 5, 2)
    elif mode == "CRD":
        x, order = node.reshape(x, (batch, rest, block, block, height, width)), (0, 1, 4, 2, 5, 3)
    else:
        node.inconsistent("mode is DCR or CRD", mode=mode)
    return node.reshape(node.emit(ops.Permute(x, dims=order)), (batch, rest, height * block, width * block))


@onnx_op("SpaceToDepth", since=1)
def space_to_depth(node: Node) -> Value:
    x, block = node.input(0), node.int_attr("blocksize")
    if node.string_attr("mode", "DCR") != "DCR":
        node.use_definition("mode other than DCR")
    batch, channels, height, width = _image(node, x)
    rows, columns = floordiv(height, block), floordiv(width, block)
    x = node.reshape(x, (batch, channels, rows, block, columns, block))
    x = node.emit(ops.Permute(x, dims=(0, 3, 5, 1, 2, 4)))
    return node.reshape(x, (batch, channels * block * block, rows, columns))


@onnx_op("ReverseSequence", since=10)
def reverse_sequence(node: Node) -> Value:
    """The first ``lengths[b]`` steps of each sequence in reverse, the rest as they are."""
    x, lengths = node.input(0), node.cast(node.input(1), DType.I64)
    time, batch = node.int_attr("time_axis", 0), node.int_attr("batch_axis", 1)
    if {time, batch} != {0, 1}:
        node.inconsistent("time_axis and batch_axis are 0 and 1", time_axis=time, batch_axis=batch)
    rank = x.type.rank
    steps, sequences = x.type.shape[time], x.type.shape[batch]
    step = node.reshape(node.emit(ops.Arange(length=steps, dtype=DType.I64)), (steps, 1) if time == 0 else (1, steps))
    length = node.reshape(lengths, (1, sequences) if time == 0 else (sequences, 1))
    mirrored = node.emit(ops.Sub(node.emit(ops.Sub(length, step)), node.scalar(1, DType.I64)))
    index = node.emit(ops.Where(node.emit(ops.Lt(step, length)), mirrored, step))
    index = node.reshape(index, (*x.type.shape[:2], *[1] * (rank - 2)))
    return node.emit(ops.Gather(x, node.emit(ops.Expand(index, shape=x.type.shape)), dim=time))


def _image(node: Node, x: Value) -> tuple[Dim, Dim, Dim, Dim]:
    if x.type.rank != 4:
        node.inconsistent("the input is [batch, channels, height, width]")
    a, b, c, d = x.type.shape
    return a, b, c, d


def _text(dims: Iterable[Dim]) -> str:
    return f"[{', '.join(map(str, dims))}]"
