"""Each built-in pass on small modules: the IR before and after, as reviewed text in tests/golden/passes."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import pytest
import torch

from trimtab.ir import Module, TensorType, parse_module, print_graph, print_module
from trimtab.ir.weights import TorchSource
from trimtab.passes.manager import PassManager

CASES: dict[str, dict[str, str]] = {
    "dce": {
        "chain": """
weight @used: f32[4]
weight @unused: f32[4]
graph main(%x: f32[4]) {
  %a = add(%x, @used) : f32[4]
  %dead = neg(%a) : f32[4]
  %deader = mul(%dead, @unused) : f32[4]
  return y=%a
}""",
        "region": """
weight @w: f32[4, 4]
graph main(%x: f32[2, 4]) {
  %y = repeat([%x], [], []) {n=3} : f32[2, 4] graph (%h: f32[2, 4]) {
    %g = linear(%h, @w) : f32[2, 4]
    %dead = exp(%g) : f32[2, 4]
    return output=%g
  }
  return y=%y
}""",
        "several_results": """
graph main(%x: f32[4, 6]) {
  %a, %b = split(%x) {dim=1, sizes=[2, 4]} : f32[4, 2], f32[4, 4]
  %c, %d = split(%x) {dim=1, sizes=[3, 3]} : f32[4, 3], f32[4, 3]
  return y=%b
}""",
    },
    "cse": {
        "twice": """
symbols batch=1..8
graph main(%x: f32[batch, 4]) {
  %a = softmax(%x) {dim=1} : f32[batch, 4]
  %b = softmax(%x) {dim=1} : f32[batch, 4]
  %c = softmax(%x) {dim=0} : f32[batch, 4]
  %ab = sub(%a, %b) : f32[batch, 4]
  %y = add(%ab, %c) : f32[batch, 4]
  return y=%y
}""",
        "commuted": """
graph main(%x: f32[4], %z: f32[4]) {
  %a = add(%x, %z) : f32[4]
  %b = add(%z, %x) : f32[4]
  %c = maximum(%x, %z) : f32[4]
  %d = maximum(%z, %x) : f32[4]
  return a=%a, b=%b, c=%c, d=%d
}""",
        "signs_and_kinds_of_numbers": """
graph main(%x: f32[4]) {
  %a = full() {value=0.0, dtype=f32} : f32[]
  %b = full() {value=-0.0, dtype=f32} : f32[]
  %c = full() {value=0.0, dtype=f32} : f32[]
  %p = add(%x, %a) : f32[4]
  %q = add(%x, %b) : f32[4]
  %r = add(%x, %c) : f32[4]
  return p=%p, q=%q, r=%r
}""",
        "random_numbers_stay_apart": """
graph main(%x: f32[4]) {
  %a = opaque([%x]) {target="aten.rand_like.default", call="[{\\"operand\\": 0}]"} : f32[4]
  %b = opaque([%x]) {target="aten.rand_like.default", call="[{\\"operand\\": 0}]"} : f32[4]
  %c = opaque([%x]) {target="aten.erfinv.default", call="[{\\"operand\\": 0}]"} : f32[4]
  %d = opaque([%x]) {target="aten.erfinv.default", call="[{\\"operand\\": 0}]"} : f32[4]
  return a=%a, b=%b, c=%c, d=%d
}""",
    },
    "simplify-identities": {
        "arithmetic": """
graph main(%x: f32[4], %n: i64[4], %c: bool[4]) {
  %one = full() {value=1.0, dtype=f32} : f32[]
  %zero = full() {value=0.0, dtype=f32} : f32[]
  %minus_zero = full() {value=-0.0, dtype=f32} : f32[]
  %none = full() {value=0, dtype=i64} : i64[]
  %true = full() {value=true, dtype=bool} : bool[]
  %a = mul(%x, %one) : f32[4]
  %b = div(%a, %one) : f32[4]
  %removed = add(%minus_zero, %b) : f32[4]
  %d = sub(%removed, %zero) : f32[4]
  %kept_plus_zero = add(%d, %zero) : f32[4]
  %kept_minus_minus_zero = sub(%x, %minus_zero) : f32[4]
  %e = add(%n, %none) : i64[4]
  %f = logical_and(%true, %c) : bool[4]
  %g = logical_and(%x, %x) : bool[4]
  %h = where(%true, %x, %kept_plus_zero) : f32[4]
  return d=%d, p=%kept_plus_zero, m=%kept_minus_minus_zero, e=%e, f=%f, g=%g, h=%h
}""",
        "broadcasts_stay": """
