"""Real factors as integers, and numbers in i32 as multiples of a unit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from trimtab.errors import PassError
from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.dtypes import DType

if TYPE_CHECKING:
    import torch

MOST = (1 << 30) - 1
"""Numbers in i32 are clamped to this, so that the sum or difference of two of them fits."""
_LONGEST_SHIFT = 62


def encoded(
    factors: torch.Tensor, bits: int, longest: int | torch.Tensor = _LONGEST_SHIFT
) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers M and N with ``M 2^-N`` next to each of ``factors``.

    Args:
        factors: finite, float64, of any shape.
        bits: of M, 2 to 31: ``2^(bits - 1) <= |M| < 2^bits``, or fewer where N would be above ``longest``.
        longest: shift, at most 62, for all factors or for each.

    Returns:
        M and N, i32, N from 1 to 62.

    Raises:
        PassError: a factor is so large that N would be below 1.
    """
    import torch

    mantissas, exponents = torch.frexp(factors.double())
    limit = torch.as_tensor(longest, dtype=torch.int32)
    shifts = torch.minimum(torch.where(mantissas == 0, _LONGEST_SHIFT, bits - exponents), limit)
    integers = torch.ldexp(factors.double(), shifts.double()).round()
    # A mantissa that was rounded up to 1 has one bit too many.
    full = integers.abs() == 2.0**bits
    integers, shifts = torch.where(full, integers / 2, integers), shifts - full.int()
    if bool((shifts < 1).any()):
        raise PassError(
            "the scales of two tensors are too far apart for integers",
            values={"factor": float(factors.abs().max())},
            rule=f"from one scale to the next the factor is below 2^{bits - 1}",
            fix="calibrate with real inputs",
        )
    return integers.to(torch.int32), shifts.to(torch.int32)


def rescaled(
    build: Builder,
    x: Value,
    factor: float | torch.Tensor,
    *,
    zero: int = 0,
    dtype: DType = DType.I32,
    low: int = -MOST,
    high: int = MOST,
) -> Value:
    """``clamp(round(x * factor) + zero, low, high)`` as ``dtype``: one Requantize with a factor of 31 bits.

    Args:
        x: i32.
        factor: a number, or float64 that broadcasts to x.
    """
    import torch

    factors = torch.as_tensor(factor, dtype=torch.float64)
    multiplier, shift = encoded(factors, 31)
    wide = (build.weight("multiplier", multiplier), build.weight("shift", shift))
    return build(ops.Requantize(x, *wide, zero=zero, dtype=dtype, low=low, high=high))


def integer(build: Builder, value: int, dtype: DType = DType.I32) -> Value:
    """A constant."""
    return build.scalar(value, dtype)


def power_of_two_above(x: float) -> float:
    """The least power of two that is not below x, which is positive."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(1.0, exponent - (mantissa == 0.5))
