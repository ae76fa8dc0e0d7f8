"""Simplification of attention masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.dtypes import DType
from trimtab.ir.rewrite import Match, Pattern, Rule, Scalar, Var, one_of, op
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.mask_facts import MASKING, MaskFacts
from trimtab.passes.rewrite_pass import RewritePass
from trimtab.passes.simplify_expands import narrowed


@dataclass(frozen=True)
class SimplifyMasks(RewritePass):
    """Drop masks that hide nothing, and replace masks by cheaper ones of the same meaning.

    Conditions that always hold are taken out of masks; masks are not expanded; what is added as 0 or minus infinity
    becomes a bool mask; and the lower triangle becomes ``causal``.  A mask of large negative numbers becomes a bool one
    only where every query is known to have a key: without a key it gives the mean of the values, a bool mask zeros.
    """

    name: ClassVar[str] = "simplify-masks"
    contract: ClassVar[Contract] = Exact(rounding=True)

    def rules(self) -> Sequence[Rule]:
        return (
            LogicOfBools(), KnownChoice(), KnownCondition(), ExpandLast(), NoMask(), UniformTerm(), ExpandedMask(),
            BoolMask(), CausalMask(),
        )  # fmt: skip


class LogicOfBools(Rule):
    """A bitwise op on bools as the logical one"""

    private = False

    def pattern(self, x: Var, y: Var) -> Pattern:
        return one_of(op.bitwise_and(x, y), op.bitwise_or(x, y), op.bitwise_not(x))

    def check(self, m: Match) -> str | None:
        return None if m.root.type.dtype is DType.BOOL else f"the result is {m.root.type}, which is not bool"

    def rewrite(self, m: Match, build: Builder) -> Value:
        logical = {ops.BitwiseAnd: ops.LogicalAnd, ops.BitwiseOr: ops.LogicalOr, ops.BitwiseNot: ops.LogicalNot}
        return build(logical[type(m.root_op)](*m.root_op.operands))


class KnownChoice(Rule):
    """``where(condition, x, y)`` with a condition that is known"""

    private = False

    def pattern(self, condition: Var, x: Var, y: Var) -> Pattern:
        return op.where(condition, x, y)

    def check(self, m: Match) -> str | None:
        return "the condition is not known" if MaskFacts(m.module).truth(m.condition) is None else None

    def rewrite(self, m: Match, build: Builder) -> Value:
        return _expanded(m.x if MaskFacts(m.module).truth(m.condition) else m.y, m.root, build)


class KnownCondition(Rule):
    """``condition and x``, ``condition or x`` with a condition that is known to change nothing"""

    private = False

    def pattern(self, condition: Var, x: Var) -> Pattern:
        return one_of(op.logical_and(condition, x), op.logical_or(condition, x))

    def check(self, m: Match) -> str | None:
        neutral = isinstance(m.root_op, ops.LogicalAnd)
        if m.x.type.dtype is not DType.BOOL:
            return f"x is {m.x.type}, which is not bool"
        return None if MaskFacts(m.module).truth(m.condition) is neutral else "no condition is known to change nothing"

    def rewrite(self, m: Match, build: Builder) -> Value:
        return _expanded(m.x, m.root, build)


class ExpandLast(Rule):
    """A mask made from an expanded condition, expanded afterwards if need be"""

    private = False

    def pattern(self, x: Var, y: Var, z: Var) -> Pattern:
        wide = op.expand(x)
        return one_of(op.where(wide, y, z), op.logical_and(wide, y), op.logical_not(wide), op.cast(wide))

    def rewrite(self, m: Match, build: Builder) -> Value:
        value = narrowed(m.root_op, build)
        assert value is not None
        return value


class _OfAttention(Rule):
    """Base of the rules that give an attention another mask."""

    private = False

    def masked(self, mask: Pattern) -> Pattern:
        q, k, v = Var("q"), Var("k"), Var("v")
        return op.attention(q, k, v, mask)

    def replaced(self, m: Match, build: Builder, mask: Value | None, causal: bool = False) -> Value:
        found = m.root_op
        assert isinstance(found, ops.Attention)
        made = ops.Attention(found.q, found.k, found.v, mask, scale=found.scale, causal=found.causal or causal)
        return build(made)


class ExpandedMask(_OfAttention):
    """Attention with an expanded mask"""

    def pattern(self, x: Var) -> Pattern:
        return self.masked(op.expand(x))

    def check(self, m: Match) -> str | None:
        return _mask_problem(m.x)

    def rewrite(self, m: Match, build: Builder) -> Value:
        return self.replaced(m, build, m.x)


class UniformTerm(_OfAttention):
    """Attention with a mask that is a sum with the same number everywhere, which the softmax does not see"""

    def pattern(self, x: Var, term: Var) -> Pattern:
        return self.masked(x + term)

    def check(self, m: Match) -> str | None:
        number = MaskFacts(m.module).uniform(m.term)
        known = number is not None and math.isfinite(number)
        return _mask_problem(m.x) if known else "no term is known to be uniform and finite"

    def rewrite(self, m: Match, build: Builder) -> Value:
        return self.replaced(m, build, m.x)


class NoMask(_OfAttention):
    """Attention with a mask that hides nothing"""

    def pattern(self, mask: Var) -> Pattern:
        return self.masked(mask)

    def check(self, m: Match) -> str | None:
        facts = MaskFacts(m.module)
        if m.mask.type.dtype is DType.BOOL:
            return None if facts.truth(m.mask) is True else "the mask is not known to be true everywhere"
        number = facts.uniform(m.mask)
        known = number is not None and math.isfinite(number)
        return None if known else "the mask is not known to be uniform and finite"

    def rewrite(self, m: Match, build: Builder) -> Value:
        return self.replaced(m, build, None)


class BoolMask(_OfAttention):
    """Attention with a mask ``where(allowed, 0, low)``"""

    def pattern(self, allowed: Var, hidden: Var, low: Scalar) -> Pattern:
        return self.masked(one_of(op.where(allowed, 0, low), op.where(hidden, low, 0)))

    def check(self, m: Match) -> str | None:
        if m.low == -math.inf:
            return None
        if m.low > MASKING:
            return f"{m.low} is not low enough to hide a score"
        if m.allowed is not None and MaskFacts(m.module).rows_have_a_key(m.allowed):
            return None
        return f"a query without keys gets the mean of all values by {m.low}, and zeros by a bool mask"

    def rewrite(self, m: Match, build: Builder) -> Value:
        return self.replaced(m, build, m.allowed if m.hidden is None else build(ops.LogicalNot(m.hidden)))


class CausalMask(_OfAttention):
    """Attention with the lower triangle as its mask, or a mask that is a conjunction with it"""

    def pattern(self, triangle: Var, x: Var, y: Var) -> Pattern:
        both = op.logical_and(triangle, x)
        return self.masked(one_of(op.logical_and(both, y), both, triangle))

    def check(self, m: Match) -> str | None:
        facts = MaskFacts(m.module)
        if m.triangle.type.dtype is DType.BOOL:
            if not facts.is_causal(m.triangle):
                return "no condition is known to be the lower triangle"
            return None if m.x is None else _mask_problem(m.x)
        return None if facts.hides_the_future(m.triangle) else "the mask is not known to hide the future and no more"

    def rewrite(self, m: Match, build: Builder) -> Value:
        rest = m.x if m.y is None else build(ops.LogicalAnd(m.x, m.y))
        return self.replaced(m, build, rest, causal=True)


def _mask_problem(value: Value) -> str | None:
    return None if value.type.rank >= 2 else f"{value.type} has no axes for queries and keys"


def _expanded(value: Value, like: Value, build: Builder) -> Value:
    return value if value.type == like.type else build(ops.Expand(value, shape=like.type.shape))
