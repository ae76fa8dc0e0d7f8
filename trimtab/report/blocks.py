"""Finds the repeated blocks of a graph, and the narrow places where a long list of ops may be cut.

The picture of a graph is a stack of short stretches of consecutive ops.  A stretch is drawn by itself, so a graph of
any length is laid out in linear time, and one that repeats a stretch is laid out once.  Both decisions are made here,
from structure alone: ops are compared by kind, attributes and types, and names play no part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Integers: TypeAlias = npt.NDArray[np.int64]

SHORTEST_BLOCK = 8
"""Ops that a repeated block has at least: shorter repetitions are seen without help."""
LONGEST_STRETCH = 64
"""Ops that a stretch has at most; the time of a layered layout grows faster than its number of ops."""
_WORD = 4  # ops compared to find candidates for the length of a block
_CANDIDATES = 24


class Section(NamedTuple):
    """``times`` blocks of ``length`` consecutive ops each, all alike; what does not repeat is a block that occurs once.

    Attributes:
        start: position of the first op.
        length: ops of one block.
        times: number of blocks.
        cuts: positions within a block at which a stretch begins, the first 0.
    """

    start: int
    length: int
    times: int
    cuts: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + self.length * self.times


def sections(kinds: Sequence[int], last_reads: Sequence[int]) -> list[Section]:
    """Divide the ops of a graph, in execution order.

    Args:
        kinds: a number for each op; two ops with the same number look the same.
        last_reads: for each op, the position of the last op that reads one of its results; its own position when
            nobody does, and ``len(kinds)`` when the graph returns it.
    """
    crossing = _crossing(last_reads)
    found: list[Section] = []
    ranges = [(0, len(kinds))]
    while ranges:
        start, stop = ranges.pop()
        repetition = _repetition(np.asarray(kinds[start:stop], np.int64))
        if repetition is None:
            if stop > start:
                found.append(Section(start, stop - start, 1, _cuts(crossing, start, stop - start)))
            continue
        first, length, covered = repetition
        # What repeats may be longer than a whole number of blocks: let the fewest values pass from block to block.
        places = range(start + first, start + first + covered % length + 1)
        begin = min(places, key=lambda place: crossing[place + length])
        section = Section(begin, length, covered // length, _cuts(crossing, begin, length))
        found.append(section)
        ranges += [(start, begin), (section.stop, stop)]
    return sorted(found)


def _crossing(last_reads: Sequence[int]) -> Integers:
    """For each position, the number of ops before it whose results are read at or after it."""
    change = np.zeros(len(last_reads) + 2, np.int64)
    for position, last in enumerate(last_reads):
        if last > position:
            change[position + 1] += 1
            change[last + 1] -= 1
    return np.cumsum(change)[: len(last_reads) + 1]


def _repetition(kinds: Integers) -> tuple[int, int, int] | None:
    """The repetition that covers the most ops, as its start, the length of a block, and the ops covered."""
    best: tuple[int, int, int] | None = None
    for length in _candidate_lengths(kinds):
        same = np.concatenate(([0], kinds[:-length] == kinds[length:], [0]))
        edges = np.flatnonzero(np.diff(same))
        starts, stops = edges[::2], edges[1::2]
        if not len(starts):
            continue
        longest = int(np.argmax(stops - starts))
        covered = int(stops[longest] - starts[longest]) + length
        if covered >= 2 * length and (best is None or covered > best[2]):
            best = int(starts[longest]), length, covered
    return best


def _candidate_lengths(kinds: Integers) -> list[int]:
    """Distances at which the same few ops occur again: the most frequent ones, in increasing order."""
    last_seen: dict[bytes, int] = {}
    distances: Counter[int] = Counter()
    for position in range(len(kinds) - _WORD + 1):
        word = kinds[position : position + _WORD].tobytes()
        if word in last_seen:
            distances[position - last_seen[word]] += 1
        last_seen[word] = position
    frequent = [length for length, _ in distances.most_common() if length >= SHORTEST_BLOCK]
    return sorted(frequent[:_CANDIDATES])


def _cuts(crossing: Integers, start: int, length: int) -> tuple[int, ...]:
    """Where to cut ``length`` ops into stretches: at the narrowest place of each window, the later one of two."""
    cuts = [0]
    while length - cuts[-1] > LONGEST_STRETCH:
        begin = cuts[-1] + LONGEST_STRETCH // 3
        window = crossing[start + begin : start + cuts[-1] + LONGEST_STRETCH + 1]
        cuts.append(begin + len(window) - 1 - int(np.argmin(window[::-1])))
    return tuple(cuts)
