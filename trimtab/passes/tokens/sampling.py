"""Sampling of tokens by how much they matter to the class token, from the formulas of ATS (Fayyaz et al., Adaptive
Token Sampling For Efficient Vision Transformers, arXiv 2111.15667), with a number of rows that does not depend on the
data."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.errors import UsageError
from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.dtypes import DType
from trimtab.ir.ops import (
    Abs,
    Add,
    Amax,
    Amin,
    Arange,
    Argmin,
    Cast,
    Cumsum,
    Div,
    Full,
    Gt,
    LogicalAnd,
    Lt,
    Maximum,
    Mul,
    Ne,
    Reshape,
    Scatter,
    Sort,
    Sqrt,
    Sub,
    Sum,
    Where,
)
from trimtab.passes.tokens.class_attention import class_rows, received_scores
from trimtab.passes.tokens.rows import column, joined, numbers, ranking, span, take, token_count
from trimtab.passes.tokens.selection import Selection

_SMALLEST = 1e-30
"""What sums of scores are divided by at least: where all scores are zero, they stay zero."""


@dataclass(frozen=True)
class Sample(Selection):
    """A selection in which positions may repeat: ``live``, bool ``[B, K]``, holds for one row of each position that was
    picked. The other rows are copies, there only because the number of rows is fixed."""

    live: Value

    def target(self, build: Builder) -> Value:
        """The live row of each token, i64 ``[B, N]``; -1 for those that were not picked."""
        batch = self.rows.type.shape[0]
        nowhere = build.scalar(-1, DType.I64)
        row = build(Where(self.live, numbers(build, self.rows, self.count), nowhere))
        return build(Scatter(build(Full(-1, DType.I64, (batch, self.tokens))), self.rows, row, dim=1, reduce="amax"))


def value_lengths(build: Builder, v: Value) -> Value:
    """The length of each token's value, all heads together: ``[B, N]`` of v ``[B, G, N, D]``.

    Where several query heads share a value head, all lengths are shorter by the same factor than with a copy for each.
    """
    return build(Sqrt(build(Sum(build(Mul(v, v)), dims=(1, 3)))))


def sampling_scores(
    build: Builder,
    q: Value,
    k: Value,
    v: Value,
    scale: float,
    protected: int = 1,
    mask: Value | None = None,
    live: Value | None = None,
) -> Value:
    """How likely each token is to be sampled: the attention that the class token, at position 0, pays to it in all
    heads, times the length of its value.

    Without protected tokens there is no class token, and the attention that a token gets from all others counts.

    Args:
        build: where ops go.
        q: ``[B, H, N, D]``.
        k: ``[B, G, N, D]``, H a multiple of G; without protected tokens G is H.
        v: ``[B, G, N, E]``.
        scale: what the products are multiplied by before the softmax.
        protected: how many leading tokens get no score.
        mask: ``[B, 1, 1, N]``, added to the scaled products, or bool: which keys may be attended to.
        live: bool ``[B, N]``; the other tokens have score 0.

    Returns:
        ``[B, N - protected]``, f32 or f64, with sum 1, or 0 where there is nothing to sample.

    Raises:
        UsageError: there are no protected tokens, and q and k have different numbers of heads.
    """
    if protected:
        attention = build(Sum(class_rows(build, q, k, scale, mask), dims=(1,)))
    else:
        counts = build(Cast(column(build, live), dtype=q.type.dtype)) if live is not None else None
        attention = received_scores(build, q, k, scale, 0, mask, counts)
    scores = span(build, build(Mul(attention, value_lengths(build, v))), protected)
    if scores.type.dtype not in (DType.F32, DType.F64):
        scores = build(Cast(scores, dtype=DType.F32))
    if live is not None:
        # Not a product: a sample of padding alone has no attention that is a number.
        scores = build(Where(span(build, live, protected), scores, build.scalar(0.0, scores.type.dtype)))
    return _shares(build, scores, build(Sum(scores, dims=(1,), keepdim=True)))


def grid_picks(build: Builder, scores: Value, points: int) -> Value:
    """Positions at which the distribution of ``scores`` comes nearest to each of ``points`` values that are spread
    evenly from its smallest value above zero to one.

    The distribution runs over the tokens from the lowest score up, shifted and stretched to lie between 0 and 1. Tokens
    of score 0 are not picked as long as there are others, nor is the one that the distribution begins with. Tokens
    with much of the sum are picked several times. With one point it is the highest score that is picked.

    Args:
        build: where ops go.
        scores: ``[B, T]``, not negative.
        points: n.

    Returns:
        i64 ``[B, n]``, from the lowest score to the highest.
    """
    dtype = scores.type.dtype
    batch, tokens = scores.type.shape
    values, order = build.add(Sort(scores, dim=1)).results
    total = build(Cumsum(values, dim=1, dtype=dtype))
    base = span(build, total, 0, 1)
    share = _shares(build, build(Sub(total, base)), build(Sub(span(build, total, token_count(total) - 1), base)))
    one = build.scalar(1.0, dtype)
    first = build(Amin(build(Where(build(Gt(share, build.scalar(0.0, dtype))), share, one)), dims=(1,), keepdim=True))
    if points == 1:
        grid = build(Full(1.0, dtype, (batch, 1)))
    else:
        steps = build(Cast(build(Arange(points, DType.I64)), dtype=dtype))
        steps = build(Reshape(build(Div(steps, build.scalar(float(points - 1), dtype))), shape=(1, points)))
        grid = build(Add(first, build(Mul(steps, build(Sub(one, first))))))
    gaps = build(Sub(build(Reshape(grid, shape=(batch, points, 1))), build(Reshape(share, shape=(batch, 1, tokens)))))
    return take(build, order, build(Argmin(build(Abs(gaps)), dim=2)))


def sample_tokens(build: Builder, scores: Value, keep: int, points: int = 0, protected: int = 1) -> Sample:
    """Sample tokens by their scores: the protected ones, and K rows of picked ones in order of position.

    Where there are more picked positions than K, those with the highest scores are kept; where there are fewer, the
    rows that remain are copies of picked tokens and not live. So are rows of tokens without a score, which are picked
    where nothing has one.

    Args:
        build: where ops go.
        scores: ``[B, N - protected]``, see :func:`sampling_scores`.
        keep: K.
        points: how many values of the distribution are looked up, at least K; 0 for K.
        protected: how many leading tokens, which have no score, are kept.

    Raises:
        UsageError: K is not between 1 and the number of scores, or there are fewer points than K.
    """
    tokens = token_count(scores)
    points = points or keep
    if not 1 <= keep <= tokens or points < keep:
        raise UsageError(
            "so many tokens cannot be sampled",
            values={"keep": keep, "points": points, "scores": tokens},
            rule=f"1 <= keep <= {tokens}, the tokens that are not protected, and points is keep or more",
        )
    picked = build.add(Sort(grid_picks(build, scores, points), dim=1)).results[0]
    new = build(Ne(span(build, picked, 1), span(build, picked, 0, points - 1))) if points > 1 else None
    batch = picked.type.shape[0]
    live = joined(build, build(Full(True, DType.BOOL, (batch, 1))), *([new] if new is not None else []))
    if points > keep:
        picked, live = _highest(build, scores, picked, live, keep)
    live = build(LogicalAnd(live, build(Gt(take(build, scores, picked), build.scalar(0.0, scores.type.dtype)))))
    rows = build(Add(picked, build.scalar(protected, DType.I64))) if protected else picked
    always = build(Full(True, DType.BOOL, (batch, protected)))
    return Sample(
        joined(build, numbers(build, scores, protected), rows), protected + tokens, joined(build, always, live)
    )


def _highest(build: Builder, scores: Value, picked: Value, live: Value, keep: int) -> tuple[Value, Value]:
    """The live positions with the ``keep`` highest scores, in order, then copies of the last; and which are live."""
    nothing = build.scalar(token_count(scores), DType.I64)
    value = build(Where(live, take(build, scores, picked), build.scalar(-1.0, scores.type.dtype)))
    best = span(build, ranking(build, value), 0, keep)
    positions = build.add(Sort(take(build, build(Where(live, picked, nothing)), best), dim=1)).results[0]
    real = build(Lt(positions, nothing))
    last = build(Amax(build(Where(real, positions, build.scalar(0, DType.I64))), dims=(1,), keepdim=True))
    return build(Where(real, positions, last)), real


def _shares(build: Builder, part: Value, whole: Value) -> Value:
    return build(Div(part, build(Maximum(whole, build.scalar(_SMALLEST, part.type.dtype)))))
