"""Attention in which heads share keys and values, without repeating these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.dims import Dim, floordiv, mod
from trimtab.ir.rewrite import Attr, Match, Pattern, Rule, Var, maybe, one_of, op
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.rewrite_pass import RewritePass


@dataclass(frozen=True)
class RemoveRepeatKv(RewritePass):
    """Let attention read shared keys and values where they are, instead of a copy for every query head.

    Grouped-query attention (Ainslie et al., arXiv 2305.13245): query head h reads key head ``h // r``, so copies must
    stand next to each other, each head r times, before the next head comes.
    """

    name: ClassVar[str] = "remove-repeat-kv"
    contract: ClassVar[Contract] = Exact(rounding=True)

    def rules(self) -> Sequence[Rule]:
        return (GroupedHeads(),)


class GroupedHeads(Rule):
    """``attention(q, repeated(k), repeated(v))``, each head repeated in place, before or after a permutation"""

    def pattern(
        self, q: Var, k: Var, v: Var, mask: Var, k_order: Attr, v_order: Attr, scale: Attr, causal: Attr
    ) -> Pattern:
        keys, values = _repeated(k, "k", k_order), _repeated(v, "v", v_order)
        return op.attention(q, keys, values, maybe(mask), scale=scale, causal=causal)

    def check(self, m: Match) -> str | None:
        keys, values = _heads(m)
        if keys.refusal() or values.refusal():
            return keys.refusal() or values.refusal()
        if keys.repeats != values.repeats:
            return f"the keys are repeated {keys.repeats} times, the values {values.repeats} times"
        return None

    def rewrite(self, m: Match, build: Builder) -> Value:
        keys, values = _heads(m)
        k, v = keys.without_copies(build), values.without_copies(build)
        return build(ops.Attention(m.q, k, v, m.mask, scale=m.scale, causal=m.causal))


def _repeated(x: Pattern, name: str, order: Attr) -> Pattern:
    """Copies along an axis of their own, and this axis joined with that of the heads."""
    joined = op.reshape(one_of(op.expand(x), op.tile(x)).bind(f"{name}_copies")).bind(f"{name}_joined")
    return one_of(joined, op.permute(joined, dims=order))


def _heads(m: Match) -> tuple[_Repeated, _Repeated]:
    return (_Repeated(m.k, m.k_copies, m.k_joined, m.k_order), _Repeated(m.v, m.v_copies, m.v_joined, m.v_order))


class _Repeated(NamedTuple):
    """Keys or values with repeated heads.

    Attributes:
        source: the heads, with an axis of size 1 for copies.
        copies: ``source`` repeated along this axis.
        joined: ``copies`` with the axes of heads and of copies as one.
        order: how ``joined`` is permuted behind that; None for not at all.
    """

    source: Value
    copies: Value
    joined: Value
    order: tuple[int, ...] | None

    @property
    def repeats(self) -> int:
        """How often each head is repeated; 0 when several axes are, or one by an unknown number."""
        before, after = self.source.type.shape, self.copies.type.shape
        grown = [new for old, new in zip(before, after, strict=False) if old != new]
        return grown[0] if len(before) == len(after) and len(grown) == 1 and isinstance(grown[0], int) else 0

    @property
    def kept(self) -> tuple[Dim, ...]:
        """The axes behind that of the copies."""
        before, after = self.source.type.shape, self.copies.type.shape
        return next(after[axis + 1 :] for axis, old in enumerate(before) if old != after[axis])

    def refusal(self) -> str | None:
        """Why the heads cannot be shared, or None."""
        copies, joined = self.copies.type, self.joined.type
        if not self.repeats:
            return f"{self.source.type} is repeated to {copies}, which is not along one axis alone"
        axis = joined.rank - len(self.kept) - 1
        if axis < 0 or joined.shape[axis + 1 :] != self.kept or mod(joined.shape[axis], self.repeats) != 0:
            return f"{copies} becomes {joined}, which does not keep the copies of a head together"
        place = axis if self.order is None else self.order.index(axis)
        return None if place == joined.rank - 3 else f"the copies are along axis {place} of the operand, not of heads"

    def without_copies(self, build: Builder) -> Value:
        shape = list(self.joined.type.shape)
        axis = len(shape) - len(self.kept) - 1
        shape[axis] = floordiv(shape[axis], self.repeats)
        heads = build(ops.Reshape(self.source, shape=tuple(shape)))
        return heads if self.order is None else build(ops.Permute(heads, dims=self.order))
