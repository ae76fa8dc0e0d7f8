"""Converters of operators that reshape, move, join, cut or create."""

from __future__ import annotations

import math
from typing import Any

from trimtab.frontend.torch_export.call import Call
from trimtab.frontend.torch_export.registry import Refusal, converts
from trimtab.ir import ops
from trimtab.ir.core import Value
from trimtab.ir.dims import Dim, bounds, dim_max, dim_min, product


def reshape_to(call: Call, x: Value, shape: tuple[Dim, ...]) -> Value:
    """``x`` in another shape; itself when it has it."""
    return x if x.type.shape == shape else call(ops.Reshape(x, shape=shape))


@converts(
    "aten.view.default",
    "aten.reshape.default",
    "aten._unsafe_view.default",
    "aten._reshape_alias.default",
    "aten.flatten.using_ints",
    "aten.unflatten.int",
    "aten.squeeze.default",
    "aten.squeeze.dim",
    "aten.squeeze.dims",
    "aten.unsqueeze.default",
    "aten.view_as.default",
    "aten.reshape_as.default",
    "aten.ravel.default",
)
def reshape(call: Call, x: Value, **_: Any) -> Value:
    return reshape_to(call, x, call.shape)


@converts("aten.as_strided.default")
def as_strided(call: Call, x: Value, **_: Any) -> Value:
    """A view of the whole memory of ``x`` in row-major order, which torch's decomposition of adaptive pooling makes."""
    source = call.node.all_input_nodes[0].meta["val"]
    if not (source.is_contiguous() and call.meta.is_contiguous() and call.shape and call.meta.storage_offset() == 0):
        raise Refusal("a view with strides of its own: the IR has no memory layouts")
    if product(call.shape) != x.type.elements:
        raise Refusal("a view of a part of a tensor's memory")
    return reshape_to(call, x, call.shape)


@converts("aten.expand.default", "aten.expand_as.default", "aten.broadcast_to.default")
def expand(call: Call, x: Value, **_: Any) -> Value:
    return x if x.type.shape == call.shape else call(ops.Expand(x, shape=call.shape))


@converts("aten.permute.default")
def permute(call: Call, x: Value, dims: list[int]) -> Value:
    order = tuple(call.axis(dim, x) for dim in dims)
    return x if order == tuple(range(len(order))) else call(ops.Permute(x, dims=order))


@converts("aten.transpose.int", "aten.swapaxes.default")
def transpose(call: Call, x: Value, dim0: int, dim1: int) -> Value:
    order = list(range(x.type.rank))
    if order:
        a, b = call.axis(dim0, x), call.axis(dim1, x)
        order[a], order[b] = order[b], order[a]
    return permute(call, x, order)


@converts("aten.t.default", "aten.numpy_T.default", "aten.mT.default")
def matrix_transpose(call: Call, x: Value) -> Value:
    order = list(range(x.type.rank))
    if len(order) >= 2:
        order[-2:] = reversed(order[-2:])
    return permute(call, x, order)


@converts("aten.movedim.int", "aten.movedim.intlist")
def movedim(call: Call, x: Value, source: Any, destination: Any) -> Value:
    sources = [call.axis(d, x) for d in (source if isinstance(source, list) else [source])]
    targets = [call.axis(d, x) for d in (destination if isinstance(destination, list) else [destination])]
    rest = iter(d for d in range(x.type.rank) if d not in sources)
    moved = dict(zip(targets, sources, strict=True))
    return permute(call, x, [moved[d] if d in moved else next(rest) for d in range(x.type.rank)])


@converts("aten.slice.Tensor")
def slice_(call: Call, x: Value, dim: int, start: Any, end: Any, step: Any) -> Value:
    axis = call.axis(dim, x)
    size = x.type.shape[axis]
    first = clamp_index(0 if start is None else start, size)
    last = dim_max(clamp_index(size if end is None else end, size), first)
    if (first, last, step) == (0, size, 1):
        return x
    return call(ops.Slice(x, dim=axis, start=first, stop=last, step=step))


def clamp_index(index: Dim, size: Dim) -> Dim:
    """A slice bound as Python means it: negative ones count from the end, and it is clamped to ``0..size``."""
    low, high = bounds(index)
    if high < 0:
        return dim_max(0, size + index)
    if low < 0:
        raise Refusal("a slice bound whose sign depends on a size")
    # torch writes "to the end" as the largest 64-bit integer.
    return size if isinstance(index, int) and index >= min(bounds(size)[1], 2**62) else dim_min(index, size)


