"""The pass sink-permutes: permutes move on where fewer are left in the end, and stay elsewhere."""

from __future__ import annotations

import pytest
import torch
from pass_harness import assert_same_results, rewritten

from trimtab.frontend.torch_export import trace
from trimtab.ir import Module, parse_module
from trimtab.ir.analysis import count_ops
from trimtab.ir.weights import TorchSource
from trimtab.passes.manager import PassManager
from zoo_models import get

PIPELINE = "sink-permutes,simplify-permutes,simplify-reshapes,fold-constants,dce"


def parse(body: str, inputs: str = "%x: f32[batch, 3, 4, 5]", weights: str = "") -> Module:
    torch.manual_seed(0)
    text = f"trimtab.ir 1\nsymbols batch=1..8\n{weights}graph main({inputs}) {{\n{body}\n}}"
    return parse_module(text, lambda id, type: TorchSource(torch.randn(type.shape)))


def names(module: Module, pipeline: str = PIPELINE) -> list[str]:
    result, _ = PassManager(pipeline).run(module)  # checks the contract
    assert "sink-permutes" not in PassManager("sink-permutes").run(result)[1].applied
    return [op.name for op in result.walk()]


def test_a_permute_that_meets_its_inverse_behind_elementwise_ops_goes() -> None:
    module = parse(
        """
  %p = permute(%x) {dims=[0, 2, 3, 1]} : f32[batch, 4, 5, 3]
  %a = add(%p, @bias) : f32[batch, 4, 5, 3]
  %g = gelu(%a) : f32[batch, 4, 5, 3]
  %s = softmax(%g) {dim=3} : f32[batch, 4, 5, 3]
  %y = permute(%s) {dims=[0, 3, 1, 2]} : f32[batch, 3, 4, 5]
  return y=%y""",
        weights="weight @bias: f32[3]\n",
    )
    assert names(module) == ["add", "gelu", "softmax"]


def test_operands_that_are_permuted_alike_are_permuted_once() -> None:
    body = """
  %p = permute(%x) {{dims=[0, 2, 3, 1]}} : f32[batch, 4, 5, 3]
  %q = permute(%z) {{dims={}}} : f32[batch, 4, 5, 3]
  %y = mul(%p, %q) : f32[batch, 4, 5, 3]
  return y=%y"""
    alike = parse(body.format("[0, 2, 3, 1]"), "%x: f32[batch, 3, 4, 5], %z: f32[batch, 3, 4, 5]")
    assert names(alike) == ["mul", "permute"]
    other = parse(body.format("[0, 3, 2, 1]"), "%x: f32[batch, 3, 4, 5], %z: f32[batch, 3, 5, 4]")
    assert names(other) == ["permute", "permute", "mul"]


def test_a_product_of_transposes_is_the_transpose_of_the_product() -> None:
    module = parse(
        """
  %p = permute(%x) {dims=[0, 2, 1]} : f32[batch, 4, 3]
  %q = permute(%z) {dims=[0, 2, 1]} : f32[batch, 3, 5]
  %m = matmul(%p, %q) : f32[batch, 4, 5]
  %y = permute(%m) {dims=[0, 2, 1]} : f32[batch, 5, 4]
  return y=%y""",
        "%x: f32[batch, 3, 4], %z: f32[batch, 5, 3]",
    )
    assert names(module) == ["matmul"]


@pytest.mark.parametrize(
    ("why", "body"),
    [
        ("nothing to meet", "  %y = gelu(%p) : f32[batch, 4, 5, 3]\n  return y=%y"),
        ("another axis", "  %g = layer_norm(%p) : f32[batch, 4, 5, 3]\n  %y = permute(%g) {dims=[0, 3, 1, 2]} : "
         "f32[batch, 3, 4, 5]\n  return y=%y"),
        ("two permutes for one", "  %g = add(%p, %z) : f32[batch, 4, 5, 3]\n  return y=%g"),
        ("as many as before", "  %g = add(%p, %z) : f32[batch, 4, 5, 3]\n  %y = permute(%g) {dims=[0, 3, 1, 2]} : "
         "f32[batch, 3, 4, 5]\n  return y=%y, p=%p"),
    ],
)  # fmt: skip
def test_it_stays_where_nothing_is_won(why: str, body: str) -> None:
    module = parse(
        "  %p = permute(%x) {dims=[0, 2, 3, 1]} : f32[batch, 4, 5, 3]\n" + body,
        "%x: f32[batch, 3, 4, 5], %z: f32[batch, 4, 5, 3]",
    )
    assert PassManager("sink-permutes").run(module)[1].applied == []


def permutes(body: str, inputs: str = "%x: f32[batch, 3, 4, 5]", weights: str = "") -> tuple[int, Module]:
    """How many permutes are left of ``body``, and the module."""
    module = parse(body, inputs, weights)
    after, _ = rewritten(module, PIPELINE)
    assert_same_results(module, after, 1, 4)
    return count_ops(after)["permute"], after


def test_a_value_that_is_read_permuted_too_meets_its_inverse() -> None:
    left, _ = permutes("""
  %p = permute(%x) {dims=[0, 2, 3, 1]} : f32[batch, 4, 5, 3]
  %g = gelu(%p) : f32[batch, 4, 5, 3]
  %y = permute(%g) {dims=[0, 3, 1, 2]} : f32[batch, 3, 4, 5]
  return y=%y, p=%p""")
    assert left == 1


