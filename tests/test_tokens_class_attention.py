"""Keeping attended tokens and fusing the others, against a transcription of EViT's formulas in loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from token_harness import Array, check_compiled, evaluated, normal

from trimtab.errors import UsageError
from trimtab.ir import Builder, DType, TensorType, Value
from trimtab.ir.ops import Sub
from trimtab.passes.tokens.class_attention import (
    class_rows,
    class_scores,
    keep_and_fuse,
    keep_best,
    kept_tokens,
    received_scores,
)


def attention_by_formula(q: Array, k: Array, scale: float) -> Array:
    """The attention matrix [H, N, N] of one image; query head h reads key head h // (H / G)."""
    heads, tokens, _ = q.shape
    matrix = np.zeros((heads, tokens, tokens))
    for h in range(heads):
        key = k[h * len(k) // heads]
        for i in range(tokens):
            logits = np.array([scale * float(np.dot(q[h, i], key[j])) for j in range(tokens)])
            weights = np.exp(logits - logits.max())
            matrix[h, i] = weights / weights.sum()
    return matrix


def keep_by_formula(x: Array, scores: Array, keep: int, protected: int) -> Array:
    order = sorted(range(len(scores)), key=lambda i: -scores[i])  # stable
    rows = [x[i] for i in range(protected)] + [x[protected + i] for i in order[:keep]]
    if order[keep:]:
        rows.append(sum(scores[i] * x[protected + i] for i in order[keep:]))
    return np.array(rows)


@pytest.mark.parametrize(("heads", "groups"), [(3, 3), (6, 2), (4, 1)])
@pytest.mark.parametrize(("batch", "tokens", "protected"), [(1, 17, 1), (8, 10, 2)])
def test_scores_of_the_class_token(batch: int, tokens: int, protected: int, heads: int, groups: int) -> None:
    q, k = normal(batch, heads, tokens, 8), normal(batch, groups, tokens, 8, seed=1)

    def make(build: Builder, q: Value, k: Value) -> list[Value]:
        return [class_scores(build, q, k, 0.3, protected), class_rows(build, q, k, 0.3)]

    scores, rows = evaluated(make, q, k)
    for b in range(batch):
        matrix = attention_by_formula(q[b], k[b], 0.3)
        np.testing.assert_allclose(rows[b], matrix[:, 0], atol=1e-12)
        expected = [sum(matrix[h, 0, j] for h in range(heads)) / heads for j in range(protected, tokens)]
        np.testing.assert_allclose(scores[b], expected, atol=1e-12)


@pytest.mark.parametrize(("batch", "tokens", "protected"), [(1, 17, 0), (8, 10, 1)])
def test_scores_of_columns(batch: int, tokens: int, protected: int) -> None:
    q, k = normal(batch, 3, tokens, 8), normal(batch, 3, tokens, 8, seed=1)
    (scores,) = evaluated(lambda build, q, k: [received_scores(build, q, k, 0.3, protected)], q, k)
    for b in range(batch):
        matrix = attention_by_formula(q[b], k[b], 0.3)
        for j in range(protected, tokens):
            expected = sum(matrix[h, i, j] for h in range(3) for i in range(tokens)) / (3 * tokens)
            assert math.isclose(scores[b, j - protected], expected, abs_tol=1e-12)


def test_a_mask_hides_keys() -> None:
    q, k, mask = normal(2, 3, 9, 8), normal(2, 3, 9, 8, seed=1), np.zeros((2, 1, 1, 9))
    mask[:, ..., 6:] = -np.inf

    def make(build: Builder, q: Value, k: Value, mask: Value) -> list[Value]:
        return [class_scores(build, q, k, 0.5, 1, mask), received_scores(build, q, k, 0.5, 0, mask)]

    of_class, received = evaluated(make, q, k, mask)
    for b in range(2):
        seen = attention_by_formula(q[b, :, :6], k[b, :, :6], 0.5)
        np.testing.assert_allclose(of_class[b, :5], seen[:, 0, 1:].mean(0), atol=1e-12)
    assert (of_class[:, 5:] == 0).all()
    assert (received[:, 6:] == 0).all()


def keeping(keep: int, protected: int) -> Any:
    def make(build: Builder, x: Value, scores: Value) -> list[Value]:
        fused = keep_and_fuse(build, scores, keep, protected)
        best = keep_best(build, scores, keep, protected)
        kept = best.select(build, x)
        back = best.restore(build, kept, build(Sub(x, x)))
        return [fused.fuse(build, x), fused.assignment.target, kept, best.target(build), back]

    return make


def draw_scores(batch: int, tokens: int, ties: bool) -> Array:
    generator = np.random.default_rng(tokens)
    if ties:
        return generator.integers(1, 4, (batch, tokens)) / 32
    return generator.random((batch, tokens)).astype(np.float32).astype(float)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("batch", "tokens", "keep", "protected"),
    [(1, 17, 11, 1), (8, 14, 1, 2), (2, 9, 8, 1), (3, 13, 12, 0), (1, 197, 138, 1)],
)
def test_kept_and_fused_tokens_follow_the_formula(
    batch: int, tokens: int, keep: int, protected: int, ties: bool
) -> None:
    x, scores = normal(batch, tokens, 6), draw_scores(batch, tokens - protected, ties)
    fused, target, kept, place, back = evaluated(keeping(keep, protected), x, scores)
    for b in range(batch):
        expected = keep_by_formula(x[b], scores[b], keep, protected)
        all_kept = keep == tokens - protected
        np.testing.assert_allclose(fused[b], x[b] if all_kept else expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(kept[b], expected[: protected + keep])
        for i in range(tokens):
            row = int(place[b, i])
            if row >= 0:
                np.testing.assert_array_equal(x[b, i], kept[b, row])
                np.testing.assert_array_equal(back[b, i], x[b, i])
            else:
                assert (back[b, i] == 0).all()
            assert target[b, i] == (i if all_kept else row if row >= 0 else protected + keep)


def test_the_number_of_kept_tokens_rounds_up() -> None:
    assert kept_tokens(0.7, 197) == 138
    assert kept_tokens(0.7, 140) == 98
    assert kept_tokens(1.0, 197) == 196


@pytest.mark.parametrize("keep", [0, 17])
def test_keeping_too_many_or_none_is_an_error(keep: int) -> None:
    build = Builder()
    scores = build.input("s", TensorType(DType.F32, (1, 16)))
    for make in (keep_and_fuse, keep_best):
        with pytest.raises(UsageError, match="1 <= keep <= 16"):
            make(build, scores, keep)


def test_columns_of_grouped_queries_are_refused() -> None:
    build = Builder()
    q, k = (build.input(n, TensorType(DType.F32, (1, h, 5, 4))) for n, h in (("q", 4), ("k", 2)))
    with pytest.raises(UsageError, match="as many heads"):
        received_scores(build, q, k, 1.0)


@pytest.mark.parametrize(("batch", "tokens", "keep", "protected"), [(1, 197, 138, 1), (8, 14, 5, 2)])
def test_compiled_keeping_and_fusing(batch: int, tokens: int, keep: int, protected: int) -> None:
    pytest.importorskip("tvm", reason="the TVM backend is not installed")
    for ties in (False, True):
        check_compiled(
            keeping(keep, protected), normal(batch, tokens, 48), draw_scores(batch, tokens - protected, ties)
        )

    def make(build: Builder, q: Value, k: Value) -> list[Value]:
        return [class_scores(build, q, k, 0.125, protected), received_scores(build, q, k, 0.125)]

    check_compiled(make, normal(batch, 3, tokens, 64), normal(batch, 3, tokens, 64, seed=1))
