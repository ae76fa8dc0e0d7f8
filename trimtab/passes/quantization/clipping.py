"""Where to clip numbers of which there is a histogram: by percentile, least squared error, or least divergence.

Within a bin, numbers count as spread evenly. What is searched for holds zero, which quantized numbers represent
exactly, and reaches no further than the data unless it has to for that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from trimtab.passes.quantization.histogram import Histogram

Range: TypeAlias = tuple[float, float]
_Floats: TypeAlias = NDArray[np.float64]

_STEPS = 64
"""Ranges that are tried in each direction of a search."""
_ROUNDS = 3
"""Times that a search is repeated around the best range so far, each time 16 times finer."""
_LEAST_SHARE = 1 / 256
"""Of the range of the data, that a search tries first: outliers may be hundreds of times larger than all else."""
_ENTROPY_BINS = 2048
"""Of absolute values at most, as TensorRT has them."""


def percentile_range(histogram: Histogram, percentile: float, symmetric: bool) -> Range:
    """The range that ``percentile`` of 100 numbers are in; as many are below as above it, or, if ``symmetric``, it is
    the one around zero. Between two numbers it is interpolated."""
    if symmetric:
        most = max(-histogram.low, histogram.high)
        indices, counts, width = histogram.magnitudes()
        bound = _quantile(
            (indices * width).clip(max=most), ((indices + 1) * width).clip(max=most), counts, percentile / 100
        )
        return -bound, bound
    outside = (1 - percentile / 100) / 2
    left, right, counts = histogram.bins()
    return _quantile(left, right, counts, outside), _quantile(left, right, counts, 1 - outside)


def least_squares_range(histogram: Histogram, bits: int, symmetric: bool) -> Range:
    """The range that loses least when numbers are rounded to ``2^bits`` levels and clipped: by the sum of squares.

    Both ends are searched together as shares of the data's range, then each by itself.
    """
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if low == high:
        return low, high
    left, right, counts = histogram.bins()
    if symmetric:
        high = max(-low, high)
        low = -high

    def error(shares: tuple[float, float]) -> float:
        return _squared_error(left, right, counts, low * shares[0], high * shares[1], bits, symmetric)

    together = _search(lambda share: error((share, share)), _LEAST_SHARE, 1.0)
    if symmetric:
        return low * together, high * together
    below, above = together, together

    def error_of_below(share: float) -> float:
        return error((share, above))

    def error_of_above(share: float) -> float:
        return error((below, share))

    if low < 0 < high:
        for _ in range(2):
            below = _search(error_of_below, 0.0, 1.0, below)
            above = _search(error_of_above, 0.0, 1.0, above)
    return low * below, high * above


def least_divergence_range(histogram: Histogram, bits: int, symmetric: bool) -> Range:
    """The range around zero whose clipped and rounded distribution tells most about the numbers': with the least
    Kullback-Leibler divergence of the two.

    As S. Migacz, "8-bit Inference with TensorRT", 2017, of absolute values: 2^(bits - 1) levels, or 2^bits for numbers
    of one sign that need not be symmetric. Ranges that clip more than half of the numbers are left out:
    one that holds a single bin, with all else clipped to it, would keep everything of nothing.
    """
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if low == high:
        return low, high
    indices, filled, width = histogram.magnitudes()
    while indices[-1] >= _ENTROPY_BINS:
        indices, width = indices >> 1, 2 * width
    counts = np.zeros(int(indices[-1]) + 1, np.int64)
    np.add.at(counts, indices, filled)
    levels = 2 ** (bits - 1 if symmetric or low < 0 < high else bits)
    half = int(np.searchsorted(np.cumsum(counts), counts.sum() / 2)) + 1
    candidates = range(min(max(levels, half), len(counts)), len(counts) + 1)
    # Of equally good ranges the widest: it clips least.
    best = min(reversed(candidates), key=lambda length: _divergence(counts, length, levels))
    bound = best * width
    if symmetric:
        bound = min(bound, max(-low, high))
        return -bound, bound
    return max(low, -bound), min(high, bound)


def _quantile(left: _Floats, right: _Floats, counts: NDArray[np.int64], share: float) -> float:
    """The number that ``share`` of all are below. Of n numbers in order, number i has the share i / (n - 1), and shares
    between two have numbers between them: numpy's definition too. It is off by at most the width of a bin."""
    after = np.cumsum(counts)

    def number(position: int) -> float:
        if position in (0, after[-1] - 1):  # the ends of the data are known
            return float(left[0] if position == 0 else right[-1])
        bin = int(np.searchsorted(after, position, side="right"))
        within = (position - (after[bin] - counts[bin]) + 0.5) / counts[bin]
        return float(left[bin] + within * (right[bin] - left[bin]))

    position = share * float(after[-1] - 1)
    before = min(int(position), int(after[-1]) - 1)
    beyond = min(before + 1, int(after[-1]) - 1)
    return number(before) + (position - before) * (number(beyond) - number(before))