@converts("aten.select.int")
def select(call: Call, x: Value, dim: int, index: Dim) -> Value:
    axis = call.axis(dim, x)
    if bounds(index)[1] < 0:
        index = x.type.shape[axis] + index
    return call(ops.Select(x, dim=axis, index=index))


@converts("aten.narrow.default")
def narrow(call: Call, x: Value, dim: int, start: Dim, length: Dim) -> Value:
    axis = call.axis(dim, x)
    return call(ops.Slice(x, dim=axis, start=start, stop=start + length))


@converts("aten.cat.default", "aten.concat.default")
def concat(call: Call, tensors: list[Value], dim: int) -> Value:
    # torch ignores one-dimensional empty tensors when it joins.
    kept = [value for value in tensors if value.type.shape != (0,)] or tensors[:1]
    values = tuple(call.cast(value, call.dtype) for value in kept)
    return values[0] if len(values) == 1 else call(ops.Concat(values, dim=call.axis(dim, values[0])))


@converts("aten.stack.default")
def stack(call: Call, tensors: list[Value], dim: int) -> Value:
    axis = dim % (tensors[0].type.rank + 1)
    parts = []
    for value in tensors:
        shape = value.type.shape
        parts.append(call(ops.Reshape(call.cast(value, call.dtype), shape=(*shape[:axis], 1, *shape[axis:]))))
    return parts[0] if len(parts) == 1 else call(ops.Concat(tuple(parts), dim=axis))


@converts(
    "aten.split.Tensor",
    "aten.split_with_sizes.default",
    "aten.split.sizes",
    "aten.chunk.default",
    "aten.tensor_split.sections",
    "aten.split_with_sizes_copy.default",
)
def split(call: Call, x: Value, dim: int, **_: Any) -> tuple[Value, ...]:
    axis = call.axis(dim, x)
    sizes = tuple(shape[axis] for shape in call.shapes())
    return (x,) if len(sizes) == 1 else call.add(ops.Split(x, dim=axis, sizes=sizes))


@converts("aten.unbind.int")
def unbind(call: Call, x: Value, dim: int) -> tuple[Value, ...]:
    axis = call.axis(dim, x)
    return tuple(call(ops.Select(x, dim=axis, index=index)) for index in range(len(call.meta)))


@converts("aten.slice_scatter.default")
def slice_scatter(call: Call, x: Value, src: Value, dim: int, start: Any, end: Any, step: int) -> Value:
    axis = call.axis(dim, x)
    size = x.type.shape[axis]
    first = clamp_index(0 if start is None else start, size)
    last = dim_max(clamp_index(size if end is None else end, size), first)
    if step != 1:
        raise Refusal("slice_scatter with a step")
    return _write_between(call, x, call.cast(src, x.type.dtype), axis, first, last)


@converts("aten.select_scatter.default")
def select_scatter(call: Call, x: Value, src: Value, dim: int, index: Dim) -> Value:
    axis = call.axis(dim, x)
    if bounds(index)[1] < 0:
        index = x.type.shape[axis] + index
    shape = src.type.shape
    row = call(ops.Reshape(call.cast(src, x.type.dtype), shape=(*shape[:axis], 1, *shape[axis:])))
    return _write_between(call, x, row, axis, index, index + 1)


def _write_between(call: Call, x: Value, middle: Value, axis: int, first: Dim, last: Dim) -> Value:
    size = x.type.shape[axis]
    shape = (*x.type.shape[:axis], last - first, *x.type.shape[axis + 1 :])
    parts = [middle if middle.type.shape == shape else call(ops.Expand(middle, shape=shape))]
    if first != 0:
        parts.insert(0, call(ops.Slice(x, dim=axis, start=0, stop=first)))
    if last != size:
        parts.append(call(ops.Slice(x, dim=axis, start=last, stop=size)))
    return parts[0] if len(parts) == 1 else call(ops.Concat(tuple(parts), dim=axis))


