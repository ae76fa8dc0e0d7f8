"""Raising of convolutions over patches to ``linear``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.dims import Dim, mod, product
from trimtab.ir.printer import value_in_words
from trimtab.ir.rewrite import Attr, Constant, Match, Pattern, Rule, Var, maybe, one_of, op, optional
from trimtab.ir.weights import ComputedSource
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.rewrite_pass import RewritePass

_SHORTEST_RUN = 4
"""Patches narrower than this cost more to gather than the product gains: measured with the TVM backend, whose product
of gathered 16-pixel patches takes 0.6 of the time of the convolution, of 4-pixel ones 0.9, of 2-pixel ones 1.2. A patch
of one pixel needs no gathering, and takes 0.5."""


@dataclass(frozen=True)
class RaisePatchEmbedding(RewritePass):
    """Write a convolution over patches that do not overlap as a linear layer (patch embedding, arXiv 2010.11929).

    Applies where channels come last afterwards, as tokens or as an image, so that nothing needs to be put back. The
    patches must divide the image for every value of the symbols.
    """

    name: ClassVar[str] = "raise-patch-embedding"
    contract: ClassVar[Contract] = Exact(rounding=True)

    def rules(self) -> Sequence[Rule]:
        return (PatchEmbedding(),)


class PatchEmbedding(Rule):
    """``conv(x)`` with its stride as large as its kernel, then flattened or not, then with channels last."""

    def pattern(
        self, x: Var, w: Constant, b: Var, stride: Attr, padding: Attr, dilation: Attr, groups: Attr
    ) -> Pattern:
        how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        convolutions = one_of(
            op.conv1d(x, w, maybe(b), **how),
            op.conv2d(x, w, maybe(b), **how, channels_last=False),
            op.conv3d(x, w, maybe(b), **how),
        )
        return op.permute(optional(op.reshape(convolutions.bind("image"))), dims=_channels_last)

    def check(self, m: Match) -> str | None:
        kernel = m.w.type.shape[2:]
        if m.stride != kernel or any(m.padding) or any(step != 1 for step in m.dilation) or m.groups != 1:
            options = {"stride": m.stride, "padding": m.padding, "dilation": m.dilation, "groups": m.groups}
            given = ", ".join(f"{name} {value}" for name, value in options.items())
            return f"a kernel of {kernel} does not cut patches with {given}"
        if 1 < kernel[-1] < _SHORTEST_RUN:
            return f"patches {kernel[-1]} pixels wide are too narrow to gain"
        if any(mod(size, patch) != 0 for size, patch in zip(m.x.type.shape[2:], kernel, strict=True)):
            return f"patches of {kernel} do not divide {m.x.type}"
        before = tuple(m.root.type.shape[axis] for axis in (0, -1, *range(1, m.root.type.rank - 1)))
        if before not in (m.image.type.shape, _flat(m.image.type.shape)):
            return f"channels are not last when {m.image.type} has become {m.root.type}"
        if not m.w.is_weight or sum(1 for _ in m.module.readers(m.w.weight)) > 1:
            return f"{value_in_words(m.w)} is not a weight with one reader"
        return None

    def rewrite(self, m: Match, build: Builder) -> Value:
        weight, (outputs, inputs, *kernel) = m.weight(m.w), m.w.type.shape
        shape = [m.x.type.shape[0], inputs]
        for grid, patch in zip(m.image.type.shape[2:], kernel, strict=True):
            shape += [grid, patch]
        cut = build(ops.Reshape(m.x, shape=tuple(shape)))
        axes = range(2, cut.type.rank)
        patches = build(ops.Permute(cut, dims=(0, *axes[::2], 1, *axes[1::2])))
        width = inputs * product(kernel)
        rows = build(ops.Reshape(patches, shape=(*m.root.type.shape[:-1], width)))
        matrix = m.add_weight(
            f"{weight.id}.flat",
            weight.type.with_shape(outputs, width),
            ComputedSource(lambda: weight.tensor().reshape(outputs, -1)),
            trainable=weight.trainable,
        )
        return build(ops.Linear(rows, matrix, m.b))


def _flat(shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """``[B, C, H, W]`` to ``[B, C, H*W]``"""
    return (*shape[:2], product(shape[2:]))


def _channels_last(dims: tuple[int, ...]) -> bool:
    return dims == (0, *range(2, len(dims)), 1)