graph main(%x: f32[1, 4]) {
  %ones = full() {value=1.0, dtype=f32, shape=[3, 4]} : f32[3, 4]
  %y = mul(%x, %ones) : f32[3, 4]
  return y=%y
}""",
        "twice_is_nothing_or_once": """
graph main(%x: f32[4], %c: bool[4]) {
  %a = neg(%x) : f32[4]
  %b = neg(%a) : f32[4]
  %d = logical_not(%c) : bool[4]
  %e = logical_not(%d) : bool[4]
  %f = logical_not(%x) : bool[4]
  %kept = logical_not(%f) : bool[4]
  %g = abs(%b) : f32[4]
  %h = abs(%g) : f32[4]
  return b=%b, e=%e, kept=%kept, h=%h
}""",
        "casts": """
graph main(%x: f32[4], %z: f64[4]) {
  %a = cast(%x) {dtype=f32} : f32[4]
  %wide = cast(%a) {dtype=f64} : f64[4]
  %back = cast(%wide) {dtype=f32} : f32[4]
  %narrow = cast(%z) {dtype=f32} : f32[4]
  %kept = cast(%narrow) {dtype=f64} : f64[4]
  return back=%back, kept=%kept
}""",
        "moves": """
symbols batch=1..8
graph main(%x: f32[batch, 4]) {
  %a = slice(%x) {dim=0, start=0, stop=batch} : f32[batch, 4]
  %b = concat([%a]) {dim=1} : f32[batch, 4]
  %c = expand(%b) {shape=[batch, 4]} : f32[batch, 4]
  %d = pad(%c) {before=[0, 0], after=[0, 0]} : f32[batch, 4]
  %e = tile(%d) {repeats=[1, 1]} : f32[batch, 4]
  %f = sum(%e) {dims=[]} : f32[batch, 4]
  %kept = slice(%f) {dim=1, start=0, stop=4, step=2} : f32[batch, 2]
  return f=%f, kept=%kept
}""",
        "nothing_joined_or_cut_off": """
graph main(%x: f32[2, 4], %none: f32[2, 0]) {
  %empty = slice(%x) {dim=1, start=4, stop=4} : f32[2, 0]
  %a = concat([%empty, %x, %none]) {dim=1} : f32[2, 4]
  %b = concat([%empty, %none]) {dim=1} : f32[2, 0]
  %all, %rest = split(%a) {dim=1, sizes=[4, 0]} : f32[2, 4], f32[2, 0]
  %part, %other = split(%a) {dim=1, sizes=[3, 1]} : f32[2, 3], f32[2, 1]
  %kept = concat([%part, %empty, %x]) {dim=1} : f32[2, 7]
  return all=%all, b=%b, kept=%kept
}""",
    },
    "simplify-reshapes": {
        "round_trip": """
symbols batch=1..8
graph main(%x: f32[batch, 4, 6]) {
  %a = reshape(%x) {shape=[4*batch, 6]} : f32[4*batch, 6]
  %b = reshape(%a) {shape=[batch, 24]} : f32[batch, 24]
  %c = reshape(%b) {shape=[batch, 4, 6]} : f32[batch, 4, 6]
  %d = reshape(%b) {shape=[batch, 2, 12]} : f32[batch, 2, 12]
  %kept = reshape(%x) {shape=[batch, 24]} : f32[batch, 24]
  return c=%c, d=%d, kept=%kept
}""",
    },
    "simplify-permutes": {
        "compose": """
graph main(%x: f32[2, 3, 4]) {
  %a = permute(%x) {dims=[2, 0, 1]} : f32[4, 2, 3]
  %back = permute(%a) {dims=[1, 2, 0]} : f32[2, 3, 4]
  %b = permute(%a) {dims=[2, 1, 0]} : f32[3, 2, 4]
  return back=%back, b=%b
}""",
        "with_reshapes_between": """
symbols batch=1..8
graph main(%x: f32[batch, 4, 6, 8], %z: f32[batch, 4, 6, 8]) {
  %a = permute(%x) {dims=[0, 3, 1, 2]} : f32[batch, 8, 4, 6]
  %b = reshape(%a) {shape=[batch, 8, 24]} : f32[batch, 8, 24]
  %back = permute(%b) {dims=[0, 2, 1]} : f32[batch, 24, 8]
  %c = reshape(%z) {shape=[4*batch, 2, 3, 8]} : f32[4*batch, 2, 3, 8]
  %d = permute(%c) {dims=[0, 2, 1, 3]} : f32[4*batch, 3, 2, 8]
  %e = reshape(%d) {shape=[batch, 4, 6, 8]} : f32[batch, 4, 6, 8]
  %once = permute(%e) {dims=[0, 3, 2, 1]} : f32[batch, 8, 6, 4]
  return back=%back, once=%once
}""",
        "between_axes_that_do_not_divide": """
