"""Separate batch axes for products that a producer computes on merged ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.rewrite import Attr, Match, Pattern, Rule, Var, op
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.rewrite_pass import RewritePass


@dataclass(frozen=True)
class UnmergeBatchAxes(RewritePass):
    """Move reshapes that merge batch axes behind the matrix product, softmax or transposition that reads them.

    A ``bmm`` has one batch axis, so batch and heads are merged before it and split after it.  Behind the product the
    two reshapes meet, and clean-up removes them: ``[b*h, n, d] @ [b*h, d, n]`` becomes
    ``[b, h, n, d] @ [b, h, d, n]``.
    """

    name: ClassVar[str] = "unmerge-batch-axes"
    contract: ClassVar[Contract] = Exact(rounding=True)

    def rules(self) -> Sequence[Rule]:
        return (UnmergedMatmul(), UnmergedSoftmax(), UnmergedTranspose())


class UnmergedMatmul(Rule):
    """``reshape(x) @ reshape(y)`` where one of the reshapes merges batch axes"""

    private = False

    def pattern(self, x: Var, y: Var) -> Pattern:
        return op.matmul(op.reshape(x).bind("merged_x"), op.reshape(y).bind("merged_y"))

    def check(self, m: Match) -> str | None:
        if m.merged_x.type.shape[:-2] != m.merged_y.type.shape[:-2]:
            return f"the batch axes of {m.merged_x.type} and {m.merged_y.type} differ"
        if _merges(m.x, m.merged_x, 2) or _merges(m.y, m.merged_y, 2):
            return None
        return "neither reshape only merges batch axes"

    def rewrite(self, m: Match, build: Builder) -> Value:
        batch = (m.x if _merges(m.x, m.merged_x, 2) else m.y).type.shape[:-2]
        x, y = (
            inner if inner.type.shape == (*batch, *merged.type.shape[-2:])
            else build(ops.Reshape(inner, shape=(*batch, *merged.type.shape[-2:])))
            for inner, merged in ((m.x, m.merged_x), (m.y, m.merged_y))
        )  # fmt: skip
        return build(ops.Reshape(build(ops.Matmul(x, y)), shape=m.root.type.shape))


class UnmergedSoftmax(Rule):
    """``softmax(reshape(x))`` over an axis that the reshape keeps"""

    private = False

    def pattern(self, x: Var) -> Pattern:
        return op.softmax(op.reshape(x), dim=-1)

    def check(self, m: Match) -> str | None:
        return None if _merges(m.x, m.root, 1) else f"the reshape from {m.x.type} to {m.root.type} is no merge of axes"

    def rewrite(self, m: Match, build: Builder) -> Value:
        probabilities = build(ops.Softmax(m.x, dim=m.x.type.rank - 1))
        return build(ops.Reshape(probabilities, shape=m.root.type.shape))


class UnmergedTranspose(Rule):
    """``permute(reshape(x))`` that exchanges the last two axes, which the reshape keeps"""

    private = False

    def pattern(self, x: Var, order: Attr) -> Pattern:
        return op.permute(op.reshape(x).bind("merged"), dims=order)

    def check(self, m: Match) -> str | None:
        rank = m.merged.type.rank
        if m.order != (*range(rank - 2), rank - 1, rank - 2):
            return f"the permute {m.order} is not the transposition of the last two axes"
        return None if _merges(m.x, m.merged, 2) else "the reshape does more than to merge batch axes"

    def rewrite(self, m: Match, build: Builder) -> Value:
        rank = m.x.type.rank
        turned = build(ops.Permute(m.x, dims=(*range(rank - 2), rank - 1, rank - 2)))
        return build(ops.Reshape(turned, shape=m.root.type.shape))


def _merges(x: Value, merged: Value, kept: int) -> bool:
    """Whether a reshape of ``x`` to ``merged`` keeps the last ``kept`` axes and has fewer before them."""
    before, after = x.type.shape, merged.type.shape
    return kept < len(after) < len(before) and before[-kept:] == after[-kept:]
