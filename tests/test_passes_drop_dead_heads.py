"""The pass drop-dead-heads: what has no effect is not computed, and what has is kept."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from pass_harness import Golden, assert_same_results, check_case, read, rewritten

from trimtab.frontend.torch_export import trace
from trimtab.ir import DType, Module
from trimtab.ir.ops import Attention, Full, IndexSelect, Linear, Slice
from trimtab.passes.drop_dead_heads import DeadHeads
from trimtab.passes.samples import count_macs
from zoo_models import get

BLOCK = """
symbols batch=1..8, seq=1..32
weight @wq: f32[12, 6]
weight @bq: f32[12]
weight @wk: f32[{keys}, 6]
weight @wv: f32[{values}, 6]
weight @bv: f32[{values}]
weight @wo: f32[6, 20]
weight @bo: f32[6]
graph main(%x: f32[batch, seq, 6], %mask: bool[batch, 4, 1, seq]) {{
  %q = linear(%x, @wq, @bq) : f32[batch, seq, 12]
  %qh = reshape(%q) {{shape=[batch, seq, 4, 3]}} : f32[batch, seq, 4, 3]
  %qt = permute(%qh) {{dims=[0, 2, 1, 3]}} : f32[batch, 4, seq, 3]
  %k = linear(%x, @wk) : f32[batch, seq, {keys}]
  %kh = reshape(%k) {{shape=[batch, seq, {groups}, 3]}} : f32[batch, seq, {groups}, 3]
  %kt = permute(%kh) {{dims=[0, 2, 1, 3]}} : f32[batch, {groups}, seq, 3]
  %v = linear(%x, @wv, @bv) : f32[batch, seq, {values}]
  %vh = reshape(%v) {{shape=[batch, seq, {groups}, 5]}} : f32[batch, seq, {groups}, 5]
  %vt = permute(%vh) {{dims=[0, 2, 1, 3]}} : f32[batch, {groups}, seq, 5]
  %a = attention(%qt, %kt, %vt, %mask) {{scale=0.5}} : f32[batch, 4, seq, 5]
  %at = permute(%a) {{dims=[0, 2, 1, 3]}} : f32[batch, seq, 4, 5]
  %ah = reshape(%at) {{shape=[batch, seq, 20]}} : f32[batch, seq, 20]
  %y = linear(%ah, @wo, @bo) : f32[batch, seq, 6]
  return y=%y
}}"""


def block(groups: int, dead: Sequence[int], dead_values: Sequence[int] = ()) -> Module:
    """Attention of four heads of 3 channels and values of 5, whose projection reads nothing of the heads ``dead``."""
    generator = torch.Generator().manual_seed(1)
    wo = torch.randn(6, 4, 5, generator=generator)
    wo[:, list(dead)] = 0
    wv, bv = torch.randn(groups, 5, 6, generator=generator), torch.randn(groups, 5, generator=generator)
    wv[list(dead_values)], bv[list(dead_values)] = 0, 0
    text = BLOCK.format(groups=groups, keys=3 * groups, values=5 * groups)
    return read(text, wo=wo.reshape(6, 20), wv=wv.reshape(-1, 6), bv=bv.reshape(-1))


def heads_of(module: Module) -> list[tuple[object, object]]:
    return [(op.q.type.shape[1], op.k.type.shape[1]) for op in module.walk() if isinstance(op, Attention)]


@pytest.mark.parametrize(
    ("groups", "dead", "dead_values", "kept"),
    [
        pytest.param(4, [1, 2], [], [(2, 2)], id="two of four"),
        pytest.param(4, [0], [], [(3, 3)], id="the first"),
        pytest.param(4, [0, 2], [], [(2, 2)], id="every other"),
        pytest.param(4, [], [3], [(3, 3)], id="zero values"),
        pytest.param(4, [0], [1], [(2, 2)], id="both kinds"),
        pytest.param(2, [0, 1], [], [(2, 1)], id="a whole group"),
        pytest.param(2, [0, 1, 2], [], [(2, 1)], id="a group and half of another"),
        pytest.param(2, [], [1], [(2, 1)], id="the values of a group"),
        pytest.param(4, [0, 1, 2, 3], [], [], id="all"),
    ],
)
def test_dead_heads_go(groups: int, dead: list[int], dead_values: list[int], kept: list[tuple[int, int]]) -> None:
    before = block(groups, dead, dead_values)
    after, (row, *_) = rewritten(before, "drop-dead-heads,dce")
    assert heads_of(after) == kept
    assert row.weight_bytes_after < row.weight_bytes_before
    # Only the mask, an input, is sliced when the model runs.
    assert all(op.x is after.main.inputs[1] for op in after.walk() if isinstance(op, Slice | IndexSelect))
    for q, k in kept:
        # Everything that belongs to a head is gone: the rows of three projections and the columns of the fourth.
        assert sorted(op.weight.type.shape for op in after.walk() if isinstance(op, Linear)) == sorted(
            [(3 * q, 6), (3 * k, 6), (5 * k, 6), (6, 5 * q)]
        )
    assert_same_results(before, after, 1, 5, 7)


@pytest.mark.parametrize(
    ("groups", "dead", "reason"),
    [
        (4, [], "every head has an effect"),
        (2, [1, 2], "every head has an effect"),  # each group has a head that lives
    ],
)
def test_heads_with_an_effect_stay(groups: int, dead: list[int], reason: str) -> None:
    module = block(groups, dead)
    _, (row,) = rewritten(module, "drop-dead-heads")
    assert not row.changed
    assert DeadHeads().explain(module, at="y").reason == reason


def test_a_shared_projection_keeps_its_heads() -> None:
    module = block(4, [1])
    graph = module.main
    projection = graph.outputs[0].producer
    assert isinstance(projection, Linear)
    again = graph.ops.append(Linear(graph.ops.append(Full(1.0, DType.F32, (2, 20))).result, projection.weight))
    graph.set_outputs([*graph.outputs, again.result])
    _, (row,) = rewritten(module, "drop-dead-heads")
    assert not row.changed
    assert DeadHeads().explain(module, at="y").reason == "the weight of the projection is no matrix of its own"


def test_rotated_heads_are_sliced_where_their_angles_vary_by_head(golden: Golden) -> None:
    """The rotary embedding is cut too; an input with all heads is sliced when the model runs."""
    wo = torch.randn(4, 2, 2)
    wo[:, 0] = 0
    text = """
