"""Folding of factors per channel into weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.ops import Div
from trimtab.ir.rewrite import Constant, Match, Pattern, Rule, Var, one_of, op
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.folding import Affine, Site, constant, fold_after, producer, reason
from trimtab.passes.rewrite_pass import RewritePass


@dataclass(frozen=True)
class FoldLayerScale(RewritePass):
    """Fold a factor per channel into the linear layer or convolution before it (LayerScale, arXiv 2103.17239).

    The result may have been reshaped, permuted or split on its way to the factor, but nothing else may see the same
    channels of it, and the weights must have no other reader.
    """

    name: ClassVar[str] = "fold-layer-scale"
    contract: ClassVar[Contract] = Exact(rounding=True)

    def rules(self) -> Sequence[Rule]:
        return (ScaledChannels(),)


class ScaledChannels(Rule):
    """``layer(x) * g`` or ``layer(x) / g`` with a constant g that differs along channels at most."""

    def pattern(self, y: Var, g: Constant) -> Pattern:
        return one_of(op.mul(y, g), op.div(y, g, rounding="none"))

    def check(self, m: Match) -> str | None:
        return reason(producer(m, m.y, m.g.type.shape))

    def rewrite(self, m: Match, build: Builder) -> Value:
        layer, factor = producer(m, m.y, m.g.type.shape), constant(m, m.g)
        assert isinstance(layer, Site)
        if isinstance(m.root.producer, Div):
            return fold_after(m, build, layer, Affine(lambda: 1 / factor()), m.y)
        return fold_after(m, build, layer, Affine(factor), m.y)
