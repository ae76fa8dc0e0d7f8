"""Clean-up of permutes (transposes)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from trimtab.ir.builder import Builder
from trimtab.ir.core import Module, Value
from trimtab.ir.dims import Dim, mod, product
from trimtab.ir.op import Op
from trimtab.ir.ops import Permute, Reshape
from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.local_rewrite import rewrite_each


@dataclass(frozen=True)
class SimplifyPermutes(Pass):
    """Make permute(permute(x)) one permute, with reshapes in between too, and remove permutes that move nothing.

    Those that only move axes of size 1 become a reshape, which costs nothing. So does a way there and back such as
    ``[b, h, w, c] -> [b, c, h, w] -> [b, c, h*w] -> [b, h*w, c]``. A permute of a weight is a constant:
    ``fold-constants`` folds it.
    """

    name: ClassVar[str] = "simplify-permutes"
    contract: ClassVar[Contract] = Exact()

    def run(self, module: Module, ctx: Context) -> Changed:
        return rewrite_each(module, simplified_permute, self.name, ctx.rewrites)


def simplified_permute(op: Op, build: Builder) -> Value | None:
    """What to read instead of the result of a permute, None when it is as simple as can be, and for other ops."""
    if not isinstance(op, Permute):
        return None
    moves = _Moves(op.x.type.shape)
    moves.permute(op.dims)
    if moves.is_identity:
        return build(Reshape(op.x, shape=op.result.type.shape)) if op.x.type != op.result.type else op.x
    return next((value for steps in _chains(op) if (value := _in_one(op, steps, build)) is not None), None)


def _chains(last: Permute) -> Iterator[Sequence[Permute | Reshape]]:
    """The permutes and reshapes that end in ``last``, from one permute before it to all, the longest first."""
    steps: list[Permute | Reshape] = [last]
    found = []
    while isinstance(before := steps[0].x.producer, Permute | Reshape):
        steps.insert(0, before)
        if isinstance(before, Permute):
            found.append(tuple(steps))
    yield from reversed(found)


def _in_one(last: Permute, steps: Sequence[Permute | Reshape], build: Builder) -> Value | None:
    """The result of ``last`` with at most one permute for all of ``steps``; None where that is not possible, and where
    the others are needed anyway."""
    source, type = steps[0].x, last.result.type
    moves = _Moves(source.type.shape)
    for step in steps:
        if isinstance(step, Permute):
            moves.permute(step.dims)
        elif not moves.reshape(step.shape):
            return None
    if not moves.is_identity:
        if len(steps) == 2 and isinstance(steps[0], Permute):
            return build(Permute(source, dims=tuple(steps[0].dims[dim] for dim in last.dims)))
        if any(len(step.result.uses) > 1 for step in steps[:-1]):
            return None
        shape, dims = moves.axes()
        apart = build(Reshape(source, shape=shape)) if shape != source.type.shape else source
        source = build(Permute(apart, dims=dims))
    return source if source.type == type else build(Reshape(source, shape=type.shape))


class _Moves:
    """How the elements of a value of a given shape move under reshapes and permutes.

    Its axes are divided into factors, numbered in row-major order, as far as reshapes need it; what moves is factors.
    """

    def __init__(self, shape: Iterable[Dim]) -> None:
        self._sizes: list[Dim] = list(shape)  # by number
        self._groups: list[list[int]] = [[i] for i in range(len(self._sizes))]  # the factors of each present axis

    @property
    def is_identity(self) -> bool:
        """Whether the elements are in the order in which they were."""
        order = self._order()
        return order == sorted(order)

    def permute(self, dims: Sequence[int]) -> None:
        """Reorder the axes."""
        self._groups = [self._groups[dim] for dim in dims]

    def reshape(self, shape: Sequence[Dim]) -> bool:
        """Regroup the factors into axes of these sizes. Returns whether that is possible."""
        waiting = [factor for group in self._groups for factor in group if self._sizes[factor] != 1]
        groups: list[list[int]] = []
        for size in shape:
            group: list[int] = []
            while size != 1:
                if not waiting or 0 in (size, self._sizes[waiting[0]]):
                    return False
                factor = waiting.pop(0)
                if mod(size, self._sizes[factor]) == 0:
                    size = size // self._sizes[factor]
                elif mod(self._sizes[factor], size) == 0:
                    waiting = self._divide(factor, size, [*groups, group], waiting)
                    size = 1
                else:
                    return False
                group.append(factor)
            groups.append(group)
        self._groups = groups
        return not waiting

    def _divide(self, factor: int, size: Dim, done: Sequence[list[int]], waiting: Sequence[int]) -> list[int]:
        """Divide a factor into one of ``size`` and the rest, which gets the next number and is the next to wait."""
        self._sizes[factor : factor + 1] = [size, self._sizes[factor] // size]
        for group in done:
            group[:] = [other + (other > factor) for other in group]
        return [factor + 1, *(other + (other > factor) for other in waiting)]

    def axes(self) -> tuple[tuple[Dim, ...], tuple[int, ...]]:
        """Axes that move as wholes: their sizes before, and the order in which they are afterwards.

        They are the present axes, where each of these is in one piece in front of the moves, else as few as possible.
        """
        place = {factor: index for index, factor in enumerate(sorted(self._order()))}
        runs = [[f for f in group if self._sizes[f] != 1] for group in self._groups]
        if not all(run and [place[f] for f in run] == list(range(place[run[0]], place[run[-1]] + 1)) for run in runs):
            runs = []
            for factor in self._order():
                if runs and place[factor] == place[runs[-1][-1]] + 1:
                    runs[-1].append(factor)
                else:
                    runs.append([factor])
        before = sorted(runs)
        shape = tuple(product(self._sizes[factor] for factor in run) for run in before)
        return shape, tuple(before.index(run) for run in runs)

    def _order(self) -> list[int]:
        return [factor for group in self._groups for factor in group if self._sizes[factor] != 1]
