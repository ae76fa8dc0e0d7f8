"""Attention in which heads share keys and values, without repeating these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

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
    """``attention(q, repeated(k), repeated(v))``, each head repeated r times in place"""

    def pattern(self, q: Var, k: Var, v: Var, mask: Var, scale: Attr, causal: Attr) -> Pattern:
        return op.attention(q, _repeated(k, "k"), _repeated(v, "v"), maybe(mask), scale=scale, causal=causal)

    def check(self, m: Match) -> str | None:
        keys, values = _repeats(m.k, m.k_copies), _repeats(m.v, m.v_copies)
        for source, copies, joined, repeats in (
            (m.k, m.k_copies, m.k_joined, keys),
            (m.v, m.v_copies, m.v_joined, values),
        ):
            if not repeats:
                return f"{source.type} is repeated to {copies.type}, not along the axis before the last two alone"
            if joined.type.shape[-2:] != copies.type.shape[-2:] or mod(joined.type.shape[-3], repeats) != 0:
                return f"{copies.type} becomes {joined.type}, which does not keep the copies of a head together"
        return None if keys == values else f"the keys are repeated {keys} times, the values {values} times"

    def rewrite(self, m: Match, build: Builder) -> Value:
        repeats = _repeats(m.k, m.k_copies)
        k, v = (
            build(ops.Reshape(source, shape=_without_copies(joined, repeats)))
            for source, joined in ((m.k, m.k_joined), (m.v, m.v_joined))
        )
        return build(ops.Attention(m.q, k, v, m.mask, scale=m.scale, causal=m.causal))


def _repeated(x: Pattern, name: str) -> Pattern:
    """Copies along an axis of their own, and this axis joined with that of the heads."""
    copies = one_of(op.expand(x), op.tile(x)).bind(f"{name}_copies")
    return op.reshape(copies).bind(f"{name}_joined")


def _repeats(source: Value, copies: Value) -> int:
    """How often each head of ``source`` stands in ``copies``; 0 if not along the axis before the last two alone."""
    before, after = source.type.shape, copies.type.shape
    if len(before) < 4 or len(before) != len(after) or before[-3] != 1 or not isinstance(after[-3], int):
        return 0
    return after[-3] if (before[:-3], before[-2:]) == (after[:-3], after[-2:]) else 0


def _without_copies(joined: Value, repeats: int) -> tuple[Dim, ...]:
    *leading, heads, length, width = joined.type.shape
    return (*leading, floordiv(heads, repeats), length, width)
