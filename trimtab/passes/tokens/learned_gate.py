"""Scores that a trained policy gives to tokens, from the formulas of IA-RED2 (Pan et al., IA-RED2:
Interpretability-Aware Redundancy Reduction for Vision Transformers, arXiv 2106.12620), with gradients that reach the
policy through a selection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.dtypes import DType
from trimtab.ir.ops import (
    Add,
    Cast,
    Div,
    Full,
    LayerNorm,
    Linear,
    Matmul,
    Maximum,
    Mean,
    Mul,
    Permute,
    Reshape,
    RmsNorm,
    Sigmoid,
    Sub,
    Sum,
    Where,
)
from trimtab.passes.tokens.assignment import SMALLEST_SIZE
from trimtab.passes.tokens.class_attention import keep_best, padding_last
from trimtab.passes.tokens.entry import sizes_for_all
from trimtab.passes.tokens.projections import Projections
from trimtab.passes.tokens.rows import column, joined, span, take
from trimtab.passes.tokens.selection import Selection
from trimtab.passes.tokens.shortening import Place
from trimtab.passes.tokens.steps import SelectStep, counted

if TYPE_CHECKING:
    import torch

_STEPS_OF_ONE = 2.0**40
"""Into which a score is cut to be an integer: finer than float32, so that a score and its copy are equal there."""


@dataclass(frozen=True)
class GateWeights:
    """The weights of a gate with H heads of D channels over tokens of C channels, all trainable, in float32.

    Attributes:
        query: F_q, ``[H D, C]`` and ``[H D]`` or none.
        key: F_k, ``[H, D, C]`` and ``[H, D, 1]`` or none.
    """

    query: tuple[Value, Value | None]
    key: tuple[Value, Value | None]

    @staticmethod
    def of(build: Builder, name: str, initial: Projections) -> GateWeights:
        """New weights called ``name`` and so on, with what ``initial`` holds."""
        heads, width, channels = initial.key.shape

        def weight(suffix: str, data: torch.Tensor) -> Value:
            return build.weight(f"{name}.{suffix}", data.contiguous(), trainable=True)

        query = weight("query.weight", initial.query.reshape(heads * width, channels))
        key = weight("key.weight", initial.key)
        biases: list[Value | None] = [None, None]
        if initial.query_bias is not None:
            biases[0] = weight("query.bias", initial.query_bias.reshape(heads * width))
        if initial.key_bias is not None:
            biases[1] = weight("key.bias", initial.key_bias.reshape(heads, width, 1))
        return GateWeights((query, biases[0]), (key, biases[1]))

    @property
    def ids(self) -> tuple[str, str]:
        """Ids of the weights of F_q and F_k, without the biases."""
        return str(self.query[0].weight), str(self.key[0].weight)


def policy_scores(build: Builder, policy: Value, x: Value, weights: GateWeights) -> Value:
    """``I_j = mean over heads of sigmoid(F_q(policy) . F_k(x_j))``: ``[B, T]``, between 0 and 1.

    The keys of tokens are not computed: ``q . (W x + b) = (q W) . x + q . b``, which takes D times less.

    Args:
        build: where ops go.
        policy: what asks, ``[B, 1, C]``: the class token, or the mean of tokens.
        x: ``[B, T, C]``.
        weights: F_q and F_k.
    """
    heads, width, _ = weights.key[0].type.shape
    batch = x.type.shape[0]
    query = build(Linear(policy, *weights.query))
    query = build(Reshape(query, shape=(batch, heads, 1, width)))
    row = build(Matmul(query, weights.key[0]))
    products = build(Matmul(build(Permute(row, dims=(0, 2, 1, 3))), _columns(build, x)))
    products = build(Reshape(products, shape=(batch, heads, x.type.shape[1])))
    if weights.key[1] is not None:
        shift = build(Matmul(query, weights.key[1]))
        products = build(Add(products, build(Reshape(shift, shape=(batch, heads, 1)))))
    return build(Mean(build(Sigmoid(products)), dims=(1,)))


def _columns(build: Builder, x: Value) -> Value:
    """x ``[B, T, C]`` as ``[B, 1, C, T]``."""
    batch, tokens, channels = x.type.shape
    return build(Reshape(build(Permute(x, dims=(0, 2, 1))), shape=(batch, 1, channels, tokens)))


def straight_through(build: Builder, scores: Value) -> Value:
    """Zeros of the shape of ``scores`` whose gradient is that of the scores: straight-through estimation (Bengio et
    al., Estimating or Propagating Gradients Through Stochastic Neurons, arXiv 1308.3432).

    ``score - copy``, where the copy has been an integer, through which no gradient goes. In float32 the two differ by
    less than 2^-40, and not at all from 2^-17 on.
    """
    dtype = scores.type.dtype
    cut = build(Cast(build(Mul(scores, build.scalar(_STEPS_OF_ONE, dtype))), dtype=DType.I64))
    copy = build(Mul(build(Cast(cut, dtype=dtype)), build.scalar(1 / _STEPS_OF_ONE, dtype)))
    return build(Sub(scores, copy))


class GateStep(SelectStep):
    """The tokens with the highest scores of a policy are kept, as keys and in means through which gradients reach it.

    A factor on the tokens themselves would not do, as a norm takes it out again. So the layers up to the next gate add
    zeros to the attention scores of kept tokens, the straight-through difference of the policy's score: its gradient is
    how much it would help to attend to a token more. Means over tokens weigh them likewise, by ones.

    Padding goes first. In means over tokens the kept ones count for the dropped ones in equal parts.

    Args:
        place: where.
        keep: K, of the unprotected tokens.
        name: what new weights are called.
        initial: values of the policy's weights.
        guessed: whether these are not the layer's own.
    """

    def __init__(self, place: Place, keep: int, name: str, initial: Projections, guessed: bool) -> None:
        build = place.build
        self.guessed = guessed
        self.weights = GateWeights.of(build, name, initial)
        present = place.sizes if place.padded else None
        scores = _scores(place, self.weights, initial, present)
        ranked = scores if present is None else padding_last(build, scores, present)
        selection = keep_best(build, ranked, keep, place.protected)
        kept = None if place.sizes is None else span(build, selection.select(build, place.sizes), place.protected)
        sizes = sizes_for_all(place, keep, kept)
        dtype, count = sizes.type.dtype, selection.count
        bias = _differences(build, scores, selection, place.protected)
        if dtype is not DType.F32:
            bias = build(Cast(bias, dtype=dtype))
        weighted = build(Mul(sizes, build(Add(bias, build.scalar(1.0, dtype)))))
        key_mask = build(Reshape(bias, shape=(place.x.type.shape[0], 1, 1, count)))
        if place.padded:
            key_mask = build(Where(counted(build, sizes), key_mask, build.scalar(float("-inf"), dtype)))
        super().__init__(selection, weighted, key_mask)


def _scores(place: Place, weights: GateWeights, initial: Projections, present: Value | None) -> Value:
    """Of the unprotected tokens, ``[B, T]``; the class token asks, or the mean of those that are no padding."""
    build, x = place.build, place.x
    if x.type.dtype is not DType.F32:
        x = build(Cast(x, dtype=DType.F32))
    if initial.norm == "layer":
        x = build(LayerNorm(x, eps=initial.eps))
    elif initial.norm == "rms":
        x = build(RmsNorm(x, eps=initial.eps))
    free = span(build, x, place.protected)
    if place.protected:
        policy = span(build, x, 0, 1)
    elif present is None:
        policy = build(Mean(free, dims=(1,), keepdim=True))
    else:
        counts = present if present.type.dtype is DType.F32 else build(Cast(present, dtype=DType.F32))
        total = build(Sum(counts, dims=(1,), keepdim=True))
        total = build(Maximum(total, build.scalar(SMALLEST_SIZE, DType.F32)))
        policy = build(Div(build(Sum(build(Mul(free, counts)), dims=(1,), keepdim=True)), total))
    return policy_scores(build, policy, free, weights)


def _differences(build: Builder, scores: Value, selection: Selection, protected: int) -> Value:
    """Of the kept tokens, ``[B, protected + K, 1]``: zeros, through which gradients reach the scores."""
    zeros = build(Full(0.0, scores.type.dtype, (scores.type.shape[0], protected)))
    return column(build, take(build, joined(build, zeros, straight_through(build, scores)), selection.rows))
