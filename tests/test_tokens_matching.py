"""Bipartite matching and merging of tokens against a transcription of ToMe's formulas in loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from token_harness import Array, built, check_compiled, evaluated, normal, signs

import trimtab
from trimtab.errors import UsageError
from trimtab.ir import Builder, DType, TensorType, Value, interpret, symbol
from trimtab.passes.tokens.assignment import Assignment, identity, initial_sizes, mean_of_originals, size_bias
from trimtab.passes.tokens.matching import bipartite_matching, first_largest, key_metric, most_merged

CASES = [(1, 17, 4, 1), (8, 17, 5, 1), (1, 16, 7, 1), (8, 13, 6, 0), (2, 12, 5, 2), (3, 13, 3, 2), (2, 20, 6, 5),
         (1, 197, 16, 1), (2, 9, 4, 1), (2, 5, 1, 1), (1, 4, 2, 0)]  # fmt: skip
"""Batch, tokens, r, protected."""


def match_by_formula(metric: Array, r: int, protected: int) -> list[list[int]]:
    """The groups of positions that become one token, in the order of the result."""
    count = len(metric)
    even = [i for i in range(0, count, 2) if i >= protected]
    odd = [i for i in range(1, count, 2) if i >= protected]
    unit = [row / np.sqrt((row * row).sum()) for row in metric]
    edges = []
    for i in even:
        best, partner = -np.inf, -1
        for j in odd:
            value = float(np.dot(unit[i], unit[j]))
            if value > best:
                best, partner = value, j
        edges.append((best, i, partner))
    edges.sort(key=lambda edge: -edge[0])  # stable
    merged = {i: partner for _, i, partner in edges[:r]}
    alone = [[i] for i in range(protected)] + [[i] for i in even if i not in merged]
    return alone + [[j, *sorted(i for i, partner in merged.items() if partner == j)] for j in odd]


def merge_by_formula(x: Array, sizes: Array, groups: Sequence[Sequence[int]]) -> tuple[Array, Array]:
    rows, totals = [], []
    for group in groups:
        total = sum(sizes[i, 0] for i in group)
        rows.append(sum(x[i] * sizes[i, 0] for i in group) / total)
        totals.append([total])
    return np.array(rows), np.array(totals)


def merging(r: int, protected: int) -> Any:
    def make(build: Builder, metric: Value, x: Value, sizes: Value) -> list[Value]:
        found = bipartite_matching(build, metric, r, protected)
        merged, new_sizes = found.merge(build, x, sizes)
        return [merged, new_sizes, found.sum(build, x), found.unmerge(build, merged), found.target]

    return make


@pytest.mark.parametrize("draw", [normal, signs])
@pytest.mark.parametrize(("batch", "tokens", "r", "protected"), CASES)
def test_matching_and_merging_follow_the_formula(batch: int, tokens: int, r: int, protected: int, draw: Any) -> None:
    """Sign vectors have equal cosines everywhere: the first receiver and the first candidate win."""
    metric, x = draw(batch, tokens, 16, seed=tokens), normal(batch, tokens, 6, seed=r)
    sizes = np.random.default_rng(2).integers(1, 5, (batch, tokens, 1)).astype(float)
    merged, new_sizes, total, back, target = evaluated(merging(r, protected), metric, x, sizes)
    assert merged.shape == (batch, tokens - r, 6)
    for b in range(batch):
        groups = match_by_formula(metric[b], r, protected)
        rows, totals = merge_by_formula(x[b], sizes[b], groups)
        np.testing.assert_allclose(merged[b], rows, rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(new_sizes[b], totals)
        np.testing.assert_allclose(total[b], [sum(x[b, i] for i in group) for group in groups], atol=1e-12)
        for row, group in enumerate(groups):
            for i in group:
                assert target[b, i] == row
                np.testing.assert_array_equal(back[b, i], merged[b, row])
    np.testing.assert_allclose(merged[:, :protected], x[:, :protected], rtol=1e-12)


def test_with_a_distillation_token_both_leading_tokens_stay_in_front() -> None:
    """ToMe lists [unmerged 0, receiver 0, unmerged 1, ...] so that the two stay at 0 and 1: here also."""
    x = normal(2, 12, 16)
    merged, *_ = evaluated(merging(5, 2), x, x, np.ones((2, 12, 1)))
    np.testing.assert_allclose(merged[:, :2], x[:, :2], rtol=1e-12)


def test_equal_rows_are_merged_from_the_front() -> None:
    x = np.ones((1, 9, 4))
    *_, target = evaluated(merging(2, 1), x, x, np.ones((1, 9, 1)))
    # Candidates 2, 4, 6, 8 all match receiver 1 alike; 2 and 4 are merged into it.
    assert target.tolist() == [[0, 3, 3, 4, 3, 5, 1, 6, 2]]


def test_no_reduction_is_the_identity() -> None:
    def make(build: Builder, x: Value) -> list[Value]:
        found = bipartite_matching(build, x, 0)
        return [found.target, found.unmerge(build, x)]

    x = normal(2, 7, 4)
    target, back = evaluated(make, x)
    assert target.tolist() == [list(range(7))] * 2
    np.testing.assert_array_equal(back, x)


def test_two_reductions_are_followed_to_the_original_tokens() -> None:
    def make(build: Builder, x: Value) -> list[Value]:
        first = bipartite_matching(build, x, 5)
        once, sizes = first.merge(build, x)
        second = bipartite_matching(build, once, 3)
        twice, sizes = second.merge(build, once, sizes)
        total = second.after(build, first)
        pooled = mean_of_originals(build, twice, sizes, 1)
        return [twice, sizes, total.unmerge(build, twice), total.target, pooled, size_bias(build, sizes)]

    x = normal(3, 15, 8)
    twice, sizes, back, target, pooled, bias = evaluated(make, x)
    assert twice.shape == (3, 7, 8)
    for b in range(3):
        assert target[b, 0] == 0
        assert sorted(set(target[b])) == list(range(7))
        for row in range(7):
            members = [i for i in range(15) if target[b, i] == row]
            assert sizes[b, row, 0] == len(members)
            np.testing.assert_allclose(twice[b, row], x[b, members].mean(0), atol=1e-12)
            for i in members:
                np.testing.assert_array_equal(back[b, i], twice[b, row])
    np.testing.assert_allclose(pooled, x[:, 1:].mean(1), atol=1e-12)
    np.testing.assert_allclose(bias, np.log(sizes).reshape(3, 1, 1, 7))


def test_the_metric_is_the_mean_of_the_keys_of_all_heads() -> None:
    keys = normal(2, 3, 5, 4)
    (metric,) = evaluated(lambda build, k: [key_metric(build, k)], keys)
    np.testing.assert_allclose(metric, (keys[:, 0] + keys[:, 1] + keys[:, 2]) / 3, atol=1e-15)


def test_a_row_of_zeros_does_not_become_nan() -> None:
    x = normal(1, 9, 4)
    x[0, 2] = 0
    merged, *_ = evaluated(merging(3, 1), x, x, np.ones((1, 9, 1)))
    assert np.isfinite(merged).all()


@pytest.mark.parametrize(("r", "protected", "tokens"), [(9, 1, 17), (-1, 1, 17), (1, 3, 4)])
def test_r_out_of_range_is_an_error_with_the_bound(r: int, protected: int, tokens: int) -> None:
    build = Builder()
    x = build.input("x", TensorType(DType.F32, (1, tokens, 4)))
    with pytest.raises(UsageError, match=f"0 <= r <= {most_merged(tokens, protected)}"):
        bipartite_matching(build, x, r, protected)


def test_a_symbolic_number_of_tokens_is_refused() -> None:
    build = Builder()
    x = build.input("x", TensorType(DType.F32, (1, symbol("seq", 2, 9), 4)))
    with pytest.raises(UsageError, match="must be a number"):
        bipartite_matching(build, x, 1)


def test_merging_is_differentiable() -> None:
    """Every token of a group of n gets 1/n of the gradient of the mean."""
    module = built(lambda build, x: [bipartite_matching(build, x, 3).merge(build, x)[0]], normal(1, 9, 4))
    x = torch.from_numpy(normal(1, 9, 4)).float().requires_grad_()
    (merged,) = interpret(module, [x], precision=torch.float64, grad=True)
    merged.sum().backward()
    groups = match_by_formula(x.detach().numpy()[0], 3, 1)
    expected = np.zeros((1, 9, 4))
    for group in groups:
        expected[0, group] = 1 / len(group)
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize(("batch", "tokens", "r", "protected"), [(1, 197, 13, 1), (8, 14, 5, 2)])
def test_compiled_matching(batch: int, tokens: int, r: int, protected: int) -> None:
    pytest.importorskip("tvm", reason="the TVM backend is not installed")
    sizes = np.random.default_rng(2).integers(1, 5, (batch, tokens, 1)).astype(float)
    for draw in (normal, signs):
        check_compiled(merging(r, protected), draw(batch, tokens, 64), normal(batch, tokens, 48), sizes)


def test_few_kernels_match_the_tokens_of_a_layer() -> None:
    """Unit rows, their products, the strongest link, what becomes of candidates, and new rows: nothing is copied."""
    pytest.importorskip("tvm", reason="the TVM backend is not installed")

    def make(build: Builder, metric: Value) -> list[Value]:
        return [bipartite_matching(build, metric, 13, 1).target]

    artifact = trimtab.compile(built(make, normal(1, 197, 64)), target="native", precision="f32")
    assert len(artifact.code.calls) == 5


@pytest.mark.parametrize("draw", [normal, signs])
def test_the_first_of_the_largest_is_found(draw: Any) -> None:
    x = draw(2, 5, 9).astype(np.float32)
    largest, position = evaluated(lambda build, value: list(first_largest(build, value)), x)
    np.testing.assert_array_equal(largest, x.max(2, keepdims=True))
    np.testing.assert_array_equal(position, x.argmax(2))


@pytest.mark.parametrize("apart", [1, 2])
def test_protected_tokens_apart_give_the_same_sums(apart: int) -> None:
    x = normal(3, 14, 6)

    def make(build: Builder, value: Value) -> list[Value]:
        found = bipartite_matching(build, value, 5, 2)
        return [found.sum(build, value), found.sum(build, value, apart)]

    together, separate = evaluated(make, x)
    np.testing.assert_allclose(separate, together, rtol=1e-14)


def test_a_token_that_stays_alone_is_not_rounded() -> None:
    x, sizes = normal(1, 17, 6), np.full((1, 17, 1), 3.0)

    def make(build: Builder, value: Value, count: Value) -> list[Value]:
        found = bipartite_matching(build, value, 4, 1)
        return [found.merge(build, value, count)[0], found.target]

    merged, target = evaluated(make, x, sizes)
    alone = [n for n in range(17) if (target[0] == target[0, n]).sum() == 1]
    assert len(alone) >= 9
    np.testing.assert_array_equal(merged[0, target[0, alone]], x[0, alone])


def test_sizes_start_at_one() -> None:
    def make(build: Builder, x: Value) -> list[Value]:
        found = Assignment(identity(build, x, 3).target, 3)
        return [initial_sizes(build, x), *found.merge(build, x)]

    x = normal(2, 3, 4)
    sizes, merged, after = evaluated(make, x)
    np.testing.assert_array_equal(sizes, np.ones((2, 3, 1)))
    np.testing.assert_array_equal(after, sizes)
    np.testing.assert_array_equal(merged, x)
