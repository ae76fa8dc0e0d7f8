"""Sampling tokens by their scores, against a transcription of ATS's formulas in loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from token_harness import Array, check_compiled, evaluated, normal

from trimtab.errors import UsageError
from trimtab.ir import Builder, DType, TensorType, Value
from trimtab.ir.ops import Cast, Gt, Reshape
from trimtab.passes.tokens.sampling import grid_picks, sample_tokens, sampling_scores


def scores_by_formula(q: Array, k: Array, v: Array, scale: float, protected: int, present: Array) -> Array:
    """Scores [N - protected] of one image; query head h reads key head h // (H / G)."""
    heads, tokens, _ = q.shape
    scores = np.zeros(tokens)
    for h in range(heads):
        key = k[h * len(k) // heads]
        for i in [0] if protected else np.flatnonzero(present):
            weights = np.array([np.exp(scale * (q[h, i] @ key[j])) if present[j] else 0.0 for j in range(tokens)])
            scores += weights / weights.sum()
    for j in range(tokens):
        scores[j] *= np.sqrt(sum(v[h * len(v) // heads, j] @ v[h * len(v) // heads, j] for h in range(heads)))
    return scores[protected:] / scores[protected:].sum()


def picks_by_formula(scores: Array, points: int) -> list[int]:
    order = sorted(range(len(scores)), key=lambda j: scores[j])  # stable
    total = np.cumsum([scores[j] for j in order])
    if total[-1] == total[0]:
        return [order[0]] * points
    share = (total - total[0]) / (total[-1] - total[0])
    first = min(value for value in share if value > 0)
    picks = []
    for i in range(points):
        y = first + i / (points - 1) * (1 - first) if points > 1 else 1.0
        picks.append(order[min(range(len(share)), key=lambda j: abs(y - share[j]))])
    return picks


def sample_by_formula(scores: Array, keep: int, points: int) -> list[int]:
    """The positions that are kept, in order."""
    different = sorted({j for j in picks_by_formula(scores, points) if scores[j] > 0})
    return sorted(sorted(different, key=lambda j: -scores[j])[:keep])


def draw_scores(batch: int, tokens: int, ties: bool, seed: int = 0) -> Array:
    """Scores with some zeros; with ``ties`` small integers, whose sums are exact and for which grids hit midpoints."""
    generator = np.random.default_rng(1000 * seed + tokens)
    drawn = generator.integers(0, 4, (batch, tokens)) if ties else generator.random((batch, tokens)) ** 4
    drawn = np.where(generator.random((batch, tokens)) < 0.2, 0, drawn).astype(np.float32).astype(float)
    drawn[-1] = 1 if ties else 0  # all equal, or nothing to sample
    drawn[0, 0] = 2
    return drawn


@pytest.mark.parametrize(("heads", "groups"), [(3, 3), (6, 2)])
@pytest.mark.parametrize(("batch", "tokens", "protected"), [(1, 17, 1), (3, 10, 2), (3, 9, 0)])
@pytest.mark.parametrize("kind", ["all", "bool", "added"])
def test_scores(batch: int, tokens: int, protected: int, heads: int, groups: int, kind: str) -> None:
    groups = groups if protected else heads  # columns of grouped queries are refused
    q = normal(batch, heads, tokens, 8)
    k, v = normal(batch, groups, tokens, 8, seed=1), normal(batch, groups, tokens, 8, seed=2)
    present = np.arange(tokens)[None] < (tokens if kind == "all" else np.array([[tokens], [tokens - 3], [4]])[-batch:])

    def make(build: Builder, q: Value, k: Value, v: Value, present: Value, mask: Value) -> list[Value]:
        live = build(Gt(present, build.scalar(0.0, DType.F32)))
        if kind == "bool":
            mask = build(Gt(mask, build.scalar(-1.0, DType.F32)))
        masks = (None, None) if kind == "all" else (mask, live)
        return [sampling_scores(build, q, k, v, 0.3, protected, *masks)]

    shown = np.broadcast_to(present, (batch, tokens)).astype(float)
    (scores,) = evaluated(make, q, k, v, shown, np.log(shown + 1e-38)[:, None, None].round(3))
    for b in range(batch):
        expected = scores_by_formula(q[b], k[b], v[b], 0.3, protected, shown[b] > 0)
        np.testing.assert_allclose(scores[b], expected, rtol=1e-9, atol=1e-12)
    assert (scores[:, -1] > 0).tolist() == (shown[:, -1] > 0).tolist()


def test_a_sample_of_padding_alone_has_no_scores() -> None:
    q, k, v = (normal(2, 2, 6, 4, seed=seed) for seed in range(3))

    def make(build: Builder, q: Value, k: Value, v: Value, present: Value) -> list[Value]:
        live = build(Gt(present, build.scalar(0.0, DType.F32)))
        mask = build(Reshape(live, shape=(live.type.shape[0], 1, 1, 6)))
        found = [sampling_scores(build, q, k, v, 0.5, protected, mask, live) for protected in (0, 1)]
        sample = sample_tokens(build, found[1], 3)
        return [*found, build(Cast(sample.live, dtype=DType.F32)), sample.rows]

    columns, row, live, rows = evaluated(make, q, k, v, np.array([[1.0] * 6, [0.0] * 6]))
    for scores in (columns, row):
        assert np.isfinite(scores).all()
        assert (scores[1] == 0).all()
        assert scores[0].sum() == pytest.approx(1)
    assert live[1].tolist() == [1, 0, 0, 0]
    assert ((rows >= 0) & (rows < 6)).all()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("batch", "tokens", "points"),
    [(2, 16, 11), (4, 12, 1), (2, 9, 9), (3, 13, 2), (2, 196, 196), (2, 1, 1), (2, 8, 30)],
)
def test_picks_follow_the_formula(batch: int, tokens: int, points: int, ties: bool) -> None:
    for seed in range(4):
        scores = draw_scores(batch, tokens, ties, seed)
        (picks,) = evaluated(lambda build, scores: [grid_picks(build, scores, points)], scores)
        for b in range(batch):
            assert picks[b].tolist() == picks_by_formula(scores[b], points)


def sampling(keep: int, points: int, protected: int) -> Any:
    def make(build: Builder, x: Value, scores: Value) -> list[Value]:
        sample = sample_tokens(build, scores, keep, points, protected)
        live = build(Cast(sample.live, dtype=DType.F32))
        return [sample.select(build, x), sample.rows, live, sample.target(build)]

    return make


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("batch", "tokens", "keep", "points", "protected"),
    [(1, 17, 11, 0, 1), (4, 14, 1, 0, 2), (3, 9, 9, 9, 0), (4, 13, 3, 12, 1), (3, 20, 1, 30, 2), (2, 197, 98, 196, 1)],
)
def test_samples_follow_the_formula(
    batch: int, tokens: int, keep: int, points: int, protected: int, ties: bool
) -> None:
    x = normal(batch, tokens, 3)
    for seed in range(3):
        scores = draw_scores(batch, tokens - protected, ties, seed)
        kept, rows, live, target = evaluated(sampling(keep, points, protected), x, scores)
        for b in range(batch):
            assert rows[b].shape == (protected + keep,)
            expected = [*range(protected), *(protected + j for j in sample_by_formula(scores[b], keep, points or keep))]
            assert [int(row) for row, alive in zip(rows[b], live[b], strict=True) if alive] == expected
            np.testing.assert_array_equal(kept[b], x[b, rows[b].astype(int)])
            # In order of position; what is not live is a copy.
            assert (np.diff(rows[b][protected:]) >= 0).all()
            for i in range(protected, protected + keep):
                if not live[b, i] and scores[b].any():
                    assert rows[b, i] == rows[b, i - 1]
            for row in range(tokens):
                place = int(target[b, row])
                assert (place >= 0) == (row in expected)
                assert place < 0 or (rows[b, place] == row and live[b, place])


@pytest.mark.parametrize(("keep", "points"), [(0, 0), (17, 0), (5, 4)])
def test_sampling_too_many_or_none_is_an_error(keep: int, points: int) -> None:
    build = Builder()
    scores = build.input("s", TensorType(DType.F32, (1, 16)))
    with pytest.raises(UsageError, match="1 <= keep <= 16"):
        sample_tokens(build, scores, keep, points)


def test_compiled_sampling() -> None:
    pytest.importorskip("tvm", reason="the TVM backend is not installed")

    def make(build: Builder, x: Value, scores: Value, q: Value, k: Value, v: Value) -> list[Value]:
        own = sampling_scores(build, q, k, v, 0.3)
        return [*sampling(9, 0, 1)(build, x, scores), *sampling(5, 16, 1)(build, x, scores), own]

    heads = [normal(8, 2, 17, 8, seed=seed) for seed in range(3)]
    check_compiled(make, normal(8, 17, 12), draw_scores(8, 16, False), *heads)
