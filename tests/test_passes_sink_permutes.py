"""The pass sink-permutes: permutes move on where fewer are left in the end, and stay elsewhere."""

from __future__ import annotations

import pytest
import torch

from trimtab.ir import Module, parse_module
from trimtab.ir.weights import TorchSource
from trimtab.passes.manager import PassManager

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
        ("read elsewhere", "  %g = gelu(%p) : f32[batch, 4, 5, 3]\n  %y = permute(%g) {dims=[0, 3, 1, 2]} : "
         "f32[batch, 3, 4, 5]\n  return y=%y, p=%p"),
        ("another axis", "  %g = layer_norm(%p) : f32[batch, 4, 5, 3]\n  %y = permute(%g) {dims=[0, 3, 1, 2]} : "
         "f32[batch, 3, 4, 5]\n  return y=%y"),
    ],
)  # fmt: skip
def test_it_stays_where_nothing_is_won(why: str, body: str) -> None:
    module = parse("  %p = permute(%x) {dims=[0, 2, 3, 1]} : f32[batch, 4, 5, 3]\n" + body)
    assert PassManager("sink-permutes").run(module)[1].applied == []
