"""Where buffers lie in one block of memory, so that those needed at the same time do not overlap.

Finding the smallest block is NP-hard (dynamic storage allocation).  Several greedy orders are tried, among them those
of Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference" (2020); each is improved: the buffer
that ends up on top is placed first, and everything again (Joslin and Clements, "Squeaky Wheel Optimization", 1999),
until nothing is above the lower bound or the trials are used up.

Sizes may be expressions over symbols.  The search runs at sample sizes, and what is kept of it is only which of two
buffers that live at the same time lies below the other.  An offset is the largest end of the buffers below: that is a
plan for all sizes, and at the sample sizes it is no larger than the one found.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from typing import Any

from trimtab.errors import UsageError
from trimtab.ir.dims import Call, Dim, DimExpr, Monomial, bounds, dim_max, evaluate, floordiv, symbol, symbols_of

ALIGNMENT = 64
"""Bytes of which every offset is a multiple."""
_TRIALS = 100
_CANDIDATES = 8


@dataclass(frozen=True)
class Buffer:
    """Memory that is needed from step ``first`` to step ``last``, both included.

    Attributes:
        first, last: steps of the program, counted from any number.
        nbytes: size; never negative.
    """

    first: int
    last: int
    nbytes: Dim


@dataclass(frozen=True)
class MemoryPlan:
    """Where buffers lie.

    Attributes:
        offsets: bytes from the start of the block, multiples of :data:`ALIGNMENT`, in the order of the buffers.
        nbytes: size of the block.
    """

    offsets: tuple[Dim, ...]
    nbytes: Dim


def plan_memory(buffers: Sequence[Buffer], samples: Sequence[Mapping[str, int]] = ({},)) -> MemoryPlan:
    """A plan for ``buffers`` that holds for all values of their symbols.

    Args:
        buffers: what to place.
        samples: values of the symbols at which the block should be small.
    """
    if not buffers:
        return MemoryPlan((), 0)
    aligned = [_align(buffer.nbytes) for buffer in buffers]
    neighbours = _neighbours(buffers)
    cases = [[int(evaluate(nbytes, sizes)) for nbytes in aligned] for sizes in samples]
    live = [_live_bytes_of(buffers, case) for case in cases]

    def excess(order: Sequence[int]) -> float:
        """How far the block of an order is above the bound, in the worst case."""
        heights = (max(_ends(_stack(order, case, neighbours), case)) for case in cases)
        return max(height / bound for height, bound in zip(heights, live, strict=True) if bound)

    found = [_search(buffers, case, bound, neighbours) for case, bound in zip(cases, live, strict=True)]
    order = min(found, key=excess) if any(live) else found[0]
    starts = _stack_symbolic(order, aligned, neighbours)
    if starts is None:
        aligned = [_align_terms(buffer.nbytes) for buffer in buffers]
        starts = _stack_symbolic(order, aligned, neighbours, above=True)
        assert starts is not None
    ends = {start + nbytes for several, nbytes in zip(starts, aligned, strict=True) for start in several}
    return MemoryPlan(tuple(map(largest, starts)), largest(_largest_ones(ends)))


def live_bytes(buffers: Sequence[Buffer]) -> Dim:
    """The most bytes that are needed at one step: no plan takes less."""
    return largest(_live_at_steps(buffers))


def largest(dims: Iterable[Dim]) -> Dim:
    """The largest of sizes, or something larger where that cannot be written down; 0 when there are none."""
    nothing: Dim = 0
    return reduce(_larger, _largest_ones(dims), nothing)


def _larger(one: Dim, other: Dim) -> Dim:
    try:
        return dim_max(one, other)
    except UsageError:  # a maximum of too many sizes that cannot be compared: neither is negative
        return one + other


def _align(nbytes: Dim) -> Dim:
    return floordiv(nbytes + (ALIGNMENT - 1), ALIGNMENT) * ALIGNMENT


def _align_terms(nbytes: Dim) -> Dim:
    """At least ``nbytes``, and a multiple of the alignment in which every coefficient is one, so that two are compared
    by their coefficients: the divisions of :func:`_align` are all different for many small tensors."""
    if isinstance(nbytes, int) or any(isinstance(atom, Call) for monomial, _ in nbytes.terms for atom, _ in monomial):
        return _align(nbytes)
    return _polynomial({monomial: -(-number // ALIGNMENT) * ALIGNMENT for monomial, number in nbytes.terms})


def _polynomial(coefficients: Mapping[Monomial, int]) -> Dim:
    total: Dim = 0
    for monomial, number in coefficients.items():
        total = total + (DimExpr(((monomial, number),)) if monomial and number else number)
    return total


def _neighbours(buffers: Sequence[Buffer]) -> list[list[int]]:
    """For each buffer those that are needed at the same time."""
    found: list[list[int]] = [[] for _ in buffers]
    live: list[int] = []
    for number in sorted(range(len(buffers)), key=lambda n: buffers[n].first):
        live = [other for other in live if buffers[other].last >= buffers[number].first]
        for other in live:
            found[other].append(number)
            found[number].append(other)
        live.append(number)
    return found


def _live_bytes_of(buffers: Sequence[Buffer], sizes: Sequence[int]) -> int:
    sized = [replace(buffer, nbytes=size) for buffer, size in zip(buffers, sizes, strict=True)]
    return max(map(int, _live_at_steps(sized)), default=0)  # type: ignore[arg-type]


def _live_at_steps(buffers: Sequence[Buffer]) -> set[Dim]:
    """Bytes that are needed at one step, for every step."""
    starts: dict[int, list[Dim]] = {}
    ends: dict[int, list[Dim]] = {}
    for buffer in buffers:
        starts.setdefault(buffer.first, []).append(buffer.nbytes)
        ends.setdefault(buffer.last, []).append(buffer.nbytes)
    live: Dim = 0
    found: set[Dim] = set()
    for step in sorted(starts.keys() | ends.keys()):
        live = sum(starts.get(step, ()), live)
        found.add(live)
        live = live - sum(ends.get(step, ()), 0)
    return found


def _search(
    buffers: Sequence[Buffer], sizes: Sequence[int], bound: int, neighbours: Sequence[Sequence[int]]
) -> list[int]:
    """An order from the bottom to the top in which buffers of these sizes take little."""
    lowest, best = -1, [0] * len(sizes)
    for order in _orders(buffers, sizes):
        for _ in range(_TRIALS):
            places = _place(order, sizes, neighbours)
            ends = _ends(places, sizes)
            top = max(order, key=ends.__getitem__)
            if lowest < 0 or ends[top] < lowest:
                lowest, best = ends[top], places
            if lowest <= bound:
                break
            order.remove(top)
            order.insert(0, top)
    return sorted(range(len(sizes)), key=lambda n: (best[n], sizes[n]))


def _stack(order: Sequence[int], sizes: Sequence[int], neighbours: Sequence[Sequence[int]]) -> list[int]:
    """Offsets when every buffer lies on top of those of its neighbours that come before it."""
    offsets = [-1] * len(sizes)
    for number in order:
        below = (other for other in neighbours[number] if offsets[other] >= 0)
        offsets[number] = max((offsets[other] + sizes[other] for other in below), default=0)
    return offsets


def _stack_symbolic(
    order: Sequence[int], sizes: Sequence[Dim], neighbours: Sequence[Sequence[int]], *, above: bool = False
) -> list[list[Dim]] | None:
    """The same for sizes with symbols: an offset is the largest of a list, whose elements have no maximum in them.

    Where a list gets long, the answer is None, or with ``above`` something above all in it stands for it.
    """
    offsets: list[list[Dim]] = [[] for _ in sizes]
    for number in order:
        kept = _not_below({start + sizes[other] for other in neighbours[number] for start in offsets[other]})
        if len(kept) > _CANDIDATES:
            if not above:
                return None
            kept = [_above(kept)]
        offsets[number] = kept or [0]
    return offsets


def _largest_ones(dims: Iterable[Dim]) -> list[Dim]:
    """Those that are not always below another one; one that is above all if they are many."""
    kept = _not_below(dims)
    return kept if len(kept) <= _CANDIDATES else [_above(kept)]


def _not_below(dims: Iterable[Dim]) -> list[Dim]:
    kept: list[Dim] = []
    for dim in sorted(set(dims), key=str):
        if not any(_never_negative(other - dim) for other in kept):
            kept = [other for other in kept if not _never_negative(dim - other)] + [dim]
    return kept


def _above(dims: Iterable[Dim]) -> Dim:
    """A size that is at least each of ``dims``, which are not negative: the largest coefficient of every product."""
    most: dict[Monomial, int] = {}
    for dim in dims:
        for monomial, number in dim.terms if isinstance(dim, DimExpr) else (((), dim),):
            most[monomial] = max(most.get(monomial, 0), number)
    return _polynomial(most)


@lru_cache(maxsize=1 << 14)
def _never_negative(dim: Dim) -> bool:
    """Whether no coefficient is negative when symbols are counted from their least value.

    :func:`trimtab.ir.dims.bounds` sees more and takes longer, which tells where thousands of sums are compared.
    """
    least = {found.name: found.min + symbol(found.name, 0) for found in symbols_of(dim)}
    if isinstance(dim, int) or any(isinstance(atom, Call) for monomial, _ in dim.terms for atom, _ in monomial):
        shifted = dim
    else:
        shifted = evaluate(dim, least)
    if isinstance(shifted, int):
        return shifted >= 0
    return all(coefficient >= 0 for _, coefficient in shifted.terms) and bounds(shifted)[0] >= 0


def _ends(offsets: Sequence[Any], sizes: Sequence[Any]) -> list[Any]:
    return [offset + size for offset, size in zip(offsets, sizes, strict=True)]


def _orders(buffers: Sequence[Buffer], sizes: Sequence[int]) -> list[list[int]]:
    """Orders in which to place buffers."""
    breadth = _breadths(buffers, sizes)
    steps = [buffer.last - buffer.first + 1 for buffer in buffers]
    keys: list[Callable[[int], tuple[int, ...]]] = [
        lambda n: (-sizes[n], -steps[n]),
        lambda n: (-breadth[n], -sizes[n]),
        lambda n: (-steps[n], -sizes[n]),
        lambda n: (-sizes[n] * steps[n],),
        lambda n: (buffers[n].first, -sizes[n]),
        lambda n: (-buffers[n].last, -sizes[n]),
    ]
    return [sorted(range(len(buffers)), key=key) for key in keys]


def _breadths(buffers: Sequence[Buffer], sizes: Sequence[int]) -> list[int]:
    """For each buffer the most bytes that are needed at one of its steps."""
    steps = sorted({b.first for b in buffers} | {b.last for b in buffers})
    index = {step: number for number, step in enumerate(steps)}
    live = [0] * len(steps)
    for buffer, size in zip(buffers, sizes, strict=True):
        for number in range(index[buffer.first], index[buffer.last] + 1):
            live[number] += size
    return [max(live[index[b.first] : index[b.last] + 1]) for b in buffers]


def _place(order: Sequence[int], sizes: Sequence[int], neighbours: Sequence[Sequence[int]]) -> list[int]:
    """Offsets of buffers placed in this order, each in the smallest gap between its neighbours that it fits."""
    places = [-1] * len(sizes)
    for number in order:
        taken: list[tuple[int, int]] = []
        for other in neighbours[number]:
            if places[other] >= 0:
                insort(taken, (places[other], places[other] + sizes[other]))
        best, gap, end = -1, -1, 0
        for start, stop in taken:
            if start - end >= sizes[number] and (gap < 0 or start - end < gap):
                best, gap = end, start - end
            end = max(end, stop)
        places[number] = best if gap >= 0 else end
    return places
