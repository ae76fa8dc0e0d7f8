"""Probabilities as powers of two or of its square root, and their product with integers by shifts.

Log2 codes c stand for ``2^-c``, codes of log-sqrt2 for ``2^(-c/2)``: those of Li et al., "RepQ-ViT: Scale
Reparameterization for Post-Training Quantization of Vision Transformers", 2023, with a largest probability of 1. With b
bits codes are 0 to ``2^b - 1``; the next one, ``2^b``, stands for 0.

``2^-c = 2^-T * (2^T >> c)``, and the integers ``2^T >> c`` are cut into bytes, each of which is a matrix to multiply
with the values. For log-sqrt2 the even and the odd codes are separate matrices, of which the other codes are 0:
``2^(-c/2)`` is ``2^-(c // 2)``, and for odd codes ``1/sqrt(2)`` times that. So each product is one of bytes, and exact.

T is the largest shift of a code that is not 0, at most 15, so that the code for 0 is shifted out. A row of them
sums to 1 before it is rounded in its exponents, so to ``sqrt(2)`` at most after it: ``2^15 sqrt(2) 127`` is below
``2^23``, and sums fit in 32 bits for any number of keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.dtypes import DType

Base = Literal["log2", "log-sqrt2"]


@dataclass(frozen=True)
class LogCodes:
    """Codes of one base and number of bits.

    Attributes:
        base: what code 1 stands for the reciprocal of: 2 or its square root.
        bits: 2 to 4 for log2, 2 to 5 for log-sqrt2.
    """

    base: Base
    bits: int

    @property
    def per_octave(self) -> int:
        """Codes in a factor of two."""
        return 1 if self.base == "log2" else 2

    @property
    def most_bits(self) -> int:
        return 3 + self.per_octave

    @property
    def zero_code(self) -> int:
        """What stands for 0."""
        return 1 << self.bits

    @property
    def top(self) -> int:
        """T: up to 15, so that the integers have at most two bytes."""
        return self.zero_code // self.per_octave - 1

    def of_probabilities(self, build: Builder, p: Value) -> Value:
        """``min(round(-log(p) / log(base)), 2^b)`` as u8, of f32 probabilities."""
        octaves = build.scalar(math.log(2) / self.per_octave, DType.F32)
        negative = build(ops.Neg(build(ops.Log(p))))
        return build(ops.Quantize(negative, octaves, dtype=DType.U8, low=0, high=self.zero_code))

    def planes(self, build: Builder, codes: Value) -> list[tuple[Value, float]]:
        """u8 matrices of the shape of ``codes`` with a factor each: the sum of the products is what the codes stand
        for."""
        wide = build(ops.Cast(codes, DType.I32))
        powers, parity = wide, None
        if self.per_octave == 2:
            one = build.scalar(1, DType.I32)
            powers, parity = build(ops.ShiftRight(wide, one)), build(ops.BitwiseAnd(wide, one))
        powers = build(ops.ShiftRight(build.scalar(1 << self.top, DType.I32), powers))
        if parity is None:
            return self._bytes(build, powers, 1.0)
        odd = build(ops.Mul(powers, parity))
        return self._bytes(build, build(ops.Sub(powers, odd)), 1.0) + self._bytes(build, odd, math.sqrt(0.5))

    def _bytes(self, build: Builder, powers: Value, factor: float) -> list[tuple[Value, float]]:
        if self.top < 8:
            return [(build(ops.Cast(powers, DType.U8)), factor * 2.0**-self.top)]
        high = build(ops.ShiftRight(powers, build.scalar(8, DType.I32)))
        low = build(ops.BitwiseAnd(powers, build.scalar(255, DType.I32)))
        return [
            (build(ops.Cast(high, DType.U8)), factor * 2.0**-7),
            (build(ops.Cast(low, DType.U8)), factor * 2.0**-15),
        ]