graph main(%x: f32[4, 6], %z: f32[2, 3, 4]) {
  %a = permute(%x) {dims=[1, 0]} : f32[6, 4]
  %b = reshape(%a) {shape=[8, 3]} : f32[8, 3]
  %c = permute(%b) {dims=[1, 0]} : f32[3, 8]
  %d = permute(%z) {dims=[0, 2, 1]} : f32[2, 4, 3]
  %e = reshape(%d) {shape=[8, 3]} : f32[8, 3]
  %read_twice = permute(%e) {dims=[1, 0]} : f32[3, 8]
  return c=%c, d=%d, read_twice=%read_twice
}""",
        "axes_of_size_one": """
symbols batch=1..8
graph main(%x: f32[batch, 1, 4], %one: f32[1, 1]) {
  %a = permute(%x) {dims=[1, 0, 2]} : f32[1, batch, 4]
  %kept = permute(%x) {dims=[2, 1, 0]} : f32[4, 1, batch]
  %c = permute(%one) {dims=[1, 0]} : f32[1, 1]
  return a=%a, kept=%kept, c=%c
}""",
    },
    "fold-constants": {
        "numbers": """
symbols batch=1..8
graph main(%x: f32[batch, 4]) {
  %a = full() {value=16.0, dtype=f32} : f32[]
  %b = sqrt(%a) : f32[]
  %c = full() {value=1.0, dtype=f32} : f32[]
  %d = div(%c, %b) : f32[]
  %e = expand(%d) {shape=[batch, 4]} : f32[batch, 4]
  %y = mul(%x, %e) : f32[batch, 4]
  %kept = dim_value() {dim=batch, dtype=i64} : i64[]
  return y=%y, kept=%kept
}""",
        "weights": """
weight @w: f32[64, 32] trainable
weight @shared: f32[64, 32]
weight @small: f32[4, 2]
graph main(%x: f32[2, 64], %z: f32[2, 32]) {
  %a = permute(@w) {dims=[1, 0]} : f32[32, 64]
  %b = linear(%x, %a) : f32[2, 32]
  %kept = permute(@shared) {dims=[1, 0]} : f32[32, 64]
  %c = linear(%x, %kept) : f32[2, 32]
  %d = linear(%z, @shared) : f32[2, 64]
  %e = permute(@small) {dims=[1, 0]} : f32[2, 4]
  return b=%b, c=%c, d=%d, e=%e, small=@small
}""",
        "mask": """
graph main(%x: f32[4, 4]) {
  %rows = arange() {length=4, dtype=i64} : i64[4]
  %column = reshape(%rows) {shape=[4, 1]} : i64[4, 1]
  %causal = le(%rows, %column) : bool[4, 4]
  %fill = full() {value=-inf, dtype=f32} : f32[]
  %y = where(%causal, %x, %fill) : f32[4, 4]
  return y=%y
}""",
    },
    "dedup-weights": {
        "equal": """
weight @a: f32[4, 4]
weight @a_twin: f32[4, 4]
weight @a_trained_twin: f32[4, 4] trainable
weight @b: f32[4, 4]
graph main(%x: f32[2, 4]) {
  %p = linear(%x, @a) : f32[2, 4]
  %q = linear(%p, @a_twin) : f32[2, 4]
  %r = linear(%q, @a_trained_twin) : f32[2, 4]
  %s = linear(%r, @b) : f32[2, 4]
  return s=%s
}""",
    },
    "cleanup": {
        "body_of_repeat": """
symbols batch=1..8
weight @w: f32[4, 4]
weight @scale: f32[2, 4]
graph main(%x: f32[batch, 4]) {
  %y = repeat([%x], [@scale], []) {n=2} : f32[batch, 4] graph (%h: f32[batch, 4], %s: f32[4]) {
    %t = permute(@w) {dims=[1, 0]} : f32[4, 4]
    %a = linear(%h, %t) : f32[batch, 4]
    %t2 = permute(@w) {dims=[1, 0]} : f32[4, 4]
    %b = linear(%h, %t2) : f32[batch, 4]
    %c = add(%a, %b) : f32[batch, 4]
    %two = full() {value=2.0, dtype=f32} : f32[]
    %one = sub(%two, %two) : f32[]
    %d = sub(%c, %one) : f32[batch, 4]
    %e = mul(%d, %s) : f32[batch, 4]
    return output=%e
  }
  return y=%y
}""",
        "attention_by_hand": """
