"""How many tokens to remove after each layer: schedules of ToMe (arXiv 2210.09461) and PiToMe (arXiv 2405.16148), and
schedules that fit a budget of multiply-accumulates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import TypeAlias

from trimtab.errors import UsageError
from trimtab.passes.tokens.matching import most_merged

Removals: TypeAlias = tuple[int, ...]
"""How many tokens each layer removes."""


def constant(r: int, layers: int) -> Removals:
    """r in each layer."""
    return (r,) * layers


def linear(r: int, inflect: float, layers: int) -> Removals:
    """From ``int(r (1 - inflect))`` in the first layer to as much above r in the last one, in equal steps.

    ``inflect`` 1 begins with none and ends with 2r, -1 the other way round, and 0 is constant.

    Raises:
        UsageError: ``inflect`` is not between -1 and 1.
    """
    _check_slope(inflect)
    first = int(r * (1 - inflect))
    last = 2 * r - first
    step = (last - first) / (layers - 1) if layers > 1 else 0
    return tuple(int(first + step * layer) for layer in range(layers))


def slope(inflect: float, layers: int) -> tuple[float, ...]:
    """What each layer of a linear schedule removes, over their mean.

    Raises:
        UsageError: ``inflect`` is not between -1 and 1.
    """
    _check_slope(inflect)
    return tuple(1 + inflect * (2 * layer / (layers - 1) - 1) if layers > 1 else 1.0 for layer in range(layers))


def _check_slope(inflect: float) -> None:
    if not -1 <= inflect <= 1:
        raise UsageError(
            "a schedule cannot have this slope", values={"inflect": inflect}, rule="inflect lies between -1 and 1"
        )


def ratio(keep: float, tokens: int, protected: int, layers: int) -> Removals:
    """``floor(T - T keep)`` of the T tokens that each layer is given and that are not protected.

    Raises:
        UsageError: ``keep`` is not above 0 and at most 1.
    """
    if not 0 < keep <= 1:
        raise UsageError("a share of tokens cannot be kept", values={"keep": keep}, rule="0 < keep <= 1")
    removals = []
    for _ in range(layers):
        free = tokens - protected
        removals.append(min(math.floor(free - free * keep), most_merged(tokens, protected)))
        tokens -= removals[-1]
    return tuple(removals)


def in_proportion(total: int, weights: Sequence[float]) -> Removals:
    """``total`` tokens in all, layer by layer in proportion to ``weights``: constant where these are the same and it
    divides."""
    exact = [Fraction(weight) for weight in weights]
    scale = total / sum(exact)
    reached = [math.floor(sum(exact[:layer]) * scale) for layer in range(len(exact) + 1)]
    return tuple(after - before for before, after in pairwise(reached))


def clamped(removals: Sequence[int], tokens: int, protected: int) -> Removals:
    """``removals`` from ``tokens`` at first, each at most half of the unprotected tokens that are left by then."""
    result = []
    for wanted in removals:
        result.append(max(0, min(wanted, most_merged(tokens, protected))))
        tokens -= result[-1]
    return tuple(result)


def remaining(removals: Sequence[int], tokens: int) -> tuple[int, ...]:
    """The number of tokens before the first layer and after each one."""
    counts = [tokens]
    for removed in removals:
        counts.append(counts[-1] - removed)
    return tuple(counts)


def within_budget(
    share: float, tokens: int, protected: int, weights: Sequence[float], macs: Callable[[Removals], float]
) -> Removals:
    """The schedule that removes the fewest tokens with at most ``share`` of the multiply-accumulates.

    Args:
        share: of what the model takes without reduction.
        tokens: N before the first layer.
        protected: how many of them are never removed.
        weights: of each layer that may remove, in proportion to which it does.
        macs: what a model takes under a schedule; more tokens removed may not take more.

    Raises:
        UsageError: no schedule of this kind takes so little.
    """
    full = macs(constant(0, len(weights)))

    def schedule(total: int) -> Removals:
        return clamped(in_proportion(total, weights), tokens, protected)

    # Half of the tokens in every layer that removes any: from here on, more wanted changes nothing.
    some = [weight for weight in weights if weight]
    low, high = 0, math.ceil(tokens * sum(some) / min(some))
    least = macs(schedule(high))
    if least > share * full:
        raise UsageError(
            "the budget cannot be met",
            values={"budget": share, "least": f"{least / full:.3f}"},
            rule="at most half of the unprotected tokens go in each layer",
            fix=f"give a budget of {math.ceil(1000 * least / full) / 1000:.3f} or more, or reduce in more layers",
        )
    while low < high:
        middle = (low + high) // 2
        if macs(schedule(middle)) <= share * full:
            high = middle
        else:
            low = middle + 1
    return schedule(low)


def margins(layers: int, first: float = 0.9, fall: float = 0.9) -> tuple[float, ...]:
    """``first - fall l / L`` for the layers l = 0 .. L - 1: what PiToMe calls similar, less strict in deeper layers."""
    return tuple(first - fall * layer / layers for layer in range(layers))
