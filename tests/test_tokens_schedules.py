"""Schedules of token reduction against numbers worked out by hand, and against exhaustive search."""

from __future__ import annotations

import pytest

from trimtab.errors import UsageError
from trimtab.passes.tokens.schedules import (
    Removals,
    clamped,
    constant,
    in_proportion,
    linear,
    margins,
    ratio,
    remaining,
    slope,
    within_budget,
)


def vit_macs(removals: Removals, width: int = 384, tokens: int = 197) -> float:
    """Multiply-accumulates of the blocks of a ViT whose tokens are reduced between attention and MLP."""
    total = 0.0
    for removed in removals:
        total += 4 * tokens * width**2 + 2 * tokens**2 * width
        tokens -= removed
        total += 8 * tokens * width**2
    return total


def test_constant_and_linear_schedules() -> None:
    assert constant(13, 3) == (13, 13, 13)
    assert linear(16, -1, 5) == (32, 24, 16, 8, 0)
    assert linear(16, 1, 5) == (0, 8, 16, 24, 32)
    assert linear(16, 0, 4) == (16, 16, 16, 16)
    assert linear(10, 0.5, 12) == (5, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
    assert linear(10, 0.5, 1) == (5,)
    with pytest.raises(UsageError, match="between -1 and 1"):
        linear(10, 2, 3)


def test_a_ratio_removes_less_in_deeper_layers() -> None:
    # 196 -> 182 -> 169 -> 157: floor(14.7), floor(13.65), floor(12.675).
    assert ratio(0.925, 197, 1, 3) == (14, 13, 12)
    assert ratio(1.0, 197, 1, 3) == (0, 0, 0)
    assert ratio(0.1, 9, 1, 3) == (4, 2, 1)  # at most half
    for keep in (0.0, 1.5):
        with pytest.raises(UsageError, match="0 < keep <= 1"):
            ratio(keep, 197, 1, 3)


def test_the_last_layers_of_a_steep_schedule_remove_half_of_what_is_left() -> None:
    assert clamped((40,) * 6, 197, 1) == (40, 40, 40, 38, 19, 9)
    assert remaining(clamped((40,) * 6, 197, 1), 197) == (197, 157, 117, 77, 39, 20, 11)
    assert clamped((5, 5), 4, 4) == (0, 0)


def test_tokens_are_spread_in_proportion() -> None:
    assert in_proportion(26, (1, 1)) == (13, 13)
    assert in_proportion(8, (1.0,) * 5) == (1, 2, 1, 2, 2)
    assert in_proportion(0, (1, 1, 1)) == (0, 0, 0)
    assert in_proportion(80, slope(-1, 5)) == linear(16, -1, 5)
    assert in_proportion(80, slope(1, 5)) == linear(16, 1, 5)
    assert slope(0.5, 1) == (1.0,)
    for total in range(50):
        assert sum(in_proportion(total, slope(0.3, 7))) == total
    with pytest.raises(UsageError, match="between -1 and 1"):
        slope(-1.5, 3)


@pytest.mark.parametrize("inflect", [0, -1, 0.5])
@pytest.mark.parametrize("share", [1.0, 0.9, 0.75, 0.6, 0.5, 0.4])
def test_a_budget_is_met_with_the_fewest_tokens_removed(share: float, inflect: float) -> None:
    weights = slope(inflect, 12)
    found = within_budget(share, 197, 1, weights, vit_macs)
    full = vit_macs(constant(0, 12))
    assert vit_macs(found) <= share * full
    fewest = next(n for n in range(1000) if vit_macs(clamped(in_proportion(n, weights), 197, 1)) <= share * full)
    assert found == clamped(in_proportion(fewest, weights), 197, 1)
    assert vit_macs(found) > (share - 0.006) * full


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    least = vit_macs(clamped(constant(197, 12), 197, 1)) / vit_macs(constant(0, 12))
    with pytest.raises(UsageError, match=rf"least={least:.3f}.*or more"):
        within_budget(0.05, 197, 1, (1,) * 12, vit_macs)


def test_margins_fall_with_depth() -> None:
    assert margins(3) == pytest.approx((0.9, 0.6, 0.3))
    assert margins(2, 0.75, 0.75) == pytest.approx((0.75, 0.375))
