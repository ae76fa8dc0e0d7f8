"""Low-rank adapters into the weights they adapt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.rewrite import Constant, Match, Pattern, Rule, Scalar, Var, maybe, op, scaled
from trimtab.ir.weights import ComputedSource, Weight
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.rewrite_pass import RewritePass

if TYPE_CHECKING:
    import torch


class MergeAdapter(Rule):
    """``linear(x, W, b) + s * linear(linear(x, A), B)`` to ``linear(x, W + s B A, b)``"""

    def pattern(self, x: Var, w: Constant, b: Constant, down: Constant, up: Constant, s: Scalar) -> Pattern:
        adapter = op.linear(op.linear(x, down), up)
        return op.linear(x, w, maybe(b)) + scaled(adapter, by=s)

    def check(self, m: Match) -> str | None:
        for value in (m.w, m.down, m.up):
            if not value.is_weight:
                return "a matrix is filled with one number: it is no adapter"
        return (
            None if len(m.w.uses) == 1 else f"@{m.w.weight} is read at {len(m.w.uses)} places, which differ afterwards"
        )

    def rewrite(self, m: Match, build: Builder) -> Value:
        w, down, up, scale = m.weight(m.w), m.weight(m.down), m.weight(m.up), m.s
        trainable = w.trainable or down.trainable or up.trainable
        source = ComputedSource(lambda: _merged(w, down, up, scale))
        return build(ops.Linear(m.x, m.add_weight(f"{w.id}.merged", w.type, source, trainable=trainable), m.b))


def _merged(w: Weight, down: Weight, up: Weight, scale: float) -> torch.Tensor:
    """``W + scale B A``, rounded once."""
    return (w.tensor().double() + scale * (up.tensor().double() @ down.tensor().double())).to(w.tensor().dtype)


@dataclass(frozen=True)
class MergeAdapters(RewritePass):
    """Merge low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) into the weights they adapt.

    The two products of the adapter and the addition go away, and its matrices with them. A weight that other ops read
    as well keeps its adapter.
    """

    name: ClassVar[str] = "merge-adapters"
    contract: ClassVar[Contract] = Exact(rounding=True)

    def rules(self) -> Sequence[Rule]:
        return (MergeAdapter(),)
