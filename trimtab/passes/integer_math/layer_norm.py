"""Layer normalisation in integers: FQ-ViT's integer layer norm.

With integers x of one scale, C channels, ``S = sum x`` and ``Q = sum x^2``, the normalised value is ``(C x - S) /
sqrt(C Q - S^2)``: the scale and both divisions by C cancel, so that the only roundings are those of the root and of one
reciprocal for each row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.dtypes import DType
from trimtab.passes.integer_math.fixed_point import encoded, integer
from trimtab.passes.integer_math.functions import square_root
from trimtab.passes.integer_math.power_factors import PowerFactors

if TYPE_CHECKING:
    import torch

NORMAL_UNIT = 2.0**-16
"""Of normalised values, which are below ``sqrt(C)`` either way."""
MOST_CHANNELS = 1 << 18
"""Sums of integers of 11 bits, times as many, fit in 32 bits, and those of squares in 64."""
_RECIPROCAL_BITS = 40
_MOST_EPS = 1 << 59
_FACTOR_BITS = 8
"""Of the multiplier of each channel, as in FQ-ViT."""


def normalised(build: Builder, x: Value, factors: PowerFactors, eps: float) -> Value:
    """Normalised rows in ``NORMAL_UNIT``, i32.

    Args:
        x: u8 ``[..., C]``, the integers that ``factors`` describe.
        eps: added to the variance.
    """
    last = x.type.rank - 1
    channels = len(factors.alphas)
    centred = build(ops.Cast(x, DType.I32))
    if factors.zero:
        centred = build(ops.Sub(centred, integer(build, factors.zero)))
    if bool(factors.alphas.any()):
        centred = build(ops.ShiftLeft(centred, build.weight("alphas", factors.alphas)))
    count = integer(build, channels)
    total = build(ops.Sum(centred, dims=(last,), keepdim=True))
    deviation = build(ops.Sub(build(ops.Mul(centred, count)), total))
    square = build(ops.Cast(build(ops.Mul(centred, centred)), DType.I64))
    squares = build(ops.Mul(build(ops.Sum(square, dims=(last,), keepdim=True)), integer(build, channels, DType.I64)))
    wide_total = build(ops.Cast(total, DType.I64))
    variance = build(ops.Sub(squares, build(ops.Mul(wide_total, wide_total))))
    added = min(round(eps * (channels / factors.unit) ** 2), _MOST_EPS)
    if added:
        variance = build(ops.Add(variance, integer(build, added, DType.I64)))
    root = square_root(build, variance)
    reciprocal = build(ops.Div(integer(build, 1 << _RECIPROCAL_BITS, DType.I64), root, rounding="floor"))
    product = build(ops.Mul(build(ops.Cast(deviation, DType.I64)), reciprocal))
    places = _RECIPROCAL_BITS - 16
    half = integer(build, 1 << (places - 1), DType.I64)
    shifted = build(ops.ShiftRight(build(ops.Add(product, half)), integer(build, places, DType.I64)))
    return build(ops.Cast(shifted, DType.I32))


def scaled(
    build: Builder, normal: Value, weight: torch.Tensor, bias: torch.Tensor, *,
    zero: int, dtype: DType, low: int, high: int,
) -> Value:  # fmt: skip
    """``clamp(round(normal * weight + bias) + zero, low, high)`` as ``dtype``, with multipliers of 8 bits.

    Args:
        normal: i32 ``[..., C]`` in ``NORMAL_UNIT``.
        weight, bias: float64 that broadcast to it, in units of the result.
    """
    import torch

    # The bias has as many places as the product, and both fit in 62 bits.
    longest = 60 - torch.frexp(bias).exponent.clamp(min=0)
    multiplier, shift = encoded(weight * NORMAL_UNIT, _FACTOR_BITS, longest)
    offset = torch.ldexp(bias, shift.double()).round().to(torch.int64) + (torch.ones_like(bias).long() << (shift - 1))
    product = build(ops.Mul(build(ops.Cast(normal, DType.I64)), build.weight("multiplier", multiplier.to(torch.int64))))
    total = build(ops.Add(product, build.weight("offset", offset)))
    y = build(ops.ShiftRight(total, build.weight("shift", shift.to(torch.int64))))
    y = build(ops.Clamp(build(ops.Add(y, integer(build, zero, DType.I64))), min=low, max=high))
    return build(ops.Cast(y, dtype))
