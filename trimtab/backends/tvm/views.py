"""Reading a value where it lies in the memory of another one, instead of copying it first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from trimtab.ir import ops
from trimtab.ir.core import Value
from trimtab.ir.dims import Dim, mod, product


@dataclass(frozen=True)
class View:
    """Where the elements of a value are: axis i of it is axis ``order[i]`` of ``base`` reshaped to ``shape``.

    Attributes:
        base: the value in memory.
        shape: the shape under which it is read; it has the elements of ``base``.
        order: for each axis of the viewed value, the axis of ``shape``.
        starts: for each axis of ``shape``, the index of the view's first element.
        steps: for each axis of ``shape``, how far apart in it the view's elements are.
    """

    base: Value
    shape: tuple[Dim, ...]
    order: tuple[int, ...]
    starts: tuple[Dim, ...]
    steps: tuple[int, ...]

    @property
    def moves(self) -> bool:
        """Whether the view is more than the base under another shape."""
        in_place = self.order == tuple(range(len(self.order))) and all(start == 0 for start in self.starts)
        return not in_place or any(step != 1 for step in self.steps)


def view_of(value: Value) -> View:
    """The view through a permute, behind it a reshape, and behind that a slice: each may be absent.

    Heads that attention reads from a packed projection are ``permute(reshape(slice(packed)))``. Where they are a group
    of their own, which makes a copy, the view is of what the group reads.
    """
    group: Any = value.producer
    if isinstance(group, ops.Fused):
        inside = view_of(group.body.outputs[group.results.index(value)])
        given = dict(zip(group.body.inputs, group.inputs, strict=True))
        return replace(inside, base=given[inside.base]) if inside.base in given else _whole(value)
    order = tuple(range(value.type.rank))
    if isinstance(value.producer, ops.Permute):
        order, value = value.producer.dims, value.producer.x
    shape = value.type.shape
    found = _sliced(value, shape)
    if found is None and isinstance(value.producer, ops.Reshape):
        found = _sliced(value.producer.x, shape)
    if found is None:
        return _whole(value, order)
    base, axis, size, start, step = found
    starts = tuple(start if i == axis else 0 for i in range(len(shape)))
    steps = tuple(step if i == axis else 1 for i in range(len(shape)))
    return View(base, (*shape[:axis], size, *shape[axis + 1 :]), order, starts, steps)


def _whole(value: Value, order: tuple[int, ...] = ()) -> View:
    rank = value.type.rank
    return View(value, value.type.shape, order or tuple(range(rank)), (0,) * rank, (1,) * rank)


def _sliced(value: Value, shape: tuple[Dim, ...]) -> tuple[Value, int, Dim, Dim, int] | None:
    """``(x, axis, size, start, step)`` when ``value``, reshaped to ``shape``, is ``x[..., start::step, ...]`` along
    ``axis``, x having ``size`` there and being reshaped alike."""
    cut: Any = value.producer
    if not isinstance(cut, ops.Slice):
        return None
    axis, own, whole = cut.dim, value.type.shape, cut.x.type.shape[cut.dim]
    if shape[:axis] != own[:axis] or len(shape) == axis:
        return None
    if shape == own:
        return cut.x, axis, whole, cut.start, cut.step
    if cut.step != 1:
        return None
    # The reshape divides the axis into pieces of `piece` elements, and the slice has to start between two of them.
    pieces, width = shape[axis], own[axis]
    if not isinstance(pieces, int) or not isinstance(width, int) or not pieces or not width or width % pieces:
        return None
    piece = width // pieces
    if (
        product(shape[axis + 1 :]) != piece * product(own[axis + 1 :])
        or mod(whole, piece) != 0
        or mod(cut.start, piece)
    ):
        return None
    return cut.x, axis, whole // piece, cut.start // piece, 1
