"""Operators that cut out or add borders: slice, split, pad, triangles."""

from __future__ import annotations

from trimtab.frontend.onnx.node import Node
from trimtab.frontend.onnx.ops.unsigned import WIDENED
from trimtab.frontend.onnx.registry import onnx_op
from trimtab.ir import ops
from trimtab.ir.core import Value
from trimtab.ir.dims import Dim, as_symbol, bounds, dim_max, dim_min, floordiv
from trimtab.ir.dtypes import DType


@onnx_op("Slice", since=10)
def slice_by_inputs(node: Node) -> Value:
    starts, ends = node.dims(1, "starts"), node.dims(2, "ends")
    return _slice(node, starts, ends, node.ints_input(3, "axes"), node.ints_input(4, "steps"))


@onnx_op("Slice", since=1)
def slice_by_attributes(node: Node) -> Value:
    return _slice(node, node.ints_attr("starts"), node.ints_attr("ends"), node.ints_attr("axes", None), None)


def _slice(
    node: Node,
    starts: tuple[Dim, ...],
    ends: tuple[Dim, ...],
    axes: tuple[int, ...] | None,
    steps: tuple[int, ...] | None,
) -> Value:
    x = node.input(0)
    axes = node.axes_in(tuple(range(len(starts))) if axes is None else axes, x.type.rank)
    steps = (1,) * len(starts) if steps is None else steps
    if not len(starts) == len(ends) == len(axes) == len(steps) or 0 in steps:
        node.inconsistent("starts, ends, axes and non-zero steps go together", starts=starts, ends=ends, steps=steps)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        x = _slice_axis(node, x, axis, start, end, step)
    return x


def _slice_axis(node: Node, x: Value, axis: int, start: Dim, end: Dim, step: int) -> Value:
    size = x.type.shape[axis]
    if step > 0:
        first, last = _place(node, start, size), _place(node, end, size)
        last = _at_least(last, first)
        if first == 0 and last == size and step == 1:
            return x
        return node.emit(ops.Slice(x, dim=axis, start=first, stop=last, step=step))
    # Backwards: positions start, start + step, ... above end. Take them forwards, then flip.
    first, last = _place(node, start, size, -1), _place(node, end, size, -1)
    count = floordiv(_at_least(first - last, 0) - step - 1, -step)
    lowest = first + step * (count - 1)
    if count == 0:
        return node.emit(ops.Slice(x, dim=axis, start=0, stop=0))
    if not (lowest == 0 and first == size - 1 and step == -1):
        x = node.emit(ops.Slice(x, dim=axis, start=lowest, stop=first + 1, step=-step))
    return node.emit(ops.Flip(x, dims=(axis,)))


def _place(node: Node, position: Dim, size: Dim, lowest: int = 0) -> Dim:
    """A slice bound counted from the front and clamped to the axis, as ONNX defines.

    ``lowest`` is 0 and the upper limit ``size`` going forwards; -1 and ``size - 1`` going backwards.
    """
    low, high = bounds(position)
    if high < 0:
        if isinstance(position, int) and position < -(2**31) + 1:
            return lowest
        position = position + size
        return _at_least(position, lowest)
    if low < 0:
        node.refuse("a bound that may be negative or not", "give the axis a range with from_onnx(..., dims={...})",
                    bound=position)  # fmt: skip
    limit = size + lowest
    if bounds(limit - position)[0] >= 0:
        return position
    if bounds(position - limit)[0] >= 0:
        return limit
    if isinstance(position, int):
        if position >= 2**31 - 1:
            return limit
    elif (symbol := as_symbol(position)) is not None and isinstance(limit, int):
        node.emitter.suggest(symbol.name, limit)
    return dim_min(position, limit)


def _at_least(dim: Dim, low: Dim) -> Dim:
    if dim == low or bounds(dim - low)[0] >= 0:
        return dim
    return low if bounds(low - dim)[0] >= 0 else dim_max(dim, low)


