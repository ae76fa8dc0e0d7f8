"""The pass simplify-permutes on random chains of reshapes and permutes."""

from __future__ import annotations

import math
import random

import pytest
from pass_harness import assert_same_results, rewritten

from trimtab.ir import Builder, Dim, DType, TensorType, ops, symbol
from trimtab.ir.analysis import count_ops
from trimtab.ir.dims import product

PIPELINE = "simplify-permutes,simplify-reshapes,dce"


def regrouped(draw: random.Random, factors: list[Dim]) -> tuple[Dim, ...]:
    """A shape with the elements of ``factors``, neighbours of which become one axis."""
    cuts = sorted(draw.sample(range(1, len(factors)), draw.randint(0, len(factors) - 1)))
    return tuple(product(factors[a:b]) for a, b in zip([0, *cuts], [*cuts, len(factors)], strict=True))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("seed", range(12))
def test_a_chain_is_one_permute_at_most(seed: int, dynamic: bool) -> None:
    draw = random.Random(seed)
    factors: list[Dim] = [symbol("batch", 1, 8) if dynamic else 4, 2, 3, 1, 5]
    build = Builder()
    x = value = build.input("x", TensorType(DType.F32, tuple(factors)))
    for _ in range(4):
        order = draw.sample(range(len(factors)), len(factors))
        value = build(ops.Permute(build(ops.Reshape(value, shape=tuple(factors))), dims=tuple(order)))
        factors = [factors[place] for place in order]
        value = build(ops.Reshape(value, shape=regrouped(draw, factors)))
    build.output(value)
    after, _ = rewritten(build.module, PIPELINE)
    assert count_ops(after)["permute"] <= 1
    assert count_ops(after).total() <= 3
    assert_same_results(build.module, after, 1, 3)
    assert x.type.elements == value.type.elements


@pytest.mark.parametrize("seed", range(12))
def test_sizes_without_common_factors_are_left_alone_or_right(seed: int) -> None:
    draw = random.Random(seed)
    shapes = [(4, 6), (6, 4), (8, 3), (3, 8), (2, 12), (2, 3, 4), (4, 3, 2), (24,), (1, 24)]
    build = Builder()
    value = build.input("x", TensorType(DType.F32, draw.choice(shapes)))
    before = 0
    for _ in range(5):
        value = build(ops.Reshape(value, shape=draw.choice(shapes)))
        value = build(ops.Permute(value, dims=tuple(draw.sample(range(value.type.rank), value.type.rank))))
        before += 1
    build.output(value)
    after, _ = rewritten(build.module, PIPELINE)
    assert count_ops(after)["permute"] <= before
    assert math.prod(after.main.outputs[0].type.shape) == 24  # type: ignore[arg-type]
    assert_same_results(build.module, after)
