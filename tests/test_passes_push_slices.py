"""The pass push-slices: only the positions that are read are computed."""

from __future__ import annotations

import pytest
import torch
from pass_harness import Golden, assert_same_results, check_case, read, rewritten

from trimtab.frontend.torch_export import trace
from trimtab.ir import Builder, DType, Module, TensorType, Value, ops, symbol
from trimtab.ir.analysis import count_ops
from trimtab.passes.narrowing import Cut, needs
from trimtab.passes.push_slices import UnreadPositions
from trimtab.passes.samples import count_macs
from zoo_models import get, vit_b

CASES = {
    # Queries, projection and MLP for the first token; keys and values for all.
    "class_token": """
symbols batch=1..8, seq=1..32
weight @g: f32[8]
weight @b: f32[8]
weight @wq: f32[8, 8]
weight @wk: f32[8, 8]
weight @wv: f32[8, 8]
weight @wo: f32[8, 8]
weight @w1: f32[16, 8]
weight @b1: f32[16]
weight @w2: f32[8, 16]
graph main(%x: f32[batch, seq, 8], %mask: bool[batch, 1, seq, seq]) {
  %n = layer_norm(%x, @g, @b) : f32[batch, seq, 8]
  %q = linear(%n, @wq) : f32[batch, seq, 8]
  %qh = reshape(%q) {shape=[batch, seq, 2, 4]} : f32[batch, seq, 2, 4]
  %qt = permute(%qh) {dims=[0, 2, 1, 3]} : f32[batch, 2, seq, 4]
  %k = linear(%n, @wk) : f32[batch, seq, 8]
  %kh = reshape(%k) {shape=[batch, seq, 2, 4]} : f32[batch, seq, 2, 4]
  %kt = permute(%kh) {dims=[0, 2, 1, 3]} : f32[batch, 2, seq, 4]
  %v = linear(%n, @wv) : f32[batch, seq, 8]
  %vh = reshape(%v) {shape=[batch, seq, 2, 4]} : f32[batch, seq, 2, 4]
  %vt = permute(%vh) {dims=[0, 2, 1, 3]} : f32[batch, 2, seq, 4]
  %a = attention(%qt, %kt, %vt, %mask) {scale=0.5} : f32[batch, 2, seq, 4]
  %at = permute(%a) {dims=[0, 2, 1, 3]} : f32[batch, seq, 2, 4]
  %ah = reshape(%at) {shape=[batch, seq, 8]} : f32[batch, seq, 8]
  %o = linear(%ah, @wo) : f32[batch, seq, 8]
  %r = add(%o, %x) : f32[batch, seq, 8]
  %m = layer_norm(%r, @g, @b) : f32[batch, seq, 8]
  %h = linear(%m, @w1, @b1) : f32[batch, seq, 16]
  %f = gelu(%h) : f32[batch, seq, 16]
  %d = linear(%f, @w2) : f32[batch, seq, 8]
  %s = add(%r, %d) : f32[batch, seq, 8]
  %y = select(%s) {dim=1, index=0} : f32[batch, 8]
  return y=%y
}""",
    # The last query sees all keys, so it needs no triangle; an earlier one would.
    "causal": """
symbols seq=1..32
graph main(%q: f32[1, 2, seq, 4], %k: f32[1, 2, seq, 4], %r: f32[1, 2, 8, 4]) {
  %e = exp(%q) : f32[1, 2, seq, 4]
  %a = attention(%e, %k, %k) {scale=0.5, causal=true} : f32[1, 2, seq, 4]
  %last = slice(%a) {dim=2, start=seq - 1, stop=seq} : f32[1, 2, 1, 4]
  %f = exp(%r) : f32[1, 2, 8, 4]
  %b = attention(%f, %r, %r) {scale=0.5, causal=true} : f32[1, 2, 8, 4]
  %first = slice(%b) {dim=2, start=0, stop=2} : f32[1, 2, 2, 4]
  %g = neg(%r) : f32[1, 2, 8, 4]
  %c = attention(%g, %r, %r) {scale=0.5, causal=true} : f32[1, 2, 8, 4]
  %middle = slice(%c) {dim=2, start=3, stop=4} : f32[1, 2, 1, 4]
  return last=%last, first=%first, middle=%middle
}""",
    # Two of three heads of features, and two tokens: rows of the weight and of x.
    "features_and_several_slices": """
weight @w: f32[12, 6]
weight @b: f32[12]
weight @p: i64[2]
graph main(%x: f32[2, 9, 6]) {
  %y = linear(%x, @w, @b) : f32[2, 9, 12]
  %s = sigmoid(%y) : f32[2, 9, 12]
  %k = slice(%s) {dim=2, start=4, stop=8} : f32[2, 9, 4]
  %v = slice(%s) {dim=2, start=8, stop=12} : f32[2, 9, 4]
  %z = mul(%k, %v) : f32[2, 9, 4]
  %first = select(%z) {dim=1, index=1} : f32[2, 4]
  %again = select(%z) {dim=1, index=1} : f32[2, 4]
  %third = slice(%z) {dim=1, start=2, stop=3} : f32[2, 1, 4]
  %pair = index_select(%z, @p) {dim=1} : f32[2, 2, 4]
  return first=%first, again=%again, third=%third, pair=%pair
}""",
    # q, k and v unpacked as some libraries do, and only the first query is used: the linear is unpacked.
    "rows_of_packed_queries": """
weight @w: f32[24, 8]
weight @b: f32[24]
graph main(%x: f32[2, 5, 8]) {
  %y = linear(%x, @w, @b) : f32[2, 5, 24]
  %r = reshape(%y) {shape=[2, 5, 3, 2, 4]} : f32[2, 5, 3, 2, 4]
  %p = permute(%r) {dims=[2, 0, 3, 1, 4]} : f32[3, 2, 2, 5, 4]
  %q = select(%p) {dim=0, index=0} : f32[2, 2, 5, 4]
  %k = select(%p) {dim=0, index=1} : f32[2, 2, 5, 4]
  %v = select(%p) {dim=0, index=2} : f32[2, 2, 5, 4]
  %a = attention(%q, %k, %v) {scale=0.5} : f32[2, 2, 5, 4]
  %c = slice(%a) {dim=2, start=0, stop=1} : f32[2, 2, 1, 4]
  return c=%c
}""",
    "split_parts": """
symbols n=1..8
graph main(%x: f32[6, n]) {
  %e = exp(%x) : f32[6, n]
  %a, %unread, %c = split(%e) {dim=0, sizes=[1, 3, 2]} : f32[1, n], f32[3, n], f32[2, n]
  %d = mul(%a, %c) : f32[2, n]
  return d=%d
}""",
    # Through the axes of views, norms and reductions; a concat of which one part is read.
    "views": """
symbols batch=1..8
graph main(%x: f32[batch, 6, 8], %t: f32[batch, 2, 8]) {
  %c = concat([%t, %x]) {dim=1} : f32[batch, 8, 8]
  %s = slice(%c) {dim=1, start=2, stop=5} : f32[batch, 3, 8]
  %n = softmax(%x) {dim=2} : f32[batch, 6, 8]
  %m = reshape(%n) {shape=[batch, 48]} : f32[batch, 48]
  %u = slice(%m) {dim=1, start=8, stop=24} : f32[batch, 16]
  %g = neg(%t) : f32[batch, 2, 8]
  %e = reshape(%g) {shape=[batch, 2, 1, 8]} : f32[batch, 2, 1, 8]
  %w = expand(%e) {shape=[batch, 2, 3, 8]} : f32[batch, 2, 3, 8]
  %h = amax(%w) {dims=[3]} : f32[batch, 2, 3]
  %i = slice(%h) {dim=2, start=0, stop=1} : f32[batch, 2, 1]
  %f = abs(%t) : f32[batch, 2, 8]
  %j = slice(%f) {dim=2, start=0, stop=8, step=2} : f32[batch, 2, 4]
  %l = slice(%j) {dim=2, start=1, stop=3} : f32[batch, 2, 2]
  return s=%s, u=%u, i=%i, l=%l
}""",
    # The axis is mixed, everything is read, the graph returns the value, the rows depend on a symbol, the weight is
    # shared, or slices of two operands would cost more than one addition.
    "stays": """
symbols seq=2..16
weight @w: f32[8, 8]
graph main(%x: f32[seq, 8], %z: f32[seq, 8]) {
  %n = softmax(%x) {dim=0} : f32[seq, 8]
  %a = select(%n) {dim=0, index=0} : f32[8]
  %e = exp(%x) : f32[seq, 8]
  %b = slice(%e) {dim=1, start=0, stop=3} : f32[seq, 3]
  %c = slice(%e) {dim=1, start=3, stop=8} : f32[seq, 5]
  %r = neg(%x) : f32[seq, 8]
  %d = select(%r) {dim=0, index=0} : f32[8]
  %p = linear(%x, @w) : f32[seq, 8]
  %q = linear(%p, @w) : f32[seq, 8]
  %f = slice(%q) {dim=1, start=0, stop=2} : f32[seq, 2]
  %s = add(%x, %z) : f32[seq, 8]
  %g = slice(%s) {dim=0, start=1, stop=seq} : f32[seq - 1, 8]
  return a=%a, b=%b, c=%c, r=%r, d=%d, f=%f, g=%g
}""",
}


