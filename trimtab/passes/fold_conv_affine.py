"""Folding of batch norms and constants per channel into convolutions and linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.ops import Sub
from trimtab.ir.rewrite import Attr, Constant, Match, Pattern, Rule, Var, maybe, one_of, op
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.fold_layer_scale import ScaledChannels
from trimtab.passes.folding import Affine, Site, constant, consumers, fold_after, fold_before, number, producer, reason
from trimtab.passes.rewrite_pass import RewritePass

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class FoldConvAffine(RewritePass):
    """Fold batch norms, and products and sums with a constant per channel, into the convolutions and linear layers
    beside them.

    A batch norm after a layer scales and shifts its output channels; one before it, its input channels, which holds
    at the border only where the convolution does not pad.
    """

    name: ClassVar[str] = "fold-conv-affine"
    contract: ClassVar[Contract] = Exact(rounding=True)
    grows_weights: ClassVar[bool] = True  # by a bias for each layer that has none

    def rules(self) -> Sequence[Rule]:
        return (BatchNormAfterLayer(), BatchNormBeforeLayers(), ScaledChannels(), ShiftedChannels())


class _BatchNorm(Rule):
    def pattern(
        self, x: Var, mean: Constant, variance: Constant, gain: Constant, shift: Constant, eps: Attr
    ) -> Pattern:
        return op.batch_norm(x, mean, variance, maybe(gain), maybe(shift), eps=eps)


class BatchNormAfterLayer(_BatchNorm):
    """``batch_norm(layer(x))``"""

    def check(self, m: Match) -> str | None:
        return reason(self._layer(m))

    def rewrite(self, m: Match, build: Builder) -> Value:
        layer = self._layer(m)
        assert isinstance(layer, Site)
        return fold_after(m, build, layer, _affine(m, m.x.type.rank - 2), m.x)

    def _layer(self, m: Match) -> Site | str:
        return producer(m, m.x, (m.x.type.shape[1], *[1] * (m.x.type.rank - 2)))


class BatchNormBeforeLayers(_BatchNorm):
    """``layer(batch_norm(x))``, for all readers of the norm."""

    def check(self, m: Match) -> str | None:
        return reason(self._layers(m))

    def rewrite(self, m: Match, build: Builder) -> Value:
        layers = self._layers(m)
        assert not isinstance(layers, str)
        for layer in layers:
            fold_before(m, build, layer, _affine(m))
        return m.x  # type: ignore[no-any-return]

    def _layers(self, m: Match) -> list[Site] | str:
        return consumers(m, m.root, 1, shifted=True)


class ShiftedChannels(Rule):
    """``layer(x) + c`` with a constant c that differs along channels at most."""

    def pattern(self, y: Var, c: Constant) -> Pattern:
        return one_of(op.add(y, c), op.sub(y, c))

    def check(self, m: Match) -> str | None:
        return reason(self._layer(m))

    def rewrite(self, m: Match, build: Builder) -> Value:
        layer, shift = self._layer(m), constant(m, m.c)
        assert isinstance(layer, Site)
        if isinstance(m.root.producer, Sub):
            return fold_after(m, build, layer, Affine(shift=lambda: -shift()), m.y)
        return fold_after(m, build, layer, Affine(shift=shift), m.y)

    def _layer(self, m: Match) -> Site | str:
        return producer(m, m.y, m.c.type.shape, scaled=False)


def _affine(m: Match, axes_after: int = 0) -> Affine:
    """The batch norm as a scale and a shift of shape ``[C, 1, ...]``."""
    mean, variance, eps = constant(m, m.mean), constant(m, m.variance), float(m.eps)
    gain = constant(m, m.gain) if m.gain is not None else number(1.0)
    bias = constant(m, m.shift) if m.shift is not None else number(0.0)
    aligned = (-1, *[1] * axes_after)

    def scale() -> torch.Tensor:
        return gain() / (variance() + eps).sqrt()

    return Affine(lambda: scale().reshape(aligned), lambda: (bias() - mean() * scale()).reshape(aligned))
