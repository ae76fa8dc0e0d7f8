"""Clustering of tokens that lie on a grid, and their reconstruction from the clusters, from the formulas of Liang et
al., Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning, arXiv 2210.01035."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.dtypes import DType
from trimtab.ir.ops import (
    AdaptiveAvgPool2d,
    Add,
    Cast,
    Exp,
    Full,
    Ge,
    Gt,
    Log,
    LogSoftmax,
    Matmul,
    Maximum,
    Mul,
    Permute,
    Reshape,
    Slice,
    Softmax,
    Sub,
    Sum,
    Topk,
    Where,
)
from trimtab.passes.tokens.assignment import SMALLEST_SIZE, divided
from trimtab.passes.tokens.rows import joined, span, unit_rows
from trimtab.passes.tokens.steps import Step, counted

if TYPE_CHECKING:
    from trimtab.passes.tokens.shortening import Place

Side = tuple[int, int]
"""Rows and columns of a grid."""
Norm = Literal["l1", "l2"]
"""What the weights of a reconstructed token are divided by: their sum, or the root of the sum of their squares."""
_PADDING = -1e4
"""The logarithm of the share of padding in a cluster: none, unless the cluster has nothing else."""


@dataclass(frozen=True)
class Clusters:
    """N tokens shared out among M clusters.

    Attributes:
        shares: ``[B, M, N]``, of which tokens each cluster is the mean; rows add up to 1.
        sizes: ``[B, M, 1]``, for how many tokens each cluster stands; they add up to N.
    """

    shares: Value
    sizes: Value

    def means(self, build: Builder, y: Value) -> Value:
        """The mean of y ``[B, N, C]`` over each cluster: ``[B, M, C]``, of y's dtype."""
        return build(Matmul(_like(build, self.shares, y), y))


def cluster(
    build: Builder,
    x: Value,
    grid: Side,
    clusters: Side,
    *,
    iterations: int = 5,
    temperature: float = 0.01,
    window: int = 5,
    sizes: Value | None = None,
) -> Clusters:
    """Share out tokens among clusters of similar ones nearby.

    Clusters begin as the means of the h x w cells that divide the grid. Then, ``iterations`` times, with d the squared
    distance of token n to cluster m,

        P_mn = softmax over m of (-temperature d_mn)      and      c_m = sum_n P_mn x_n / sum_n P_mn,

    where only clusters count that lie at most ``window // 2`` cells from the token's own in each direction. What all
    clusters have in common for a token, its own square, is left out of d.  The second formula is evaluated as a softmax
    over n of log P, so that a cluster far from all tokens stays the mean of those nearest to it.

    Args:
        build: where ops go.
        x: tokens ``[B, H W, C]``, row by row of the grid.
        grid: H, W.
        clusters: h, w; at most H, W.
        iterations: at least 1.
        temperature: how strongly distance counts.
        window: cells, odd.
        sizes: ``[B, H W, 1]``, how much each token counts, 0 for padding; None for all alike.

    Returns:
        The clusters, row by row of h x w: ``means(x)`` is the last c.
    """
    batch = x.type.shape[0]
    count = clusters[0] * clusters[1]

    def pooled(y: Value) -> Value:
        width = y.type.shape[2]
        image = build(Reshape(y, shape=(batch, *grid, width)))
        cells = build(AdaptiveAvgPool2d(image, size=clusters, channels_last=True))
        return build(Reshape(cells, shape=(batch, count, width)))

    if sizes is None:
        centers = pooled(x)
    else:
        centers = divided(build, pooled(build(Mul(x, sizes))), pooled(sizes))
    columns = build(Permute(x, dims=(0, 2, 1)))
    far = _outside(build, grid, clusters, window, x.type.dtype)
    counts = _log_counts(build, sizes) if sizes is not None else None
    shares, log_parts = centers, centers
    for _ in range(iterations):
        scores = _scores(build, centers, columns, temperature)
        log_parts = build(LogSoftmax(build(Add(scores, far)) if far is not None else scores, dim=1))
        if counts is not None:
            log_parts = build(Add(log_parts, counts))
        shares = build(Softmax(log_parts, dim=2))
        centers = build(Matmul(shares, x))
    return Clusters(shares, build(Sum(build(Exp(log_parts)), dims=(2,), keepdim=True)))


