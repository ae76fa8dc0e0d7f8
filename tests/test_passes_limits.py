"""Limits: how many changes a pass may make, and how many bytes constant folding may copy of a weight that stays."""

from __future__ import annotations

import pytest
import torch
from pass_harness import Golden, assert_same_results, check_case, read

from trimtab.ir import Module, print_module
from trimtab.ir.rewrite import Rewrites
from trimtab.passes.base import Context
from trimtab.passes.fold_constants import FoldConstants
from trimtab.passes.registry import load_pass

SOURCES = {
    "cse": """
graph main(%x: f32[4]) {
  %a = exp(%x) : f32[4]
  %b = exp(%x) : f32[4]
  %c = exp(%x) : f32[4]
  %ab = sub(%a, %b) : f32[4]
  %y = add(%ab, %c) : f32[4]
  return y=%y
}""",
    "dedup-weights": """
weight @a: f32[4]
weight @b: f32[4]
weight @c: f32[4]
graph main(%x: f32[4]) {
  %p = mul(%x, @a) : f32[4]
  %q = mul(%p, @b) : f32[4]
  %r = mul(%q, @c) : f32[4]
  return r=%r
}""",
    "fold-constants": """
weight @w: f32[4]
graph main(%x: f32[4]) {
  %a = full() {value=4.0, dtype=f32} : f32[]
  %b = sqrt(%a) : f32[]
  %c = mul(@w, %b) : f32[4]
  %y = mul(%x, %c) : f32[4]
  return y=%y
}""",
    "simplify-identities": """
graph main(%x: f32[4]) {
  %a = neg(%x) : f32[4]
  %b = neg(%a) : f32[4]
  %c = neg(%b) : f32[4]
  %d = neg(%c) : f32[4]
  return d=%d
}""",
    "simplify-permutes": """
graph main(%x: f32[2, 3, 4]) {
  %a = permute(%x) {dims=[2, 0, 1]} : f32[4, 2, 3]
  %b = permute(%a) {dims=[2, 1, 0]} : f32[3, 2, 4]
  %c = permute(%b) {dims=[1, 0, 2]} : f32[2, 3, 4]
  return c=%c
}""",
    "simplify-reshapes": """
graph main(%x: f32[2, 6]) {
  %a = reshape(%x) {shape=[12]} : f32[12]
  %b = reshape(%a) {shape=[3, 4]} : f32[3, 4]
  %c = reshape(%b) {shape=[2, 6]} : f32[2, 6]
  return c=%c
}""",
}


def module_of(name: str) -> Module:
    same = torch.arange(4.0)
    return read(SOURCES[name], **({"a": same, "b": same, "c": same} if name == "dedup-weights" else {}))


@pytest.mark.parametrize("name", SOURCES)
def test_a_limit_gives_the_first_changes_of_a_pass(name: str) -> None:
    original, unlimited = module_of(name), module_of(name)
    everything = Context()
    assert load_pass(name)().run(unlimited, everything)
    total = everything.rewrites.applied
    assert total >= 2
    assert everything.rewrites.log[name].applied == total
    texts = []
    for limit in range(total + 2):
        module, context = module_of(name), Context(rewrites=Rewrites(limit))
        assert load_pass(name)().run(module, context) == (limit > 0)
        assert context.rewrites.applied == min(limit, total)
        assert_same_results(original, module)
        texts.append(print_module(module))
    assert texts[0] == print_module(original)
    assert texts[total] == texts[total + 1] == print_module(unlimited)
    assert len(set(texts)) == total + 1


def test_ops_tell_which_pass_made_them() -> None:
    for name in ("fold-constants", "simplify-permutes"):
        module = module_of(name)
        load_pass(name)().run(module, Context(rewrites=Rewrites(1)))
        assert name in {op.made_by for op in module.walk()}


def test_copies_of_a_weight_that_stays_are_limited_together(golden: Golden) -> None:
    """Three slices of 16 bytes would together hold the shared weight a second time."""
    source = """
weight @shared: f32[12]
weight @own: f32[12]
graph main(%x: f32[4]) {
  %a = slice(@shared) {dim=0, start=0, stop=4} : f32[4]
  %b = slice(@shared) {dim=0, start=4, stop=8} : f32[4]
  %c = slice(@shared) {dim=0, start=8, stop=12} : f32[4]
  %d = neg(@own) : f32[12]
  %ab = add(%a, %b) : f32[4]
  %abc = add(%ab, %c) : f32[4]
  %y = mul(%x, %abc) : f32[4]
  return y=%y, d=%d, shared=@shared
}"""
    module = read(source)
    result = check_case(golden, "fold-constants-shared", "fold-constants{limit=32},dce", module)
    assert result.weight_bytes <= module.weight_bytes + 32
    assert_same_results(module, result, tolerance=1e-6)


def test_a_large_result_never_stands_beside_what_it_is_computed_from() -> None:
    source = """
weight @w: f32[64, 64]
graph main(%x: f32[64, 64]) {
  %t = permute(@w) {dims=[1, 0]} : f32[64, 64]
  %a = matmul(%x, %t) : f32[64, 64]
  %y = matmul(%a, @w) : f32[64, 64]
  return y=%y
}"""
    module = read(source)
    assert not FoldConstants().run(module, Context())
    assert list(module.weights) == ["w"]
