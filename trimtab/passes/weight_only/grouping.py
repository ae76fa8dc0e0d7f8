"""Rounding of weights to groups of integers with a scale, and a zero point, for each group."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trimtab.ir.dtypes import DType

_LEAST_SCALE = float(torch.finfo(torch.float32).tiny)
"""Hardware may take smaller numbers for zero, and they have fewer digits. Groups that would need one become zeros."""
CLIPPING_RATIOS = tuple(1 - step / 40 for step in range(20))
"""Shares of a group's range that a search tries to keep: 20, from the whole down to a little more than half."""


@dataclass(frozen=True)
class Grid:
    """The integers that a weight is rounded to.

    A group w has ``s = max|w| / (2^(bits - 1) - 1)`` and integers from ``-2^(bits - 1)`` when it is symmetric; else
    ``s = (max w - min w) / (2^bits - 1)`` and ``z = round(-min w / s)`` with integers from 0, where the range is made
    to hold zero.

    Attributes:
        bits: of an integer, 2 to 8.
        group: weights along K that have one scale.
        symmetric: whether there are no zero points.
    """

    bits: int
    group: int
    symmetric: bool

    @property
    def low(self) -> int:
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def high(self) -> int:
        return self.low + (1 << self.bits) - 1

    @property
    def dtype(self) -> DType:
        """The type that integers are stored in."""
        if self.bits <= 4:
            return DType.I4 if self.symmetric else DType.U4
        return DType.I8 if self.symmetric else DType.U8


@dataclass(frozen=True)
class Scales:
    """What the integers of groups stand for: ``(q - zero) * scale``.

    Attributes:
        scale: numbers of float32, held in f64, of any shape ``[...]``.
        zero: integers, held in f64, of the same shape; all 0 in a symmetric grid.
    """

    scale: torch.Tensor
    zero: torch.Tensor


@dataclass(frozen=True)
class Quantized:
    """A weight as integers ``[N, K]``, held in f64, and their scales ``[N, K / group]``."""

    grid: Grid
    codes: torch.Tensor
    scales: Scales

    def values(self) -> torch.Tensor:
        """What the integers stand for: f64 ``[N, K]``."""
        groups = self.codes.unflatten(-1, (-1, self.grid.group))
        return dequantize(groups, self.scales).flatten(-2)


def fit(groups: torch.Tensor, grid: Grid, ratio: float = 1.0) -> Scales:
    """Scales for groups f64 ``[..., group]`` of which the share ``ratio`` of the range is kept: ``[...]``."""
    if grid.symmetric:
        scale = ratio * groups.abs().amax(-1) / grid.high
    else:
        least, most = (ratio * end for end in (groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)))
        scale = (most - least) / grid.high
    scale = scale.float().double()
    scale = torch.where(scale < _LEAST_SCALE, 1.0, scale)
    zero = torch.zeros_like(scale) if grid.symmetric else torch.round(-least / scale).clamp(grid.low, grid.high)
    return Scales(scale, zero)


def fit_clipped(groups: torch.Tensor, grid: Grid, products: torch.Tensor | None = None) -> Scales:
    """Scales with whichever of ``CLIPPING_RATIOS`` gives each group the least error; the largest of equal ones.

    Args:
        groups: f64 ``[..., group]``.
        grid: the integers.
        products: ``X^T X`` of the groups' inputs, f64 ``[G, group, group]`` for groups ``[N, G, group]``, or without G
            for both: the error is then that of the layer's result, and without it that of the weights.
    """
    best = fit(groups, grid)
    least = _group_error(groups, grid, best, products)
    for ratio in CLIPPING_RATIOS[1:]:
        scales = fit(groups, grid, ratio)
        error = _group_error(groups, grid, scales, products)
        better = error < least
        least = torch.where(better, error, least)
        best = Scales(torch.where(better, scales.scale, best.scale), torch.where(better, scales.zero, best.zero))
    return best


def quantize(groups: torch.Tensor, grid: Grid, scales: Scales) -> torch.Tensor:
    """The integers nearest to groups f64 ``[..., group]``, halves to even, as f64 of the same shape."""
    return (torch.round(groups / scales.scale[..., None]) + scales.zero[..., None]).clamp(grid.low, grid.high)


def dequantize(codes: torch.Tensor, scales: Scales) -> torch.Tensor:
    """What integers f64 ``[..., group]`` stand for, of the same shape."""
    return (codes - scales.zero[..., None]) * scales.scale[..., None]


def round_to_nearest(
    weight: torch.Tensor, grid: Grid, *, clip: bool = False, products: torch.Tensor | None = None
) -> Quantized:
    """A weight f64 ``[N, K]`` with every element rounded by itself.

    Args:
        weight: K is a multiple of the group.
        grid: the integers.
        clip: search for the clipping ratio of each group.
        products: for the search, f64 ``[K / group, group, group]``; see :func:`fit_clipped`.
    """
    groups = weight.unflatten(-1, (-1, grid.group))
    scales = fit_clipped(groups, grid, products) if clip else fit(groups, grid)
    return Quantized(grid, quantize(groups, grid, scales).flatten(-2), scales)


def _group_error(groups: torch.Tensor, grid: Grid, scales: Scales, products: torch.Tensor | None) -> torch.Tensor:
    difference = dequantize(quantize(groups, grid, scales), scales) - groups
    if products is None:
        return difference.square().sum(-1)
    if products.dim() == 2:
        return ((difference @ products) * difference).sum(-1)
    response = (difference.transpose(0, 1) @ products).transpose(0, 1)
    return (response * difference).sum(-1)
