"""Keeping the tokens that get attention and fusing the others, from the formulas of EViT (Liang et al., Not All Patches
are What You Need, arXiv 2202.07800)."""

from __future__ import annotations

import math

from trimtab.errors import UsageError
from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.dtypes import DType
from trimtab.ir.ops import (
    Add,
    Cast,
    Div,
    Full,
    Gt,
    Lt,
    Matmul,
    Maximum,
    Mean,
    Minimum,
    Mul,
    Permute,
    Reshape,
    Softmax,
    Sum,
    Where,
)
from trimtab.passes.tokens.assignment import Assignment, identity
from trimtab.passes.tokens.rows import column, inverse, joined, numbers, ranking, span, token_count
from trimtab.passes.tokens.selection import Selection, WeightedAssignment


def class_scores(
    build: Builder, q: Value, k: Value, scale: float, protected: int = 1, mask: Value | None = None
) -> Value:
    """How much the class token, at position 0, attends to each other token: the mean over heads of its row.

    Only that row of the attention matrix is computed, N * D products a head, beside an attention that stays fused.

    Args:
        build: where ops go.
        q: ``[B, H, N, D]``.
        k: ``[B, G, N, D]``, H a multiple of G.
        scale: what the products are multiplied by before the softmax.
        protected: how many leading tokens get no score.
        mask: ``[B, 1, 1, N]``, added to the scaled products, or bool: which keys may be attended to.

    Returns:
        ``[B, N - protected]``, not normalised again after the protected tokens are left out.
    """
    row = class_rows(build, q, k, scale, mask)
    return span(build, build(Mean(row, dims=(1,))), protected)


def class_rows(build: Builder, q: Value, k: Value, scale: float, mask: Value | None = None) -> Value:
    """The class token's row of the attention matrix for each head, ``[B, H, N]``; see :func:`class_scores`."""
    batch, heads, _, width = q.type.shape
    groups, tokens = k.type.shape[1:3]
    # The query heads that share a key head are rows of one product.
    first = build(Reshape(span(build, q, 0, 1, dim=2), shape=(batch, groups, heads // groups, width)))
    return build(Reshape(_attention(build, first, k, scale, mask), shape=(batch, heads, tokens)))


def received_scores(
    build: Builder,
    q: Value,
    k: Value,
    scale: float,
    protected: int = 0,
    mask: Value | None = None,
    sizes: Value | None = None,
) -> Value:
    """How much attention each token gets: the mean over heads and queries of its column. For models without a class
    token. Takes what :func:`class_scores` does and computes the whole attention matrix; with ``sizes`` ``[B, N, 1]``,
    queries of size 0, which are padding, do not count.

    Raises:
        UsageError: q and k have different numbers of heads.
    """
    if q.type.shape[1] != k.type.shape[1]:
        raise UsageError(
            "the attention that tokens get cannot be computed",
            values={"q": q.type, "k": k.type},
            rule="q and k need as many heads as one another",
        )
    matrix = _attention(build, q, k, scale, mask)
    if sizes is None:
        columns = build(Mean(matrix, dims=(1, 2)))
    else:
        rows = build(Mean(matrix, dims=(1,)))
        counts = build(Cast(build(Gt(sizes, build.scalar(0.0, sizes.type.dtype))), dtype=q.type.dtype))
        number = build(Maximum(build(Sum(counts, dims=(1,))), build.scalar(1.0, q.type.dtype)))
        columns = build(Div(build(Sum(build(Mul(rows, counts)), dims=(1,))), number))
    return span(build, columns, protected)


def _attention(build: Builder, q: Value, k: Value, scale: float, mask: Value | None) -> Value:
    products = build(Matmul(q, build(Permute(k, dims=(0, 1, 3, 2)))))
    logits = build(Mul(products, build.scalar(scale, q.type.dtype)))
    if mask is not None and mask.type.dtype is DType.BOOL:
        logits = build(Where(mask, logits, build.scalar(float("-inf"), q.type.dtype)))
    elif mask is not None:
        logits = build(Add(logits, mask))
    return build(Softmax(logits, dim=3))


def padding_last(build: Builder, scores: Value, sizes: Value) -> Value:
    """``scores`` ``[B, K]``, with -1 for padding: the last K tokens of ``sizes`` ``[B, N, 1]`` that have size 0."""
    batch, count = scores.type.shape
    own = span(build, sizes, token_count(sizes) - token_count(scores))
    present = build(Gt(build(Reshape(own, shape=(batch, count))), build.scalar(0.0, sizes.type.dtype)))
    return build(Where(present, scores, build.scalar(-1.0, scores.type.dtype)))


def kept_tokens(keep: float, tokens: int, protected: int = 1) -> int:
    """K = ceil(keep * (N - protected)), how many of the tokens without the protected ones a rate keeps."""
    return math.ceil(keep * (tokens - protected))


def keep_and_fuse(build: Builder, scores: Value, keep: int, protected: int = 1) -> WeightedAssignment:
    """Keep the tokens with the highest scores, and add up the others, times their scores, as one token at the end.

    The result holds the protected tokens, the kept ones from the highest score down, and the fused token. Of equal
    scores the first wins. Scores that sum to one over all tokens give a fused token that is shorter than a mean, as
    in the original.

    Args:
        build: where ops go.
        scores: ``[B, N - protected]``; one below 0, see :func:`padding_last`, adds nothing to the fused token.
        keep: K; with all of them nothing is fused and the result is the identity.
        protected: how many leading tokens, which have no score, are kept.

    Raises:
        UsageError: K is not between 1 and the number of scores.
    """
    count = _checked(scores, keep)
    batch = scores.type.shape[0]
    if keep == count:
        every = build(Full(1.0, scores.type.dtype, (batch, protected + count, 1)))
        return WeightedAssignment(identity(build, scores, protected + count), every)
    ones = build(Full(1.0, scores.type.dtype, (batch, protected)))
    rank = inverse(build, ranking(build, scores))
    limit = build.scalar(keep, DType.I64)
    row = build(Add(build(Minimum(rank, limit)), build.scalar(protected, DType.I64)))
    one, zero = (build.scalar(number, scores.type.dtype) for number in (1.0, 0.0))
    weight = build(Where(build(Lt(rank, limit)), one, build(Maximum(scores, zero))))
    target = joined(build, numbers(build, scores, protected), row)
    return WeightedAssignment(Assignment(target, protected + keep + 1), column(build, joined(build, ones, weight)))


def keep_best(build: Builder, scores: Value, keep: int, protected: int = 1) -> Selection:
    """Keep the protected tokens and those with the highest scores, from the highest down, and drop the others.

    Args and errors are those of :func:`keep_and_fuse`.
    """
    count = _checked(scores, keep)
    best = span(build, ranking(build, scores), 0, keep)
    rows = build(Add(best, build.scalar(protected, DType.I64)))
    return Selection(joined(build, numbers(build, scores, protected), rows), protected + count)


def _checked(scores: Value, keep: int) -> int:
    count = token_count(scores)
    if not 1 <= keep <= count:
        raise UsageError(
            "so many tokens cannot be kept",
            values={"keep": keep, "scores": count},
            rule=f"1 <= keep <= {count}, the tokens that are not protected",
        )
    return count
