"""Where to reduce tokens: how much each layer minds, measured on the user's data, and the most that a bound allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from trimtab.errors import UsageError
from trimtab.ir.core import Module
from trimtab.ir.interpreter import interpret
from trimtab.passes.base import Context
from trimtab.passes.tokens.matching import most_merged
from trimtab.passes.tokens.schedules import Removals, clamped

if TYPE_CHECKING:
    import torch

_PROBED = 8
"""Tokens, as a divisor of their number, that a layer removes alone when its sensitivity is measured."""
_LEAST = 0.1
"""What a layer's sensitivity counts at least, of the largest: a layer that minds nothing is not to give all tokens."""


class Drop:
    """How much worse a reduced module is than the original: by the user's metric, or by how far its outputs move.

    Args:
        module: the original.
        ctx: with a metric, whose fall is the drop, or calibration batches; the drop is then the mean, over batches and
            floating outputs, of the distance to the original's output relative to its length.
        name: of the pass, for messages.

    Raises:
        UsageError: there is neither.
    """

    def __init__(self, module: Module, ctx: Context, name: str) -> None:
        if ctx.metric is None and not ctx.calibration:
            raise UsageError(
                f"{name} cannot keep to max_drop",
                values={"metric": None, "calibration batches": 0},
                rule="how much a model loses is measured by a metric, or on calibration data",
                fix="give optimize() a metric or calibration batches, or budget= instead of max_drop=",
            )
        self._ctx = ctx
        self._score = ctx.metric(module) if ctx.metric is not None else 0.0
        self._outputs = [] if ctx.metric is not None else [interpret(module, batch) for batch in ctx.calibration]

    def __call__(self, reduced: Module) -> float:
        """The drop; not negative."""
        if self._ctx.metric is not None:
            return max(0.0, self._score - self._ctx.metric(reduced))
        moved = [
            _distance(before, after)
            for batch, outputs in zip(self._ctx.calibration, self._outputs, strict=True)
            for before, after in zip(outputs, interpret(reduced, batch), strict=True)
            if before.dtype.is_floating_point
        ]
        return sum(moved) / len(moved) if moved else 0.0


def _distance(before: torch.Tensor, after: torch.Tensor) -> float:
    length = float(before.double().norm())
    return float((after.double() - before.double()).norm()) / length if length else 0.0


def sensitivities(
    tokens: int, protected: int, layers: int, reduced: Callable[[Removals], Module], drop: Drop
) -> list[float]:
    """The drop when a layer alone removes an eighth of the tokens, for each of ``layers``."""
    probe = max(1, min((tokens - protected) // _PROBED, most_merged(tokens, protected)))
    return [
        drop(reduced(tuple(probe if layer == number else 0 for layer in range(layers)))) for number in range(layers)
    ]


def within_drop(
    bound: float,
    tokens: int,
    protected: int,
    weights: Sequence[float],
    reduced: Callable[[Removals], Module],
    drop: Drop,
) -> tuple[Removals, float]:
    """The schedule that removes the most tokens with a drop of at most ``bound``, and its drop.

    Args:
        bound: the largest drop.
        tokens: N before the first layer.
        protected: how many of them are never removed.
        weights: of each layer that may remove, in proportion to which it does; see :func:`worth`. How many tokens go in
            all is found by halving, with the drop measured for each number.
        reduced: makes the module under a schedule.
        drop: measures it.
    """
    scale = sum(weights)

    def schedule(total: int) -> Removals:
        return clamped([round(total * weight / scale) for weight in weights], tokens, protected)

    low, high, measured = 0, tokens - protected, 0.0
    while low < high:
        middle = (low + high + 1) // 2
        found = drop(reduced(schedule(middle)))
        if found <= bound:
            low, measured = middle, found
        else:
            high = middle - 1
    return schedule(low), measured


def worth(sensitivity: Sequence[float], macs: Callable[[Removals], float]) -> list[float]:
    """For each layer the multiply-accumulates that a token removed there saves, over the layer's sensitivity."""
    layers = range(len(sensitivity))
    least = _LEAST * max(sensitivity) or 1.0
    full = macs((0,) * len(sensitivity))
    saved = [full - macs(tuple(int(layer == number) for layer in layers)) for number in layers]
    return [work / max(value, least) for work, value in zip(saved, sensitivity, strict=True)]