@pytest.mark.parametrize("case", CASES)
def test_rewrites_as_reviewed(case: str, golden: Golden) -> None:
    before = read(CASES[case], p=torch.tensor([-5, 2]))
    after = check_case(golden, f"push-slices-{case}", "push-slices", before)
    assert_same_results(before, after, 1, 4, 7)


def test_explanation_names_the_reader_in_the_way() -> None:
    module = read(CASES["stays"])
    reasons = [UnreadPositions().explain(module, at=name).reason for name in "abdg"]
    assert reasons == [
        "softmax mixes the elements along axis 0",
        "the slices take everything between them",
        "what it slices is also read by the graph's outputs",
        "slices of all that add reads would cost more than it computes in vain",
    ]


def test_pushing_again_changes_nothing() -> None:
    for text in CASES.values():
        once, _ = rewritten(read(text, p=torch.tensor([0, 2])), "push-slices")
        _, (row,) = rewritten(once, "push-slices")
        assert not row.changed


# -- what each op needs ----------------------------------------------------------------------------------------------

BATCH, SEQ = symbol("batch", 1, 8), symbol("seq", 2, 9)
NARROWED = {
    "layer_norm": ((BATCH, SEQ, 4), lambda x: ops.LayerNorm(x), (0, 1)),
    "rms_norm": ((BATCH, SEQ, 4), lambda x: ops.RmsNorm(x, axes=2), (0,)),
    "group_norm": ((BATCH, 4, SEQ), lambda x: ops.GroupNorm(x, groups=2), (0,)),
    "softmax": ((BATCH, SEQ, 4), lambda x: ops.Softmax(x, 1), (0, 2)),
    "cumsum": ((BATCH, SEQ, 4), lambda x: ops.Cumsum(x, 1, DType.F32), (0, 2)),
    "flip": ((BATCH, SEQ, 4), lambda x: ops.Flip(x, (2,)), (0, 1)),
    "roll": ((BATCH, SEQ, 4), lambda x: ops.Roll(x, (1,), (1,)), (0, 2)),
    "pad": ((BATCH, SEQ, 4), lambda x: ops.Pad(x, (0, 1, 0), (0, 0, 0)), (0, 2)),
    "sum": ((BATCH, SEQ, 4), lambda x: ops.Sum(x, (1,)), (0, 1)),
    "mean": ((BATCH, SEQ, 4), lambda x: ops.Mean(x, (1,), True), (0, 2)),
    "permute": ((BATCH, SEQ, 4), lambda x: ops.Permute(x, (2, 0, 1)), (0, 1, 2)),
    "expand": ((SEQ, 1, 4), lambda x: ops.Expand(x, (2, SEQ, 3, 4)), (0, 1, 2, 3)),
    "add": ((BATCH, SEQ, 4), lambda x: ops.Add(x, x), (0, 1, 2)),
    "linear_of_one_output": (
        (BATCH, 3, SEQ, 4),
        lambda x: ops.Linear(x, _builders[-1].weight("w", torch.randn(4))),
        (0, 1, 2),
    ),
    "matmul": ((BATCH, 4, 4), lambda x: ops.Matmul(x, x), (0, 1, 2)),
    "attention": ((BATCH, 3, 4, 4), lambda x: ops.Attention(x, x, x, scale=0.5), (0, 1, 2, 3)),
    "grouped_attention": (
        (BATCH, 4, SEQ, 4),
        lambda x: ops.Attention(x, *[_kept_alive(ops.Slice(x, 1, 0, 2))] * 2, scale=0.5),
        (0, 2, 3),
    ),
    "concat": ((BATCH, SEQ, 4), lambda x: ops.Concat((x, x), 2), (0, 1, 2)),
    "merged_axes": ((BATCH, SEQ, 4), lambda x: ops.Reshape(x, (BATCH, SEQ * 4)), (0,)),
    "divided_axis": ((BATCH, 8, SEQ), lambda x: ops.Reshape(x, (BATCH, 4, 2, SEQ)), (0, 1, 3)),
}
_builders: list[Builder] = []


