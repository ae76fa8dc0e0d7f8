"""The pass fold-norm-affine: the weight and bias of a norm go into all linear layers that read it."""

from __future__ import annotations

import pytest
from pass_harness import Golden, assert_same_results, check_case, read, rewritten

CASES = {
    "every_reader": """
symbols batch=1..8, seq=1..32
weight @gamma: f32[6]
weight @beta: f32[6]
weight @wq: f32[8, 6] trainable
weight @bq: f32[8]
weight @wk: f32[4, 6] trainable
graph main(%x: f32[batch, seq, 6]) {
  %n = layer_norm(%x, @gamma, @beta) {eps=1e-6} : f32[batch, seq, 6]
  %q = linear(%n, @wq, @bq) : f32[batch, seq, 8]
  %k = linear(%n, @wk) : f32[batch, seq, 4]
  return q=%q, k=%k
}""",
    "rms_norm": """
symbols batch=1..8
weight @gamma: f32[6]
weight @gate: f32[8, 6]
weight @up: f32[8, 6]
weight @b: f32[8]
graph main(%x: f32[batch, 5, 6]) {
  %n = rms_norm(%x, @gamma) : f32[batch, 5, 6]
  %g = linear(%n, @gate) : f32[batch, 5, 8]
  %u = linear(%n, @up, @b) : f32[batch, 5, 8]
  %y = mul(%g, %u) : f32[batch, 5, 8]
  return y=%y
}""",
    "moved_tokens": """
symbols batch=1..8
weight @gamma: f32[6]
weight @beta: f32[6]
weight @w: f32[3, 6]
weight @head: f32[2, 6]
weight @only_beta: f32[3]
weight @v: f32[2, 3]
graph main(%x: f32[batch, 4, 4, 6]) {
  %n = layer_norm(%x, @gamma, @beta) : f32[batch, 4, 4, 6]
  %r = roll(%n) {shifts=[1, 1], dims=[1, 2]} : f32[batch, 4, 4, 6]
  %s = reshape(%r) {shape=[batch, 2, 2, 2, 2, 6]} : f32[batch, 2, 2, 2, 2, 6]
  %p = permute(%s) {dims=[0, 1, 3, 2, 4, 5]} : f32[batch, 2, 2, 2, 2, 6]
  %windows = reshape(%p) {shape=[4*batch, 4, 6]} : f32[4*batch, 4, 6]
  %y = linear(%windows, @w) : f32[4*batch, 4, 3]
  %rows = reshape(%n) {shape=[batch, 16, 6]} : f32[batch, 16, 6]
  %first = select(%rows) {dim=1, index=0} : f32[batch, 6]
  %z = linear(%first, @head) : f32[batch, 2]
  %m = layer_norm(%y, none, @only_beta) : f32[4*batch, 4, 3]
  %u = linear(%m, @v) : f32[4*batch, 4, 2]
  return z=%z, u=%u
}""",
    "slices_of_channels": """
weight @gamma: f32[6]
weight @beta: f32[6]
weight @w: f32[2, 4]
weight @v: f32[2, 2]
graph main(%x: f32[3, 6]) {
  %n = layer_norm(%x, @gamma, @beta) : f32[3, 6]
  %a, %b = split(%n) {dim=1, sizes=[4, 2]} : f32[3, 4], f32[3, 2]
  %y = linear(%a, @w) : f32[3, 2]
  %z = linear(%b, @v) : f32[3, 2]
  return y=%y, z=%z
}""",
    "convolution": """
weight @gamma: f32[6]
weight @beta: f32[6]
weight @k: f32[4, 3, 2, 2]
graph main(%x: f32[2, 5, 5, 6]) {
  %n = layer_norm(%x, @gamma, @beta) : f32[2, 5, 5, 6]
  %p = permute(%n) {dims=[0, 3, 1, 2]} : f32[2, 6, 5, 5]
  %y = conv2d(%p, @k) {stride=[1, 1], padding=[0, 0], dilation=[1, 1], groups=2} : f32[2, 4, 4, 4]
  return y=%y
}""",
    "stays": """
weight @g: f32[4]
weight @b: f32[4]
weight @gg: f32[2, 4]
weight @w: f32[3, 4]
weight @v: f32[3, 4]
weight @h: f32[5, 8]
weight @k: f32[2, 4, 3]
graph main(%x: f32[2, 2, 4]) {
  %residual = layer_norm(%x, @g, @b) : f32[2, 2, 4]
  %a = linear(%residual, @w) : f32[2, 2, 3]
  %c = add(%residual, %x) : f32[2, 2, 4]
  %returned = layer_norm(%c, @g, @b) : f32[2, 2, 4]
  %two_axes = layer_norm(%c, @gg) {axes=2} : f32[2, 2, 4]
  %d = linear(%two_axes, @v) : f32[2, 2, 3]
  %merged = rms_norm(%c, @g) : f32[2, 2, 4]
  %e = reshape(%merged) {shape=[2, 8]} : f32[2, 8]
  %f = linear(%e, @h) : f32[2, 5]
  %padded = layer_norm(%c, @g, @b) {eps=0.1} : f32[2, 2, 4]
  %p = permute(%padded) {dims=[0, 2, 1]} : f32[2, 4, 2]
  %i = conv1d(%p, @k) {stride=[1], padding=[1], dilation=[1]} : f32[2, 2, 2]
  return a=%a, returned=%returned, d=%d, f=%f, i=%i
}""",
    "shared_weight": """
weight @g: f32[4]
weight @b: f32[4]
weight @w: f32[4, 4]
graph main(%x: f32[2, 4]) {
  %n = layer_norm(%x, @g, @b) : f32[2, 4]
  %a = linear(%n, @w) : f32[2, 4]
  %m = layer_norm(%a, @g, @b) : f32[2, 4]
  %c = linear(%m, @w) : f32[2, 4]
  return c=%c
}""",
}


@pytest.mark.parametrize("case", CASES)
def test_rewrites_as_reviewed(case: str, golden: Golden) -> None:
    module = read(CASES[case])
    result = check_case(golden, f"fold-norm-affine-{case}", "fold-norm-affine", module)
    sizes = ({"batch": 1, "seq": 1}, {"batch": 3, "seq": 7}, {"batch": 8, "seq": 32})
    assert_same_results(module, result, *sizes, tolerance=1e-6)


def test_weights_grow_by_missing_biases_alone() -> None:
    module = read(CASES["every_reader"])
    result, _ = rewritten(module, "fold-norm-affine")
    assert result.weight_bytes == module.weight_bytes - 4 * (6 + 6) + 4 * 4
    assert {id: weight.trainable for id, weight in result.weights.items()} == {
        "wq.folded": True, "bq.folded": False, "wk.folded": True, "wk.bias": True,
    }  # fmt: skip
