"""Fusion grouping: what shares a kernel and what does not, in text, and the promises of the pass."""

from __future__ import annotations

import sys
import zlib

import pytest
import torch
from random_graphs import random_module

from trimtab.ir import (
    Builder,
    DType,
    Module,
    TensorType,
    Value,
    interpret,
    ops,
    parse_module,
    print_module,
    symbol,
    verify,
)
from trimtab.ir.analysis import module_cost
from trimtab.ir.fused import ungroup
from trimtab.ir.weights import TorchSource
from trimtab.passes.base import Context
from trimtab.passes.fusion_model import CONTRACTIONS
from trimtab.passes.group_fusions import GroupFusions
from trimtab.passes.manager import PassManager
from trimtab.passes.registry import load_pass

BATCH = symbol("batch", 1, 64)


def read(body: str) -> Module:
    """The module of a test case; its weights have random values that depend on their names only."""

    def source(id: str, type: TensorType) -> TorchSource:
        generator = torch.Generator().manual_seed(zlib.crc32(id.encode()))
        return TorchSource(torch.randn([int(size) for size in type.shape], generator=generator))

    module = parse_module(f"trimtab.ir 1\n{body}", source)
    verify(module)
    return module


def group(module: Module, pass_: GroupFusions | None = None) -> Module:
    """The module after the pass, whose contract (the same bits) the manager has checked."""
    return PassManager([pass_ or GroupFusions()]).run(module)[0]


def kinds(module: Module) -> list[str]:
    """The kinds of all groups, in order, and the names of the ops beside them."""
    return [op.kind if isinstance(op, ops.Fused) else op.name for op in module.main.ops]