def _search(error: Callable[[float], float], low: float, high: float, known: float | None = None) -> float:
    """The share between ``low`` and ``high`` with the least error, first on a grid and then closer around the best."""
    best = high if known is None else known
    least = error(best)
    center, reach = (low + high) / 2, (high - low) / 2
    for _ in range(_ROUNDS):
        for share in np.linspace(max(low, center - reach), min(high, center + reach), _STEPS):
            found = error(float(share))
            if found < least:
                best, least = float(share), found
        center, reach = best, reach / 16
    return best


def _squared_error(
    left: _Floats, right: _Floats, counts: NDArray[np.int64], low: float, high: float, bits: int, symmetric: bool
) -> float:
    """The sum of squared errors when numbers in the bins are rounded to the levels between ``low`` and ``high``."""
    if symmetric:
        below = above = 2 ** (bits - 1) - 1
        step = high / above
    else:
        step = (high - low) / (2**bits - 1)
        below = round(-low / step) if step else 0
        above = 2**bits - 1 - below
    if not step:
        middle = (left + right) / 2
        return float(np.dot(counts, middle**2 + (right - left) ** 2 / 12))
    # In units of the step the levels are integers. A bin too narrow for the difference of integrals counts as a point.
    start, end = left / step, right / step
    width = end - start
    spread = width > 1e-9 * np.maximum(np.abs(start), 1)
    mean = np.square(start - np.clip(np.rint(start), -below, above))
    total = _integral(end, below, above) - _integral(start, below, above)
    np.divide(total, width, out=mean, where=spread)
    return float(np.dot(counts, mean) * step**2)


def _integral(x: _Floats, below: int, above: int) -> _Floats:
    """The integral from 0 to x of ``(t - clip(round(t), -below, above))^2``."""
    level = np.rint(x)
    np.clip(level, -below, above, out=level)
    off = x - level
    return level / 12 + off * off * off / 3


def _divergence(counts: NDArray[np.int64], length: int, levels: int) -> float:
    """The divergence of the first ``length`` bins, with all beyond in the last of them, from what ``levels`` keep."""
    inside = counts[:length].astype(np.float64)
    clipped = inside.copy()
    clipped[-1] += counts[length:].sum()
    starts = np.arange(levels) * length // levels if length > levels else np.arange(length)
    filled = inside > 0
    sizes = np.diff(np.append(starts, length))
    sums, used = np.add.reduceat(inside, starts), np.add.reduceat(filled.astype(np.float64), starts)
    kept = np.repeat(sums / np.maximum(used, 1), sizes) * filled
    if not kept.any():
        return np.inf
    # A bin that is filled by clipping alone has no counterpart; a share too small to matter keeps the logarithm finite.
    share, other = clipped / clipped.sum(), np.maximum(kept / kept.sum(), 1e-12)
    there = share > 0
    return float(np.dot(share[there], np.log(share[there] / other[there])))
