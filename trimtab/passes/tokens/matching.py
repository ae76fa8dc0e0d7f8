"""Bipartite matching of tokens, from the formulas of ToMe (Bolya et al., Token Merging: Your ViT But Faster,
arXiv 2210.09461)."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.errors import UsageError
from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.dtypes import DType
from trimtab.ir.ops import (
    Add,
    Amax,
    Amin,
    Cast,
    Eq,
    Gt,
    IndexSelect,
    Le,
    Lt,
    Matmul,
    Mean,
    Mul,
    Permute,
    Reshape,
    Sub,
    Sum,
    Tril,
    Where,
)
from trimtab.passes.tokens.assignment import Assignment, identity
from trimtab.passes.tokens.rows import column, constant, joined, span, token_count, unit_rows


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
    unit = unit_rows(build, span(build, metric, protected))
    candidates, receivers = (span(build, unit, (protected + odd) % 2, step=2) for odd in (0, 1))
    # Receivers come last.
    rows = iter(range(tokens - r - token_count(receivers), tokens - r))
    fixed = [n if n < protected else None if n % 2 == 0 else next(rows) for n in range(tokens)]
    return Assignment(match(build, candidates, receivers, r, protected, fixed), tokens - r)


def match(
    build: Builder, candidates: Value, receivers: Value, r: int, first: int, fixed: Sequence[int | None]
) -> Value:
    """New rows i64 ``[B, T]`` of T tokens after merging the r candidates most similar to one of the receivers.

    Candidates that stay alone get the rows from ``first`` on, in their order.

    Args:
        build: where ops go.
        candidates, receivers: ``[B, A, D]`` and ``[B, R, D]``, of unit length.
        r: how many candidates to merge.
        first: see above.
        fixed: for each of the T tokens its new row, or None for a candidate; candidates stand there in their order,
            and receivers in theirs, whose rows follow ``first`` and the A - r candidates that stay alone.
    """
    count = token_count(candidates)
    fates = _fates(build, candidates, receivers, r)
    # Each token looks at one candidate, those that are none at the first.
    numbers_of = iter(range(count))
    source = [next(numbers_of) if row is None else 0 for row in fixed]
    # A token's candidate, if it stays alone, is preceded by as many others that do as have a smaller number.
    upto = build(
        Le(build(Reshape(fates, shape=(fates.type.shape[0], 1, count))), constant(build, [[n] for n in source]))
    )
    place = build(Add(build(Sum(build(Cast(upto, dtype=DType.I64)), dims=(2,))), build.scalar(first - 1, DType.I64)))
    fate = build(IndexSelect(fates, constant(build, source), dim=1))
    joined_to = build(Add(fate, build.scalar(first - r, DType.I64)))  # the receivers' rows begin at first + A - r
    moved = build(Where(build(Lt(fate, build.scalar(count, DType.I64))), place, joined_to))
    is_candidate = constant(build, [row is None for row in fixed])
    rows = constant(build, [0 if row is None else row for row in fixed])
    return build(Where(is_candidate, moved, rows))


def _fates(build: Builder, candidates: Value, receivers: Value, r: int) -> Value:
    """What becomes of each candidate, i64 ``[B, A]``: its own number if it stays alone, or A and the number of the
    receiver if it is one of the r that are merged."""
    links = build(Matmul(candidates, build(Permute(receivers, dims=(0, 2, 1)))))
    strength, partner = first_largest(build, links)
    batch, count, _ = strength.type.shape
    # Stronger ones come first, and of equally strong ones the first: few candidates are ranked faster by comparing each
    # with each than by sorting, and in one kernel.
    others = build(Reshape(strength, shape=(batch, 1, count)))
    stronger = build(Cast(build(Gt(others, strength)), dtype=DType.I64))
    equal = build(Tril(build(Cast(build(Eq(others, strength)), dtype=DType.I64)), diagonal=-1))
    rank = build(Sum(build(Add(stronger, equal)), dims=(2,)))
    joined_to = build(Add(partner, build.scalar(token_count(candidates), DType.I64)))
    own = constant(build, range(token_count(candidates)))
    return build(Where(build(Lt(rank, build.scalar(r, DType.I64))), joined_to, own))


def first_largest(build: Builder, x: Value) -> tuple[Value, Value]:
    """The largest elements ``[B, A, 1]`` along the last axis of x ``[B, A, R]``, and the positions, i64 ``[B, A]``, of
    the first of them.

    The position is found by comparing with the largest element, so that one kernel makes both; in rows with NaN it is
    the last one.
    """
    size = x.type.shape[2]
    assert isinstance(size, int)
    largest = build(Amax(x, dims=(2,), keepdim=True))
    found = build(Where(build(Eq(x, largest)), constant(build, range(size)), build.scalar(size - 1, DType.I64)))
    return largest, build(Amin(found, dims=(2,)))


def interleaved(build: Builder, first: Value, second: Value) -> Value:
    """``first[0], second[0], first[1], ...`` of ``[B, n]`` and ``[B, n]`` or ``[B, n - 1]``."""
    batch, pairs = first.type.shape[0], token_count(second)
    stacked = joined(build, column(build, span(build, first, 0, pairs)), column(build, second), dim=2)
    return joined(build, build(Reshape(stacked, shape=(batch, 2 * pairs))), span(build, first, pairs))
