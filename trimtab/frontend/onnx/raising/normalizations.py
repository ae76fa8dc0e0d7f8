"""Layer norm and RMS norm, in the forms in which exporters and hand-written models spell them."""

from __future__ import annotations

from trimtab.frontend.onnx.raising.matching import (
    Site,
    either_way,
    plus_constant,
    produced_by,
    read_once,
    same,
    square_of,
)
from trimtab.ir.attributes import shortest_float
from trimtab.ir.core import Value
from trimtab.ir.ops import Add, Div, LayerNorm, Mean, Mul, Reciprocal, RmsNorm, Rsqrt, Sqrt, Sub


def raise_norm(op: Mul | Div, site: Site) -> Value | None:
    """``x / sqrt(mean(x^2) + eps)``: an RMS norm, or a layer norm where x is itself ``z - mean(z)``.

    The inverse root may be a division, a reciprocal or an rsqrt; eps stands inside the root, else the rewrite does
    not apply.
    """
    if isinstance(op, Div):
        candidates = [(op.x, _rooted(op.y))]
    else:
        candidates = [(x, _inverse_rooted(other, site)) for x, other in either_way(op)]
    for x, under_root in candidates:
        shifted = plus_constant(under_root, site) if under_root is not None else None
        if shifted is None or x.type != op.result.type:
            continue
        mean = produced_by(shifted[0], Mean)
        axes = _trailing(mean)
        squared = square_of(mean.x, site) if mean is not None else None
        if not axes or squared is None or not same(squared, x):
            continue
        eps = shortest_float(shifted[1])
        if eps < 0:
            continue
        centred = _centred(x, axes)
        if centred is not None:
            return site.insert(LayerNorm(centred, axes=axes, eps=eps))
        return site.insert(RmsNorm(x, axes=axes, eps=eps))
    return None


def raise_scale(op: Mul, site: Site) -> Value | None:
    """``norm(x) * weight``"""
    for normed, weight in either_way(op):
        norm = produced_by(normed, LayerNorm) or produced_by(normed, RmsNorm)
        if norm is None or norm.weight is not None or not read_once(normed) or normed.type != op.result.type:
            continue
        if isinstance(norm, LayerNorm) and norm.bias is not None:
            continue
        if weight.type.shape == norm.x.type.shape[-norm.axes :] and weight.type.dtype is normed.type.dtype:
            make = LayerNorm if isinstance(norm, LayerNorm) else RmsNorm
            return site.insert(make(norm.x, weight, axes=norm.axes, eps=norm.eps))
    return None


def raise_shift(op: Add, site: Site) -> Value | None:
    """``layer_norm(x) * weight + bias``"""
    for normed, bias in either_way(op):
        norm = produced_by(normed, LayerNorm)
        if norm is None or norm.weight is None or norm.bias is not None or not read_once(normed):
            continue
        if bias.type == norm.weight.type and bias.is_weight:
            return site.insert(LayerNorm(norm.x, norm.weight, bias, axes=norm.axes, eps=norm.eps))
    return None


def _rooted(value: Value) -> Value | None:
    root = produced_by(value, Sqrt)
    return None if root is None else root.x


def _inverse_rooted(value: Value, site: Site) -> Value | None:
    """v where ``value`` is ``1 / sqrt(v)``."""
    rsqrt, reciprocal, quotient = produced_by(value, Rsqrt), produced_by(value, Reciprocal), produced_by(value, Div)
    if rsqrt is not None:
        return rsqrt.x
    if reciprocal is not None:
        return _rooted(reciprocal.x)
    if quotient is not None and site.scalar(quotient.x) == 1.0:
        return _rooted(quotient.y)
    return None


def _trailing(mean: Mean | None) -> int:
    """How many of the last axes a mean reduces, keeping them; 0 when it reduces others."""
    if mean is None or not mean.keepdim:
        return 0
    rank = mean.x.type.rank
    return len(mean.dims) if tuple(sorted(mean.dims)) == tuple(range(rank - len(mean.dims), rank)) else 0


def _centred(x: Value, axes: int) -> Value | None:
    """z where x is ``z - mean(z)`` over the last ``axes`` axes."""
    difference = produced_by(x, Sub)
    if difference is None:
        return None
    mean = produced_by(difference.y, Mean)
    if mean is None or _trailing(mean) != axes or not same(mean.x, difference.x) or difference.x.type != x.type:
        return None
    return difference.x
