"""The pass reassociate-matmuls: chains of products in an order that is cheaper, for all sizes."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from pass_harness import assert_same_results

from trimtab.ir import Builder, Dim, DType, Module, TensorType, Value, ops, symbol
from trimtab.passes.manager import PassManager
from trimtab.passes.reassociate_matmuls import StackedLinears
from trimtab.passes.samples import count_macs

F32 = DType.F32
PASS = "reassociate-matmuls"


def optimized(module: Module, pipeline: str = PASS) -> Module:
    return PassManager(pipeline).run(module)[0]  # checks the contract


def macs(module: Module, **sizes: int) -> int:
    return count_macs(module, sizes)


def chain(*sizes: int, order: str, batch: tuple[Dim, ...] = ()) -> Module:
    """A chain of inputs, multiplied from the ``left`` or from the ``right``."""
    b = Builder()
    values = [b.input(f"x{i}", TensorType(F32, (*batch, *pair))) for i, pair in enumerate(itertools.pairwise(sizes))]
    while len(values) > 1:
        if order == "left":
            values[:2] = [b(ops.Matmul(values[0], values[1]))]
        else:
            values[-2:] = [b(ops.Matmul(values[-2], values[-1]))]
    b.output(values[0])
    return b.module


def cheapest(sizes: tuple[int, ...]) -> int:
    """The textbook recursion, without the tables."""
    if len(sizes) <= 2:
        return 0
    return min(
        cheapest(sizes[: k + 1]) + cheapest(sizes[k:]) + sizes[0] * sizes[k] * sizes[-1]
        for k in range(1, len(sizes) - 1)
    )


@pytest.mark.parametrize("order", ["left", "right"])
@pytest.mark.parametrize("seed", range(8))
def test_a_chain_is_multiplied_in_the_cheapest_order(seed: int, order: str) -> None:
    draw = random.Random(seed)
    sizes = tuple(draw.randint(1, 12) for _ in range(draw.randint(4, 8)))
    result = optimized(chain(*sizes, order=order))
    assert macs(result) == cheapest(sizes)
    assert PassManager(PASS).run(result)[1].applied == []


def test_batches_are_broadcast_and_counted() -> None:
    module = chain(2, 9, 2, 9, order="right", batch=(symbol("batch", 1, 16), 3))
    result = optimized(module)
    assert macs(module, batch=4) == 4 * 3 * (9 * 2 * 9 + 2 * 9 * 9)
    assert macs(result, batch=4) == 4 * 3 * (2 * 9 * 2 + 2 * 2 * 9)


def linear_attention(tokens: Dim, width: int) -> Module:
    b = Builder()
    q, k, v = (b.input(name, TensorType(F32, (2, tokens, width))) for name in "qkv")
    b.output(b(ops.Matmul(b(ops.Matmul(q, b(ops.Permute(k, dims=(0, 2, 1))))), v)))
    return b.module


def test_linear_attention_is_linear_in_the_tokens() -> None:
    assert macs(optimized(linear_attention(50, 8))) == 2 * (2 * 50 * 8 * 8)


def test_a_saving_must_hold_for_all_sizes() -> None:
    always = optimized(linear_attention(symbol("tokens", 9, 64), 8))
    assert macs(always, tokens=10) == 2 * (2 * 10 * 8 * 8)
    module = linear_attention(symbol("tokens", 2, 64), 8)
    _, report = PassManager(PASS).run(module)
    assert report.applied == []
    assert report.near_misses() == [f"{PASS}: another order saves multiply-accumulates for some sizes only"]


def test_products_of_weights_become_weights_where_that_saves_bytes() -> None:
    def stacked(hidden: int) -> Module:
        torch.manual_seed(0)
        b = Builder()
        x = b.input("x", TensorType(F32, (3, 5, 8)))
        first, second = b.weight("first", torch.randn(hidden, 8)), b.weight("second", torch.randn(6, hidden))
        bias = b.weight("bias", torch.randn(6))
        b.output(b(ops.Linear(b(ops.Linear(x, first)), second, bias)))
        return b.module

    wide = stacked(32)
    merged = optimized(wide, f"{PASS},dce")
    assert macs(merged) == 3 * 5 * 8 * 6
    assert merged.weight_bytes == 4 * (8 * 6 + 6)
    assert [op.name for op in optimized(stacked(2)).walk()] == ["linear", "linear"], "a low rank is cheaper as it is"


def stacked_with_biases(hidden: int, dtype: DType = F32, bias: bool = True) -> Module:
    torch.manual_seed(0)
    b = Builder()
    x = b.input("x", TensorType(dtype, (symbol("batch", 1, 8), 5, 8)))
    v, a, w, c = (torch.randn(shape).to(dtype.to_torch()) for shape in ((hidden, 8), (hidden,), (6, hidden), (6,)))
    inner = b(ops.Linear(x, b.weight("v", v), b.weight("a", a)))
    b.output(b(ops.Linear(inner, b.weight("w", w), b.weight("c", c) if bias else None)))
    return b.module


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_in_a_row_become_one_with_their_biases(bias: bool) -> None:
    module = stacked_with_biases(16, bias=bias)
    after = optimized(module, f"{PASS},dce")
    (linear,) = after.walk()
    assert linear.operands[1].type.shape == (6, 8)
    assert after.weight_bytes == 4 * (6 * 8 + 6)
    assert_same_results(module, after, 1, 3, tolerance=1e-6)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (stacked_with_biases(2), "one matrix has 48 elements, the two have 28"),
        (stacked_with_biases(16, DType.BF16), "weights of type bf16 are too coarse to be rounded once more"),
    ],
    ids=["low rank", "half precision"],
)
def test_linear_layers_that_stay_apart(module: Module, reason: str) -> None:
    assert PassManager(PASS).run(module)[1].applied == []
    assert StackedLinears().explain(module).reason == reason


def test_half_precision_weights_are_not_multiplied() -> None:
    b = Builder()
    x = b.input("x", TensorType(DType.F16, (4, 8)))
    v, w = b.weight("v", torch.randn(32, 8).half()), b.weight("w", torch.randn(6, 32).half())
    b.output(b(ops.Linear(b(ops.Linear(x, v)), w)))
    assert PassManager(PASS).run(b.module)[1].applied == []


def test_a_weight_with_other_readers_is_not_multiplied_into_a_new_one() -> None:
    torch.manual_seed(0)
    b = Builder()
    x = b.input("x", TensorType(F32, (5, 8)))
    first, second = b.weight("first", torch.randn(9, 8)), b.weight("second", torch.randn(8, 9))
    b.output(b(ops.Linear(b(ops.Linear(x, first)), second)), b(ops.Exp(first)), b(ops.Exp(second)))
    assert PassManager(PASS).run(b.module)[1].applied == []


def test_a_weight_may_come_to_stand_on_the_left() -> None:
    torch.manual_seed(0)
    b = Builder()
    x, y = b.input("x", TensorType(F32, (20, 8))), b.input("y", TensorType(F32, (16, 1)))
    b.output(b(ops.Matmul(b(ops.Linear(x, b.weight("w", torch.randn(16, 8)))), y)))
    assert macs(optimized(b.module)) == 8 * 16 * 1 + 20 * 8 * 1


@pytest.mark.parametrize("reader", ["another op", "an output"])
def test_an_inner_product_that_is_read_elsewhere_ends_the_chain(reader: str) -> None:
    b = Builder()
    x, y, z = (b.input(n, TensorType(F32, s)) for n, s in (("x", (9, 2)), ("y", (2, 9)), ("z", (9, 2))))
    inner = b(ops.Matmul(x, y))
    outer: Value = b(ops.Matmul(inner, z))
    b.output(outer, b(ops.Exp(inner)) if reader == "another op" else inner)
    assert PassManager(PASS).run(b.module)[1].applied == []
