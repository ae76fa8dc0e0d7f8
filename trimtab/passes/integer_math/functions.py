"""Exponentials, logarithms, roots and GELU of integers.

Each is a composition of ops on i32 and i64, of which every backend computes the same integers. The largest errors that
their tests allow are stated at each.
"""

from __future__ import annotations

import math

from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.dtypes import DType
from trimtab.passes.integer_math.fixed_point import integer, rescaled

SCORE_UNIT = 2.0**-10
"""Of the numbers that an exponential is taken of."""
PROBABILITY_UNIT = 2.0**-30
"""Of the results of :func:`softmax`."""
_HALVINGS = 30
"""Exponentials below ``2^-30`` are 0: the n of FQ-ViT."""
_EXP = (0.35815147, 0.96963238, 1.0)
"""``e^r = 0.3585 r^2 + 0.9696 r + 1`` for r from ``-ln 2`` to 0."""
_ERF = (-0.2888, -1.769)
"""``erf(x) = sign(x) (a (min(|x|, -b) + b)^2 + 1)``."""
_ERF_BITS = 14
_GELU_BITS = 15
_ROOT_STEPS = 5


def exponential(build: Builder, x: Value) -> Value:
    """``e^x`` in units of about ``2^-30.5``, i32, for x that is not positive, i32 in ``SCORE_UNIT``.

    The i-exp of Kim et al., "I-BERT: Integer-only BERT Quantization", 2021, with the coefficients of FQ-ViT (Lin et
    al., "FQ-ViT: Post-Training Quantization for Fully Quantized Vision Transformer", 2022): ``x = -q ln 2 + r``, and a
    polynomial of r is shifted right by q. FQ-ViT shifts left by 30 - q, which is the same in units that need 64 bits.

    The result divided by that of 0 is off by at most 0.002.
    """
    a, b, c = _EXP
    octave = round(math.log(2) / SCORE_UNIT)
    clipped = build(ops.Clamp(x, min=-(_HALVINGS + 1) * octave))
    halvings = build(ops.Div(build(ops.Neg(clipped)), integer(build, octave), rounding="floor"))
    rest = build(ops.Add(clipped, build(ops.Mul(halvings, integer(build, octave)))))
    linear = build(ops.Add(rest, integer(build, round(b / a / SCORE_UNIT))))
    square = build(ops.Mul(linear, rest))
    polynomial = build(ops.Add(square, integer(build, round(c / a / SCORE_UNIT**2))))
    # The polynomial is below 2^21.5, so that nine more bits fit.
    return build(ops.ShiftRight(build(ops.ShiftLeft(polynomial, integer(build, 9))), halvings))


def softmax(build: Builder, x: Value, dim: int) -> Value:
    """Softmax along ``dim`` in ``PROBABILITY_UNIT``, i32, of x in ``SCORE_UNIT``, i32 below ``2^30`` either way.

    One division for each row: the exponentials are multiplied by the reciprocal of their sum, which has at least
    ``31 - log2(n)`` bits for rows of n. Probabilities are off by at most 0.001.
    """
    largest = build(ops.Amax(x, dims=(dim,), keepdim=True))
    wide = build(ops.Cast(exponential(build, build(ops.Sub(x, largest))), DType.I64))
    total = build(ops.Sum(wide, dims=(dim,), keepdim=True))
    # The largest element alone makes the sum more than 2^30, so that the reciprocal is below 2^32.
    reciprocal = build(ops.Div(integer(build, 1 << 62, DType.I64), total, rounding="floor"))
    shares = build(ops.ShiftRight(build(ops.Mul(wide, reciprocal)), integer(build, 32, DType.I64)))
    return build(ops.Cast(shares, DType.I32))


