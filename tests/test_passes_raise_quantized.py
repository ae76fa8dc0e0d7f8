"""The pass raise-quantized: products of dequantized numbers become products of integers, with the same results."""

from __future__ import annotations

import pytest
import torch
from pass_harness import read, rewritten

from trimtab.ir import interpret
from trimtab.ir.analysis import count_ops
from trimtab.ir.core import Module


def bytes_of(*shape: int, seed: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    low, high = (-128, 128) if dtype is torch.int8 else (0, 256)
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def scales(*shape: int, seed: int) -> torch.Tensor:
    return 0.003 + 0.02 * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


LINEAR = """
symbols batch=1..8
weight @w: {type}[9, 13]
weight @sw: f32[{count}]
weight @zw: {type}[{count}]
weight @b: f32[9]
graph main(%x: u8[batch, 5, 13], %s: f32[], %z: u8[]) {{
  %a = dequantize(%x, %s, %z) : f32[batch, 5, 13]
  %c = dequantize(@w, @sw, @zw) : f32[9, 13]
  %y = linear(%a, %c, @b) : f32[batch, 5, 9]
  return y=%y
}}"""

MATMUL = """
weight @w: {type}[13, 9]
weight @sw: f32[{count}]
weight @zw: {type}[{count}]
graph main(%x: i8[4, 5, 13], %s: f32[4, 5, 1], %z: i32[4, 5, 1]) {{
  %a = dequantize(%x, %s, %z) : f32[4, 5, 13]
  %c = dequantize(@w, @sw, @zw) : f32[13, 9]
  %y = matmul(%a, %c) : f32[4, 5, 9]
  return y=%y
}}"""

ATTENTION = """
symbols length=1..64
graph main(%q: u8[2, 3, length, 16], %k: i8[2, 3, length, 16], %sq: f32[], %sk: f32[], %zq: u8[], %zk: i8[]) {
  %a = dequantize(%q, %sq, %zq) : f32[2, 3, length, 16]
  %b = dequantize(%k, %sk, %zk) : f32[2, 3, length, 16]
  %t = permute(%b) {dims=[0, 1, 3, 2]} : f32[2, 3, 16, length]
  %y = matmul(%a, %t) : f32[2, 3, length, length]
  %v = matmul(%y, %b) : f32[2, 3, length, 16]
  return y=%y, v=%v
}"""

CONVOLUTION = """
weight @w: {type}[6, 2, 3, 3]
weight @sw: f32[6, 1, 1]
weight @b: f32[6]
graph main(%x: u8[2, 4, 7, 5], %s: f32[1], %z: u8[1]) {{
  %scale = reshape(@sw) {{shape=[6, 1, 1, 1]}} : f32[6, 1, 1, 1]
  %zero = full() {{value={zero}, dtype={type}}} : {type}[]
  %a = dequantize(%x, %s, %z) : f32[2, 4, 7, 5]
  %c = dequantize(@w, %scale, %zero) : f32[6, 2, 3, 3]
  %y = conv2d(%a, %c, @b) {{stride=[2, 1], padding=[1, 1], dilation=[1, 1], groups=2}} : f32[2, 6, 4, 5]
  return y=%y
}}"""


def assert_agrees(before: Module, after: Module, inputs: list[torch.Tensor]) -> None:
    """In double precision, where neither form rounds a product of integers."""
    pairs = zip(*(interpret(module, inputs, precision=torch.float64) for module in (before, after)), strict=True)
    for expected, found in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("count", ["", "9, 1"])
@pytest.mark.parametrize("zero", ["none", "middle", "any"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_linear(dtype: torch.dtype, zero: str, count: str, seed: int) -> None:
    shape = (9, 1) if count else ()
    middle = 0 if dtype is torch.int8 else 128
    zw = bytes_of(*shape, seed=seed, dtype=dtype) if zero == "any" else torch.full(shape, middle, dtype=dtype)
    text = LINEAR.format(type="i8" if dtype is torch.int8 else "u8", count=count)
    if zero == "none":
        text = text.replace("@sw, @zw)", "@sw)").replace("weight @zw", "weight @unread")
    weights = {"w": bytes_of(9, 13, seed=seed, dtype=dtype), "sw": scales(*shape, seed=seed), "zw": zw, "unread": zw}
    module = read(text, **weights)
    after, rows = rewritten(module, "raise-quantized")
    counts = count_ops(after)
    assert rows[0].changed
    assert counts["linear_integer"] == 1
    assert "linear" not in counts
    # Row sums of x are for weights whose zero point is not the middle of their range.
    assert ("sum" in counts) == (zero == "any" or (zero == "none" and dtype is torch.uint8))
    x = bytes_of(3, 5, 13, seed=seed + 7, dtype=torch.uint8)
    assert_agrees(module, after, [x, scales(seed=seed), bytes_of(seed=seed, dtype=torch.uint8)])


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("count", ["", "9", "1, 9"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_product_with_a_weight_that_is_stored_transposed(dtype: torch.dtype, count: str, seed: int) -> None:
    """Scales and zero points of rows of x and columns of the weight."""
    shape = tuple(map(int, filter(None, count.split(", "))))
    text = MATMUL.format(type="i8" if dtype is torch.int8 else "u8", count=count)
    weights = {"w": bytes_of(13, 9, seed=seed, dtype=dtype), "sw": scales(*shape, seed=seed)}
    module = read(text, **weights, zw=bytes_of(*shape, seed=seed, dtype=dtype))
    after, _ = rewritten(module, "raise-quantized")
    assert count_ops(after)["linear_integer"] == 1
    assert "w" not in after.weights  # the transposed one takes its place
    zero = torch.randint(-128, 128, (4, 5, 1), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    assert_agrees(module, after, [bytes_of(4, 5, 13, seed=seed), scales(4, 5, 1, seed=seed), zero])


@pytest.mark.parametrize("length", [1, 7, 33])
def test_product_of_activations(length: int) -> None:
    module = read(ATTENTION)
    after, _ = rewritten(module, "raise-quantized")
    counts = count_ops(after)
    assert counts["matmul_integer"] == 1
    assert counts["matmul"] == 1  # the second one multiplies by what is no integer
    shape = (2, 3, length, 16)
    inputs = [bytes_of(*shape, seed=1, dtype=torch.uint8), bytes_of(*shape, seed=2), scales(seed=3), scales(seed=4)]
    assert_agrees(module, after, [*inputs, torch.tensor(200, dtype=torch.uint8), torch.tensor(-77, dtype=torch.int8)])


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_convolution(dtype: torch.dtype) -> None:
    """The borders are zeros of the real numbers, so x's zero point is subtracted before."""
    text = CONVOLUTION.format(type="i8" if dtype is torch.int8 else "u8", zero=0 if dtype is torch.int8 else 128)
    module = read(text, w=bytes_of(6, 2, 3, 3, seed=1, dtype=dtype), sw=scales(6, 1, 1, seed=2))
    after, _ = rewritten(module, "raise-quantized")
    assert count_ops(after)["conv_integer"] == 1
    assert "conv2d" not in count_ops(after)
    x = bytes_of(2, 4, 7, 5, seed=3, dtype=torch.uint8)
    assert_agrees(module, after, [x, scales(1, seed=4), torch.tensor([131], dtype=torch.uint8)])


def _reasons(module: Module) -> str:
    after, rows = rewritten(module, "raise-quantized")
    assert not rows[0].changed
    assert str(after) == str(module)
    return " ".join(reason for rule in rows[0].rules for reason in rule["rejected"])


def test_scales_along_the_sum_stay() -> None:
    text = LINEAR.format(type="i8", count="13")
    shape = {"w": bytes_of(9, 13, seed=1), "sw": scales(13, seed=1), "zw": bytes_of(13, seed=1)}
    assert "more than one scale along the axis that is summed" in _reasons(read(text, **shape))


def test_sums_that_may_wrap_stay() -> None:
    text = ATTENTION.replace("length=1..64", "length=1..100000").replace("16", "40000")
    assert "may not have 32 bits" in _reasons(read(text))


def test_a_weight_that_is_read_otherwise_is_not_stored_twice() -> None:
    text = MATMUL.format(type="i8", count="").replace("return y=%y", "return y=%y, c=%c")
    weights = {"w": bytes_of(13, 9, seed=1), "sw": scales(seed=1), "zw": bytes_of(seed=1)}
    assert "would be a second weight" in _reasons(read(text, **weights))


def test_a_convolution_whose_weight_has_a_zero_point_stays() -> None:
    text = CONVOLUTION.format(type="i8", zero=3)
    module = read(text, w=bytes_of(6, 2, 3, 3, seed=1), sw=scales(6, 1, 1, seed=2))
    assert "borders of zeros" in _reasons(module)


def test_matrices_of_bytes_are_not_folded_to_floats() -> None:
    """Not even small ones, which the limit of fold-constants allows to grow; vectors are."""
    text = """
weight @w: i8[4, 8]
weight @b: i32[4]
graph main(%x: f32[3, 8]) {
  %s = full() {value=0.5, dtype=f32} : f32[]
  %c = dequantize(@w, %s) : f32[4, 8]
  %d = dequantize(@b, %s) : f32[4]
  %y = linear(%x, %c, %d) : f32[3, 4]
  return y=%y
}"""
    after, _ = rewritten(read(text, w=bytes_of(4, 8, seed=1), b=bytes_of(4, seed=2).int()), "cleanup")
    assert count_ops(after)["dequantize"] == 1
    assert after.weights["w"].nbytes == 32
