"""The pass fold-layer-scale: factors per channel go into the layer before them."""

from __future__ import annotations

import pytest
from pass_harness import Golden, assert_same_results, check_case, read

CASES = {
    "layer_scale": """
symbols batch=1..8, seq=1..32
weight @w: f32[6, 4] trainable
weight @b: f32[6]
weight @gamma: f32[6] trainable
weight @v: f32[4, 6]
weight @lambda: f32[1, 1, 4]
graph main(%x: f32[batch, seq, 4], %r: f32[batch, seq, 4]) {
  %a = linear(%x, @w, @b) : f32[batch, seq, 6]
  %scaled = mul(%a, @gamma) : f32[batch, seq, 6]
  %g = gelu(%scaled) : f32[batch, seq, 6]
  %c = linear(%g, @v) : f32[batch, seq, 4]
  %d = mul(@lambda, %c) : f32[batch, seq, 4]
  %y = add(%d, %r) : f32[batch, seq, 4]
  return y=%y
}""",
    "moved_channels": """
symbols batch=1..8
weight @w: f32[6, 4]
weight @b: f32[6]
weight @planes: f32[6, 1, 1]
weight @v: f32[6, 4]
weight @heads: f32[2, 1, 3]
weight @k: f32[3, 4, 1, 1]
weight @kb: f32[3]
weight @last: f32[3]
graph main(%x: f32[batch, 2, 5, 4], %image: f32[batch, 4, 5, 5]) {
  %a = linear(%x, @w, @b) : f32[batch, 2, 5, 6]
  %p = permute(%a) {dims=[0, 3, 1, 2]} : f32[batch, 6, 2, 5]
  %scaled = mul(%p, @planes) : f32[batch, 6, 2, 5]
  %c = linear(%x, @v) : f32[batch, 2, 5, 6]
  %h = reshape(%c) {shape=[batch, 10, 2, 3]} : f32[batch, 10, 2, 3]
  %q = permute(%h) {dims=[0, 2, 1, 3]} : f32[batch, 2, 10, 3]
  %by_head = div(%q, @heads) : f32[batch, 2, 10, 3]
  %d = conv2d(%image, @k, @kb) {stride=[1, 1], padding=[0, 0], dilation=[1, 1]} : f32[batch, 3, 5, 5]
  %n = permute(%d) {dims=[0, 2, 3, 1]} : f32[batch, 5, 5, 3]
  %channels_last = mul(%n, @last) : f32[batch, 5, 5, 3]
  return scaled=%scaled, by_head=%by_head, channels_last=%channels_last
}""",
    "some_of_the_channels": """
weight @packed: f32[9, 4]
weight @b: f32[9]
weight @g: f32[3]
graph main(%x: f32[2, 4]) {
  %p = linear(%x, @packed, @b) : f32[2, 9]
  %q, %k, %v = split(%p) {dim=1, sizes=[3, 3, 3]} : f32[2, 3], f32[2, 3], f32[2, 3]
  %scaled = mul(%k, @g) : f32[2, 3]
  return q=%q, k=%scaled, v=%v
}""",
    "depthwise_and_grouped": """
weight @k: f32[4, 1, 3, 3]
weight @gk: f32[4, 1, 1]
weight @t: f32[4, 3, 2]
weight @gt: f32[6, 1]
graph main(%image: f32[2, 4, 5, 5], %line: f32[2, 4, 5]) {
  %a = conv2d(%image, @k) {stride=[1, 1], padding=[1, 1], dilation=[1, 1], groups=4} : f32[2, 4, 5, 5]
  %b = mul(%a, @gk) : f32[2, 4, 5, 5]
  %c = conv_transpose1d(%line, @t) {stride=[2], padding=[0], output_padding=[0], dilation=[1], groups=2} : f32[2, 6, 10]
  %d = mul(%c, @gt) : f32[2, 6, 10]
  return b=%b, d=%d
}""",
    "stays": """
weight @w: f32[6, 4]
weight @tokens: f32[5, 1]
weight @one: f32[1, 4]
weight @wide: f32[3]
weight @g: f32[6]
graph main(%x: f32[2, 5, 4]) {
  %a = linear(%x, @w) : f32[2, 5, 6]
  %by_token = mul(%a, @tokens) : f32[2, 5, 6]
  %b = linear(%x, @one) : f32[2, 5, 1]
  %wider = mul(%b, @wide) : f32[2, 5, 3]
  %r = relu(%a) : f32[2, 5, 6]
  %activated = mul(%r, @g) : f32[2, 5, 6]
  return by_token=%by_token, wider=%wider, activated=%activated
}""",
    "shared_weight": """
weight @w: f32[4, 4]
weight @g: f32[4]
graph main(%x: f32[2, 4]) {
  %a = linear(%x, @w) : f32[2, 4]
  %b = mul(%a, @g) : f32[2, 4]
  %c = linear(%b, @w) : f32[2, 4]
  %d = mul(%c, @g) : f32[2, 4]
  return d=%d
}""",
}


@pytest.mark.parametrize("case", CASES)
def test_rewrites_as_reviewed(case: str, golden: Golden) -> None:
    module = read(CASES[case])
    result = check_case(golden, f"fold-layer-scale-{case}", "fold-layer-scale", module)
    assert result.weight_bytes <= module.weight_bytes
    sizes = ({"batch": 1, "seq": 1}, {"batch": 3, "seq": 7}, {"batch": 8, "seq": 32})
    assert_same_results(module, result, *sizes, tolerance=1e-6)
