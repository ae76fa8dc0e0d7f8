"""The pass fold-scale: factors and the scale of attention go into weights that are read for this alone."""

from __future__ import annotations

import pytest
import torch
from pass_harness import Golden, assert_same_results, check_case, read, rewritten

from trimtab.ir import DType, Module
from trimtab.ir.analysis import count_ops
from trimtab.ir.rewrite import Rewrites
from trimtab.ir.weights import ComputedSource
from trimtab.passes.base import Context
from trimtab.passes.fold_scale import FoldScale
from trimtab.passes.report import PassRow

CASES = {
    "results": """
symbols batch=1..8
weight @w: f32[6, 4] trainable
weight @b: f32[6] trainable
weight @k: f32[3, 2, 3, 3]
weight @t: f32[4, 3, 2]
graph main(%x: f32[batch, 4], %image: f32[batch, 4, 5, 5], %line: f32[batch, 4, 5]) {
  %half = full() {value=0.5, dtype=f32} : f32[]
  %a = linear(%x, @w, @b) : f32[batch, 6]
  %scaled = mul(%half, %a) : f32[batch, 6]
  %three = full() {value=3.0, dtype=f32} : f32[]
  %c, %d = split(%image) {dim=1, sizes=[2, 2]} : f32[batch, 2, 5, 5], f32[batch, 2, 5, 5]
  %e = conv2d(%c, @k) {stride=[1, 1], padding=[1, 1], dilation=[1, 1]} : f32[batch, 3, 5, 5]
  %divided = div(%e, %three) : f32[batch, 3, 5, 5]
  %f = conv_transpose1d(%line, @t) {stride=[2], padding=[0], output_padding=[0], dilation=[1]} : f32[batch, 3, 10]
  %g = mul(%f, %half) : f32[batch, 3, 10]
  %h = mul(%g, %three) : f32[batch, 3, 10]
  return a=%scaled, c=%divided, h=%h
}""",
    "queries": """
symbols batch=1..8, seq=1..32
weight @wq: f32[8, 6]
weight @bq: f32[8]
weight @wk: f32[8, 6]
weight @wv: f32[8, 6]
graph main(%x: f32[batch, seq, 6]) {
  %q = linear(%x, @wq, @bq) : f32[batch, seq, 8]
  %qh = reshape(%q) {shape=[batch, seq, 2, 4]} : f32[batch, seq, 2, 4]
  %qt = permute(%qh) {dims=[0, 2, 1, 3]} : f32[batch, 2, seq, 4]
  %k = linear(%x, @wk) : f32[batch, seq, 8]
  %kh = reshape(%k) {shape=[batch, seq, 2, 4]} : f32[batch, seq, 2, 4]
  %kt = permute(%kh) {dims=[0, 2, 1, 3]} : f32[batch, 2, seq, 4]
  %v = linear(%x, @wv) : f32[batch, seq, 8]
  %vh = reshape(%v) {shape=[batch, seq, 2, 4]} : f32[batch, seq, 2, 4]
  %vt = permute(%vh) {dims=[0, 2, 1, 3]} : f32[batch, 2, seq, 4]
  %y = attention(%qt, %kt, %vt) {scale=0.3, causal=true} : f32[batch, 2, seq, 4]
  return y=%y
}""",
    "packed_queries": """
symbols batch=1..8
weight @qkv: f32[24, 6]
weight @bias: f32[24]
graph main(%x: f32[batch, 5, 6]) {
  %y = linear(%x, @qkv, @bias) : f32[batch, 5, 24]
  %h = reshape(%y) {shape=[batch, 5, 3, 2, 4]} : f32[batch, 5, 3, 2, 4]
  %p = permute(%h) {dims=[2, 0, 3, 1, 4]} : f32[3, batch, 2, 5, 4]
  %q = select(%p) {dim=0, index=0} : f32[batch, 2, 5, 4]
  %k = select(%p) {dim=0, index=1} : f32[batch, 2, 5, 4]
  %v = select(%p) {dim=0, index=2} : f32[batch, 2, 5, 4]
  %z = attention(%q, %k, %v) {scale=0.3} : f32[batch, 2, 5, 4]
  return z=%z
}""",
    "turned_queries": """
symbols batch=1..8, seq=1..32
weight @wq: f32[8, 6]
graph main(%x: f32[batch, seq, 6], %k: f32[batch, 1, seq, 4], %cos: f32[seq, 2], %sin: f32[seq, 2]) {
  %q = linear(%x, @wq) : f32[batch, seq, 8]
  %qh = reshape(%q) {shape=[batch, seq, 2, 4]} : f32[batch, seq, 2, 4]
  %qt = permute(%qh) {dims=[0, 2, 1, 3]} : f32[batch, 2, seq, 4]
  %turned = rotary_embedding(%qt, %cos, %sin) : f32[batch, 2, seq, 4]
  %y = attention(%turned, %k, %k) {scale=0.3, causal=true} : f32[batch, 2, seq, 4]
  return y=%y
}""",
    "turned_queries_that_are_read_twice": """
weight @wq: f32[8, 8]
graph main(%x: f32[2, 3, 8], %cos: f32[3, 4], %sin: f32[3, 4]) {
  %q = linear(%x, @wq) : f32[2, 3, 8]
  %h = reshape(%q) {shape=[2, 1, 3, 8]} : f32[2, 1, 3, 8]
  %turned = rotary_embedding(%h, %cos, %sin) : f32[2, 1, 3, 8]
  %y = attention(%turned, %turned, %h) {scale=0.3} : f32[2, 1, 3, 8]
  return y=%y
}""",
    "seen_by_others": """
weight @w: f32[8, 6]
weight @v: f32[8, 6]
weight @packed: f32[24, 6]
graph main(%x: f32[2, 5, 6], %m: f32[8, 6]) {
  %c = full() {value=0.3, dtype=f32} : f32[]
  %a = linear(%x, @w) : f32[2, 5, 8]
  %returned = mul(%a, %c) : f32[2, 5, 8]
  %q = reshape(%a) {shape=[2, 5, 2, 4]} : f32[2, 5, 2, 4]
  %self = attention(%q, %q, %q) {scale=0.3} : f32[2, 5, 2, 4]
  %p = linear(%x, @packed) : f32[2, 5, 24]
  %first = slice(%p) {dim=2, start=0, stop=8} : f32[2, 5, 8]
  %scaled = mul(%first, %c) : f32[2, 5, 8]
  %across = slice(%p) {dim=2, start=4, stop=12} : f32[2, 5, 8]
  %d = linear(%x, %m) : f32[2, 5, 8]
  %given = mul(%d, %c) : f32[2, 5, 8]
  %e = linear(%x, @v) : f32[2, 5, 8]
  %f = reshape(%e) {shape=[2, 40]} : f32[2, 40]
  %g = permute(%f) {dims=[1, 0]} : f32[40, 2]
  %mixed = mul(%g, %c) : f32[40, 2]
  %h = exp(%x) : f32[2, 5, 6]
  %no_layer = mul(%h, %c) : f32[2, 5, 6]
  return returned=%returned, self=%self, scaled=%scaled, across=%across, given=%given, mixed=%mixed, no_layer=%no_layer
}""",
    "shared_weight": """
weight @w: f32[6, 6]
weight @v: f32[6, 6]
weight @b: f32[6]
graph main(%x: f32[2, 6]) {
  %c = full() {value=0.5, dtype=f32} : f32[]
  %a = linear(%x, @w) : f32[2, 6]
  %d = mul(%a, %c) : f32[2, 6]
  %e = linear(%d, @w) : f32[2, 6]
  %f = linear(%e, @v, @b) : f32[2, 6]
  %g = mul(%f, %c) : f32[2, 6]
  %y = add(%g, @b) : f32[2, 6]
  return y=%y
}""",
    "factors_that_are_no_numbers": """
weight @w: f32[6, 6]
graph main(%x: f32[2, 6]) {
  %c = full() {value=inf, dtype=f32} : f32[]
  %a = linear(%x, @w) : f32[2, 6]
  %y = mul(%a, %c) : f32[2, 6]
  return y=%y
}""",
}