def _kept_alive(op: ops.Slice) -> Value:
    return _builders[-1](op)


@pytest.mark.parametrize("cut", [Cut(0, 1), Cut(1, 2), Cut.at([1, 0])], ids=["first", "second", "swapped"])
@pytest.mark.parametrize("name", NARROWED)
def test_a_part_is_computed_by_itself_along_these_axes_only(name: str, cut: Cut) -> None:
    shape, make, axes = NARROWED[name]
    for axis in range(4):
        build = Builder()
        _builders[:] = [build]
        x = build(ops.Neg(build.input("x", TensorType(DType.F32, shape))))
        op = build.add(make(x))
        if axis >= op.result.type.rank:
            continue
        found = needs(op, axis, cut, build.module)
        size = op.result.type.shape[axis]
        if isinstance(found, str):
            assert axis not in axes
            continue
        assert axis in axes
        if cut.places or (size in (BATCH, 1) and cut.stop == 2):
            continue  # places of axes that may be too short
        build.output(build(ops.Slice(op.result, axis, cut.start, cut.stop)))
        after, _ = rewritten(build.module, "push-slices")
        assert_same_results(build.module, after, 2, 5)


@pytest.mark.parametrize("places", [[0], [2, 5], [3, 1, 2], [0, 1, 2, 3], [4, 4], [1, 3, 5, 7]], ids=str)
@pytest.mark.parametrize("times", [1, 2, 3])
def test_cuts_of_divided_axes(places: list[int], times: int) -> None:
    cut = Cut.at(places)
    assert list(cut.positions or ()) == places
    assert cut.size == len(places)
    repeated = cut.repeated(times)
    assert repeated is not None
    assert list(repeated.positions or ()) == [p * times + i for p in places for i in range(times)]
    assert repeated.merged(times) == cut
    assert list(cut.shifted(3).positions or ()) == [p + 3 for p in places]


