"""What the raising of layer norm and of RMS norm have in common: the spellings of a mean and of an inverse root, and
the conditions on axes and affine parameters."""

from __future__ import annotations

from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.dtypes import DType
from trimtab.ir.ops import Reshape
from trimtab.ir.rewrite import Attr, Match, Pattern, Scalar, one_of, op


def mean(x: Pattern, dims: Attr) -> Pattern:
    """The mean over ``dims``, of a shape that broadcasts to x."""
    return op.mean(x, dims=dims, keepdim=True)


def gain(spread: Pattern, eps: Scalar, weight: Pattern) -> Pattern:
    """``1 / sqrt(spread + eps)``, which may be multiplied by the weight before it is applied."""
    inverse = (spread + eps) ** -0.5
    return one_of(inverse * weight, inverse)


def over_root(x: Pattern, spread: Pattern, eps: Scalar) -> Pattern:
    """``x / sqrt(spread + eps)`` as a quotient."""
    return x / (spread + eps) ** 0.5


def axes_problem(m: Match) -> str | None:
    """Why ``m.dims`` are not the last axes of ``m.x``, or the eps is none; None when all is well."""
    rank = m.x.type.rank
    if m.dims != tuple(range(rank - len(m.dims), rank)) or not m.dims:
        return f"the mean is over the axes {m.dims} of {m.x.type}, not over the last ones"
    return None if m.eps >= 0 else f"eps is {m.eps}, which is negative"


def parameter_problem(parameter: Value | None, x: Value, axes: int) -> str | None:
    """Why ``parameter`` is not one of a norm over the last ``axes`` axes of ``x``; None when it is absent or is."""
    if parameter is None:
        return None
    normalised, shape = x.type.shape[x.type.rank - axes :], parameter.type.shape
    extra = len(shape) - axes
    if extra < 0 or shape[extra:] != normalised or any(dim != 1 for dim in shape[:extra]):
        return f"{parameter.type} has not the shape of the last axes of {x.type}"
    return None if parameter.type.dtype is x.type.dtype else f"{parameter.type} has another dtype than {x.type}"


def parameter(build: Builder, value: Value | None, axes: int) -> Value | None:
    """``value`` without the axes of size 1 before the last ``axes`` ones."""
    if value is None or value.type.rank == axes:
        return value
    return build(Reshape(value, shape=value.type.shape[-axes:]))


def narrow_problem(m: Match) -> str | None:
    """Why the root is not a value in half precision that went through float32 and back; None when it is."""
    dtype, wide = m.x.type.dtype, m.wide.type.dtype
    if dtype not in (DType.F16, DType.BF16) or m.root.type.dtype is not dtype:
        return f"the casts go from {dtype} to {wide} and then to {m.root.type.dtype}, not from half precision and back"
    return None if wide is DType.F32 else f"the norm is computed in {wide}, not in f32"
