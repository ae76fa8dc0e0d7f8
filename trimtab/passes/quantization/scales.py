"""From ranges of real numbers to scales and zero points, and from weights to integers.

A real number r becomes ``q = clamp(round(r / scale) + zero, low, high)``. Fewer than 8 bits are computed in bytes with
narrower bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.ir.dtypes import DType

if TYPE_CHECKING:
    import torch

LEAST_SCALE = 2.0**-60
"""A scale is at least this, so that what is zero on all data has one."""
_SHRINKS = 40
"""Clipping ranges that are tried for a weight's row: down to half of its largest element."""


@dataclass(frozen=True)
class Integers:
    """The integers that numbers become.

    Attributes:
        dtype: u8 or i8.
        low, high: the least and the largest.
    """

    dtype: DType
    low: int
    high: int

    def unit(self, x: torch.Tensor) -> torch.Tensor:
        """Of symmetric integers: the scales of the rows of x ``[..., K]``, ``[..., 1]``."""
        return (x.abs().amax(-1, keepdim=True) / self.high).clamp(min=LEAST_SCALE)

    @staticmethod
    def affine(bits: int) -> Integers:
        """All integers of ``bits`` bits, for numbers with a zero point of their own."""
        return Integers(DType.U8, 0, 2**bits - 1)

    @staticmethod
    def symmetric(bits: int) -> Integers:
        """As many below zero as above it."""
        return Integers(DType.I8, 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)


@dataclass(frozen=True)
class Affine:
    """How numbers of a tensor become integers: one scale and one zero point for all of it."""

    scale: float
    zero: int
    integers: Integers

    @staticmethod
    def of_range(low: float | torch.Tensor, high: float | torch.Tensor, integers: Integers) -> Affine:
        """The finest scale whose integers reach from ``low`` to ``high``; zero is always one of them.

        The scale is a number of float32, as kernels read it.
        """
        import torch

        low, high = min(float(low), 0.0), max(float(high), 0.0)
        if integers.low < 0:
            widest = max(-low, high)
            low, high = -widest, widest
        steps = integers.high - integers.low
        scale = float(torch.tensor(max((high - low) / steps, LEAST_SCALE), dtype=torch.float32))
        zero = 0 if integers.low < 0 else min(max(integers.low - round(low / scale), integers.low), integers.high)
        return Affine(scale, zero, integers)

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """The numbers that the integers of x stand for."""
        return ((x / self.scale).round() + self.zero).clamp(
            self.integers.low, self.integers.high
        ).sub(self.zero) * self.scale  # fmt: skip

    def clipped(self, x: torch.Tensor) -> float:
        """The share of x outside of the range, by more than rounding moves it."""
        bounds = [(bound - self.zero) * self.scale for bound in (self.integers.low, self.integers.high)]
        outside = (x < bounds[0] - self.scale / 2) | (x > bounds[1] + self.scale / 2)
        return float(outside.double().mean()) if x.numel() else 0.0


def row_scales(weight: torch.Tensor, integers: Integers, search: bool) -> torch.Tensor:
    """A scale for each row of ``weight`` [N, ...], f32 [N].

    Args:
        weight: floating, its rows the output channels.
        integers: symmetric ones.
        search: try smaller clipping ranges, and take the one with the least squared error; else the row's largest
            element decides.
    """
    import torch

    rows = weight.double().flatten(1)
    largest = rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(rows.shape[0])
    best = (largest / integers.high).clamp(min=LEAST_SCALE).float()
    if not search:
        return best
    error = _squared_error(rows, best, integers)
    for step in range(1, _SHRINKS):
        tried = (largest * (1 - step / (2 * _SHRINKS)) / integers.high).clamp(min=LEAST_SCALE).float()
        found = _squared_error(rows, tried, integers)
        best, error = torch.where(found < error, tried, best), torch.minimum(found, error)
    return best


def quantized_rows(weight: torch.Tensor, scales: torch.Tensor, integers: Integers) -> torch.Tensor:
    """``weight`` [N, ...] in units of its rows' scales [N], as integers."""
    units = scales.double().reshape(-1, *[1] * (weight.dim() - 1))
    return (weight.double() / units).round().clamp(integers.low, integers.high).to(integers.dtype.to_torch())


def _squared_error(rows: torch.Tensor, scales: torch.Tensor, integers: Integers) -> torch.Tensor:
    units = scales.double()[:, None]
    return (((rows / units).round().clamp(integers.low, integers.high) * units) - rows).square().sum(1)