# What each module becomes: the ops of each kernel, in order.
CASES: dict[str, tuple[str, list[str]]] = {
    "linear takes its activation": ("""
weight @w: f32[8, 4]
graph main(%x: f32[2, 3, 4]) {
  %a = linear(%x, @w) : f32[2, 3, 8]
  %b = gelu(%a) : f32[2, 3, 8]
  return y=%b
}""", ["linear+gelu"]),
    "an epilogue may read its tile twice": ("""
weight @w: f32[8, 4]
graph main(%x: f32[3, 4]) {
  %a = linear(%x, @w) : f32[3, 8]
  %s = sigmoid(%a) : f32[3, 8]
  %b = mul(%a, %s) : f32[3, 8]
  return y=%b
}""", ["linear+sigmoid+mul"]),
    "residual and scale of a convolution": ("""
symbols n=1..8
weight @w: f32[4, 4, 1, 1]
weight @g: f32[4, 1, 1]
graph main(%x: f32[n, 4, 6, 6]) {
  %a = conv2d(%x, @w) {stride=[1, 1], padding=[0, 0], dilation=[1, 1]} : f32[n, 4, 6, 6]
  %s = mul(%a, @g) : f32[n, 4, 6, 6]
  %b = add(%s, %x) : f32[n, 4, 6, 6]
  return y=%b
}""", ["conv2d+mul+add"]),
    "a product turned over, innermost axis in place": ("""
graph main(%x: f32[2, 3, 5, 7], %y: f32[2, 3, 7, 4]) {
  %a = matmul(%x, %y) : f32[2, 3, 5, 4]
  %b = permute(%a) {dims=[0, 2, 1, 3]} : f32[2, 5, 3, 4]
  return y=%b
}""", ["matmul+permute"]),
    "a transposed product stays apart": ("""
graph main(%x: f32[5, 7], %y: f32[7, 4]) {
  %a = matmul(%x, %y) : f32[5, 4]
  %b = permute(%a) {dims=[1, 0]} : f32[4, 5]
  return y=%b
}""", ["matmul", "permute"]),
    "no two contractions in one kernel": ("""
weight @v: f32[8, 4]
weight @w: f32[8, 4]
graph main(%x: f32[3, 4]) {
  %a = linear(%x, @v) : f32[3, 8]
  %b = linear(%x, @w) : f32[3, 8]
  %c = silu(%a) : f32[3, 8]
  %d = mul(%b, %c) : f32[3, 8]
  return y=%d
}""", ["linear+silu", "linear+mul"]),
    "nothing before a contraction": ("""
weight @w: f32[8, 4]
graph main(%x: f32[3, 4]) {
  %a = gelu(%x) : f32[3, 4]
  %b = linear(%a, @w) : f32[3, 8]
  return y=%b
}""", ["gelu", "linear"]),
    "a product that is read elsewhere keeps its kernel": ("""
weight @w: f32[8, 4]
graph main(%x: f32[3, 4]) {
  %a = linear(%x, @w) : f32[3, 8]
  %b = gelu(%a) : f32[3, 8]
  return y=%b, z=%a
}""", ["linear", "gelu"]),
    "an epilogue does not broadcast the tile": ("""
weight @w: f32[1, 4]
graph main(%x: f32[3, 4], %y: f32[3, 8]) {
  %a = linear(%x, @w) : f32[3, 1]
  %b = add(%a, %y) : f32[3, 8]
  return y=%b
}""", ["linear", "add"]),
    "skip and norm, both results kept": ("""
symbols n=1..8
weight @g: f32[16]
graph main(%x: f32[n, 5, 16], %y: f32[n, 5, 16]) {
  %s = add(%x, %y) : f32[n, 5, 16]
  %h = layer_norm(%s, @g) : f32[n, 5, 16]
  return h=%h, s=%s
}""", ["add+layer_norm"]),
    "a residual belongs to its product, not to the norm": ("""
weight @w: f32[16, 16]
graph main(%x: f32[5, 16]) {
  %a = linear(%x, @w) : f32[5, 16]
  %s = add(%a, %x) : f32[5, 16]
  %h = rms_norm(%s) : f32[5, 16]
  return h=%h, s=%s
}""", ["linear+add", "rms_norm"]),
    "around a softmax": ("""
graph main(%x: f32[2, 5, 16], %m: f32[2, 1, 16]) {
  %k = full() {value=0.5, dtype=f32} : f32[]
  %a = mul(%x, %k) : f32[2, 5, 16]
  %b = add(%a, %m) : f32[2, 5, 16]
  %c = softmax(%b) {dim=2} : f32[2, 5, 16]
  %d = cast(%c) {dtype=f16} : f16[2, 5, 16]
  return y=%d
}""", ["mul+add+softmax+cast"]),
    "a norm in pieces": ("""
weight @g: f32[16]
graph main(%x: f32[2, 5, 16]) {
  %e = full() {value=1e-05, dtype=f32} : f32[]
  %q = mul(%x, %x) : f32[2, 5, 16]
  %m = mean(%q) {dims=[2], keepdim=true} : f32[2, 5, 1]
  %v = add(%m, %e) : f32[2, 5, 1]
  %r = rsqrt(%v) : f32[2, 5, 1]
  %n = mul(%x, %r) : f32[2, 5, 16]
  %y = mul(%n, @g) : f32[2, 5, 16]
  return y=%y
}""", ["mul+mean+add+rsqrt+mul+mul"]),
    "norms over different rows": ("""
graph main(%x: f32[4, 5, 16]) {
  %a = layer_norm(%x) : f32[4, 5, 16]
  %b = layer_norm(%a) {axes=2} : f32[4, 5, 16]
  return y=%b
}""", ["layer_norm", "layer_norm"]),
    "a softmax over columns stays apart": ("""
graph main(%x: f32[5, 16]) {
  %a = neg(%x) : f32[5, 16]
  %b = softmax(%a) {dim=0} : f32[5, 16]
  return y=%b
}""", ["neg", "softmax"]),
    "masked mean over tokens": ("""
graph main(%x: f32[4, 9, 16], %m: f32[4, 9, 1], %n: f32[4, 1]) {
  %a = mul(%x, %m) : f32[4, 9, 16]
  %s = sum(%a) {dims=[1]} : f32[4, 16]
  %y = div(%s, %n) : f32[4, 16]
  return y=%y
}""", ["mul+sum+div"]),
    "what a sum over tokens reads is needed elsewhere": ("""
graph main(%x: f32[4, 9, 16]) {
  %a = exp(%x) : f32[4, 9, 16]
  %s = sum(%a) {dims=[1]} : f32[4, 16]
  return y=%s, z=%a
}""", ["exp", "sum"]),
    "embeddings and their norm": ("""
weight @t: f32[10, 16]
weight @p: f32[5, 16]
weight @g: f32[16]
graph main(%i: i64[2, 5]) {
  %a = embedding(@t, %i) : f32[2, 5, 16]
  %b = add(%a, @p) : f32[2, 5, 16]
  %h = layer_norm(%b, @g) : f32[2, 5, 16]
  return h=%h
}""", ["embedding+add+layer_norm"]),
    "a chain with moves in it": ("""
graph main(%x: f32[4, 6, 5], %y: f32[4, 5, 3]) {
  %a = neg(%x) : f32[4, 6, 5]
  %b = permute(%a) {dims=[0, 2, 1]} : f32[4, 5, 6]
  %c = slice(%b) {dim=2, start=1, stop=4} : f32[4, 5, 3]
  %d = add(%c, %y) : f32[4, 5, 3]
  return d=%d
}""", ["neg+permute+slice+add"]),
    "a value read at two indices is stored": ("""
graph main(%x: f32[4, 6]) {
  %a = exp(%x) : f32[4, 6]
  %b = slice(%a) {dim=1, start=0, stop=3} : f32[4, 3]
  %c = slice(%a) {dim=1, start=3, stop=6} : f32[4, 3]
  %d = add(%b, %c) : f32[4, 3]
  return d=%d
}""", ["exp", "slice+slice+add"]),
    "work is not repeated by broadcasting": ("""
graph main(%x: f32[1, 6], %y: f32[4, 6]) {
  %a = exp(%x) : f32[1, 6]
  %b = mul(%a, %y) : f32[4, 6]
  return b=%b
}""", ["exp", "mul"]),
    "nor by expanding, but a move may be": ("""
graph main(%x: f32[1, 6], %y: f32[1, 8]) {
  %a = exp(%x) : f32[1, 6]
  %b = expand(%a) {shape=[4, 6]} : f32[4, 6]
  %c = slice(%y) {dim=1, start=1, stop=7} : f32[1, 6]
  %d = sub(%b, %c) : f32[4, 6]
  return d=%d
}""", ["exp", "expand+slice+sub"]),
    "several results of one shape": ("""
graph main(%x: f32[4, 6], %y: f32[4, 6]) {
  %a = add(%x, %y) : f32[4, 6]
  %b = exp(%a) : f32[4, 6]
  %c = sin(%a) : f32[4, 6]
  return a=%a, b=%b, c=%c
}""", ["add+exp+sin"]),
    "what depends on a group does not join it again": ("""
graph main(%x: f32[4, 6]) {
  %a = exp(%x) : f32[4, 6]
  %b = cumsum(%a) {dim=1, dtype=f32} : f32[4, 6]
  %c = add(%a, %b) : f32[4, 6]
  return c=%c
}""", ["exp", "cumsum", "add"]),
    "ops that nobody reads are left alone": ("""
graph main(%x: f32[4, 6]) {
  %a = exp(%x) : f32[4, 6]
  %b = sin(%a) : f32[4, 6]
  %c = cos(%b) : f32[4, 6]
  return a=%a
}""", ["exp+sin", "cos"]),
    "constants are no reason to wait": ("""
graph main(%x: f32[4, 6], %y: f32[4, 6]) {
  %a = add(%x, %y) : f32[4, 6]
  %b = cumsum(%a) {dim=1, dtype=f32} : f32[4, 6]
  %k = full() {value=2.0, dtype=f32} : f32[]
  %c = mul(%a, %k) : f32[4, 6]
  return b=%b, c=%c
}""", ["add+mul", "cumsum"]),
    "attention and what writes its own loops stand alone": ("""
graph main(%q: f32[2, 3, 5, 4]) {
  %a = neg(%q) : f32[2, 3, 5, 4]
  %b = attention(%a, %a, %a) {scale=0.5} : f32[2, 3, 5, 4]
  %c = exp(%b) : f32[2, 3, 5, 4]
  return y=%c
}""", ["neg", "attention", "exp"]),
    "inside the body of a repeat": ("""
weight @w: f32[4, 4]
graph main(%x: f32[2, 4]) {
  %y = repeat([%x], [], []) {n=3} : f32[2, 4] graph (%h: f32[2, 4]) {
    %g = linear(%h, @w) : f32[2, 4]
    %t = tanh(%g) : f32[2, 4]
    return output=%t
  }
  return y=%y
}""", ["repeat"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_shares_a_kernel(case: str) -> None:
    text, expected = CASES[case]
    module = read(text)
    grouped = group(module)
    assert kinds(grouped) == expected
    again, report = PassManager("group-fusions", check="never").run(grouped)
    assert not report.rows[0].changed
    assert again == grouped
    parsed = parse_module(print_module(grouped), lambda id, type: module.weights[id].source)
    assert parsed == grouped


def test_the_body_of_a_repeat_is_grouped() -> None:
    grouped = group(read(CASES["inside the body of a repeat"][0]))
    (repeat,) = grouped.main.ops
    assert [op.kind for op in repeat.body.ops if isinstance(op, ops.Fused)] == ["linear+tanh"]


def test_the_order_of_the_groups_follows_what_they_read() -> None:
    """Two chains whose ops alternate: each reads what the other made before, so they cannot become two groups."""
    module = read("""
graph main(%x: f32[4, 6], %y: f32[4, 6]) {
  %a = exp(%x) : f32[4, 6]
  %p = cumsum(%a) {dim=1, dtype=f32} : f32[4, 6]
  %b = sin(%y) : f32[4, 6]
  %q = cumsum(%b) {dim=1, dtype=f32} : f32[4, 6]
  %c = mul(%a, %q) : f32[4, 6]
  %d = mul(%b, %p) : f32[4, 6]
  return c=%c, d=%d
}""")
    grouped = group(module)
    verify(grouped)
    assert sorted(name for kind in kinds(grouped) for name in kind.split("+")) == [
        "cumsum", "cumsum", "exp", "mul", "mul", "sin",
    ]  # fmt: skip


def test_a_kernel_is_no_larger_than_asked() -> None:
    b = Builder()
    value = b.input("x", TensorType(DType.F32, (4, 6)))
    for _ in range(10):
        value = b(ops.Exp(value))
    b.output(value)
    assert kinds(group(b.module, GroupFusions(max_ops=4))) == ["exp+exp+exp+exp", "exp+exp+exp+exp", "exp+exp"]


def test_a_row_that_does_not_fit_in_cache_stays_in_memory() -> None:
    module = read("""
graph main(%x: f32[32, 4096], %y: f32[32, 4096]) {
  %s = add(%x, %y) : f32[32, 4096]
  %h = layer_norm(%s) : f32[32, 4096]
  return h=%h
}""")
    assert kinds(group(module)) == ["add+layer_norm"]
    assert kinds(group(module, GroupFusions(max_row_bytes=8192))) == ["add", "layer_norm"]


def test_work_is_not_moved_into_a_loop_with_too_few_rows() -> None:
    module = read("""
graph main(%x: f32[1, 16384]) {
  %a = gelu(%x) : f32[1, 16384]
  %m = mean(%a) {dims=[1]} : f32[1]
  return m=%m
}""")
    assert kinds(group(module)) == ["gelu", "mean"]
    assert kinds(group(module, GroupFusions(parallel_tasks=1))) == ["gelu+mean"]


def test_groups_move_fewer_bytes() -> None:
    module = read(CASES["skip and norm, both results kept"][0])
    before, after = (module_cost(m).bind({"n": 2}) for m in (module, group(module)))
    values = 2 * 5 * 16 * 4
    assert before.bytes_read - after.bytes_read == values  # the sum is not read back
    assert before.bytes_written == after.bytes_written == 2 * values
    assert before.macs == after.macs


def test_the_report_tells_what_was_grouped_and_what_was_not() -> None:
    module, report = PassManager("group-fusions").run(read(CASES["no two contractions in one kernel"][0]))
    assert [op.made_by for op in module.main.ops] == ["group-fusions"] * 2
    (row,) = report.rows
    assert row.notes == ["2 groups: 1 linear+silu, 1 linear+mul"]
    (log,) = row.rules
    assert (log["rule"], log["applied"]) == ("group-fusions", 2)
    assert log["rejected"] == {"a kernel has one contraction, and it comes first": 2}
    (miss,) = log["near_misses"]
    assert miss["at"].startswith("%d = mul(")


def test_every_number_of_applications_gives_a_correct_module() -> None:
    """``trimtab bisect`` stops the pass after each of its steps."""
    from trimtab.ir.rewrite import Rewrites

    text, _ = CASES["a norm in pieces"]
    (inputs,) = [[torch.randn(2, 5, 16)]]
    (expected,) = interpret(read(text), inputs)
    sizes = []
    for limit in range(7):
        module = read(text)
        GroupFusions().run(module, Context(rewrites=Rewrites(limit)))
        verify(module)
        (got,) = interpret(module, inputs)
        assert torch.equal(got, expected)
        sizes.append(max((len(op.body.ops) for op in module.main.ops if isinstance(op, ops.Fused)), default=1))
    assert sizes == sorted(sizes)
    assert sizes[0] == 1
    assert sizes[-1] == 7  # six ops and a constant


@pytest.mark.parametrize("seed", range(40))
def test_random_graphs_keep_their_bits_and_ungroup(seed: int) -> None:
    module, _ = PassManager("dce", check="never").run(random_module(seed, 4 + seed % 20))
    grouped = group(module)
    for op in grouped.walk():
        if isinstance(op, ops.Fused):
            assert sum(isinstance(inner, (*CONTRACTIONS, ops.Attention)) for inner in op.body.ops) <= 1
    names = sorted(op.name for op in module.walk() if not isinstance(op, ops.Full | ops.DimValue))
    ungroup(grouped)
    verify(grouped)
    assert sorted(op.name for op in grouped.walk() if not isinstance(op, ops.Full | ops.DimValue)) == names


def deep_module(blocks: int) -> Module:
    """Pre-norm MLP blocks with two chains of pointwise ops each, of a symbolic batch."""
    b = Builder()
    x = b.input("x", TensorType(DType.F32, (BATCH, 16, 32)))
    up, down, gain = (b.weight(n, torch.randn(s)) for n, s in (("up", (64, 32)), ("down", (32, 64)), ("gain", (32,))))

    def block(x: Value) -> Value:
        h = b(ops.Linear(b(ops.LayerNorm(x, gain)), up))
        h = b(ops.Mul(h, b(ops.Sigmoid(b(ops.Mul(h, b.scalar(1.702, DType.F32)))))))
        return b(ops.Add(x, b(ops.Mul(b(ops.Linear(h, down)), gain))))

    for _ in range(blocks):
        x = block(x)
    b.output(x)
    return b.module


def test_work_grows_with_the_number_of_ops() -> None:
    """Four times the blocks take at most four times the calls of functions."""

    def calls(blocks: int) -> int:
        module, count = deep_module(blocks), 0

        def see(frame: object, event: str, argument: object) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        before = sys.getprofile()
        sys.setprofile(see)
        try:
            GroupFusions().run(module, Context())
        finally:
            sys.setprofile(before)
        assert [op.kind for op in module.main.ops if isinstance(op, ops.Fused)].count("linear+mul+add") == blocks
        return count

    assert calls(80) <= 4.1 * calls(20)


def test_the_pass_is_registered() -> None:
    assert load_pass("group-fusions") is GroupFusions
