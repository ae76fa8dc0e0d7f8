"""Folding of constant factors into weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.rewrite import Attr, Match, Pattern, Rule, Scalar, Var, maybe, one_of, op
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.folding import Affine, Site, fold_after, number, producer, reason
from trimtab.passes.rewrite_pass import RewritePass


@dataclass(frozen=True)
class FoldScale(RewritePass):
    """Fold constant factors of linear layers and convolutions, and the scale of attention, into weights.

    The result may have been reshaped, permuted or split on its way to the factor, but nothing else may see the same
    channels of it, and the weights must have no other reader. The scale of attention goes into the layer that makes
    the queries, and becomes 1.
    """

    name: ClassVar[str] = "fold-scale"
    contract: ClassVar[Contract] = Exact(rounding=True)

    def rules(self) -> Sequence[Rule]:
        return (ScaledResult(), ScaledQuery())


class ScaledResult(Rule):
    """``layer(x) * c`` with a number c."""

    def pattern(self, y: Var, c: Scalar) -> Pattern:
        return y * c

    def check(self, m: Match) -> str | None:
        return reason(_layer(m, m.y, m.c))

    def rewrite(self, m: Match, build: Builder) -> Value:
        return _scaled(m, build, m.y, m.c)


class ScaledQuery(Rule):
    """``attention(layer(x), k, v)`` with a scale that is not 1, where a rotary embedding may turn the queries."""

    def pattern(self, q: Var, cos: Var, sin: Var, k: Var, v: Var, mask: Var, causal: Attr) -> Pattern:
        turned = op.rotary_embedding(q, cos, sin).bind("turned")
        return op.attention(one_of(turned, q), k, v, maybe(mask), scale=lambda scale: scale != 1, causal=causal)

    def check(self, m: Match) -> str | None:
        return reason(_layer(m, m.q, _attention(m).scale))

    def rewrite(self, m: Match, build: Builder) -> Value:
        q = _scaled(m, build, m.q, _attention(m).scale)
        return build(ops.Attention(m.turned or q, m.k, m.v, m.mask, scale=1.0, causal=m.causal))


def _attention(m: Match) -> ops.Attention:
    attention = m.root.producer
    assert isinstance(attention, ops.Attention)
    return attention


def _layer(m: Match, y: Value, factor: float) -> Site | str:
    """The layer that makes ``y``, or why ``factor`` cannot be folded into it."""
    if not math.isfinite(factor):
        return f"the factor is {factor}"
    # A power of two moves the exponent alone, as does 1/8, the scale of attention with heads of 64.
    exact = abs(math.frexp(factor)[0]) == 0.5 and abs(factor) <= 1
    return producer(m, y, reader=next(op for op in m.ops if y in op.operands), exact=exact)


def _scaled(m: Match, build: Builder, y: Value, factor: float) -> Value:
    layer = _layer(m, y, factor)
    assert isinstance(layer, Site)
    return fold_after(m, build, layer, Affine(number(factor)), y)