@converts("aten.pad.default", "aten.constant_pad_nd.default")
def pad(call: Call, x: Value, pad: list[Any], mode: str = "constant", value: Any = None) -> Value:
    if any(not isinstance(width, int) for width in pad):
        raise Refusal("a padding width that depends on a size")
    before, after = [0] * x.type.rank, [0] * x.type.rank
    for index in range(len(pad) // 2):
        axis = x.type.rank - 1 - index
        before[axis], after[axis] = pad[2 * index], pad[2 * index + 1]
    for axis in range(x.type.rank):  # negative widths crop
        size = x.type.shape[axis]
        if before[axis] < 0 or after[axis] < 0:
            x = call(ops.Slice(x, dim=axis, start=max(-before[axis], 0), stop=size - max(-after[axis], 0)))
            before[axis], after[axis] = max(before[axis], 0), max(after[axis], 0)
    if not any(before) and not any(after):
        return x
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    fill = value if value is not None else 0
    return call(ops.Pad(x, before=tuple(before), after=tuple(after), mode=modes[mode], value=fill))


@converts("aten.repeat.default", "aten.tile.default")
def tile(call: Call, x: Value, repeats: list[Dim] | None = None, dims: list[Dim] | None = None) -> Value:
    counts: list[Dim] = list(repeats if repeats is not None else dims or [])
    counts = [*[1] * (x.type.rank - len(counts)), *counts]
    x = reshape_to(call, x, (*(1,) * (len(counts) - x.type.rank), *x.type.shape))
    return x if all(count == 1 for count in counts) else call(ops.Tile(x, repeats=tuple(counts)))


@converts("aten.flip.default")
def flip(call: Call, x: Value, dims: list[int]) -> Value:
    return call(ops.Flip(x, dims=call.axes(dims, x)))


@converts("aten.roll.default")
def roll(call: Call, x: Value, shifts: list[int], dims: list[int]) -> Value:
    if not dims:
        flat = reshape_to(call, x, (x.type.elements,))
        return reshape_to(call, call(ops.Roll(flat, shifts=tuple(shifts), dims=(0,))), x.type.shape)
    return call(ops.Roll(x, shifts=tuple(shifts), dims=tuple(call.axis(dim, x) for dim in dims)))


@converts("aten.tril.default", "aten.triu.default")
def triangle(call: Call, x: Value, diagonal: int) -> Value:
    return call((ops.Tril if "tril" in str(call.node.target) else ops.Triu)(x, diagonal=diagonal))


@converts("aten.meshgrid.indexing", "aten.meshgrid.default")
def meshgrid(call: Call, tensors: list[Value], indexing: str = "ij") -> tuple[Value, ...]:
    axes = list(range(len(tensors)))
    if indexing == "xy" and len(axes) >= 2:
        axes[:2] = [1, 0]
    grids = []
    for value, axis, shape in zip(tensors, axes, call.shapes(), strict=True):
        spread = tuple(value.type.elements if index == axis else 1 for index in range(len(tensors)))
        grids.append(call(ops.Expand(reshape_to(call, value, spread), shape=shape)))
    return tuple(grids)


@converts("aten.arange.default", "aten.arange.start", "aten.arange.start_step")
def arange(call: Call, end: Any, start: Any = 0, step: Any = 1, **_: Any) -> Value:
    if isinstance(start, int | float) and isinstance(step, int | float):
        return call(ops.Arange(length=call.shape[0], dtype=call.dtype, start=start, step=step))
    counting = call(ops.Arange(length=call.shape[0], dtype=call.dtype))
    scaled = call(ops.Mul(counting, call.operand(step, call.dtype))) if step != 1 else counting
    return call(ops.Add(scaled, call.operand(start, call.dtype)))


@converts("aten.full.default", "aten.full_like.default", "aten.new_full.default")
def full(call: Call, fill_value: Any, **_: Any) -> Value:
    if isinstance(fill_value, int | float | bool):
        return call(ops.Full(value=_scalar(fill_value, call), dtype=call.dtype, shape=call.shape))
    scalar = call.operand(fill_value, call.dtype)
    return call(ops.Expand(scalar, shape=call.shape)) if call.shape else scalar


@converts("aten.ones.default", "aten.ones_like.default", "aten.new_ones.default")
def ones(call: Call, **_: Any) -> Value:
    return call(ops.Full(value=_scalar(1, call), dtype=call.dtype, shape=call.shape))


@converts(
    "aten.zeros.default",
    "aten.zeros_like.default",
    "aten.new_zeros.default",
    "aten.empty.memory_format",
    "aten.empty_like.default",
    "aten.new_empty.default",
    "aten.empty_permuted.default",
)
def zeros(call: Call, **_: Any) -> Value:
    return call(ops.Full(value=_scalar(0, call), dtype=call.dtype, shape=call.shape))


def _scalar(value: float, call: Call) -> float | int | bool:
    if call.dtype.is_floating:
        return float(value)
    if math.isnan(value) or math.isinf(value):
        raise Refusal("an integer tensor filled with NaN or infinity")
    return int(value) if call.dtype.is_integer else bool(value)
