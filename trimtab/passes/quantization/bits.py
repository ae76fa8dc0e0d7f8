"""How many bits each layer has, and the search for the fewest layers that must have more than was wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bits:
    """Bits of a layer's weights and of its input; 0 and 0 for a layer in float, which is :data:`FLOAT`."""

    weights: int
    inputs: int

    def __str__(self) -> str:
        return f"W{self.weights}A{self.inputs}" if self.weights else "float"


FLOAT = Bits(0, 0)
_FULL = Bits(8, 8)


@dataclass(frozen=True)
class Choice:
    """What :func:`fewest_changes` found.

    Attributes:
        bits: of each layer.
        lost: with these.
        lost_at_first: with the bits that were wanted.
        alone: what each layer loses when no other one is quantized; empty when that was not asked.
    """

    bits: Sequence[Bits]
    lost: float
    lost_at_first: float
    alone: Sequence[float]


def fewest_changes(wanted: Sequence[Bits], loss: Callable[[Sequence[Bits]], float], bound: float) -> Choice:
    """More bits for the layers that lose most alone, until ``loss`` is at most ``bound``.

    First some layers get 8 bits instead of fewer; if that does not do for all, they are in float instead of 8 bits. How
    many is found by halving, so the loss is measured once for each layer and a few times more.

    Args:
        wanted: bits of each layer; those in float stay there.
        loss: measures a choice; 0 when all is in float.
        bound: the most that may be lost.
    """
    first = loss(wanted)
    if first <= bound:
        return Choice(wanted, first, first, [])
    count = len(wanted)
    alone = [
        0.0 if bits == FLOAT else loss([bits if n == layer else FLOAT for n in range(count)])
        for layer, bits in enumerate(wanted)
    ]
    by_loss = sorted((n for n in range(count) if wanted[n] != FLOAT), key=lambda n: -alone[n])

    def raised(base: Sequence[Bits], to: Bits, number: int) -> list[Bits]:
        most = set(by_loss[:number])
        return [to if n in most else bits for n, bits in enumerate(base)]

    bits, lost = list(wanted), first
    for level in (_FULL, FLOAT):
        if level is _FULL and all(its in (FLOAT, _FULL) for its in wanted):
            continue
        low, high = 1, len(by_loss)
        found = {len(by_loss): loss(raised(bits, level, len(by_loss)))}
        if found[high] > bound:
            bits, lost = raised(bits, level, high), found[high]
            continue
        while low < high:
            middle = (low + high) // 2
            found[middle] = loss(raised(bits, level, middle))
            low, high = (low, middle) if found[middle] <= bound else (middle + 1, high)
        return Choice(raised(bits, level, high), found[high], first, alone)
    return Choice(bits, lost, first, alone)
