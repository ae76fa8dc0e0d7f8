"""The pass pack-linears: one product for linears of one input, exactly where weights allow it."""

from __future__ import annotations

import pytest
import torch
from pass_harness import Golden, assert_same_results, check_case, read, rewritten

from trimtab.frontend.torch_export import trace
from trimtab.ir import Module
from trimtab.ir.analysis import count_ops
from trimtab.ir.weights import ComputedSource
from zoo_models import get, vit_b

CASES = {
    # The key has no bias: zeros stand in for it.
    "qkv": """
symbols batch=1..8, seq=1..32
weight @wq: f32[8, 6]
weight @bq: f32[8]
weight @wk: f32[4, 6]
weight @wv: f32[4, 6]
weight @bv: f32[4]
graph main(%x: f32[batch, seq, 6]) {
  %q = linear(%x, @wq, @bq) : f32[batch, seq, 8]
  %qh = reshape(%q) {shape=[batch, seq, 4, 2]} : f32[batch, seq, 4, 2]
  %qt = permute(%qh) {dims=[0, 2, 1, 3]} : f32[batch, 4, seq, 2]
  %k = linear(%x, @wk) : f32[batch, seq, 4]
  %kh = reshape(%k) {shape=[batch, seq, 2, 2]} : f32[batch, seq, 2, 2]
  %kt = permute(%kh) {dims=[0, 2, 1, 3]} : f32[batch, 2, seq, 2]
  %v = linear(%x, @wv, @bv) : f32[batch, seq, 4]
  %vh = reshape(%v) {shape=[batch, seq, 2, 2]} : f32[batch, seq, 2, 2]
  %vt = permute(%vh) {dims=[0, 2, 1, 3]} : f32[batch, 2, seq, 2]
  %a = attention(%qt, %kt, %vt) {scale=0.5} : f32[batch, 4, seq, 2]
  return y=%a
}""",
    "gate_and_up": """
weight @gate: f32[5, 3]
weight @up: f32[5, 3]
graph main(%x: f32[2, 3]) {
  %g = linear(%x, @gate) : f32[2, 5]
  %s = silu(%g) : f32[2, 5]
  %u = linear(%x, @up) : f32[2, 5]
  %h = mul(%s, %u) : f32[2, 5]
  return y=%h
}""",
    # One weight is shared, one computed, one bias computed, and one result is never read: one is left, too few.
    "nothing_to_pack": """
weight @shared: f32[4, 4]
weight @own: f32[4, 4]
weight @other: f32[4, 4]
weight @unread: f32[4, 4]
weight @b: f32[4]
graph main(%x: f32[2, 4], %w: f32[4, 4]) {
  %a = linear(%x, @shared) : f32[2, 4]
  %c = linear(%a, @shared) : f32[2, 4]
  %d = linear(%x, %w) : f32[2, 4]
  %bias = neg(@b) : f32[4]
  %e = linear(%x, @own, %bias) : f32[2, 4]
  %f = linear(%x, @other) : f32[2, 4]
  %u = linear(%x, @unread) : f32[2, 4]
  return c=%c, d=%d, e=%e, f=%f
}""",
    # A regional pack: the body of a repeat has its own siblings.
    "in_a_region": """
weight @a: f32[4, 4]
weight @b: f32[4, 4]
graph main(%x: f32[2, 4]) {
  %y = repeat([%x], [], []) {n=3} : f32[2, 4] graph (%h: f32[2, 4]) {
    %p = linear(%h, @a) : f32[2, 4]
    %q = linear(%h, @b) : f32[2, 4]
    %s = sub(%p, %q) : f32[2, 4]
    return output=%s
  }
  return y=%y
}""",
}


@pytest.mark.parametrize("case", CASES)
def test_rewrites_as_reviewed(case: str, golden: Golden) -> None:
    before = read(CASES[case])
    after = check_case(golden, f"pack-linears-{case}", "pack-linears", before)
    assert_same_results(before, after, 1, 7)


def test_packed_weights_are_lazy_and_take_no_more_bytes() -> None:
    before = read(CASES["gate_and_up"])
    after, (row,) = rewritten(before, "pack-linears")
    read_ids = {value.weight for value in after.main.weights}
    (packed,) = [after.weights[id] for id in read_ids]
    assert isinstance(packed.source, ComputedSource)
    assert row.weight_bytes_after == row.weight_bytes_before
    gate, up = (before.weights[id].tensor() for id in ("gate", "up"))
    assert torch.equal(packed.tensor(), torch.cat([gate, up]))


@pytest.mark.parametrize(("width", "linears"), [("none", 1), ("16", 1), ("12", 2), ("11", 2), ("7", 3)])
def test_the_width_of_a_pack_is_bounded(width: str, linears: int) -> None:
    after, _ = rewritten(read(CASES["qkv"]), f"pack-linears{{max_width={width}}}")
    assert count_ops(after)["linear"] == linears


def test_packing_again_changes_nothing() -> None:
    for text in CASES.values():
        once, _ = rewritten(read(text), "pack-linears,dce")
        _, (row,) = rewritten(once, "pack-linears")
        assert not row.changed


def _traced(entry: object, length: int = 12) -> Module:
    model = entry.build()  # type: ignore[attr-defined]
    return trace(model, tuple(entry.inputs(1, length).values()))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "packs"),
    [
        ("vit", 2),  # q, k, v in each of 2 layers
        ("bert", 2),
        ("llama", 4),  # q, k, v, and gate and up, in each of 2 layers
        ("qwen2", 4),
        ("whisper-encoder", 2),  # k has no bias
        ("gpt2", 0),  # packed by its author
    ],
)
def test_packs_of_the_zoo(name: str, packs: int) -> None:
    before = _traced(get(name))
    after, rows = rewritten(before, "cleanup,raise,pack-linears")
    applied = sum(rule["applied"] for rule in rows[-1].rules)
    assert applied == packs
    assert_same_results(rewritten(before, "cleanup,raise")[0], after)


def test_a_vit_of_twelve_layers_has_twelve_packs() -> None:
    module = _traced(vit_b())
    before, _ = rewritten(module, "cleanup,raise")
    after, (row,) = rewritten(before, "pack-linears")
    assert row.rules[0]["applied"] == 12
    assert count_ops(before)["linear"] - count_ops(after)["linear"] == 24
    assert count_ops(after)["slice"] - count_ops(before)["slice"] == 36
    assert row.weight_bytes_after == row.weight_bytes_before
