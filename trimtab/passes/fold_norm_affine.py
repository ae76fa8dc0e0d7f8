"""Folding of the scale and shift of norms into the layers after them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.rewrite import Attr, Constant, Match, Pattern, Rule, Var, maybe, one_of, op
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.folding import Affine, Site, constant, consumers, fold_before, reason
from trimtab.passes.rewrite_pass import RewritePass


@dataclass(frozen=True)
class FoldNormAffine(RewritePass):
    """Fold the weight and bias of a layer norm or RMS norm into all linear layers that read it.

    ``W (g * x + t) + b`` is ``(W g) x + (b + W t)``. Nothing else may read the norm, and the weights of the linear
    layers must have no other reader. Passes that migrate scales between a norm and its readers, as for quantisation,
    run before this one.
    """

    name: ClassVar[str] = "fold-norm-affine"
    contract: ClassVar[Contract] = Exact(rounding=True)
    grows_weights: ClassVar[bool] = True  # by a bias for each linear layer that has none

    def rules(self) -> Sequence[Rule]:
        return (NormAffine(),)


class NormAffine(Rule):
    """A norm over the last axis with a weight or bias, before linear layers."""

    def pattern(self, x: Var, gain: Constant, shift: Constant, axes: Attr, eps: Attr) -> Pattern:
        return one_of(
            op.layer_norm(x, gain, maybe(shift), axes=axes, eps=eps),
            op.layer_norm(x, bias=shift, axes=axes, eps=eps),
            op.rms_norm(x, gain, axes=axes, eps=eps),
        )

    def check(self, m: Match) -> str | None:
        if m.axes != 1:
            return f"the norm is over the last {m.axes} axes"
        return reason(_layers(m))

    def rewrite(self, m: Match, build: Builder) -> Value:
        layers = _layers(m)
        assert not isinstance(layers, str)
        scale, shift = (constant(m, value) if value is not None else None for value in (m.gain, m.shift))
        for layer in layers:
            fold_before(m, build, layer, Affine(scale, shift))
        norm = ops.LayerNorm if isinstance(m.root.producer, ops.LayerNorm) else ops.RmsNorm
        return build(norm(m.x, axes=1, eps=m.eps))


def _layers(m: Match) -> list[Site] | str:
    return consumers(m, m.root, m.root.type.rank - 1, shifted=m.shift is not None)