def test_a_cut_that_divides_a_group_is_not_merged() -> None:
    assert Cut(1, 5).merged(2) is None
    assert Cut.at([0, 1, 3, 2]).merged(2) is None
    assert Cut(2, 8, 2).merged(2) is None
    assert Cut(SEQ * 4, SEQ * 8).merged(4) == Cut(SEQ, SEQ * 2)


# -- models ------------------------------------------------------------------------------------------------------


def _traced(name: str, dynamic: bool = False) -> Module:
    entry = get(name)
    shapes = {"dynamic_shapes": entry.dynamic_shapes()} if dynamic else {}
    return trace(entry.build(), tuple(entry.inputs(2, 12).values()), **shapes)


@pytest.mark.parametrize("passes", ["push-slices,dce", "pack-linears,push-slices,dce"])
@pytest.mark.parametrize("name", ["vit", "deit", "distilbert"])
def test_classifiers_of_the_zoo_compute_few_tokens_of_the_last_block(name: str, passes: str) -> None:
    before, _ = rewritten(_traced(name, dynamic=True), "cleanup")
    after, _ = rewritten(before, passes)
    width, hidden, tokens = 64, 128, {"vit": 17, "deit": 18, "distilbert": 12}[name]
    read = 2 if name == "deit" else 1  # it has a distillation token too
    sizes = dict.fromkeys(before.symbols(), 12)
    # Queries, projection and MLP for all other tokens, and the attention of these.
    rows = sizes["batch"] * (tokens - read)
    saved = rows * (2 * width**2 + 2 * width * hidden + 2 * tokens * width)
    assert count_macs(before, sizes) - count_macs(after, sizes) == saved
    assert after.weight_bytes == before.weight_bytes
    assert_same_results(before, after, 2, 5)


def test_vit_b_saves_what_the_formula_says() -> None:
    entry = vit_b()
    module = trace(entry.build(), tuple(entry.inputs(1, 12).values()))
    before, _ = rewritten(module, "cleanup")
    after, _ = rewritten(before, "push-slices,dce")
    n, c = 197, 768
    block, last = 12 * n * c**2 + 2 * n**2 * c, 2 * n * c**2 + 10 * c**2 + 2 * n * c
    assert count_macs(before, {}) - count_macs(after, {}) == block - last
    assert (block - last) / count_macs(before, {}) == pytest.approx(0.069, abs=1e-3)
    assert count_ops(after)["linear"] == count_ops(before)["linear"]


def test_a_model_that_returns_all_tokens_stays() -> None:
    before, _ = rewritten(_traced("bert"), "cleanup")
    _after, (row,) = rewritten(before, "push-slices")
    assert not row.changed
    (rejected,) = [rule["rejected"] for rule in row.rules if rule["rule"] == "unread-positions"]
    assert rejected == {"what it slices is also read by the graph's outputs": 1}
