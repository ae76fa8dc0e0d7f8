"""Run with ``pytest`` after installing the package."""

import pytest
import torch
from my_pass.multiply_by_rsqrt import DivideBySqrt, MultiplyByRsqrt
from my_pass.round_weights import RoundWeights

import trimtab
from trimtab.ir import Module, parse_module
from trimtab.passes import PassManager


def module(body: str) -> Module:
    return parse_module(f"trimtab.ir 1\ngraph main(%x: f32[3, 5], %y: f32[3, 5]) {{\n{body}\n  return z=%z\n}}")


def test_a_division_by_a_root_becomes_a_product() -> None:
    before = module("  %r = sqrt(%y) : f32[3, 5]\n  %z = div(%x, %r) : f32[3, 5]")
    after, report = PassManager([MultiplyByRsqrt()]).run(before)  # compares the results, as the contract asks
    assert [op.name for op in after.walk()] == ["rsqrt", "mul"]
    assert report.rows[0].rules[0]["applied"] == 1


def test_a_root_that_is_read_elsewhere_stays() -> None:
    before = module("  %r = sqrt(%y) : f32[3, 5]\n  %q = div(%x, %r) : f32[3, 5]\n  %z = add(%q, %r) : f32[3, 5]")
    assert not PassManager([MultiplyByRsqrt()]).run(before)[1].rows[0].changed
    assert "the result of sqrt, is also read by add" in str(DivideBySqrt().explain(before))


def test_weights_are_rounded() -> None:
    net = torch.nn.Linear(64, 32).eval()
    traced = trimtab.trace(net, (torch.randn(2, 64),))
    after = trimtab.optimize(traced, "round-weights").module
    assert torch.equal(after.weights["weight"].tensor(), net.weight.bfloat16().float())
    assert torch.equal(after.weights["bias"].tensor(), net.bias)


@pytest.mark.parametrize("name", ["multiply-by-rsqrt", "round-weights"])
def test_the_passes_are_registered(name: str) -> None:
    assert trimtab.passes.load_pass(name) in (MultiplyByRsqrt, RoundWeights)
