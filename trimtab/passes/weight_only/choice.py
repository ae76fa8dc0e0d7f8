"""Which layers keep more bits, so that a model loses no more than it may."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

FLOAT = 0
"""The bits of a layer that is left as it is."""
_SAFE = 8
"""The bits that layers fall back to before they are left in float."""


@dataclass(frozen=True)
class Choice:
    """The bits of each layer, ``FLOAT`` for none.

    Attributes:
        bits: of each layer.
        drop: what the model loses with them.
        alone: what it loses when a layer alone is quantized, for each layer.
    """

    bits: tuple[int, ...]
    drop: float
    alone: tuple[float, ...]


def choose(
    sizes: Sequence[int],
    bits: int,
    bound: float,
    quick: Callable[[Sequence[int]], float],
    drop: Callable[[Sequence[int]], float],
) -> Choice:
    """Bits for each layer with which no more than ``bound`` is lost: ``bits``, 8, or none.

    Layers are ranked by what the model loses when each alone has ``bits``, for each of its weights. Those that lose
    most take 8 bits, as few as will do; when not even 8 bits for all will do, those that lose most stay in float and
    the others take 8. How many is found by halving, so the measured drop need not be monotonic to stay in the bound.

    Args:
        sizes: the number of weights of each layer.
        bits: what is wanted.
        bound: the largest drop, not negative.
        quick: the drop with given bits for each layer, possibly by a cheaper method; called once for each layer.
        drop: the drop with given bits for each layer, as they will be.
    """
    layers = range(len(sizes))
    alone = tuple(quick([bits if layer == number else FLOAT for layer in layers]) for number in layers)
    ranked = sorted(layers, key=lambda layer: alone[layer] / sizes[layer])

    def mixed(count: int, low: int, high: int) -> tuple[int, ...]:
        """``low`` for the ``count`` layers that lose least, ``high`` for the others."""
        lowered = set(ranked[:count])
        return tuple(low if layer in lowered else high for layer in layers)

    for low, high in ((bits, _SAFE), (_SAFE, FLOAT)):
        if low == high:
            continue
        # The most first: that is what is hoped for.
        most = drop(mixed(len(sizes), low, high))
        if most <= bound:
            return Choice(mixed(len(sizes), low, high), most, alone)
        none = drop(mixed(0, low, high)) if high != FLOAT else 0.0
        if none > bound:
            continue
        fewest, measured, too_many = 0, none, len(sizes)
        while too_many - fewest > 1:
            middle = (fewest + too_many) // 2
            found = drop(mixed(middle, low, high))
            if found <= bound:
                fewest, measured = middle, found
            else:
                too_many = middle
        return Choice(mixed(fewest, low, high), measured, alone)
    raise AssertionError("no layer quantized loses nothing")