def binary_codes(build: Builder, p: Value, per_octave: int, most: int) -> Value:
    """``min(round(-per_octave log2(p)), most)``, i32, of p in ``PROBABILITY_UNIT``, i32 from 0 to ``2^30``; exact.

    The exponent is found by halving, and the mantissa is compared with where rounding changes: ``sqrt(2)``, or the
    fourth root of 2 and of 8. FQ-ViT compares with 1.5, which rounds the number and not its logarithm.

    Args:
        per_octave: 1 for codes of log2, 2 for log-sqrt2.
    """
    mantissa = p
    # Shifted left until bit 30 is set; what shifts add up to is -log2(p) rounded up.
    shifts = integer(build, 0)
    for step in (16, 8, 4, 2, 1):
        small = build(ops.Cast(build(ops.Lt(mantissa, integer(build, 1 << (31 - step)))), DType.I32))
        by = build(ops.Mul(small, integer(build, step))) if step > 1 else small
        mantissa = build(ops.ShiftLeft(mantissa, by))
        shifts = build(ops.Add(shifts, by))
    codes = build(ops.Mul(shifts, integer(build, per_octave)))
    for part in range(per_octave):
        edge = math.floor(2.0 ** (30 + (2 * part + 1) / (2 * per_octave))) + 1
        above = build(ops.Cast(build(ops.Ge(mantissa, integer(build, edge))), DType.I32))
        codes = build(ops.Sub(codes, above))
    codes = build(ops.Clamp(codes, min=0, max=most))
    some = build(ops.Gt(p, integer(build, 0)))
    return build(ops.Where(some, codes, integer(build, most)))


def square_root(build: Builder, x: Value) -> Value:
    """``floor(sqrt(x))`` or one more, i64, of x from 0 to ``2^60``, i64.

    Newton's iterations as in I-BERT, from a power of two that is above the root by less than twice: after five the
    error is below ``2^-32`` of the root.
    """
    bits, rest = integer(build, 0, DType.I64), x
    for step in (32, 16, 8, 4, 2, 1):
        big = build(ops.Cast(build(ops.Ge(rest, integer(build, 1 << step, DType.I64))), DType.I64))
        by = build(ops.Mul(big, integer(build, step, DType.I64))) if step > 1 else big
        rest = build(ops.ShiftRight(rest, by))
        bits = build(ops.Add(bits, by))
    half = build(ops.ShiftRight(bits, integer(build, 1, DType.I64)))
    root = build(ops.ShiftLeft(integer(build, 2, DType.I64), half))
    for _ in range(_ROOT_STEPS):
        quotient = build(ops.Div(x, root, rounding="floor"))
        root = build(ops.ShiftRight(build(ops.Add(root, quotient)), integer(build, 1, DType.I64)))
        root = build(ops.Clamp(root, min=1))
    return root


def gelu_unit(largest: float) -> float:
    """The unit for inputs of :func:`gelu` up to ``largest``: a power of two, so that they fit in 16 bits."""
    return max(2.0**-12, math.ldexp(1.0, math.frexp(largest)[1] - _GELU_BITS))


def gelu(build: Builder, x: Value, unit: float) -> tuple[Value, float]:
    """GELU of x in ``unit``, i32 of at most ``2^15`` either way, and the unit of the result, i32.

    The i-GELU of I-BERT, ``x (1 + erf(x / sqrt(2))) / 2`` with a polynomial of second order for erf. It is off by at
    most 0.019, nearly all of it the polynomial's.
    """
    a, b = _ERF
    end = round(-b * math.sqrt(2) / unit)
    magnitude = build(ops.Clamp(build(ops.Abs(x)), max=end))
    below = build(ops.Sub(magnitude, integer(build, end)))
    square = build(ops.Mul(below, below))
    one = 1 << _ERF_BITS
    missing = rescaled(build, square, -a / 2 * unit**2 * one)
    erf = build(ops.Sub(integer(build, one), missing))
    positive = build(ops.Ge(x, integer(build, 0)))
    erf = build(ops.Where(positive, erf, build(ops.Neg(erf))))
    # 16 bits times 15: the product fits in 32.
    product = build(ops.Mul(x, build(ops.Add(erf, integer(build, one)))))
    return product, unit * 2.0 ** -(_ERF_BITS + 1)