symbols seq=1..32
weight @wq: f32[4, 4]
weight @wo: f32[4, 4]
graph main(%x: f32[1, seq, 4], %cos: f32[seq, 2], %sin: f32[seq, 2], %k: f32[1, 2, seq, 2]) {
  %q = linear(%x, @wq) : f32[1, seq, 4]
  %qh = reshape(%q) {shape=[1, seq, 2, 2]} : f32[1, seq, 2, 2]
  %qt = permute(%qh) {dims=[0, 2, 1, 3]} : f32[1, 2, seq, 2]
  %qr = rotary_embedding(%qt, %cos, %sin) : f32[1, 2, seq, 2]
  %a = attention(%qr, %k, %k) {scale=0.5, causal=true} : f32[1, 2, seq, 2]
  %at = permute(%a) {dims=[0, 2, 1, 3]} : f32[1, seq, 2, 2]
  %ah = reshape(%at) {shape=[1, seq, 4]} : f32[1, seq, 4]
  %y = linear(%ah, @wo) : f32[1, seq, 4]
  return y=%y
}"""
    before = read(text, wo=wo.reshape(4, 4))
    after = check_case(golden, "drop-dead-heads-rotary", "drop-dead-heads", before)
    assert_same_results(before, after, 1, 6)


GATED = """
symbols n=1..8
weight @gate: f32[6, 4]
weight @bg: f32[6]
weight @up: f32[6, 4]
weight @down: f32[4, 6]
weight @bd: f32[4]
graph main(%x: f32[n, 4]) {
  %g = linear(%x, @gate, @bg) : f32[n, 6]
  %s = silu(%g) : f32[n, 6]
  %u = linear(%x, @up) : f32[n, 6]
  %h = mul(%s, %u) : f32[n, 6]
  %y = linear(%h, @down, @bd) : f32[n, 4]
  return y=%y
}"""


@pytest.mark.parametrize(("dead", "left"), [([], 6), ([0], 5), ([1, 4], 4), ([0, 1, 2, 3, 4, 5], 0)])
def test_dead_units_go(dead: list[int], left: int) -> None:
    down = torch.randn(4, 6)
    down[:, dead] = 0
    before = read(GATED, down=down)
    after, (row, *_) = rewritten(before, "drop-dead-heads,dce")
    widths = [op.weight.type.shape[0] for op in after.walk() if isinstance(op, Linear)]
    assert widths == ([left, left, 4] if left else [])
    assert row.changed == bool(dead)
    assert_same_results(before, after, 1, 5)


def test_units_that_are_read_elsewhere_stay() -> None:
    down = torch.randn(4, 6)
    down[:, 2] = 0
    before = read(GATED.replace("return y=%y", "return y=%y, h=%h"), down=down)
    _, (row,) = rewritten(before, "drop-dead-heads")
    assert not row.changed
    (rejected,) = [rule["rejected"] for rule in row.rules if rule["rule"] == "dead-units"]
    assert rejected["the result of mul is read 2 times"] == 1


def test_unread_rows_of_a_packed_weight_go() -> None:
    before = read("""
weight @w: f32[12, 4]
weight @b: f32[12]
graph main(%x: f32[3, 4]) {
  %p = linear(%x, @w, @b) : f32[3, 12]
  %unread, %k, %v = split(%p) {dim=1, sizes=[4, 4, 4]} : f32[3, 4], f32[3, 4], f32[3, 4]
  %y = mul(%k, %v) : f32[3, 4]
  return y=%y
}""")
    after, (row, *_) = rewritten(before, "drop-dead-heads,dce")
    assert row.weight_bytes_after == row.weight_bytes_before * 2 // 3
    assert count_macs(after, {}) == count_macs(before, {}) * 2 // 3
    assert_same_results(before, after)


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_pruned_models_of_the_zoo_shrink(name: str) -> None:
    entry = get(name)
    model = entry.build()
    blocks = [module for module in model.modules() if hasattr(module, "o_proj")]
    for attention in blocks:
        # Heads 0 and 1 of four: a group of two for llama.
        attention.o_proj.weight.data[:, :32] = 0
    module = trace(model, tuple(entry.inputs(2, 12).values()), dynamic_shapes=entry.dynamic_shapes())
    before, _ = rewritten(module, "cleanup,raise")
    after, _ = rewritten(before, "drop-dead-heads,dce")
    assert heads_of(before) == [(4, 2 if name == "llama" else 4)] * len(blocks)
    assert heads_of(after) == [(2, 1 if name == "llama" else 2)] * len(blocks)
    assert_same_results(before, after, 3, 7)
