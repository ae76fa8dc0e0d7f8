"""A histogram of a stream of numbers in constant memory, whose counts do not depend on the order of the stream.

Bins are ``[k w, (k + 1) w)`` for integers k and a width w that is a power of two. When data leaves the range, w
doubles and each two bins become one, so no count is ever estimated. The width in the end is the least with which the
range of the data fits: a function of its ends alone.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

BINS = 8192
"""At least half of them, less one, cover the range of the data."""
_PIECE = 1 << 20
"""Elements that are sorted into bins at a time: what is needed beside the data is a few times this."""
_LEAST_EXPONENT = -1022
"""Of the width: the least normal number."""
_INDEX_BITS = 50
"""Indices of bins stay below this power of two, so that they are exact in float64."""


class Histogram:
    """Counts of the numbers of a stream.

    Attributes:
        low, high: the least and the largest number so far; infinity and minus infinity before the first.
    """

    def __init__(self) -> None:
        self.low = math.inf
        self.high = -math.inf
        self._exponent = _LEAST_EXPONENT
        self._first = 0
        self._counts: NDArray[np.int64] = np.zeros(BINS, np.int64)

    def add(self, numbers: torch.Tensor) -> None:
        """Count ``numbers``: finite, of any shape and real type."""
        flat = numbers.detach().reshape(-1)
        if not len(flat):
            return
        ends = flat.aminmax()
        self._cover(float(ends.min), float(ends.max))
        for piece in flat.split(_PIECE):
            # A product with a power of two is exact, as the division by the width is.
            indices = np.floor(piece.double().numpy() * math.ldexp(1.0, -self._exponent)).astype(np.int64)
            self._counts += np.bincount(indices - self._first, minlength=BINS)

    @property
    def total(self) -> int:
        """How many numbers were counted."""
        return int(self._counts.sum())

    def bins(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
        """Left ends, right ends and counts of the bins that are not empty, in order; ends are cut to the data's."""
        filled = np.flatnonzero(self._counts)
        left = np.ldexp((filled + self._first).astype(np.float64), self._exponent)
        right = np.ldexp((filled + self._first + 1).astype(np.float64), self._exponent)
        return left.clip(self.low, self.high), right.clip(self.low, self.high), self._counts[filled]

    def magnitudes(self) -> tuple[NDArray[np.int64], NDArray[np.int64], float]:
        """Absolute values: indices and counts of the bins ``[k w, (k + 1) w)`` that are not empty, in order, and w."""
        filled = np.flatnonzero(self._counts)
        indices = filled + self._first
        folded, inverse = np.unique(np.where(indices < 0, -indices - 1, indices), return_inverse=True)
        counts = np.zeros(len(folded), np.int64)
        np.add.at(counts, inverse, self._counts[filled])
        return folded, counts, math.ldexp(1.0, self._exponent)

    def state(self) -> dict[str, NDArray[Any]]:
        """What :meth:`load` takes."""
        return {
            "ends": np.array([self.low, self.high]),
            "place": np.array([self._exponent, self._first], np.int64),
            "counts": self._counts.copy(),
        }

    def load(self, state: dict[str, NDArray[Any]]) -> None:
        """Become what :meth:`state` was taken of.

        Raises:
            KeyError, ValueError: it was taken of something else.
        """
        if np.shape(state["counts"]) != (BINS,):
            raise ValueError(f"a histogram has {BINS} bins")
        self.low, self.high = (float(end) for end in state["ends"])
        self._exponent, self._first = (int(number) for number in state["place"])
        self._counts = np.array(state["counts"], np.int64)

    def _cover(self, low: float, high: float) -> None:
        empty = self.low > self.high
        self.low, self.high = min(self.low, low), max(self.high, high)
        exponent = _fitting_exponent(self.low, self.high)
        first = math.floor(math.ldexp(self.low, -exponent))
        if not empty:
            filled = np.flatnonzero(self._counts)
            indices = (filled + self._first) >> min(exponent - self._exponent, 63)
            counts = np.zeros(BINS, np.int64)
            np.add.at(counts, indices - first, self._counts[filled])
            self._counts = counts
        self._exponent, self._first = exponent, first


def _fitting_exponent(low: float, high: float) -> int:
    """The least exponent of a width with which ``low`` and ``high`` lie less than ``BINS`` bins apart."""
    largest = max(abs(low), abs(high))
    exponent = max(_LEAST_EXPONENT, math.frexp(largest)[1] - _INDEX_BITS)
    spread = max(high / 2 - low / 2, 0.0)  # halves, because the difference of the largest numbers overflows
    if spread:
        exponent = max(exponent, math.frexp(spread)[1] - BINS.bit_length())
    while math.floor(math.ldexp(high, -exponent)) - math.floor(math.ldexp(low, -exponent)) >= BINS:
        exponent += 1
    return exponent
