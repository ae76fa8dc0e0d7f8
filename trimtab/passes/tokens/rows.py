"""Rows of token tensors taken, summed, ranked and numbered by index; and the norm of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.errors import UsageError
from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.dtypes import DType
from trimtab.ir.ops import (
    Arange,
    Concat,
    Div,
    Expand,
    Full,
    Gather,
    Maximum,
    Mul,
    Reshape,
    Scatter,
    Slice,
    Sort,
    Sqrt,
    Sum,
)

SMALLEST_NORM = 1e-12
"""Rows shorter than this are divided by it instead of their length, so that a row of zeros stays zero."""


def token_count(x: Value) -> int:
    """N of ``[B, N, ...]``.

    Raises:
        UsageError: N is a symbol.
    """
    size = x.type.shape[1]
    if not isinstance(size, int):
        raise UsageError(
            "tokens cannot be reduced",
            values={"tokens": x.type},
            rule="the number of tokens is part of the reduced graph, so it must be a number; the batch may be a symbol",
            fix="trace the model with a fixed number of tokens",
            location=x.producer.location if x.producer is not None else None,
        )
    return size


def span(build: Builder, x: Value, start: int, stop: int | None = None, step: int = 1, dim: int = 1) -> Value:
    """``x[:, start:stop:step]``; x itself where that is all of it."""
    size = x.type.shape[dim]
    end = size if stop is None else stop
    if (start, end, step) == (0, size, 1):
        return x
    return build(Slice(x, dim=dim, start=start, stop=end, step=step))


def joined(build: Builder, *parts: Value, dim: int = 1) -> Value:
    """The parts behind one another, without those that are empty."""
    present = [part for part in parts if part.type.shape[dim] != 0] or list(parts[:1])
    return present[0] if len(present) == 1 else build(Concat(tuple(present), dim=dim))


def column(build: Builder, x: Value) -> Value:
    """``[B, K]`` as ``[B, K, 1]``."""
    return build(Reshape(x, shape=(*x.type.shape, 1)))


def numbers(build: Builder, like: Value, count: int, start: int = 0) -> Value:
    """``start, start + 1, ...`` as i64 ``[B, count]``, B of ``like``."""
    line = build(Arange(count, DType.I64, start=start))
    return build(Expand(line, shape=(like.type.shape[0], count)))


def constant(build: Builder, numbers: Sequence[Any]) -> Value:
    """Numbers (i64) or truth values that the graph holds as a weight: a table of rows costs no kernel.

    Nested sequences give more axes.
    """
    import torch

    return build.weight("tokens", torch.tensor(numbers))


def take(build: Builder, x: Value, rows: Value) -> Value:
    """Rows ``[B, K]`` of x ``[B, N, C]`` (or elements of ``[B, N]``): ``[B, K, C]``."""
    if x.type.rank == 3:
        rows = build(Expand(column(build, rows), shape=(*rows.type.shape, x.type.shape[2])))
    return build(Gather(x, rows, dim=1))


def sum_into(build: Builder, x: Value, rows: Value, count: int) -> Value:
    """``[B, count, C]`` whose row i is the sum of those rows of x ``[B, N, C]`` for which ``rows`` ``[B, N]`` holds i.

    Rows are added in the order of x.
    """
    batch, _, channels = x.type.shape
    zeros = build(Full(0.0, x.type.dtype, (batch, count, channels)))
    where = build(Expand(column(build, rows), shape=x.type.shape))
    return build(Scatter(zeros, where, x, dim=1, reduce="add"))


def put(build: Builder, base: Value, rows: Value, updates: Value) -> Value:
    """``base`` ``[B, N]`` or ``[B, N, C]`` with ``updates`` in the distinct rows ``[B, K]``."""
    if base.type.rank == 3:
        rows = build(Expand(column(build, rows), shape=updates.type.shape))
    return build(Scatter(base, rows, updates, dim=1))


def ranking(build: Builder, scores: Value) -> Value:
    """Positions i64 of ``scores`` ``[B, N]`` from the highest score to the lowest; of equal scores the first first.

    A stable sort: ``torch.topk`` leaves the order of equal scores open.
    """
    return build.add(Sort(scores, dim=1, descending=True)).results[1]


def inverse(build: Builder, order: Value) -> Value:
    """The inverse of permutations ``[B, N]``: the place of each position in ``order``."""
    count = token_count(order)
    places = numbers(build, order, count)
    return build(Scatter(places, order, places, dim=1))


def unit_rows(build: Builder, x: Value) -> Value:
    """x over the Euclidean length of its last axis."""
    square = build(Sum(build(Mul(x, x)), dims=(x.type.rank - 1,), keepdim=True))
    length = build(Maximum(build(Sqrt(square)), build.scalar(SMALLEST_NORM, x.type.dtype)))
    return build(Div(x, length))
