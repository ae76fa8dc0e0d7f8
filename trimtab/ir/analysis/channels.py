"""Which channels of a value its readers see, behind ops that only move elements.

The result of a linear layer is reshaped into heads, permuted, split into q, k and v, and only then read by something
that computes.  To scale the channels that reach one reader, a pass must know which these are, and that no other
reader sees them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from trimtab.ir import ops
from trimtab.ir.core import Use, Value
from trimtab.ir.dims import Dim, mod
from trimtab.ir.op import Op


@dataclass(frozen=True)
class Channels:
    """Where the channels of a source are in a value that has some of its elements.

    The element at ``index`` is of channel ``offset + sum(index[axis] * strides[axis])``.

    Attributes:
        shape: the value's shape.
        strides: how far an axis moves through the channels; 0 when it does not, or has one element. Axes that do have a
            static size.
        offset: the channel of the first element.
    """

    shape: tuple[Dim, ...]
    strides: tuple[int, ...]
    offset: int = 0

    def __post_init__(self) -> None:
        moving = tuple(stride if size != 1 else 0 for size, stride in zip(self.shape, self.strides, strict=True))
        object.__setattr__(self, "strides", moving)

    @staticmethod
    def along(axis: int, value: Value) -> Channels:
        """The channels of a value whose axis ``axis`` they are."""
        shape = value.type.shape
        return Channels(shape, tuple(int(index == axis) for index in range(len(shape))))

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes along which the channel changes."""
        return tuple(axis for axis, stride in enumerate(self.strides) if stride)

    def meets(self, other: Channels) -> bool:
        """Whether a channel is among both."""
        return bool(torch.isin(self.numbers(), other.numbers()).any())

    def numbers(self) -> torch.Tensor:
        """The channel of each element, int64; an axis along which it does not change has size 1."""
        numbers = torch.full((1,) * len(self.shape), self.offset)
        for axis in self.axes:
            size = self.shape[axis]
            assert isinstance(size, int)
            along = [1] * len(self.shape)
            along[axis] = size
            numbers = numbers + (torch.arange(size) * self.strides[axis]).reshape(along)
        return numbers


def readers(source: Value, axis: int | Channels) -> Iterator[tuple[Use, Channels]]:
    """Every place that reads ``source``, directly or moved, and which of its channels it sees.

    The channels lie along ``axis``, or, as those of heads side by side, where :class:`Channels` says. An op that only
    moves elements is not such a place, unless it mixes channels with other axes.
    """
    waiting = deque([(source, axis if isinstance(axis, Channels) else Channels.along(axis, source))])
    while waiting:
        value, channels = waiting.popleft()
        for use in value.uses:
            moved = _moved(use, channels)
            if moved is None:
                yield use, channels
            else:
                waiting += zip(use.user.results, moved, strict=True)  # type: ignore[union-attr]  # graphs move nothing


def source_of(value: Value) -> Value:
    """The value whose elements ``value`` has: back through all ops that only move elements."""
    while type(value.producer) in _MOVES:
        value = value.producer.operands[0]  # type: ignore[union-attr]
    return value


def _moved(use: Use, channels: Channels) -> list[Channels] | None:
    move = _MOVES.get(type(use.user))  # type: ignore[arg-type]
    return move(use.user, channels) if move is not None and use.index == 0 else None


_Move: TypeAlias = Callable[[Any, Channels], "list[Channels] | None"]


def _permute(op: ops.Permute, channels: Channels) -> list[Channels]:
    return [Channels(op.result.type.shape, tuple(channels.strides[dim] for dim in op.dims), channels.offset)]


def _expand(op: ops.Expand, channels: Channels) -> list[Channels]:
    added = op.result.type.rank - len(channels.strides)
    return [Channels(op.result.type.shape, (0,) * added + channels.strides, channels.offset)]


def _slice(op: ops.Slice, channels: Channels) -> list[Channels] | None:
    offset = _offset_at(channels, op.dim, op.start)
    strides = tuple(stride * (op.step if axis == op.dim else 1) for axis, stride in enumerate(channels.strides))
    return None if offset is None else [Channels(op.result.type.shape, strides, offset)]


def _select(op: ops.Select, channels: Channels) -> list[Channels] | None:
    offset = _offset_at(channels, op.dim, op.index)
    strides = channels.strides[: op.dim] + channels.strides[op.dim + 1 :]
    return None if offset is None else [Channels(op.result.type.shape, strides, offset)]


def _split(op: ops.Split, channels: Channels) -> list[Channels] | None:
    parts: list[Channels] = []
    start: Dim = 0
    for size, result in zip(op.sizes, op.results, strict=True):
        offset = _offset_at(channels, op.dim, start)
        if offset is None:
            return None
        parts.append(Channels(result.type.shape, channels.strides, offset))
        start = start + size
    return parts


def _offset_at(channels: Channels, axis: int, start: Dim) -> int | None:
    """The channel of the first element from ``start`` of an axis on; None when it depends on a symbol."""
    if not channels.strides[axis]:
        return channels.offset
    return channels.offset + start * channels.strides[axis] if isinstance(start, int) else None


def _reordered(op: ops.Roll | ops.Flip, channels: Channels) -> list[Channels] | None:
    return [channels] if not any(channels.strides[dim] for dim in op.dims) else None


def _reshape(op: ops.Reshape, channels: Channels) -> list[Channels] | None:
    """Each new axis must lie inside a run of old axes through which the channels move evenly."""
    if 0 in op.shape:
        return None
    runs = _runs(channels)
    strides: list[int] = []
    inner: Dim = 1
    for size in reversed(op.shape):
        outer = inner * size
        run = next((run for run in runs if mod(inner, run.inner) == 0 and mod(run.outer, outer) == 0), None)
        if size == 1:
            strides.append(0)
        elif run is None:
            return None
        else:
            step = run.stride * (inner // run.inner)
            assert isinstance(step, int)  # the channels are an axis of static size
            strides.append(step)
        inner = outer
    return [Channels(op.shape, tuple(reversed(strides)), channels.offset)]


@dataclass(frozen=True)
class _Run:
    """Neighbouring axes that move evenly: elements ``inner`` apart differ by ``stride`` channels, up to ``outer``."""

    inner: Dim
    outer: Dim
    stride: int


def _runs(channels: Channels) -> list[_Run]:
    runs: list[_Run] = []
    inner: Dim = 1
    for size, stride in zip(reversed(channels.shape), reversed(channels.strides), strict=True):
        last = runs[-1] if runs else None
        if size == 1:
            continue
        outer = inner * size
        if last is not None and stride == last.stride * (last.outer // last.inner):
            runs[-1] = _Run(last.inner, outer, last.stride)
        else:
            runs.append(_Run(inner, outer, stride))
        inner = outer
    return runs


_MOVES: Mapping[type[Op], _Move] = {
    ops.Permute: _permute,
    ops.Reshape: _reshape,
    ops.Expand: _expand,
    ops.Slice: _slice,
    ops.Select: _select,
    ops.Split: _split,
    ops.Roll: _reordered,
    ops.Flip: _reordered,
}
