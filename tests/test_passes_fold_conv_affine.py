"""The pass fold-conv-affine: batch norms and constants per channel go into the layers beside them."""

from __future__ import annotations

import re

import pytest
import torch
from pass_harness import Golden, assert_same_results, check_case, read

from trimtab.ir import Module

CASES = {
    "after_convolutions": """
symbols batch=1..8, width=6..40
weight @k: f32[6, 4, 3, 3]
weight @mean: f32[6]
weight @var: f32[6]
weight @gamma: f32[6]
weight @beta: f32[6]
weight @d: f32[6, 1, 3, 3]
weight @db: f32[6]
weight @mean2: f32[6]
weight @var2: f32[6]
weight @t: f32[6, 2, 2, 2]
weight @mean3: f32[4]
weight @var3: f32[4]
graph main(%x: f32[batch, 4, 8, width]) {
  %a = conv2d(%x, @k) {stride=[1, 1], padding=[1, 1], dilation=[1, 1]} : f32[batch, 6, 8, width]
  %b = batch_norm(%a, @mean, @var, @gamma, @beta) : f32[batch, 6, 8, width]
  %c = relu(%b) : f32[batch, 6, 8, width]
  %e = conv2d(%c, @d, @db) {stride=[1, 1], padding=[1, 1], dilation=[1, 1], groups=6} : f32[batch, 6, 8, width]
  %f = batch_norm(%e, @mean2, @var2) {eps=0.001} : f32[batch, 6, 8, width]
  %g = conv_transpose2d(%f, @t) {stride=[2, 2], padding=[0, 0], output_padding=[0, 0],
    dilation=[1, 1], groups=2} : f32[batch, 4, 16, 2*width]
  %h = batch_norm(%g, @mean3, @var3) : f32[batch, 4, 16, 2*width]
  return h=%h
}""",
    "channels_last": """
symbols batch=1..8
weight @k: f32[6, 4, 3, 3]
weight @c: f32[6]
weight @d: f32[6]
graph main(%x: f32[batch, 8, 8, 4]) {
  %a = conv2d(%x, @k) {stride=[1, 1], padding=[1, 1], dilation=[1, 1], channels_last=true} : f32[batch, 8, 8, 6]
  %m = mul(%a, @c) : f32[batch, 8, 8, 6]
  %y = add(%m, @d) : f32[batch, 8, 8, 6]
  return y=%y
}""",
    "before_layers": """
symbols batch=1..8
weight @mean: f32[4]
weight @var: f32[4]
weight @gamma: f32[4]
weight @beta: f32[4]
weight @k: f32[6, 2, 3, 3]
weight @p: f32[5, 4, 1, 1]
weight @pb: f32[5]
weight @mean2: f32[3]
weight @var2: f32[3]
weight @w: f32[2, 3]
graph main(%x: f32[batch, 4, 5, 5], %z: f32[batch, 3]) {
  %a = batch_norm(%x, @mean, @var, @gamma, @beta) : f32[batch, 4, 5, 5]
  %b = conv2d(%a, @k) {stride=[1, 1], padding=[0, 0], dilation=[1, 1], groups=2} : f32[batch, 6, 3, 3]
  %c = conv2d(%a, @p, @pb) {stride=[1, 1], padding=[0, 0], dilation=[1, 1]} : f32[batch, 5, 5, 5]
  %n = batch_norm(%z, @mean2, @var2) : f32[batch, 3]
  %y = linear(%n, @w) : f32[batch, 2]
  return b=%b, c=%c, y=%y
}""",
    "after_linear": """
symbols batch=1..8
weight @w: f32[4, 3]
weight @mean: f32[4]
weight @var: f32[4]
weight @beta: f32[4]
weight @v: f32[4, 3]
weight @mean2: f32[4]
weight @var2: f32[4]
graph main(%x: f32[batch, 5, 3], %z: f32[batch, 3]) {
  %a = linear(%x, @w) : f32[batch, 5, 4]
  %p = permute(%a) {dims=[0, 2, 1]} : f32[batch, 4, 5]
  %y = batch_norm(%p, @mean, @var, none, @beta) : f32[batch, 4, 5]
  %c = linear(%z, @v) : f32[batch, 4]
  %d = batch_norm(%c, @mean2, @var2) : f32[batch, 4]
  return y=%y, d=%d
}""",
    "sums_and_products": """
symbols batch=1..8
weight @k: f32[6, 4, 3, 3]
weight @c: f32[6, 1, 1]
weight @g: f32[1, 6, 1, 1]
weight @d: f32[6, 1, 1]
weight @w: f32[6, 4]
weight @b: f32[6]
weight @e: f32[6]
graph main(%x: f32[batch, 4, 8, 8], %z: f32[batch, 4]) {
  %a = conv2d(%x, @k) {stride=[1, 1], padding=[1, 1], dilation=[1, 1]} : f32[batch, 6, 8, 8]
  %s = add(@c, %a) : f32[batch, 6, 8, 8]
  %m = mul(%s, @g) : f32[batch, 6, 8, 8]
  %y = sub(%m, @d) : f32[batch, 6, 8, 8]
  %one = full() {value=1.0, dtype=f32} : f32[]
  %p = linear(%z, @w, @b) : f32[batch, 6]
  %q = add(%p, @e) : f32[batch, 6]
  %r = add(%q, %one) : f32[batch, 6]
  return y=%y, r=%r
}""",
    "stays": """
weight @mean: f32[4]
weight @var: f32[4]
weight @k: f32[4, 4, 3, 3]
weight @positions: f32[4, 5, 5]
graph main(%x: f32[2, 4, 5, 5]) {
  %padded = batch_norm(%x, @mean, @var) : f32[2, 4, 5, 5]
  %a = conv2d(%padded, @k) {stride=[1, 1], padding=[1, 1], dilation=[1, 1]} : f32[2, 4, 5, 5]
  %p = add(%a, @positions) : f32[2, 4, 5, 5]
  %both = batch_norm(%p, @mean, @var) {eps=0.5} : f32[2, 4, 5, 5]
  %c = relu(%both) : f32[2, 4, 5, 5]
  %minus = sub(@positions, %a) : f32[2, 4, 5, 5]
  return c=%c, minus=%minus
}""",
    "shared_bias": """
weight @w: f32[4, 3]
weight @v: f32[4, 4]
weight @b: f32[4]
weight @c: f32[4]
graph main(%x: f32[2, 3]) {
  %a = linear(%x, @w, @b) : f32[2, 4]
  %d = linear(%a, @v, @b) : f32[2, 4]
  %e = add(%d, @c) : f32[2, 4]
  return e=%e
}""",
}


def module_of(case: str) -> Module:
    """The module of a case, with positive variances."""
    generator = torch.Generator().manual_seed(3)
    declared = re.findall(r"weight @(var\d?): f32\[(\d)\]", CASES[case])
    return read(CASES[case], **{name: torch.rand(int(size), generator=generator) + 0.5 for name, size in declared})


@pytest.mark.parametrize("case", CASES)
def test_rewrites_as_reviewed(case: str, golden: Golden) -> None:
    module = module_of(case)
    result = check_case(golden, f"fold-conv-affine-{case}", "fold-conv-affine,dce", module)
    sizes = ({"batch": 1, "width": 6}, {"batch": 3, "width": 11}, {"batch": 8, "width": 40})
    assert_same_results(module, result, *sizes, tolerance=1e-6)
    for weight in result.weights.values():
        assert weight.tensor().isfinite().all()
