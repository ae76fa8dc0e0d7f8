"""Where to reduce tokens: how much each layer minds, measured on the user's data, and the most that a bound allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trimtab.ir.core import Module
from trimtab.passes.drop import Drop
from trimtab.passes.tokens.matching import most_merged
from trimtab.passes.tokens.schedules import Removals, clamped

_PROBED = 8
"""Tokens, as a divisor of their number, that a layer removes alone when its sensitivity is measured."""
_LEAST = 0.1
"""What a layer's sensitivity counts at least, of the largest: a layer that minds nothing is not to give all tokens."""


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
