"""The pass channels-last: which convolutions get channels last, and where permutes are left."""

from __future__ import annotations

import pytest
from pass_harness import assert_same_results, read, rewritten

from trimtab.frontend.torch_export import trace
from trimtab.ir import Module
from trimtab.ir.analysis import count_ops
from zoo_models import get


def conv(result: str, x: str, weight: str, shape: str, kernel: int = 3, stride: int = 1, more: str = "") -> str:
    how = f"stride=[{stride}, {stride}], padding=[{kernel // 2}, {kernel // 2}], dilation=[1, 1]{more}"
    return f"  %{result} = conv2d(%{x}, @{weight}) {{{how}}} : f32[batch, {shape}]\n"


BLOCK = (
    "symbols batch=1..8\nweight @k: f32[64, 16, 3, 3]\nweight @p: f32[16, 64, 1, 1]\nweight @s: f32[16, 1, 1]\n"
    "graph main(%x: f32[batch, 16, 12, 12]) {\n"
    + conv("a", "x", "k", "64, 12, 12")
    + "  %b = relu(%a) : f32[batch, 64, 12, 12]\n"
    + conv("c", "b", "p", "16, 12, 12", kernel=1)
    + "  %d = mul(%c, @s) : f32[batch, 16, 12, 12]\n"
    "  %e = add(%d, %x) : f32[batch, 16, 12, 12]\n"
    "  %f = max_pool2d(%e) {kernel=[2, 2], stride=[2, 2]} : f32[batch, 16, 6, 6]\n"
    "  %y = mean(%f) {dims=[2, 3]} : f32[batch, 16]\n"
    "  return y=%y\n}"
)


def names(module: Module) -> list[str]:
    result, _ = rewritten(module, "channels-last")  # checks the contract
    assert_same_results(module, result, 1, 3)
    assert not rewritten(result, "channels-last")[1][0].changed
    return [op.name for op in result.walk()]


def test_a_region_is_permuted_at_its_border_and_one_pixel_is_a_linear_layer() -> None:
    assert names(read(BLOCK)) == ["permute", "conv2d", "relu", "linear", "mul", "add", "max_pool2d", "mean"]


def test_permutes_around_what_computes_with_channels_last_go() -> None:
    text = (
        "symbols batch=1..8\nweight @d: f32[32, 1, 7, 7]\nweight @w: f32[32, 32]\n"
        "graph main(%x: f32[batch, 14, 14, 32]) {\n"
        "  %p = permute(%x) {dims=[0, 3, 1, 2]} : f32[batch, 32, 14, 14]\n"
        + conv("a", "p", "d", "32, 14, 14", kernel=7, more=", groups=32")
        + "  %q = permute(%a) {dims=[0, 2, 3, 1]} : f32[batch, 14, 14, 32]\n"
        "  %n = layer_norm(%q) : f32[batch, 14, 14, 32]\n"
        "  %l = linear(%n, @w) : f32[batch, 14, 14, 32]\n"
        "  %r = permute(%l) {dims=[0, 3, 1, 2]} : f32[batch, 32, 14, 14]\n"
        "  %s = add(%r, %p) : f32[batch, 32, 14, 14]\n"
        "  %y = permute(%s) {dims=[0, 2, 3, 1]} : f32[batch, 14, 14, 32]\n"
        "  return y=%y\n}"
    )
    assert names(read(text)) == ["conv2d", "layer_norm", "linear", "add"]


def test_a_convolution_of_little_work_stays() -> None:
    text = (
        "symbols batch=1..8\nweight @d: f32[32, 1, 3, 3]\ngraph main(%x: f32[batch, 32, 14, 14]) {\n"
        + conv("y", "x", "d", "32, 14, 14", more=", groups=32")
        + "  return y=%y\n}"
    )
    assert names(read(text)) == ["conv2d"]


def test_a_shared_weight_is_read_under_two_shapes() -> None:
    text = (
        "symbols batch=1..8\nweight @p: f32[64, 64, 1, 1]\ngraph main(%x: f32[batch, 64, 8, 8]) {\n"
        + conv("a", "x", "p", "64, 8, 8", kernel=1)
        + conv("b", "a", "p", "64, 4, 4", kernel=1, stride=2)
        + "  %y = mean(%b) {dims=[2, 3]} : f32[batch, 64]\n  return y=%y\n}"
    )
    assert names(read(text)) == ["permute", "reshape", "linear", "conv2d", "mean"]


@pytest.mark.parametrize("name", ["resnet", "convnext"])
def test_networks_are_permuted_once(name: str) -> None:
    entry = get(name)
    module = trace(entry.build(), tuple(entry.inputs(2, 12).values()))
    module, _ = rewritten(module, "cleanup,fuse")
    result, _ = rewritten(module, "channels-last")
    assert count_ops(result)["permute"] <= 1
    assert all(op.attributes["channels_last"] for op in result.walk() if op.name == "conv2d")
    assert_same_results(module, result)
