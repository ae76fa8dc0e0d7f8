"""The result of merging: which token of the shorter sequence each token has become part of."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.dtypes import DType
from trimtab.ir.ops import Div, Full, Log, Maximum, Mul, Reshape, Sub, Sum
from trimtab.passes.tokens.rows import joined, numbers, span, sum_into, take

SMALLEST_SIZE = 1e-9
"""What the sizes of rows are at least when sums are divided by them, so that a row of padding alone becomes zero."""


@dataclass(frozen=True)
class Assignment:
    """Each of N tokens becomes part of one of ``count`` tokens.

    ``target``, i64 ``[B, N]``, holds the new row of each token, between 0 and count - 1; every row has a token, and
    protected tokens, which come first, keep their rows and are alone in them. The original patches of a drawing or
    a dense output are found by ``after``, which follows several reductions at once.
    """

    target: Value
    count: int

    def sum(self, build: Builder, x: Value, apart: int = 0) -> Value:
        """x ``[B, N, C]`` with the tokens of each new row added: ``[B, count, C]``.

        ``apart`` of the protected tokens do not pass through the sum: where nothing else is read later, all that was
        computed for others can be left out.
        """
        if not apart:
            return sum_into(build, x, self.target, self.count)
        rows = build(Sub(span(build, self.target, apart), build.scalar(apart, DType.I64)))
        rest = sum_into(build, span(build, x, apart), rows, self.count - apart)
        return joined(build, span(build, x, 0, apart), rest)

    def merge(self, build: Builder, x: Value, sizes: Value | None = None) -> tuple[Value, Value]:
        """The mean of the tokens of each new row, weighted by how many tokens each of them already stands for.

        Args:
            build: where ops go.
            x: tokens ``[B, N, C]``.
            sizes: ``[B, N, 1]`` in x's dtype; none means that every token stands for itself. Tokens of size 0, which
                padding has, do not count, and a row of them alone is zero.

        Returns:
            The merged tokens ``[B, count, C]`` and their sizes ``[B, count, 1]``.
        """
        if sizes is None:
            sizes = initial_sizes(build, x)
        total = self.sum(build, sizes)
        return self.sum(build, build(Mul(x, self.shares(build, sizes, total)))), total

    def shares(self, build: Builder, sizes: Value, total: Value) -> Value:
        """The share of each token in its new row ``[B, N, 1]``: its own size over the size of that row.

        Multiplied by it before they are added, tokens become their mean, and no pass over the new rows has to divide
        them. A token that is alone has the share 1 and stays what it is, one of size 0 has none.

        Args:
            build: where ops go.
            sizes: ``[B, N, 1]``.
            total: sizes of the new rows, ``[B, count, 1]``.
        """
        return divided(build, sizes, take(build, total, self.target))

    def unmerge(self, build: Builder, y: Value) -> Value:
        """Tokens y ``[B, count, C]`` (or ``[B, count]``) copied back to all that they stand for: ``[B, N, C]``."""
        return take(build, y, self.target)

    def after(self, build: Builder, earlier: Assignment) -> Assignment:
        """``earlier`` and then this one, as one assignment of the tokens that ``earlier`` began with."""
        return Assignment(take(build, self.target, earlier.target), self.count)


def divided(build: Builder, total: Value, sizes: Value) -> Value:
    """Sums of rows ``[B, N, C]`` over their sizes ``[B, N, 1]``; rows of size 0 are zero."""
    return build(Div(total, build(Maximum(sizes, build.scalar(SMALLEST_SIZE, sizes.type.dtype)))))


def initial_sizes(build: Builder, x: Value) -> Value:
    """Ones ``[B, N, 1]`` in x's dtype: every token stands for itself."""
    return build(Full(1.0, x.type.dtype, (*x.type.shape[:2], 1)))


def made_up(build: Builder, kept: Value, before: Value, protected: int) -> Value:
    """Sizes ``kept`` ``[B, K, 1]`` of what is left, scaled behind the protected ones so that they add up to as much as
    those ``before`` ``[B, N, 1]``: a mean or sum over tokens then still counts all."""
    ours, wanted = (span(build, sizes, protected) for sizes in (kept, before))
    total, left = (build(Sum(sizes, dims=(1,), keepdim=True)) for sizes in (wanted, ours))
    scaled = build(Mul(ours, divided(build, total, left)))
    return joined(build, span(build, kept, 0, protected), scaled)


def identity(build: Builder, like: Value, tokens: int) -> Assignment:
    """The assignment of ``tokens`` tokens that changes nothing; B of ``like``."""
    return Assignment(numbers(build, like, tokens), tokens)


def size_bias(build: Builder, sizes: Value) -> Value:
    """``log(size)`` as a mask ``[B, 1, 1, N]`` to add to attention scores: a merged token counts as all that it
    stands for (proportional attention of ToMe, arXiv 2210.09461)."""
    batch, tokens, _ = sizes.type.shape
    return build(Log(build(Reshape(sizes, shape=(batch, 1, 1, tokens)))))


def mean_of_originals(build: Builder, x: Value, sizes: Value, protected: int) -> Value:
    """The mean ``[B, C]`` over the tokens that x ``[B, N, C]`` stands for, without the protected ones: what mean
    pooling gave before tokens were merged."""
    patches, weights = (span(build, value, protected) for value in (x, sizes))
    total = build(Sum(build(Mul(patches, weights)), dims=(1,)))
    return build(Div(total, build(Sum(weights, dims=(1,)))))
