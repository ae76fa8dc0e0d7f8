"""Sampling of tokens that matter to the class token: ATS."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from trimtab.errors import UsageError
from trimtab.ir.builder import Builder
from trimtab.ir.core import Module, Value
from trimtab.ir.dead_code import remove_dead_ops
from trimtab.ir.dtypes import DType
from trimtab.ir.interpreter import interpret
from trimtab.ir.op import Op
from trimtab.ir.ops import Cast, Gt, Mul, Reshape, Sum
from trimtab.passes.base import Context
from trimtab.passes.tokens.assignment import initial_sizes, made_up
from trimtab.passes.tokens.class_attention import kept_tokens
from trimtab.passes.tokens.reduction import TokenReduction
from trimtab.passes.tokens.rows import column
from trimtab.passes.tokens.sampling import Sample, sample_tokens, sampling_scores
from trimtab.passes.tokens.schedules import Removals
from trimtab.passes.tokens.shortening import Place, Plan, Reduce, shorten
from trimtab.passes.tokens.steps import SelectStep, Step
from trimtab.passes.tokens.stream import Blocker, Layer, Stream, find_stream

_PERCENTILE = 0.9
"""The share of calibration samples in which all tokens that are picked have a row."""


@dataclass(frozen=True)
class SampleTokens(TokenReduction):
    """Sample the tokens that matter to the class token inside the attention of each layer (ATS).

    A token's score is the attention that the class token pays to it in all heads, times the length of its value; in
    models without a class token, the attention that it gets from all others. The running sum of the scores, from the
    lowest up, is looked up at evenly spread values, and the tokens found there are kept. As a token with a high score
    is found several times, how many different tokens there are depends on the image. Their number of rows does not:
    rows too many are copies that no attention and no mean sees. All tokens are keys and values once more, but queries
    only if they are kept. Means over tokens count each kept one alike. From Fayyaz et al., Adaptive Token Sampling For
    Efficient Vision Transformers, arXiv 2111.15667.

    - ``keep``: the share of the original tokens, without those that are read by their position, that a layer keeps.
      A layer that is given no more than that samples none.
    - ``k``: the number of tokens that each of the layers keeps, instead.
    - ``points``: how many values the running sum is looked up at; 0 for as many as tokens are kept. With more, the
      tokens found are more than are kept, which are the ones with the highest scores.
    - ``calibrated``: keep as many tokens in each layer as are different ones in nine tenths of the calibration data
      when there are as many values as original tokens, but no more than ``keep``.
    - ``layers``: as in all passes that reduce tokens, but empty for all but the first quarter.
    """

    name: ClassVar[str] = "sample-tokens"
    gives_back: ClassVar[bool] = False
    keep: float = 0.7
    k: tuple[int, ...] = ()
    points: int = 0
    calibrated: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keep <= 1:
            raise UsageError(
                "sample-tokens got a share of tokens that it cannot keep",
                values={"keep": self.keep},
                rule="0 < keep <= 1",
            )
        if any(count < 1 for count in self.k) or self.points < 0:
            raise UsageError(
                "sample-tokens got wrong numbers of tokens",
                values={"k": list(self.k), "points": self.points},
                rule="a layer keeps 1 or more, and points is 0 or more",
            )
        given = {
            "k": list(self.k),
            "calibrated": self.calibrated,
            "budget": self.budget,
            "max_drop": self.max_drop,
        }
        chosen = {name: value for name, value in given.items() if value}
        if len(chosen) > 1:
            raise UsageError(
                "sample-tokens got options that do not go together",
                values=chosen,
                rule="each of them says how many tokens are kept",
                fix="give one of them",
            )

    def does_nothing(self) -> bool:
        return self.keep == 1 and not self.k and not self.calibrated

    def default_layers(self, stream: Stream) -> list[int]:
        count = len(stream.layers)
        return list(range(count // 4, count))

    def blockers(self, layer: Layer) -> tuple[Blocker, ...]:
        return layer.entry_blockers

    def removals(self, stream: Stream, layers: Sequence[int]) -> Removals:
        free = stream.tokens - stream.protected
        if not self.k:
            return _down_to([kept_tokens(self.keep, stream.tokens, stream.protected)] * len(layers), free)
        asked = list(self.layers) or self.default_layers(stream)
        if len(self.k) != len(asked) or max(self.k) > free:
            raise UsageError(
                "sample-tokens got wrong numbers of tokens",
                values={"k": list(self.k), "layers": asked, "tokens": stream.tokens, "protected": stream.protected},
                rule=f"there is one number for each layer that may reduce, from 1 to {free}",
                fix=f"give {len(asked)} numbers, or layers=",
            )
        wanted = dict(zip(asked, self.k, strict=True))
        return _down_to([wanted[number] for number in layers], free)

    def plan(self, stream: Stream, removals: Removals, layers: Sequence[int]) -> Plan:
        def reduction(removed: int) -> Reduce:
            return lambda place: self.reduce(place, removed)

        inside: dict[Op, tuple[int, Reduce]] = {
            stream.layers[number].attention: (number, reduction(removed))
            for number, removed in zip(layers, removals, strict=True)
            if removed
        }
        return Plan({}, inside, self.unmerge)

    def reduce(self, place: Place, removed: int) -> Step:
        keep = place.tokens - place.protected - removed
        original = place.layer.tokens - place.protected
        return sample_at(place, keep, original if self.calibrated else max(keep, self.points))

    def _chosen(self, module: Module, stream: Stream, layers: Sequence[int], ctx: Context) -> Removals:
        if not self.calibrated:
            return super()._chosen(module, stream, layers, ctx)
        if not ctx.calibration:
            raise UsageError(
                "sample-tokens cannot be calibrated",
                values={"calibration batches": 0},
                rule="how many tokens a layer keeps is counted on calibration data",
                fix="give optimize() calibration batches, or keep= or k= instead of calibrated=",
            )
        most = kept_tokens(self.keep, stream.tokens, stream.protected)
        counts = [min(most, count) for count in different_tokens(module, layers, ctx)]
        ctx.note("k " + ", ".join(f"{number}: {count}" for number, count in zip(layers, counts, strict=True)))
        return _down_to(counts, stream.tokens - stream.protected)


def different_tokens(module: Module, layers: Sequence[int], ctx: Context) -> list[int]:
    """How many different tokens each of ``layers`` picks in nine tenths of the calibration samples, when it looks up as
    many values as there are original tokens and there is a row for every token.

    Args:
        module: with its attention raised; it is only read.
        layers: numbers.
        ctx: with calibration batches.
    """
    import torch

    copy = module.copy()
    stream, graph = find_stream(copy), copy.main
    original = stream.tokens - stream.protected
    outputs = len(graph.outputs)

    def watch(place: Place, step: Step) -> None:
        assert isinstance(step, SampleStep)
        live = place.build(Cast(step.sample.live, dtype=DType.F32))
        # As outputs they stay when the rewriting removes ops that nothing reads.
        graph.set_outputs(
            [*graph.outputs, place.build(Sum(live, dims=(1,)))], [*graph.output_names, f"live.{place.number}"]
        )

    def reduction(place: Place) -> Step:
        return sample_at(place, original, original)

    plan = Plan({}, {stream.layers[number].attention: (number, reduction) for number in layers})
    shorten(copy, stream, plan, SampleTokens.name, watch)
    graph.set_outputs(graph.outputs[outputs:], graph.output_names[outputs:])
    remove_dead_ops(copy)
    counted = [interpret(copy, batch) for batch in ctx.calibration]
    return [
        max(1, math.ceil(float(torch.cat(counts).quantile(_PERCENTILE, interpolation="higher"))) - stream.protected)
        for counts in zip(*counted, strict=True)
    ]


class SampleStep(SelectStep):
    """Tokens that were sampled, some of them several times. The copies are masked as keys and count for nothing, and
    the others count as much together as all tokens did before.

    Args:
        place: where.
        sample: what was sampled.
    """

    def __init__(self, place: Place, sample: Sample) -> None:
        build = place.build
        self.sample = sample
        live = sample.live
        batch, count = live.type.shape
        super().__init__(sample, _sizes(build, place, sample), build(Reshape(live, shape=(batch, 1, 1, count))))


def sample_at(place: Place, keep: int, points: int) -> SampleStep:
    """Sample ``keep`` tokens beside the protected ones at a place; see :func:`~.tokens.sampling.sample_tokens`."""
    build, attention = place.build, place.layer.attention
    with build.at(attention.location):
        live = _live(build, place)
        mask = place.key_mask
        if mask is not None and mask.type.dtype not in (DType.BOOL, place.q.type.dtype):
            mask = build(Cast(mask, dtype=place.q.type.dtype))
        scores = sampling_scores(build, place.q, place.k, place.v, attention.scale, place.protected, mask, live)
        return SampleStep(place, sample_tokens(build, scores, keep, points, place.protected))


def _live(build: Builder, place: Place) -> Value | None:
    """Bool ``[B, N]``: which tokens are neither padding nor copies."""
    mask, shape = place.key_mask, place.x.type.shape[:2]
    if mask is not None and mask.type.dtype is DType.BOOL and mask.type.shape[0] == shape[0]:
        return build(Reshape(mask, shape=shape))
    if place.sizes is None:
        return None
    return build(Gt(build(Reshape(place.sizes, shape=shape)), build.scalar(0.0, place.sizes.type.dtype)))


def _sizes(build: Builder, place: Place, sample: Sample) -> Value:
    """``[B, K, 1]``: protected tokens keep their size; the other live ones share that of all tokens before."""
    before = place.sizes if place.sizes is not None else initial_sizes(build, place.x)
    dtype = before.type.dtype
    kept = build(Mul(sample.select(build, before), build(Cast(column(build, sample.live), dtype=dtype))))
    return made_up(build, kept, before, place.protected)


def _down_to(counts: Sequence[int], tokens: int) -> Removals:
    """How many go where ``counts`` are left, of ``tokens`` at first; none where there are no more than that."""
    removals = []
    for count in counts:
        removals.append(max(0, tokens - count))
        tokens -= removals[-1]
    return tuple(removals)
