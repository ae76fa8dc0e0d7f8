"""The pass raise-patch-embedding: convolutions over patches become linear where channels come last."""

from __future__ import annotations

import pytest
import torch
from pass_harness import Golden, assert_same_results, check_case, read, rewritten

CASES = {
    "tokens": """
symbols batch=1..8
weight @k: f32[6, 3, 4, 8] trainable
weight @b: f32[6]
graph main(%x: f32[batch, 3, 8, 16]) {
  %c = conv2d(%x, @k, @b) {stride=[4, 8], padding=[0, 0], dilation=[1, 1]} : f32[batch, 6, 2, 2]
  %f = reshape(%c) {shape=[batch, 6, 4]} : f32[batch, 6, 4]
  %y = permute(%f) {dims=[0, 2, 1]} : f32[batch, 4, 6]
  return y=%y
}""",
    "image_of_any_size": """
symbols batch=1..8, rows=1..9, columns=1..9
weight @k: f32[5, 2, 4, 4]
graph main(%x: f32[batch, 2, rows, columns]) {
  %up = resize2d(%x) {size=[4*rows, 8*columns], mode="nearest"} : f32[batch, 2, 4*rows, 8*columns]
  %c = conv2d(%up, @k) {stride=[4, 4], padding=[0, 0], dilation=[1, 1]} : f32[batch, 5, rows, 2*columns]
  %y = permute(%c) {dims=[0, 2, 3, 1]} : f32[batch, rows, 2*columns, 5]
  return y=%y
}""",
    "one_pixel": """
weight @k: f32[5, 2, 1, 1]
graph main(%x: f32[2, 2, 3, 4]) {
  %c = conv2d(%x, @k) {stride=[1, 1], padding=[0, 0], dilation=[1, 1]} : f32[2, 5, 3, 4]
  %y = permute(%c) {dims=[0, 2, 3, 1]} : f32[2, 3, 4, 5]
  return y=%y
}""",
    "other_dimensions": """
weight @line: f32[5, 2, 4]
weight @video: f32[5, 2, 2, 4, 4]
graph main(%x: f32[2, 2, 12], %v: f32[1, 2, 4, 8, 12]) {
  %c = conv1d(%x, @line) {stride=[4], padding=[0], dilation=[1]} : f32[2, 5, 3]
  %y = permute(%c) {dims=[0, 2, 1]} : f32[2, 3, 5]
  %d = conv3d(%v, @video) {stride=[2, 4, 4], padding=[0, 0, 0], dilation=[1, 1, 1]} : f32[1, 5, 2, 2, 3]
  %f = reshape(%d) {shape=[1, 5, 12]} : f32[1, 5, 12]
  %z = permute(%f) {dims=[0, 2, 1]} : f32[1, 12, 5]
  return y=%y, z=%z
}""",
    "stays": """
symbols size=8..64
weight @k: f32[6, 3, 4, 4]
weight @other: f32[6, 3, 4, 4]
weight @narrow: f32[6, 3, 2, 2]
weight @grouped: f32[6, 1, 4, 4]
weight @a: f32[6, 3, 4, 4]
weight @c: f32[6, 3, 4, 4]
weight @d: f32[6, 3, 4, 4]
weight @e: f32[6, 3, 4, 4]
graph main(%x: f32[2, 3, 8, 8], %odd: f32[2, 3, 9, 8], %s: f32[2, 3, 8, size]) {
  %overlapping = conv2d(%x, @k) {stride=[2, 2], padding=[0, 0], dilation=[1, 1]} : f32[2, 6, 3, 3]
  %o = permute(%overlapping) {dims=[0, 2, 3, 1]} : f32[2, 3, 3, 6]
  %padded = conv2d(%x, @a) {stride=[4, 4], padding=[2, 2], dilation=[1, 1]} : f32[2, 6, 3, 3]
  %p = permute(%padded) {dims=[0, 2, 3, 1]} : f32[2, 3, 3, 6]
  %dilated = conv2d(%x, @e) {stride=[4, 4], padding=[0, 0], dilation=[2, 2]} : f32[2, 6, 1, 1]
  %l = permute(%dilated) {dims=[0, 2, 3, 1]} : f32[2, 1, 1, 6]
  %in_groups = conv2d(%x, @grouped) {stride=[4, 4], padding=[0, 0], dilation=[1, 1], groups=3} : f32[2, 6, 2, 2]
  %g = permute(%in_groups) {dims=[0, 2, 3, 1]} : f32[2, 2, 2, 6]
  %two_pixels = conv2d(%x, @narrow) {stride=[2, 2], padding=[0, 0], dilation=[1, 1]} : f32[2, 6, 4, 4]
  %n = permute(%two_pixels) {dims=[0, 2, 3, 1]} : f32[2, 4, 4, 6]
  %cut_off = conv2d(%odd, @c) {stride=[4, 4], padding=[0, 0], dilation=[1, 1]} : f32[2, 6, 2, 2]
  %u = permute(%cut_off) {dims=[0, 2, 3, 1]} : f32[2, 2, 2, 6]
  %unknown = conv2d(%s, @d) {stride=[4, 4], padding=[0, 0], dilation=[1, 1]} : f32[2, 6, 2, (size - 4)//4 + 1]
  %w = permute(%unknown) {dims=[0, 2, 3, 1]} : f32[2, 2, (size - 4)//4 + 1, 6]
  %channels_first = conv2d(%x, @other) {stride=[4, 4], padding=[0, 0], dilation=[1, 1]} : f32[2, 6, 2, 2]
  %shared = conv2d(%x, @other) {stride=[4, 4], padding=[0, 0], dilation=[1, 1]} : f32[2, 6, 2, 2]
  %t = permute(%shared) {dims=[0, 2, 3, 1]} : f32[2, 2, 2, 6]
  return o=%o, p=%p, l=%l, g=%g, n=%n, u=%u, w=%w, first=%channels_first, t=%t
}""",
    "other_reshapes": """
weight @k: f32[6, 3, 4, 4]
weight @b: f32[6]
graph main(%x: f32[2, 3, 8, 8]) {
  %c = conv2d(%x, @k, @b) {stride=[4, 4], padding=[0, 0], dilation=[1, 1]} : f32[2, 6, 2, 2]
  %f = reshape(%c) {shape=[2, 3, 8]} : f32[2, 3, 8]
  %y = permute(%f) {dims=[0, 2, 1]} : f32[2, 8, 3]
  return y=%y
}""",
}


@pytest.mark.parametrize("case", CASES)
def test_rewrites_as_reviewed(case: str, golden: Golden) -> None:
    module = read(CASES[case])
    result = check_case(golden, f"raise-patch-embedding-{case}", "raise-patch-embedding", module)
    assert result.weight_bytes == module.weight_bytes
    sizes = ({"batch": 1, "rows": 1, "columns": 1, "size": 8}, {"batch": 3, "rows": 5, "columns": 2, "size": 13})
    assert_same_results(module, result, *sizes)


def test_the_matrix_shares_the_data_of_the_kernel() -> None:
    module = read(CASES["tokens"])
    result, _ = rewritten(module, "raise-patch-embedding")
    kernel, matrix = module.weights["k"], result.weights["k.flat"]
    assert matrix.trainable
    assert matrix.tensor().data_ptr() == kernel.tensor().data_ptr()
    assert torch.equal(matrix.tensor(), kernel.tensor().flatten(1))
