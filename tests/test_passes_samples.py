"""Sample inputs for contract checks: small, of different sizes, valid as indices, the same in every run."""

from __future__ import annotations

import math

import pytest
import torch

from trimtab.ir import Builder, DType, Module, TensorType, interpret, ops, symbol
from trimtab.passes import Context
from trimtab.passes.contracts import Close, Exact, measure
from trimtab.passes.optimize import optimize
from trimtab.passes.samples import count_macs, generate_samples, index_limits

BATCH, SEQ = symbol("batch", 1, 64), symbol("seq", 4, 512)


def text_model() -> Module:
    """Token ids, position ids made from a mask, and a table of two token types."""
    b = Builder()
    ids = b.input("ids", TensorType(DType.I64, (BATCH, SEQ)))
    mask = b.input("mask", TensorType(DType.I64, (BATCH, SEQ)))
    kinds = b.input("kinds", TensorType(DType.I32, (BATCH, SEQ)))
    words = b(ops.Embedding(b.weight("words", torch.randn(100, 8)), b(ops.Reshape(ids, shape=(BATCH * SEQ,)))))
    types = b(ops.Embedding(b.weight("types", torch.randn(2, 8)), kinds))
    total = b(ops.Add(b(ops.Reshape(words, shape=(BATCH, SEQ, 8))), types))
    b.output(b(ops.Mul(total, b(ops.Reshape(b(ops.Cast(mask, dtype=DType.F32)), shape=(BATCH, SEQ, 1))))))
    return b.module


def test_samples_have_different_small_sizes_and_valid_indices() -> None:
    module = text_model()
    samples = generate_samples(module, Context(), math.inf)
    sizes = [tuple(sample.inputs[0].shape) for sample in samples]
    assert sizes == [(3, 8), (1, 4), (3, 8)]
    for sample in samples:
        ids, mask, kinds = sample.inputs
        assert int(ids.max()) < 100
        assert set(mask.unique().tolist()) <= {0, 1}
        assert set(kinds.unique().tolist()) <= {0, 1}
        interpret(module, sample.inputs)
    assert int(samples[0].inputs[0].max()) > 2, "the vocabulary is used"


def test_limit_of_an_index_is_the_smallest_axis_it_reaches() -> None:
    b = Builder()
    x = b.input("x", TensorType(DType.I64, (3,)))
    y = b.input("y", TensorType(DType.I64, (3,)))
    big, small = b.weight("big", torch.randn(50, 4)), b.weight("small", torch.randn(7, 4))
    doubled = b(ops.Add(x, y))
    b.output(b(ops.Embedding(big, doubled)), b(ops.IndexSelect(small, x, dim=0)))
    assert index_limits(b.module.main, {}) == {x: 7, y: 50}


def test_divisors_are_not_zero() -> None:
    b = Builder()
    x, y = (b.input(name, TensorType(DType.I64, (200,))) for name in "xy")
    divided = b(ops.Div(x, b(ops.Neg(y)), rounding="floor"))
    b.output(divided, b(ops.Remainder(x, y)), b(ops.Fmod(y, x)))
    for module in b.module, optimize(b.module, "group-fusions").module:
        for sample in generate_samples(module, Context(), 1e9):
            assert all(bool((data != 0).all()) for data in sample.inputs)
            interpret(module, sample.inputs)


def test_indices_that_are_computed_stay_within_the_axis() -> None:
    b = Builder()
    x, at = b.input("x", TensorType(DType.F32, (4,))), b.input("at", TensorType(DType.I64, (40,)))
    further = b(ops.Add(at, b.weight("two", torch.tensor([2]))))
    b.output(b(ops.Gather(x, further, dim=0)))
    for sample in generate_samples(b.module, Context(), 1e9):
        interpret(b.module, sample.inputs)


def test_samples_are_the_same_for_a_seed_and_fit_the_limit() -> None:
    b = Builder()
    x = b.input("x", TensorType(DType.F32, (BATCH, 16)))
    b.output(b(ops.Linear(x, b.weight("w", torch.randn(8, 16)))))
    first, second = (generate_samples(b.module, Context(seed=5), math.inf) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.inputs[0].nan_to_num(), other.inputs[0].nan_to_num())
    assert [s.macs for s in first] == [3 * 128, 128, 3 * 128]
    assert next(s.name for s in generate_samples(b.module, Context(), 200)) == "smallest sizes"
    assert next(s.macs for s in generate_samples(b.module, Context(), 1)) == 128, "one remains"


def test_macs_of_a_repeat_count_every_iteration() -> None:
    from trimtab.ir import Graph

    b = Builder()
    x = b.input("x", TensorType(DType.F32, (2, 4)))
    w = b.weight("w", torch.randn(4, 4))
    body = Graph("")
    h = body.add_input(x.type, "h")
    inner = Builder(b.module, body)
    inner.output(inner(ops.Linear(h, body.weight(b.module.weights["w"]))))
    b.output(b(ops.Linear(b(ops.Repeat((x,), (), (), body, n=5)), w)))
    assert count_macs(b.module, {}) == 6 * 2 * 4 * 4


@pytest.mark.parametrize(
    ("before", "after", "differing", "absolute"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0, 0.0),
        ([math.nan, math.inf], [math.nan, math.inf], 0, 0.0),
        ([0.0, 1.0], [-0.0, 1.0], 1, 0.0),
        ([math.nan, 1.0], [0.0, 1.0], 1, 0.0),
        ([math.inf, 1.0], [-math.inf, 1.0], 1, math.inf),
        ([1.0, 4.0], [1.0, 4.5], 1, 0.5),
    ],
)
def test_drift(before: list[float], after: list[float], differing: int, absolute: float) -> None:
    drift = measure(torch.tensor(before), torch.tensor(after))
    assert (drift.differing, drift.absolute) == (differing, absolute)
    assert Exact().holds(drift) == (differing == 0)
    assert Close(rtol=0.2).holds(drift) == (absolute < 1)


def test_drift_of_another_shape_or_kind_is_infinite() -> None:
    one = torch.ones(3)
    for other in (torch.ones(4), torch.ones(3, dtype=torch.float64)):
        assert measure(one, other).absolute == math.inf
    assert measure(torch.tensor([True, False]), torch.tensor([True, True])).differing == 1
    assert measure(torch.ones(0), torch.ones(0)).differing == 0


def test_a_bound_below_the_resolution_of_a_half_type_is_the_resolution() -> None:
    before = torch.tensor([1.0, -2.0])
    for dtype, step in ((torch.bfloat16, 2**-7), (torch.float16, 2**-10)):
        near, far = before * (1 + 4 * step), before * (1 + 12 * step)
        assert Close(rtol=1e-4).holds(measure(before.to(dtype), near.to(dtype)))
        assert not Close(rtol=1e-4).holds(measure(before.to(dtype), far.to(dtype)))
        assert not Close(rtol=1e-4).holds(measure(before, near))
