"""Recognise attention in decomposed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.rewrite import Attr, Match, Pattern, Rule, Scalar, Var, one_of, op, optional, scaled
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.mask_facts import ABSORBING, MASKING, MaskFacts
from trimtab.passes.rewrite_pass import RewritePass

_SAME_HEADS = "q, k and v have the same batch axes and heads, or k and v one head"


@dataclass(frozen=True)
class RaiseAttention(RewritePass):
    """Make one attention of two matrix products and the softmax between them.

    Vaswani et al., arXiv 1706.03762.  The scale may be a product or a quotient, before or after the first product, on
    one operand or on both; up to three masks may be added; a mask may replace scores instead (``where``); and torch's
    guard for rows without keys may stand behind the softmax.  Several masks become one sum, which stays additive.

    A row of scores that is masked with minus infinity everywhere and has no guard is NaN in the decomposed form.
    Attention gives zeros for it.
    """

    name: ClassVar[str] = "raise-attention"
    contract: ClassVar[Contract] = Exact(rounding=True)

    def rules(self) -> Sequence[Rule]:
        return (ReplacedScores(), SoftmaxAttention())


class SoftmaxAttention(Rule):
    """``softmax(scale q k^T + mask) v``"""

    name = "attention"

    def pattern(
        self, q: Var, k: Var, k_t: Var, v: Var, order: Attr, q_scale: Scalar, k_scale: Scalar, k_t_scale: Scalar,
        scale0: Scalar, mask0: Var, scale1: Scalar, mask1: Var, scale2: Scalar, mask2: Var,
    ) -> Pattern:  # fmt: skip
        keys = one_of(op.permute(scaled(k, by=k_scale), dims=order), k_t)
        product = op.matmul(scaled(q, by=q_scale), scaled(keys, by=k_t_scale)).bind("product")
        scores = _masked(_masked(_masked(product, scale0, mask0), scale1, mask1), scale2, mask2)
        probabilities = optional(op.cast(_guarded(op.softmax(optional(op.cast(scores)), dim=-1), scores)))
        return op.matmul(probabilities, v)

    def check(self, m: Match) -> str | None:
        left, right = m.product.producer.operands
        batch, heads = left.type.shape[:-2], [value.type.shape[:-2] for value in (right, m.v)]
        if not left.type.rank == right.type.rank == m.v.type.rank >= 3:
            return f"the ranks of q, {left.type}, k, {right.type}, and v, {m.v.type}, are not one rank of 3 or more"
        if heads not in ([batch] * 2, [(*batch[:-1], 1)] * 2):
            return f"{_SAME_HEADS}, but they are {batch}, {heads[0]} and {heads[1]}"
        if right.type.shape[-1] != m.v.type.shape[-2]:
            return f"there are {right.type.shape[-1]} keys but {m.v.type.shape[-2]} values"
        if m.root.type != left.type.with_shape(*left.type.shape[:-1], m.v.type.shape[-1]):
            return f"the result is {m.root.type}: a mask or a cast changes the type of the scores {m.product.type}"
        masks = [mask.type for mask in (m.mask0, m.mask1, m.mask2) if mask is not None]
        odd = next((mask for mask in masks if mask.dtype is not left.type.dtype), None)
        return None if odd is None else f"the mask {odd} has not the dtype of q"

    def rewrite(self, m: Match, build: Builder) -> Value:
        transposed, order = (m.k_t, range(m.k_t.type.rank)) if m.k is None else (m.k, m.order)
        turned = (*order[:-2], order[-1], order[-2])
        key = transposed if turned == tuple(range(len(turned))) else build(ops.Permute(transposed, dims=turned))
        scale = m.q_scale * (m.k_scale or 1.0) * m.k_t_scale * m.scale0 * m.scale1 * m.scale2
        terms = [(m.mask0, m.scale1 * m.scale2), (m.mask1, m.scale2), (m.mask2, 1.0)]
        mask = None
        for term, factor in terms:
            if term is not None:
                part = term if factor == 1.0 else build(ops.Mul(term, build.scalar(factor, term.type.dtype)))
                mask = part if mask is None else build(ops.Add(mask, part))
        if mask is not None and mask.type.rank < 2:
            mask = build(ops.Reshape(mask, shape=(*(1,) * (2 - mask.type.rank), *mask.type.shape)))
        return build(ops.Attention(m.q, key, m.v, mask, scale=scale))


class ReplacedScores(Rule):
    """``where(allowed, scores, low)`` as ``scores + where(allowed, 0, low)``: a low number among the scores, or a sum
    with it, has no weight."""

    def pattern(
        self, x: Var, y: Var, scale0: Scalar, mask0: Var, scale1: Scalar, allowed: Var, hidden: Var, low: Scalar
    ) -> Pattern:
        scores = scaled(_masked(op.matmul(x, y), scale0, mask0), by=scale1).bind("scores")
        return one_of(op.where(allowed, scores, low), op.where(hidden, low, scores))

    def check(self, m: Match) -> str | None:
        if m.scores.type != m.root.type:
            return f"the scores {m.scores.type} are broadcast to {m.root.type}"
        if m.low <= ABSORBING:
            return None
        if m.low > MASKING:
            return f"{m.low} is not low enough to hide a score"
        if m.allowed is None or not MaskFacts(m.module).rows_have_a_key(m.allowed):
            return f"a row of which everything is replaced by {m.low} would have equal weights"
        if not all(isinstance(user, ops.Softmax) for user in m.root.users):
            return f"what is added to {m.low} afterwards might outweigh it"
        return None

    def rewrite(self, m: Match, build: Builder) -> Value:
        dtype = m.root.type.dtype
        nothing, low = build.scalar(0.0, dtype), build.scalar(m.low, dtype)
        choice = ops.Where(m.allowed, nothing, low) if m.hidden is None else ops.Where(m.hidden, low, nothing)
        return build(ops.Add(m.scores, build(choice)))


def _masked(scores: Pattern, scale: Scalar, mask: Var) -> Pattern:
    """The scores times constants, with or without a mask."""
    factor = scaled(scores, by=scale)
    return one_of(factor + mask, factor)


def _guarded(softmax: Pattern, scores: Pattern) -> Pattern:
    """The softmax, also with torch's guards that give zeros for a row of minus infinity."""
    seen = op.any(op.logical_not(op.eq(scores, -math.inf)), dims=(-1,), keepdim=True)
    return one_of(op.where(op.is_nan(softmax), 0, softmax), op.where(op.logical_not(seen), 0, softmax), softmax)