symbols batch=1..8
weight @q: f32[8, 8]
weight @k: f32[8, 8]
graph main(%x: f32[batch, 5, 8]) {
  %q = linear(%x, @q) : f32[batch, 5, 8]
  %qh = reshape(%q) {shape=[5*batch, 2, 4]} : f32[5*batch, 2, 4]
  %qr = reshape(%qh) {shape=[batch, 5, 2, 4]} : f32[batch, 5, 2, 4]
  %qp = permute(%qr) {dims=[0, 2, 1, 3]} : f32[batch, 2, 5, 4]
  %k = linear(%x, @k) : f32[batch, 5, 8]
  %kr = reshape(%k) {shape=[batch, 5, 2, 4]} : f32[batch, 5, 2, 4]
  %kp = permute(%kr) {dims=[0, 2, 1, 3]} : f32[batch, 2, 5, 4]
  %kt = permute(%kp) {dims=[0, 1, 3, 2]} : f32[batch, 2, 4, 5]
  %scores = matmul(%qp, %kt) : f32[batch, 2, 5, 5]
  %four = full() {value=4.0, dtype=f32} : f32[]
  %root = sqrt(%four) : f32[]
  %scaled = div(%scores, %root) : f32[batch, 2, 5, 5]
  %same = cast(%scaled) {dtype=f32} : f32[batch, 2, 5, 5]
  %p = softmax(%same) {dim=3} : f32[batch, 2, 5, 5]
  return p=%p
}""",
    },
    "raise-linear": {
        "product_and_bias": """
symbols batch=1..8
weight @w: f32[6, 4]
weight @v: f32[6, 6]
weight @bias: f32[6]
graph main(%x: f32[batch, 4]) {
  %t = permute(@w) {dims=[1, 0]} : f32[4, 6]
  %a = matmul(%x, %t) : f32[batch, 6]
  %b = add(@bias, %a) : f32[batch, 6]
  %c = matmul(%b, @v) : f32[batch, 6]
  return c=%c
}""",
        "stays": """
symbols batch=1..8
weight @w: f32[6, 6]
weight @bias: f32[6]
graph main(%x: f32[batch, 6]) {
  %t = permute(@w) {dims=[0, 1]} : f32[6, 6]
  %a = matmul(%x, %t) : f32[batch, 6]
  %b = linear(%a, @w) : f32[batch, 6]
  %c = add(%b, @bias) : f32[batch, 6]
  %d = matmul(%b, @w) : f32[batch, 6]
  return c=%c, d=%d
}""",
    },
}


def read(text: str) -> Module:
    """A module from its text; weights hold random numbers, equal for ids that share the part before ``_``."""

    def source(id: str, type: TensorType) -> TorchSource:
        generator = torch.Generator().manual_seed(zlib.crc32(id.split("_")[0].encode()))
        return TorchSource(torch.randn(type.bind({}).shape, generator=generator))

    return parse_module("trimtab.ir 1\n" + text, source)


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in CASES.items() for case in cases])
def test_pass_rewrites_as_reviewed(name: str, case: str, golden: Callable[[str, str], None]) -> None:
    module = read(CASES[name][case])
    result, report = PassManager(name).run(module)
    changed = "changed" if report.applied else "unchanged"
    before, after = (print_module(m, hashes=False).split("\n", 1)[1] for m in (module, result))
    golden(f"passes/{name}-{case}.txt", f"// before {name}\n{before}\n// after {name}: {changed}\n{after}")


def test_cleanup_reaches_a_fixpoint() -> None:
    module = read(CASES["simplify-identities"]["arithmetic"])
    once, _ = PassManager("cleanup").run(module)
    twice, report = PassManager("cleanup").run(once)
    assert not report.applied
    assert print_graph(once.main) == print_graph(twice.main)


def test_large_folded_weight_is_computed_on_demand() -> None:
    from trimtab.ir import Builder, DType, ops
    from trimtab.ir.weights import ComputedSource

    b = Builder()
    x = b.input("x", TensorType(DType.F32, (2, 512)))
    data = torch.randn(512, 1024)
    b.output(b(ops.Linear(x, b(ops.Permute(b.weight("w", data), dims=(1, 0))))))
    result, report = PassManager("fold-constants,dce").run(b.module)
    (weight,) = result.weights.values()
    assert isinstance(weight.source, ComputedSource)
    assert weight.tensor().data_ptr() == data.data_ptr(), "a transposed weight shares the data"
    assert torch.equal(weight.tensor(), data.T)
    assert report.rows[-1].weight_bytes_after == b.module.weight_bytes