def reconstruction(
    build: Builder,
    before: Value,
    after: Value,
    *,
    k: int = 20,
    temperature: float = 0.01,
    normalize: Norm = "l2",
) -> Value:
    """The weights ``[B, N, M]`` by which N tokens are made of M clusters again.

    With d the squared distance of token n, before clustering, to cluster m: ``e^(-temperature d)`` for the k nearest
    clusters (more where several are as near as the k-th) and 0 for the others, divided by the norm of the row. A factor
    common to a row cancels, so that the weights of a token far from all clusters do not vanish.

    Args:
        build: where ops go.
        before: tokens ``[B, N, C]``.
        after: clusters ``[B, M, C]``.
        k: how many clusters a token is made of; M or more for all.
        temperature: how strongly distance counts.
        normalize: ``l2`` as in the published code; ``l1`` for the weighted mean that the paper writes.
    """
    scores = build(Permute(_scores(build, after, build(Permute(before, dims=(0, 2, 1))), temperature), dims=(0, 2, 1)))
    count = after.type.shape[1]
    assert isinstance(count, int)
    if k < count:
        nearest = build.add(Topk(scores, dim=2, k=k)).results[0]
        last = build(Slice(nearest, dim=2, start=k - 1, stop=k))
        nowhere = build.scalar(float("-inf"), scores.type.dtype)
        scores = build(Where(build(Ge(scores, last)), scores, nowhere))
    weights = build(Softmax(scores, dim=2))
    return unit_rows(build, weights) if normalize == "l2" else weights


class ClusterStep(Step):
    """The tokens of a grid become its clusters, behind the protected tokens; each is made of clusters again.

    Args:
        place: where.
        grid: H, W of the tokens that are not protected.
        clusters: h, w.
        iterations, temperature, window: of :func:`cluster`.
        k, normalize: of :func:`reconstruction`.
    """

    def __init__(
        self,
        place: Place,
        grid: Side,
        clusters: Side,
        *,
        iterations: int,
        temperature: float,
        window: int,
        k: int,
        normalize: Norm,
    ) -> None:
        build, first = place.build, place.protected
        x = span(build, place.x, first)
        sizes = span(build, place.sizes, first) if place.sizes is not None else None
        found = cluster(
            build, x, grid, clusters, iterations=iterations, temperature=temperature, window=window, sizes=sizes
        )
        self._first = first
        self._clusters = found
        self._weights = reconstruction(
            build, x, found.means(build, x), k=k, temperature=temperature, normalize=normalize
        )
        self.count = first + clusters[0] * clusters[1]
        single = build(Full(1.0, x.type.dtype, (x.type.shape[0], first, 1)))
        before = single if place.sizes is None else span(build, place.sizes, 0, first)
        self.sizes = joined(build, before, found.sizes)
        if place.padded:
            self.key_mask = counted(build, self.sizes)
        self._whole: dict[Value, Value] = {}
        """What was or will be given for shortened rows: those they come from, or rows restored before."""

    def shorten(self, build: Builder, y: Value) -> Value:
        kept, rest = span(build, y, 0, self._first), span(build, y, self._first)
        short = joined(build, kept, self._clusters.means(build, rest))
        self._whole[short] = y
        return short

    def restore(self, build: Builder, y: Value) -> Value:
        if y not in self._whole:
            kept, rest = span(build, y, 0, self._first), span(build, y, self._first)
            self._whole[y] = joined(build, kept, build(Matmul(_like(build, self._weights, y), rest)))
        return self._whole[y]


def _scores(build: Builder, centers: Value, columns: Value, temperature: float) -> Value:
    """``[B, M, N]``: ``-temperature d`` of centers ``[B, M, C]`` and tokens ``[B, C, N]``, up to what a token has in
    common for all centers."""
    dtype = centers.type.dtype
    square = build(Sum(build(Mul(centers, centers)), dims=(2,), keepdim=True))
    products = build(Matmul(build(Mul(centers, build.scalar(2 * temperature, dtype))), columns))
    return build(Sub(products, build(Mul(square, build.scalar(temperature, dtype)))))


def _outside(build: Builder, grid: Side, clusters: Side, window: int, dtype: DType) -> Value | None:
    """``[M, N]``: minus infinity for clusters outside of the window around a token's own cell; None for none."""
    near = torch.ones((), dtype=torch.bool)
    for axis, (tokens, cells) in enumerate(zip(grid, clusters, strict=True)):
        own = torch.arange(tokens) * cells // tokens
        along = (torch.arange(cells)[:, None] - own).abs() <= window // 2
        near = near & along.reshape([cells, 1, tokens, 1] if axis == 0 else [1, cells, 1, tokens])
    if bool(near.all()):
        return None
    mask = torch.zeros(near.shape, dtype=dtype.to_torch()).masked_fill(~near, float("-inf"))
    return build.weight("cluster_window", mask.reshape(clusters[0] * clusters[1], grid[0] * grid[1]))


def _log_counts(build: Builder, sizes: Value) -> Value:
    """``[B, 1, N]``: the logarithm of sizes ``[B, N, 1]``."""
    batch, tokens, _ = sizes.type.shape
    rows = build(Reshape(sizes, shape=(batch, 1, tokens)))
    zero, padding = (build.scalar(number, sizes.type.dtype) for number in (0.0, _PADDING))
    smallest = build.scalar(SMALLEST_SIZE, sizes.type.dtype)
    return build(Where(build(Gt(rows, zero)), build(Log(build(Maximum(rows, smallest)))), padding))


def _like(build: Builder, weights: Value, y: Value) -> Value:
    return weights if weights.type.dtype is y.type.dtype else build(Cast(weights, dtype=y.type.dtype))
