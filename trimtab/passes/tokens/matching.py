"""Bipartite matching of tokens, from the formulas of ToMe (Bolya et al., Token Merging: Your ViT But Faster,
arXiv 2210.09461)."""

from __future__ import annotations

from trimtab.errors import UsageError
from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.dtypes import DType
from trimtab.ir.ops import Add, Amax, Argmax, Cast, Cumsum, Full, Gt, Matmul, Mean, Mul, Permute, Reshape, Sub, Where
from trimtab.passes.tokens.assignment import Assignment, identity
from trimtab.passes.tokens.rows import column, joined, numbers, put, ranking, span, token_count, unit_rows


def key_metric(build: Builder, keys: Value) -> Value:
    """What tokens are compared by: the mean over heads of the keys ``[B, H, N, D]``, ``[B, N, D]``."""
    return build(Mean(keys, dims=(1,)))


def without_padding(build: Builder, metric: Value, sizes: Value) -> Value:
    """``metric`` ``[B, N, D]`` of unit length, and a channel by which padding, tokens of size 0, is like padding only.

    Padding is merged with padding first, before any token is. A token that finds nothing like itself may still be
    merged into padding, which counts for nothing, and so stays what it is.

    Args:
        build: where ops go.
        metric: see :func:`key_metric`.
        sizes: ``[B, N, 1]``.
    """
    zero, one = (build.scalar(number, sizes.type.dtype) for number in (0.0, 1.0))
    padding = build(Where(build(Gt(sizes, zero)), zero, one))
    tokens = build(Mul(unit_rows(build, metric), build(Sub(one, padding))))
    return joined(build, tokens, padding, dim=2)


def most_merged(tokens: int, protected: int) -> int:
    """The largest r for so many tokens: half of those that are not protected."""
    return max(0, (tokens - protected) // 2)


def bipartite_matching(build: Builder, metric: Value, r: int, protected: int = 1) -> Assignment:
    """Merge r tokens into those most similar to them.

    Tokens at even positions are candidates, those at odd positions may receive. Each candidate is linked to the
    receiver whose metric has the largest cosine to its own, and the r strongest links are merged. Among equal
    cosines the receiver, and among equally strong links the candidate, at the smaller position wins.

    The result holds the protected tokens, then the candidates that were not merged, then the receivers, each in
    their order.

    Args:
        build: where ops go.
        metric: ``[B, N, D]``, see :func:`key_metric`.
        r: how many tokens to merge, at most :func:`most_merged`; 0 gives the identity.
        protected: how many leading tokens neither merge nor receive.

    Raises:
        UsageError: r is out of range, or N is a symbol.
    """
    tokens = token_count(metric)
    if not 0 <= r <= most_merged(tokens, protected):
        raise UsageError(
            "so many tokens cannot be merged",
            values={"r": r, "tokens": tokens, "protected": protected},
            rule=f"0 <= r <= {most_merged(tokens, protected)}, half of the tokens that are not protected",
        )
    if r == 0:
        return identity(build, metric, tokens)
    candidates = span(build, metric, protected + protected % 2, step=2)
    receivers = span(build, metric, protected + (protected + 1) % 2, step=2)
    candidate_target, receiver_target = match(
        build, unit_rows(build, candidates), unit_rows(build, receivers), r, first=protected
    )
    even_first = (candidate_target, receiver_target)
    rest = interleaved(build, *(even_first if protected % 2 == 0 else even_first[::-1]))
    return Assignment(joined(build, numbers(build, metric, protected), rest), tokens - r)


def match(build: Builder, candidates: Value, receivers: Value, r: int, first: int) -> tuple[Value, Value]:
    """Merge the r ``candidates`` ``[B, A, D]`` most similar to one of ``receivers`` ``[B, R, D]``, all of unit length.

    Returns:
        New rows ``[B, A]`` of the candidates and ``[B, R]`` of the receivers: from ``first`` on the candidates
        that stay alone, then the receivers.
    """
    links = build(Matmul(candidates, build(Permute(receivers, dims=(0, 2, 1)))))
    strength, partner = build(Amax(links, dims=(2,))), build(Argmax(links, dim=2))
    batch, count = strength.type.shape
    assert isinstance(count, int)
    merged = span(build, ranking(build, strength), 0, r)
    ones, zeros = (build(Full(n, DType.I64, (batch, size))) for n, size in ((1, count), (0, r)))
    alone = put(build, ones, merged, zeros)
    place = build(Add(build(Cumsum(alone, dim=1, dtype=DType.I64)), build.scalar(first - 1, DType.I64)))
    start = first + count - r
    joined_to = build(Add(partner, build.scalar(start, DType.I64)))
    target = build(Where(build(Cast(alone, dtype=DType.BOOL)), place, joined_to))
    return target, numbers(build, receivers, token_count(receivers), start)


def interleaved(build: Builder, first: Value, second: Value) -> Value:
    """``first[0], second[0], first[1], ...`` of ``[B, n]`` and ``[B, n]`` or ``[B, n - 1]``."""
    batch, pairs = first.type.shape[0], token_count(second)
    stacked = joined(build, column(build, span(build, first, 0, pairs)), column(build, second), dim=2)
    return joined(build, build(Reshape(stacked, shape=(batch, 2 * pairs))), span(build, first, pairs))