@pytest.mark.parametrize("case", CASES)
def test_rewrites_as_reviewed(case: str, golden: Golden) -> None:
    module = read(CASES[case])
    result = check_case(golden, f"fold-scale-{case}", "fold-scale,dce", module)
    assert result.weight_bytes <= module.weight_bytes
    sizes = ({"batch": 1, "seq": 1}, {"batch": 3, "seq": 7}, {"batch": 8, "seq": 32})
    if "inf" not in CASES[case]:
        assert_same_results(module, result, *sizes, tolerance=1e-6)


def test_new_weights_are_lazy_keep_their_flag_and_are_rounded_once() -> None:
    module = read(
        """
weight @w: f32[600, 500] trainable
weight @b: f32[600]
graph main(%x: f32[2, 500]) {
  %c = full() {value=0.3, dtype=f32} : f32[]
  %a = linear(%x, @w, @b) : f32[2, 600]
  %y = mul(%a, %c) : f32[2, 600]
  return y=%y
}"""
    )
    result, _ = rewritten(module, "fold-scale")
    weight, bias = result.weights["w.folded"], result.weights["b.folded"]
    assert set(result.weights) == {"w.folded", "b.folded"}, "the old ones are gone"
    assert weight.trainable
    assert not bias.trainable
    assert isinstance(weight.source, ComputedSource)
    assert torch.equal(weight.tensor(), (module.weights["w"].tensor().double() * 0.3).float())
    (op,) = (op for op in result.main.ops if op.name == "linear")
    assert op.made_by == "scaled-result"


def reasons(row: PassRow, rule: str) -> list[str]:
    return [reason for log in row.rules if log["rule"] == rule for reason in log["rejected"]]


def half_precision(scale: float) -> Module:
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(4, 4, generator=generator).half() for name in ("q", "k")}
    return read(
        f"""
weight @q: f16[4, 4]
weight @k: f16[4, 4]
graph main(%x: f16[2, 5, 4]) {{
  %q = linear(%x, @q) : f16[2, 5, 4]
  %k = linear(%x, @k) : f16[2, 5, 4]
  %y = attention(%q, %k, %x) {{scale={scale}}} : f16[2, 5, 4]
  return y=%y
}}""",
        **weights,
    )


def test_half_precision_takes_powers_of_two_only() -> None:
    folded, _ = rewritten(half_precision(0.125), "fold-scale")
    assert folded.weights["q.folded"].type.dtype is DType.F16
    kept, (row,) = rewritten(half_precision(0.3), "fold-scale")
    assert "q.folded" not in kept.weights
    assert reasons(row, "scaled-query") == ["the weight @q is too coarse to be rounded once more: f16"]


def test_the_limit_of_rewrites_ends_the_pass() -> None:
    for limit in range(5):
        module = read(CASES["results"])
        context = Context(rewrites=Rewrites(limit))
        assert FoldScale().run(module, context) == (limit > 0)
        assert count_ops(module)["mul"] + count_ops(module)["div"] == 4 - limit
        assert_same_results(read(CASES["results"]), module, {"batch": 2}, tolerance=1e-6)
