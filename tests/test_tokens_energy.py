"""Merging by energy against a transcription of PiToMe's formulas in loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from token_harness import Array, check_compiled, evaluated, normal, signs

from trimtab.errors import UsageError
from trimtab.ir import Builder, DType, TensorType, Value
from trimtab.passes.tokens.energy import Kernel, energy_bipartite_matching, energy_matching

CASES = [(1, 17, 8, 1), (8, 17, 5, 1), (2, 16, 3, 1), (8, 13, 6, 0), (2, 12, 5, 2), (1, 197, 14, 1)]
"""Batch, tokens, r, protected."""


def _unit(metric: Array) -> list[Array]:
    return [row / math.sqrt(float((row * row).sum())) for row in metric]


def _by_falling_energy(unit: Sequence[Array], margin: float, kernel: Kernel) -> list[int]:
    energies = []
    for own in unit:
        total = 0.0
        for other in unit:
            cosine = float(np.dot(own, other))
            if kernel == "gaussian":
                sigma = 1 - margin
                total += math.exp(-0.5 * ((1 - cosine) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
            else:
                total += cosine - margin if cosine > margin else math.expm1(cosine - margin)
        energies.append(total / len(unit))
    return sorted(range(len(unit)), key=lambda i: -energies[i])  # stable


def _best(unit: Sequence[Array], i: int, receivers: Sequence[int]) -> tuple[float, int]:
    best, partner = -math.inf, -1
    for j in receivers:
        cosine = float(np.dot(unit[i], unit[j]))
        if cosine > best:
            best, partner = cosine, j
    return best, partner


def groups_by_formula(metric: Array, r: int, margin: float, protected: int, kernel: Kernel) -> list[list[int]]:
    """The groups of positions that become one token, in the order of the result."""
    unit = _unit(metric[protected:])
    order = _by_falling_energy(unit, margin, kernel)
    merge, rest = order[: 2 * r], order[2 * r :]
    a, b = (merge[0::2], merge[1::2]) if kernel == "elu" else (merge[:r], merge[r:])
    partners = {i: _best(unit, i, b)[1] for i in a}
    found = [[i] for i in rest] + [[j, *(i for i in a if partners[i] == j)] for j in b]
    return [[i] for i in range(protected)] + [[protected + i for i in group] for group in found]


def bipartite_groups_by_formula(metric: Array, r: int, margin: float, protected: int) -> list[list[int]]:
    unit = _unit(metric[protected:])
    order = _by_falling_energy(unit, margin, "elu")
    a, b = order[0::2], order[1::2]
    edges = [(*_best(unit, i, b), i) for i in a]
    edges.sort(key=lambda edge: -edge[0])  # stable
    partners = {i: j for _, j, i in edges[:r]}
    found = [[i] for i in a if i not in partners] + [[j, *(i for i in partners if partners[i] == j)] for j in b]
    return [[i] for i in range(protected)] + [[protected + i for i in group] for group in found]


def check_groups(x: Array, sizes: Array, results: Sequence[Array], groups: Sequence[Sequence[Sequence[int]]]) -> None:
    merged, new_sizes, target = results
    for b, own in enumerate(groups):
        for row, group in enumerate(own):
            assert [target[b, i] for i in group] == [row] * len(group)
            assert new_sizes[b, row, 0] == sum(sizes[b, i, 0] for i in group)
            expected = sum(x[b, i] * sizes[b, i, 0] for i in group) / new_sizes[b, row, 0]
            np.testing.assert_allclose(merged[b, row], expected, rtol=1e-12, atol=1e-12)
        assert merged.shape[1] == len(own)


def merging(r: int, margin: float, protected: int, kernel: Kernel | None) -> Any:
    def make(build: Builder, metric: Value, x: Value, sizes: Value) -> list[Value]:
        if kernel is None:
            found = energy_bipartite_matching(build, metric, r, margin, protected)
        else:
            found = energy_matching(build, metric, r, margin, protected, kernel)
        return [*found.merge(build, x, sizes), found.target]

    return make


def data(batch: int, tokens: int) -> tuple[Array, Array]:
    sizes = np.random.default_rng(2).integers(1, 5, (batch, tokens, 1)).astype(float)
    return normal(batch, tokens, 6, seed=3), sizes


@pytest.mark.parametrize(("kernel", "margin"), [("elu", 0.9), ("elu", 0.1), ("gaussian", 0.5), ("gaussian", -0.2)])
@pytest.mark.parametrize(("batch", "tokens", "r", "protected"), CASES)
def test_merging_by_energy_follows_the_formula(
    batch: int, tokens: int, r: int, protected: int, kernel: Kernel, margin: float
) -> None:
    metric, (x, sizes) = normal(batch, tokens, 16, seed=tokens), data(batch, tokens)
    groups = [groups_by_formula(m, r, margin, protected, kernel) for m in metric]
    check_groups(x, sizes, evaluated(merging(r, margin, protected, kernel), metric, x, sizes), groups)


@pytest.mark.parametrize(("batch", "tokens", "r", "protected"), CASES)
def test_bipartite_merging_by_energy_follows_the_formula(batch: int, tokens: int, r: int, protected: int) -> None:
    metric, (x, sizes) = normal(batch, tokens, 16, seed=tokens), data(batch, tokens)
    groups = [bipartite_groups_by_formula(m, r, 0.5, protected) for m in metric]
    check_groups(x, sizes, evaluated(merging(r, 0.5, protected, None), metric, x, sizes), groups)


@pytest.mark.parametrize("kernel", ["elu", None])
@pytest.mark.parametrize("pattern", [[0, 1, 0, 2, 1, 0, 3, 2], [0] * 8, [1, 1, 2, 2, 3, 3, 0, 0]])
def test_of_equal_energies_and_cosines_the_first_wins(pattern: list[int], kernel: Kernel | None) -> None:
    """Rows repeat among four orthogonal ones, so that all cosines are 0 or 1 and many energies are equal.

    Margin 0 makes the energy the share of equal rows, without rounding."""
    metric = np.eye(4)[np.array([[3, *pattern]])]
    x, sizes = data(1, 9)
    by = groups_by_formula(metric[0], 3, 0.0, 1, "elu") if kernel else bipartite_groups_by_formula(metric[0], 3, 0.0, 1)
    check_groups(x, sizes, evaluated(merging(3, 0.0, 1, kernel), metric, x, sizes), [by])


def test_outliers_are_kept() -> None:
    """The object among background: the tokens unlike all others stay alone, whatever their position."""
    metric = np.tile(np.eye(8)[0], (1, 11, 1))
    metric[0, 3], metric[0, 8] = np.eye(8)[1], np.eye(8)[2]
    *_, target = evaluated(merging(4, 0.9, 1, "elu"), metric, metric, np.ones((1, 11, 1)))
    counts = np.bincount(target[0].astype(int))
    assert counts[int(target[0, 3])] == counts[int(target[0, 8])] == 1


def test_no_reduction_is_the_identity() -> None:
    x = normal(2, 7, 4)
    for kernel in ("elu", None):
        merged, _, target = evaluated(merging(0, 0.5, 1, kernel), x, x, np.ones((2, 7, 1)))  # type: ignore[arg-type]
        assert target.tolist() == [list(range(7))] * 2
        np.testing.assert_array_equal(merged, x)


@pytest.mark.parametrize(("r", "margin"), [(9, 0.5), (-1, 0.5), (2, 1.0)])
def test_values_out_of_range_are_errors(r: int, margin: float) -> None:
    build = Builder()
    x = build.input("x", TensorType(DType.F32, (1, 17, 4)))
    for make in (energy_matching, energy_bipartite_matching):
        with pytest.raises(UsageError, match="0 <= r <= 8"):
            make(build, x, r, margin)


@pytest.mark.parametrize("kernel", ["elu", "gaussian", None])
@pytest.mark.parametrize(("batch", "tokens", "r", "protected"), [(1, 197, 14, 1), (8, 20, 9, 1)])
def test_compiled_merging_by_energy(batch: int, tokens: int, r: int, protected: int, kernel: Kernel | None) -> None:
    pytest.importorskip("tvm", reason="the TVM backend is not installed")
    x, sizes = data(batch, tokens)
    check_compiled(merging(r, 0.3, protected, kernel), normal(batch, tokens, 64), x, sizes)
    if kernel == "elu":  # without rounding, also in float32
        check_compiled(merging(r, 0.0, protected, kernel), abs(signs(batch, tokens, 16)), x, sizes)
