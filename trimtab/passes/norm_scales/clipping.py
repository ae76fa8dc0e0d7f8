"""Lower and upper bounds of each channel for a quantizer of few bits, by a search on a grid."""

from __future__ import annotations

import torch

from trimtab.passes.norm_scales.statistics import Statistics

_RATIOS = tuple(1 - step / 20 for step in range(12))


def clipped_ranges(found: Statistics, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The bounds f64 ``[C]`` with the least squared error of each channel, rounded to ``2^bits`` levels between them.

    A channel with the mean m on the sampled rows is tried between ``m - a (m - min)`` and ``m + b (max - m)``, for
    all pairs of a and b among 1, 0.95, ... 0.45; numbers outside go to the nearer bound. The dual clipping of RepQuant
    (Li et al., arXiv 2402.05628) learns such a pair for each channel by gradients. The error of one channel does not
    depend on the bounds of another, so the grid gives the best of its pairs for all channels, without a rate or steps
    to choose.

    Args:
        found: with rows.
        bits: of the quantizer.
    """
    rows = found.rows.double()
    mean = rows.mean(0)
    best = torch.full_like(mean, float("inf"))
    low, high = found.low.clone(), found.high.clone()
    for below in _RATIOS:
        least = mean - below * (mean - found.low)
        for above in _RATIOS:
            most = mean + above * (found.high - mean)
            error = _error(rows, least, most, bits)
            better = error < best
            best = torch.where(better, error, best)
            low, high = torch.where(better, least, low), torch.where(better, most, high)
    return low, high


def _error(rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bits: int) -> torch.Tensor:
    """The squared error of each channel of ``rows`` ``[n, C]`` between the bounds."""
    levels = 2**bits - 1
    step = ((high - low) / levels).clamp(min=torch.finfo(rows.dtype).tiny)
    codes = torch.round((rows - low) / step).clamp_(0, levels)
    error: torch.Tensor = (codes * step + low - rows).square_().sum(0)
    return error