def test_blocks_with_a_residual_stay_in_the_order_of_most_ops() -> None:
    """Two blocks in the order of channels last between additions in the order of channels first."""
    block = """
  %p{0} = permute(%{1}) {{dims=[0, 2, 3, 1]}} : f32[batch, 4, 5, 3]
  %n{0} = layer_norm(%p{0}) : f32[batch, 4, 5, 3]
  %l{0} = linear(%n{0}, @w{0}) : f32[batch, 4, 5, 3]
  %b{0} = permute(%l{0}) {{dims=[0, 3, 1, 2]}} : f32[batch, 3, 4, 5]
  %s{0} = add(%b{0}, %{1}) : f32[batch, 3, 4, 5]"""
    left, after = permutes(
        block.format("0", "x") + block.format("1", "s0") + "\n  return y=%s1",
        weights="weight @w0: f32[3, 3]\nweight @w1: f32[3, 3]\n",
    )
    assert left == 2, "one on the way in and one on the way out"
    assert next(op.name for op in after.walk()) == "permute"
    assert [op.name for op in after.walk()][-1] == "permute"


@pytest.mark.parametrize(
    ("reduction", "shape", "dims", "left"),
    [
        ("mean(%p) {dims=[1, 2]}", "batch, 3", (2, 3), 0),
        ("sum(%p) {dims=[3]}", "batch, 4, 5", (1,), 0),
        ("amax(%p) {dims=[2]}", "batch, 4, 3", (3,), 1),  # of a quarter of the elements
        ("sum(%p) {dims=[3], keepdim=true}", "batch, 4, 5, 1", (1,), 0),  # of an axis of size 1
    ],
)
def test_a_reduction_reads_the_value_before_the_permute(
    reduction: str, shape: str, dims: tuple[int, ...], left: int
) -> None:
    found, after = permutes(f"""
  %p = permute(%x) {{dims=[0, 2, 3, 1]}} : f32[batch, 4, 5, 3]
  %y = {reduction} : f32[{shape}]
  return y=%y""")
    assert found == left
    assert next(op for op in after.walk()).attributes["dims"] == dims


def test_axes_of_ops_are_those_before_the_permute() -> None:
    left, _ = permutes("""
  %p = permute(%x) {dims=[0, 2, 3, 1]} : f32[batch, 4, 5, 3]
  %c = cumsum(%p) {dim=1, dtype=f32} : f32[batch, 4, 5, 3]
  %j = concat([%c, %p]) {dim=2} : f32[batch, 4, 10, 3]
  %t = slice(%j) {dim=2, start=2, stop=7} : f32[batch, 4, 5, 3]
  %m = amax(%t) {dims=[3], keepdim=true} : f32[batch, 4, 5, 1]
  %d = sub(%t, %m) : f32[batch, 4, 5, 3]
  %y = permute(%d) {dims=[0, 3, 1, 2]} : f32[batch, 3, 4, 5]
  return y=%y""")
    assert left == 0


def test_bytes_must_not_grow_for_any_size() -> None:
    """The permute of one part of a concatenation against that of the other part, which may be larger."""
    body = """
  %p = permute(%x) {dims=[1, 0]} : f32[n, 3]
  %j = concat([%p, %z]) {dim=0} : f32[n + m, 3]
  %y = permute(%j) {dims=[1, 0]} : f32[3, n + m]
  return y=%y, j=%j"""

    def applied(symbols: str) -> tuple[list[str], list[str]]:
        text = f"symbols {symbols}\ngraph main(%x: f32[3, n], %z: f32[m, 3]) {{{body}\n}}"
        _, report = PassManager("sink-permutes").run(parse_module("trimtab.ir 1\n" + text))
        return report.applied, report.near_misses()

    assert applied("n=65..128, m=1..64") == (["sink-permutes"], [])
    assert applied("n=1..128, m=1..64") == ([], ["sink-permutes: fewer bytes are permuted for some sizes only"])
    assert applied("n=1..64, m=65..128") == ([], [])


def test_constants_are_permuted_once_and_for_all() -> None:
    body = """
  %p = permute(%x) {dims=[0, 2, 3, 1]} : f32[batch, 40, 50, 3]
  %a = add(%p, @c) : f32[batch, 40, 50, 3]
  return y=%a"""
    inputs, weights = "%x: f32[batch, 3, 40, 50]", "weight @c: f32[1, 40, 50, 3]\n"
    meets = body.replace("return y=%a", "%y = permute(%a) {dims=[0, 3, 1, 2]} : f32[batch, 3, 40, 50]\n  return y=%y")
    assert permutes(body, inputs, weights)[0] == 1
    assert permutes(meets, inputs, weights)[0] == 0
    # A constant that something else reads as it is would be permuted in every run.
    module = parse(meets.replace("return", "%z = exp(@c) : f32[1, 40, 50, 3]\n  return z=%z,"), inputs, weights)
    after, _ = rewritten(module, PIPELINE)
    assert [op.operands[0].is_weight for op in after.walk() if op.name == "permute"] == [True]


@pytest.mark.parametrize(
    ("name", "before", "after"), [("convnext", 8, 6), ("mamba", 10, 8), ("swin", 26, 25), ("vit", 9, 9)]
)
def test_permutes_of_the_zoo(name: str, before: int, after: int) -> None:
    entry = get(name)
    inputs = tuple(entry.inputs(2, 12).values())
    module = trace(entry.build(), inputs, dynamic_shapes=entry.dynamic_shapes())
    given, _ = rewritten(module, "cleanup")
    result, _ = rewritten(given, PIPELINE)
    assert (count_ops(given)["permute"], count_ops(result)["permute"]) == (before, after)
    assert_same_results(given, result, 2, 3)
