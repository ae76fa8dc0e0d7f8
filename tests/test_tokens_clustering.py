"""Clustering of tokens and their reconstruction against a transcription of the formulas of Expediting in loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from token_harness import Array, built, check_compiled, evaluated, normal

from trimtab.ir import Builder, Value
from trimtab.passes.tokens.clustering import cluster, reconstruction

Side = tuple[int, int]
CASES = [(1, (4, 4), (2, 2)), (8, (4, 4), (2, 2)), (2, (7, 7), (4, 4)), (2, (3, 5), (2, 3)), (2, (9, 8), (7, 6)),
         (2, (5, 9), (1, 9)), (1, (6, 6), (1, 1)), (2, (8, 3), (7, 3))]  # fmt: skip
"""Batch, grid, clusters."""


def cells(size: int, parts: int) -> list[tuple[int, int]]:
    """The range of each part: from the floor to the ceiling of its ends."""
    return [(part * size // parts, -(-(part + 1) * size // parts)) for part in range(parts)]


def cluster_by_formula(
    x: Array, grid: Side, clusters: Side, iterations: int = 5, temperature: float = 0.01, window: int = 5,
    sizes: Array | None = None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Centers ``[M, C]``, which share of each token ``[M, N]`` goes where, and sizes ``[M]``, of x ``[N, C]``."""
    (height, width), (rows, columns) = grid, clusters
    weight = np.ones(len(x)) if sizes is None else sizes[:, 0]
    centers = []
    for top, bottom in cells(height, rows):
        for left, right in cells(width, columns):
            inside = [i * width + j for i in range(top, bottom) for j in range(left, right)]
            total = sum(weight[n] for n in inside)
            centers.append(sum(weight[n] * x[n] for n in inside) / max(total, 1e-9))
    part = np.zeros((rows * columns, len(x)))
    for _ in range(iterations):
        part[:] = 0
        for n in range(len(x)):
            own = (n // width * rows // height, n % width * columns // width)
            near = [m for m in range(rows * columns)
                    if max(abs(m // columns - own[0]), abs(m % columns - own[1])) <= window // 2]  # fmt: skip
            distances = np.array([((x[n] - centers[m]) ** 2).sum() for m in near])
            scores = np.exp(-temperature * (distances - distances.min()))
            part[near, n] = scores / scores.sum()
        part = part * weight
        centers = [sum(part[m, n] * x[n] for n in range(len(x))) / part[m].sum() for m in range(rows * columns)]
    return np.array(centers), part, part.sum(1)


def weights_by_formula(
    before: Array, after: Array, k: int = 20, temperature: float = 0.01, normalize: str = "l2"
) -> Array:
    """``[N, M]``."""
    rows = []
    for token in before:
        weight = np.array([np.exp(-temperature * ((token - center) ** 2).sum()) for center in after])
        if k < len(after):
            weight[weight < sorted(weight)[-k]] = 0
        rows.append(weight / (np.sqrt((weight**2).sum()) if normalize == "l2" else weight.sum()))
    return np.array(rows)


def clustering(grid: Side, clusters: Side, **options: Any) -> Any:
    def make(build: Builder, x: Value, *sizes: Value) -> list[Value]:
        found = cluster(build, x, grid, clusters, sizes=sizes[0] if sizes else None, **options)
        return [found.means(build, x), found.shares, found.sizes]

    return make


@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize(("batch", "grid", "clusters"), CASES)
def test_clusters_follow_the_formula(batch: int, grid: Side, clusters: Side, scale: float) -> None:
    """At a scale of 8, distances tell clusters apart."""
    x = scale * normal(batch, grid[0] * grid[1], 8, seed=grid[1])
    centers, shares, sizes = evaluated(clustering(grid, clusters), x)
    for b in range(batch):
        expected, part, counts = cluster_by_formula(x[b], grid, clusters)
        np.testing.assert_allclose(centers[b], expected, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(shares[b], part / counts[:, None], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(sizes[b, :, 0], counts, rtol=1e-9)
    np.testing.assert_allclose(shares.sum(2), 1, rtol=1e-12)
    np.testing.assert_allclose(sizes.sum(1), grid[0] * grid[1], rtol=1e-12)
    # Clusters with their sizes keep the sum of the tokens.
    np.testing.assert_allclose((centers * sizes).sum(1), x.sum(1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("iterations", "temperature", "window"), [(1, 0.01, 5), (3, 0.2, 3), (5, 1.0, 1), (2, 0.05, 4)]
)
def test_options_of_clustering(iterations: int, temperature: float, window: int) -> None:
    options: dict[str, Any] = {"iterations": iterations, "temperature": temperature, "window": window}
    x = 2 * normal(2, 42, 5)
    centers, shares, _ = evaluated(clustering((6, 7), (4, 5), **options), x)
    for b in range(2):
        expected, part, _ = cluster_by_formula(x[b], (6, 7), (4, 5), **options)
        np.testing.assert_allclose(centers[b], expected, rtol=1e-9, atol=1e-9)
        np.testing.assert_array_equal(shares[b] == 0, part == 0)


def test_a_token_does_not_go_to_clusters_outside_of_the_window() -> None:
    x = np.zeros((1, 64, 3))
    _, shares, _ = evaluated(clustering((8, 8), (8, 4), window=3), x)
    for m in range(32):
        for n in range(64):
            near = abs(m // 4 - n // 8) <= 1 and abs(m % 4 - n % 8 // 2) <= 1
            assert (shares[0, m, n] > 0) == near


def test_equal_tokens_give_equal_clusters() -> None:
    centers, _, _ = evaluated(clustering((4, 6), (2, 2)), np.full((2, 24, 3), 2.5))
    np.testing.assert_allclose(centers, 2.5, rtol=1e-12)


def test_a_cluster_far_from_all_tokens_keeps_to_its_nearest() -> None:
    """Its share of each token underflows, yet their mean is known; the formula as it is written gives 0/0."""
    x = np.zeros((1, 4, 1))
    x[0, :, 0] = [0.0, 2000.0, 1000.0, 1000.0]
    centers, shares, _ = evaluated(clustering((1, 4), (1, 2), iterations=3), x)
    assert np.isfinite(centers).all()
    np.testing.assert_allclose(shares.sum(2), 1)


def test_padding_does_not_change_clusters_and_counts_for_nothing() -> None:
    x, sizes = 4 * normal(2, 24, 6), np.ones((2, 24, 1))
    sizes[0, 18:] = 0  # the last row of the grid, and the whole of a cell of the second image
    sizes[1, [2, 3, 8, 9]] = 0
    other = x.copy()
    other[sizes[:, :, 0] == 0] = 7.0
    make = clustering((4, 6), (2, 3), temperature=0.1)
    centers, _, counts = evaluated(make, x, sizes)
    for b in range(2):
        expected, _, total = cluster_by_formula(x[b], (4, 6), (2, 3), temperature=0.1, sizes=sizes[b])
        np.testing.assert_allclose(centers[b], expected, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(counts[b, :, 0], total, rtol=1e-9)
    np.testing.assert_allclose(evaluated(make, other, sizes)[0], centers, rtol=1e-9, atol=1e-9)
    nothing, _, none = evaluated(make, x[:1], np.zeros((1, 24, 1)))
    assert np.isfinite(nothing).all()
    assert (none == 0).all()


@pytest.mark.parametrize("normalize", ["l1", "l2"])
@pytest.mark.parametrize(("tokens", "clusters", "k"), [(17, 9, 4), (16, 4, 20), (12, 6, 1), (9, 5, 5)])
def test_reconstruction_follows_the_formula(tokens: int, clusters: int, k: int, normalize: Any) -> None:
    before, after = 2 * normal(3, tokens, 7), 2 * normal(3, clusters, 7, seed=1)

    def make(build: Builder, f: Value, s: Value) -> list[Value]:
        return [reconstruction(build, f, s, k=k, temperature=0.03, normalize=normalize)]

    (weights,) = evaluated(make, before, after)
    for b in range(3):
        expected = weights_by_formula(before[b], after[b], k, 0.03, normalize)
        np.testing.assert_allclose(weights[b], expected, rtol=1e-9, atol=1e-12)
    if k == 4:
        check_compiled(make, before, after)


def test_as_near_as_the_kth_is_as_good() -> None:
    before = np.zeros((1, 2, 2))
    after = np.array([[[1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [0.5, 0.0], [9.0, 9.0]]])

    def make(build: Builder, f: Value, s: Value) -> list[Value]:
        return [reconstruction(build, f, s, k=2, normalize="l1")]

    (weights,) = evaluated(make, before, after)
    assert (weights[0] > 0).tolist() == [[True, True, True, True, False]] * 2
    np.testing.assert_allclose(weights[0], weights_by_formula(before[0], after[0], 2, normalize="l1"), rtol=1e-9)


def test_weights_of_a_token_far_from_all_clusters_do_not_vanish() -> None:
    def make(build: Builder, f: Value, s: Value) -> list[Value]:
        return [reconstruction(build, f, s, normalize="l2")]

    (weights,) = evaluated(make, np.full((1, 1, 4), 1e3), normal(1, 3, 4))
    np.testing.assert_allclose((weights**2).sum(2), 1)


def test_compiled_code_agrees() -> None:
    x = 2 * normal(3, 35, 8)
    check_compiled(clustering((5, 7), (3, 2), temperature=0.1, iterations=2), x, tolerance=1e-4)
    check_compiled(clustering((7, 5), (7, 2), iterations=1), x, np.ones((3, 35, 1)), tolerance=1e-4)


def test_a_window_over_all_clusters_needs_no_weight() -> None:
    assert not built(clustering((6, 6), (3, 3)), normal(1, 36, 4)).weights
    assert len(built(clustering((6, 6), (5, 5)), normal(1, 36, 4)).weights) == 1
