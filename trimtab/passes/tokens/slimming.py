"""Mixing tokens into fewer ones by trained weights, from the formulas of SiT (Zong et al., Self-slimmed Vision
Transformer, arXiv 2111.12624)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.dtypes import DType
from trimtab.ir.ops import (
    Cast,
    Div,
    Gelu,
    Gt,
    LayerNorm,
    Linear,
    Matmul,
    Maximum,
    Mul,
    Permute,
    Softmax,
    Sum,
    Where,
)
from trimtab.passes.tokens.entry import sizes_for_all
from trimtab.passes.tokens.rows import joined, span
from trimtab.passes.tokens.shortening import Place
from trimtab.passes.tokens.steps import Step, counted

if TYPE_CHECKING:
    import torch

NORM_EPS = 1e-5
_OUTSIDE = -1e9
"""The score of padding: its share is zero, but where there is nothing else all are alike and finite."""
_SMALLEST_SHARE = 1e-6
"""What the shares of a token are divided by at least, when it is given back by them."""
_RIDGE = 1e-4
"""Of the mean square of the hidden features: keeps a fit on few samples from following their noise."""
_LARGEST_SCALE = 12
"""Of the scales that are tried, as a power of two."""
_SCALES_A_STEP = 4
"""How many scales between one power of two and the next."""


@dataclass(frozen=True)
class SlimmingWeights:
    """The weights of a slimming module from tokens of C channels to M tokens, all trainable, in float32.

    Attributes:
        up: ``[C // 2, C]`` and ``[C // 2]``.
        down: ``[M, C // 2]``.
        scale: ``[1]``.
    """

    up: tuple[Value, Value]
    down: Value
    scale: Value

    @staticmethod
    def blank(build: Builder, name: str, channels: int, count: int) -> SlimmingWeights:
        """Zeros, which give every token the same share, in new weights called ``name`` and so on."""
        import torch

        def weight(suffix: str, *shape: int) -> Value:
            return build.weight(f"{name}.{suffix}", torch.zeros(shape), trainable=True)

        hidden = max(1, channels // 2)
        return SlimmingWeights(
            (weight("up.weight", hidden, channels), weight("up.bias", hidden)),
            weight("down.weight", count, hidden),
            weight("scale", 1),
        )

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the weights: of the first layer's weight and bias, the second's weight, and the scale."""
        return tuple(str(value.weight) for value in (*self.up, self.down, self.scale))


def shares(build: Builder, x: Value, weights: SlimmingWeights, present: Value | None = None) -> Value:
    """How much each of M new tokens takes of each of T old ones: ``[B, M, T]``, rows of which the sum is 1.

    With ``w = LN(x) -> Linear(C, C/2) -> GELU -> Linear(C/2, M)``, the softmax of ``w scale`` over the tokens. The norm
    has no scale and shift of its own, as the linear layer behind it can express both; and the second layer no bias,
    which would be the same for all tokens and so change nothing.

    Args:
        build: where ops go.
        x: ``[B, T, C]``.
        weights: of the module.
        present: ``[B, T, 1]``, 0 for tokens of which nothing is to be taken, such as padding; None for all.
    """
    if x.type.dtype is not DType.F32:
        x = build(Cast(x, dtype=DType.F32))
    hidden = build(Gelu(build(Linear(build(LayerNorm(x, eps=NORM_EPS)), *weights.up))))
    scores = build(Mul(build(Linear(hidden, weights.down)), weights.scale))
    if present is not None:
        there = build(Gt(present, build.scalar(0.0, present.type.dtype)))
        scores = build(Where(there, scores, build.scalar(_OUTSIDE, DType.F32)))
    return build(Softmax(build(Permute(scores, dims=(0, 2, 1))), dim=2))


class SlimStep(Step):
    """Tokens that are mixed of all others by their shares; the protected ones stay in front as they are.

    In means over tokens the mixed ones count for all tokens that there were, and for equal parts of them. Tokens that
    are given back are means of the mixed ones, by the share that each took of them.

    Args:
        place: where.
        count: M, how many tokens the unprotected ones become.
        name: what new weights are called.
    """

    sizes: Value

    def __init__(self, place: Place, count: int, name: str) -> None:
        build = place.build
        self.protected = place.protected
        self.count = place.protected + count
        self.free = span(build, place.x, place.protected)
        channels = place.x.type.shape[2]
        assert isinstance(channels, int)
        self.weights = SlimmingWeights.blank(build, name, channels, count)
        before = place.sizes if place.padded else None
        self.shares = shares(
            build, self.free, self.weights, None if before is None else span(build, before, place.protected)
        )
        self.sizes = sizes_for_all(place, count)
        if place.padded:
            self.key_mask = counted(build, self.sizes)

    def shorten(self, build: Builder, y: Value) -> Value:
        mixed = build(Matmul(self._in(build, self.shares, y), span(build, y, self.protected)))
        return joined(build, span(build, y, 0, self.protected), mixed)

    def restore(self, build: Builder, y: Value) -> Value:
        taken = build(Permute(self._in(build, self.shares, y), dims=(0, 2, 1)))
        total = build(Sum(taken, dims=(2,), keepdim=True))
        total = build(Maximum(total, build.scalar(_SMALLEST_SHARE, y.type.dtype)))
        back = build(Div(build(Matmul(taken, span(build, y, self.protected))), total))
        return joined(build, span(build, y, 0, self.protected), back)

    @staticmethod
    def _in(build: Builder, value: Value, like: Value) -> Value:
        return value if value.type.dtype is like.type.dtype else build(Cast(value, dtype=like.type.dtype))


def pooling_weights(samples: torch.Tensor, count: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Values of the weights with which new tokens are close to means of neighbours, as far as tokens tell their places.

    A mean of all tokens, to which small random weights come, makes all new tokens the same and loses everything between
    them; nor has the module an input for positions. But tokens carry them, by their position embedding: so the first
    layer is random, the second is the ridge regression from what it gives to which of ``count`` runs of neighbours a
    token is in, and the scale is that with which the new tokens come nearest to the means of the runs.

    Args:
        samples: tokens ``[S, T, C]`` of S samples.
        count: M.
        generator: of the random layer.

    Returns:
        The weight and bias of the first layer, the weight of the second, and the scale, in float32.
    """
    import torch
    from torch.nn import functional as F

    samples = samples.double()
    number, tokens, channels = samples.shape
    hidden = max(1, channels // 2)
    up = torch.randn(hidden, channels, generator=generator, dtype=torch.float64) * math.sqrt(2 / channels)
    bias = (2 * torch.rand(hidden, generator=generator, dtype=torch.float64) - 1) / math.sqrt(channels)
    up, bias = up.float().double(), bias.float().double()
    features = F.gelu(F.linear(F.layer_norm(samples, (channels,), eps=NORM_EPS), up, bias))
    runs = torch.arange(tokens) * count // tokens
    wanted = F.one_hot(runs, count).double()
    rows = features.reshape(-1, hidden)
    center = rows.mean(0)
    centered = rows - center
    square = centered.T @ centered
    ridge = _RIDGE * max(float(rows.square().mean()), 1e-12) * len(rows)
    down = torch.linalg.solve(
        square + ridge * torch.eye(hidden, dtype=torch.float64),
        centered.T @ (wanted - wanted.mean(0)).repeat(number, 1),
    ).T
    scores = F.linear(features, down)
    means = (wanted / wanted.sum(0)).T @ samples

    def distance(scale: float) -> float:
        return float((torch.softmax(scores * scale, 1).transpose(1, 2) @ samples - means).square().mean())

    scales = [2 ** (step / _SCALES_A_STEP) for step in range(_LARGEST_SCALE * _SCALES_A_STEP + 1)]
    scale = min(scales, key=distance)
    return up.float(), bias.float(), down.float(), torch.tensor([scale])