@onnx_op("Split", since=2)
def split(node: Node) -> tuple[Value, ...]:
    x = node.input(0)
    axis = node.axis_in(node.int_attr("axis", 0), x.type.rank)
    size = x.type.shape[axis]
    sizes = node.ints_attr("split", None) if node.version < 13 else None
    if node.version >= 13 and node.optional(1) is not None:
        sizes = node.dims(1, "split")
    if sizes is None:
        parts = node.int_attr("num_outputs", len(node.outputs)) if node.version >= 18 else len(node.outputs)
        if parts < 1 or parts != len(node.outputs):
            node.inconsistent("one output per part", parts=parts, outputs=len(node.outputs))
        each = floordiv(size + parts - 1, parts)
        if isinstance(size, int) and size % parts == 0:
            sizes = (each,) * parts
        elif isinstance(size, int):
            sizes = (each,) * (parts - 1) + (size - each * (parts - 1),)
        else:
            exact = floordiv(size, parts)
            sizes = (exact,) * parts
            if exact * parts != size:
                node.refuse(
                    "an axis that may not divide evenly", "fix its size with from_onnx(..., dims={...})", size=size
                )
    if any(bounds(part)[0] < 0 for part in sizes):
        node.inconsistent("a part has a negative size", sizes=list(map(str, sizes)))
    return (x,) if len(sizes) == 1 else node.emit_all(ops.Split(x, dim=axis, sizes=tuple(sizes)))


_PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "edge", "wrap": "wrap"}


@onnx_op("Pad", since=2)
def pad(node: Node) -> Value:
    """Negative widths cut elements off."""
    x = node.input(0)
    rank = x.type.rank
    widths = node.ints_input(1, "pads") if node.version >= 11 else node.ints_attr("pads")
    axes = tuple(range(rank))
    if node.version >= 18 and (given := node.ints_input(3, "axes")) is not None:
        axes = node.axes_in(given, rank)
    if widths is None or len(widths) != 2 * len(axes):
        node.inconsistent("two widths per axis", pads=widths)
    value: float | int | bool = 0
    if node.version < 11:
        value = node.float_attr("value", 0.0)
    elif node.optional(2) is not None:
        value = node.tensor(2, "constant_value").reshape(-1)[0].item()
    before, after = [0] * rank, [0] * rank
    for place, axis in enumerate(axes):
        before[axis], after[axis] = widths[place], widths[place + len(axes)]
    mode = node.string_attr("mode", "constant")
    if mode not in _PAD_MODES:
        node.inconsistent("unknown mode", mode=mode)
    for axis in range(rank):
        low, high = min(before[axis], 0), min(after[axis], 0)
        if low or high:
            x = _slice_axis(node, x, axis, -low, x.type.shape[axis] + high, 1)
            before[axis], after[axis] = max(before[axis], 0), max(after[axis], 0)
    if not any(before) and not any(after):
        return x
    if x.type.dtype is DType.BOOL:
        value = bool(value)
    dtype = x.type.dtype
    if mode == "reflect":
        for axis in range(rank):
            if bounds(x.type.shape[axis])[0] == bounds(x.type.shape[axis])[1] == 0 and (before[axis] or after[axis]):
                node.inconsistent("an empty axis cannot be mirrored", axis=axis)
    wide = node.cast(x, DType.I64) if dtype in WIDENED else x
    padded = node.emit(ops.Pad(wide, before=tuple(before), after=tuple(after), mode=_PAD_MODES[mode], value=value))
    return node.cast(padded, dtype)


@onnx_op("Trilu", since=14)
def trilu(node: Node) -> Value:
    x = node.input(0)
    diagonal = (node.ints_input(1, "k") or (0,))[0]
    make = ops.Triu if node.flag("upper", True) else ops.Tril
    return node.emit(make(x, diagonal=diagonal))
