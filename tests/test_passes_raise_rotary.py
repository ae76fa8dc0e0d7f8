"""Rotary embedding and shared key heads in the forms that models and exporters write."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto
from onnx_models import info, model, names, node, normal
from pass_harness import Golden, assert_same_results, check_case, read, rewritten
from torch import Tensor

import trimtab
from trimtab import from_onnx
from trimtab.ir import Module, ops
from trimtab.passes.raise_rotary import PartialRotary, RotaryHalves, RotaryNeighbours
from trimtab.passes.remove_repeat_kv import GroupedHeads

ROTARY = {
    "raise-rotary-halves_of_a_part": """
symbols batch=1..8, seq=2..64
graph main(%x: f32[batch, 4, seq, 16], %cos: f32[1, 1, seq, 8], %sin: f32[batch, 1, seq, 8]) {
  %turned = slice(%x) {dim=3, start=0, stop=8} : f32[batch, 4, seq, 8]
  %rest = slice(%x) {dim=3, start=8, stop=16} : f32[batch, 4, seq, 8]
  %a = slice(%turned) {dim=3, start=0, stop=4} : f32[batch, 4, seq, 4]
  %b = slice(%turned) {dim=3, start=4, stop=8} : f32[batch, 4, seq, 4]
  %minus_b = neg(%b) : f32[batch, 4, seq, 4]
  %rotated = concat([%minus_b, %a]) {dim=3} : f32[batch, 4, seq, 8]
  %left = mul(%turned, %cos) : f32[batch, 4, seq, 8]
  %right = mul(%sin, %rotated) : f32[batch, 4, seq, 8]
  %sum = add(%right, %left) : f32[batch, 4, seq, 8]
  %y = concat([%sum, %rest]) {dim=3} : f32[batch, 4, seq, 16]
  return y=%y
}""",
    "raise-rotary-neighbours_by_pair": """
symbols seq=2..64
graph main(%x: f32[seq, 8], %cos: f32[seq, 4], %sin: f32[seq, 4]) {
  %a = slice(%x) {dim=1, start=0, stop=8, step=2} : f32[seq, 4]
  %b = slice(%x) {dim=1, start=1, stop=8, step=2} : f32[seq, 4]
  %a_cos = mul(%a, %cos) : f32[seq, 4]
  %b_sin = mul(%b, %sin) : f32[seq, 4]
  %low = sub(%a_cos, %b_sin) : f32[seq, 4]
  %b_cos = mul(%b, %cos) : f32[seq, 4]
  %a_sin = mul(%a, %sin) : f32[seq, 4]
  %high = add(%a_sin, %b_cos) : f32[seq, 4]
  %low_apart = reshape(%low) {shape=[seq, 4, 1]} : f32[seq, 4, 1]
  %high_apart = reshape(%high) {shape=[seq, 4, 1]} : f32[seq, 4, 1]
  %pairs = concat([%low_apart, %high_apart]) {dim=2} : f32[seq, 4, 2]
  %y = reshape(%pairs) {shape=[seq, 8]} : f32[seq, 8]
  return y=%y
}""",
    "raise-rotary-near_misses": """
graph main(%x: f32[6, 8], %z: f32[6, 8], %cos: f32[6, 8], %sin: f32[6, 8], %stack: f32[3, 6, 8]) {
  %a = slice(%x) {dim=1, start=0, stop=4} : f32[6, 4]
  %b = slice(%x) {dim=1, start=4, stop=8} : f32[6, 4]
  %minus_a = neg(%a) : f32[6, 4]
  %turned_back = concat([%b, %minus_a]) {dim=1} : f32[6, 8]
  %x_cos = mul(%x, %cos) : f32[6, 8]
  %p = mul(%turned_back, %sin) : f32[6, 8]
  %wrong_sign = add(%x_cos, %p) : f32[6, 8]
  %minus_b = neg(%b) : f32[6, 4]
  %rotated = concat([%minus_b, %a]) {dim=1} : f32[6, 8]
  %z_cos = mul(%z, %cos) : f32[6, 8]
  %q = mul(%rotated, %sin) : f32[6, 8]
  %other_value = add(%z_cos, %q) : f32[6, 8]
  %c = slice(%x) {dim=1, start=0, stop=2} : f32[6, 2]
  %d = slice(%x) {dim=1, start=2, stop=8} : f32[6, 6]
  %minus_d = neg(%d) : f32[6, 6]
  %uneven = concat([%minus_d, %c]) {dim=1} : f32[6, 8]
  %x_sin = mul(%x, %sin) : f32[6, 8]
  %r = mul(%uneven, %cos) : f32[6, 8]
  %uneven_parts = add(%x_sin, %r) : f32[6, 8]
  %e = slice(%z) {dim=1, start=0, stop=4} : f32[6, 4]
  %f = slice(%z) {dim=1, start=4, stop=8} : f32[6, 4]
  %minus_f = neg(%f) : f32[6, 4]
  %z_rotated = concat([%minus_f, %e]) {dim=1} : f32[6, 8]
  %s = mul(%z, %stack) : f32[3, 6, 8]
  %t = mul(%z_rotated, %stack) : f32[3, 6, 8]
  %larger = add(%s, %t) : f32[3, 6, 8]
  return sign=%wrong_sign, value=%other_value, parts=%uneven_parts, larger=%larger
}""",
}
HEADS = {
    "remove-repeat-kv-before_a_transposition": """
symbols batch=1..8, seq=2..64
graph main(%q: f32[batch, 6, seq, 8], %k: f32[batch, seq, 2, 8], %v: f32[batch, 2, seq, 8], %mask: bool[seq, seq]) {
  %k_apart = reshape(%k) {shape=[batch, seq, 2, 1, 8]} : f32[batch, seq, 2, 1, 8]
  %k_copies = expand(%k_apart) {shape=[batch, seq, 2, 3, 8]} : f32[batch, seq, 2, 3, 8]
  %k_joined = reshape(%k_copies) {shape=[batch, seq, 6, 8]} : f32[batch, seq, 6, 8]
  %k_heads = permute(%k_joined) {dims=[0, 2, 1, 3]} : f32[batch, 6, seq, 8]
  %v_apart = reshape(%v) {shape=[batch, 2, 1, seq, 8]} : f32[batch, 2, 1, seq, 8]
  %v_copies = tile(%v_apart) {repeats=[1, 1, 3, 1, 1]} : f32[batch, 2, 3, seq, 8]
  %v_joined = reshape(%v_copies) {shape=[batch, 6, seq, 8]} : f32[batch, 6, seq, 8]
  %y = attention(%q, %k_heads, %v_joined, %mask) {scale=0.35} : f32[batch, 6, seq, 8]
  return y=%y
}""",
    "remove-repeat-kv-near_misses": """
graph main(%q: f32[2, 4, 5, 8], %k: f32[2, 2, 5, 8], %v: f32[2, 2, 5, 8], %one: f32[2, 1, 5, 8]) {
  %before = reshape(%k) {shape=[2, 1, 2, 5, 8]} : f32[2, 1, 2, 5, 8]
  %tiled = expand(%before) {shape=[2, 2, 2, 5, 8]} : f32[2, 2, 2, 5, 8]
  %k_tiled = reshape(%tiled) {shape=[2, 4, 5, 8]} : f32[2, 4, 5, 8]
  %v_apart = reshape(%v) {shape=[2, 2, 1, 5, 8]} : f32[2, 2, 1, 5, 8]
  %v_copies = expand(%v_apart) {shape=[2, 2, 2, 5, 8]} : f32[2, 2, 2, 5, 8]
  %v_joined = reshape(%v_copies) {shape=[2, 4, 5, 8]} : f32[2, 4, 5, 8]
  %in_turn = attention(%q, %k_tiled, %v_joined) {scale=0.35} : f32[2, 4, 5, 8]
  %one_apart = reshape(%one) {shape=[2, 1, 1, 5, 8]} : f32[2, 1, 1, 5, 8]
  %one_copies = expand(%one_apart) {shape=[2, 1, 4, 5, 8]} : f32[2, 1, 4, 5, 8]
  %one_joined = reshape(%one_copies) {shape=[2, 4, 5, 8]} : f32[2, 4, 5, 8]
  %w_apart = reshape(%v) {shape=[2, 2, 1, 5, 8]} : f32[2, 2, 1, 5, 8]
  %w_copies = expand(%w_apart) {shape=[2, 2, 2, 5, 8]} : f32[2, 2, 2, 5, 8]
  %w_joined = reshape(%w_copies) {shape=[2, 4, 5, 8]} : f32[2, 4, 5, 8]
  %unequal = attention(%q, %one_joined, %w_joined) {scale=0.35} : f32[2, 4, 5, 8]
  %both = expand(%one_apart) {shape=[2, 2, 2, 5, 8]} : f32[2, 2, 2, 5, 8]
  %both_joined = reshape(%both) {shape=[2, 4, 5, 8]} : f32[2, 4, 5, 8]
  %two_axes = attention(%q, %both_joined, %both_joined) {scale=0.35} : f32[2, 4, 5, 8]
  return in_turn=%in_turn, unequal=%unequal, two_axes=%two_axes
}""",
}
SIZES = ({"batch": 1, "seq": 2}, {"batch": 3, "seq": 7})


def sizes_of(module: Module) -> list[dict[str, int]]:
    """Values for the two symbols of a traced module, batch and sequence."""
    return [dict(zip(module.symbols(), sizes, strict=True)) for sizes in ((1, 2), (3, 7))]


@pytest.mark.parametrize("name", [*ROTARY, *HEADS])
def test_pass_rewrites_as_reviewed(name: str, golden: Golden) -> None:
    module = read({**ROTARY, **HEADS}[name])
    result = check_case(golden, name, f"{'raise-rotary' if name in ROTARY else 'remove-repeat-kv'},dce", module)
    assert_same_results(module, result, *(SIZES if module.symbols() else ()))


# -- rotary embedding as models write it ----------------------------------------------------------------------------

Rotary = Callable[[Tensor, Tensor, Tensor], Tensor]


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def llama(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def chunks(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return sin * rotate_half(x) + cos * x


def gpt_neox(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, rest = x[..., :8], x[..., 8:]
    return torch.cat((turned * cos[..., :8] + rotate_half(turned) * sin[..., :8], rest), -1)


def split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, rest = x.split([12, 4], -1)
    return torch.cat((turned * cos[..., :12] + rotate_half(turned) * sin[..., :12], rest), -1)


def gpt_j(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, rest = x[..., :8], x[..., 8:]
    rotated = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    return torch.cat((turned * cos[..., :8] + rotated * sin[..., :8], rest), -1)


def halves_by_pair(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b, c, s = x[..., :8], x[..., 8:], cos[..., :8], sin[..., :8]
    return torch.cat((a * c - b * s, b * c + a * s), -1)


def pairs_unbound(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[..., :8], sin[..., :8]
    return torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2)


def meta(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """On heads before their transposition, with reshapes that clean-up joins with those of the pairs."""
    flat = x.transpose(1, 2).flatten(2)
    pairs = flat.view(*flat.shape[:2], 3, 16).reshape(*flat.shape[:2], 3, -1, 2)
    a, b, c, s = pairs[..., 0], pairs[..., 1], cos[:, None, :8], sin[:, None, :8]
    return torch.stack((a * c - b * s, a * s + b * c), -1).flatten(3).flatten(2)


FORMS: dict[Rotary, bool] = {
    llama: False, chunks: False, gpt_neox: False, split: False, gpt_j: True, halves_by_pair: False,
    pairs_unbound: True, meta: True,
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_rotary_embedding_as_models_write_it(form: Rotary) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            return form(x, cos, sin)

    batch, seq = torch.export.Dim("batch", min=1, max=8), torch.export.Dim("seq", min=2, max=64)
    inputs = torch.randn(2, 3, 12, 16), torch.randn(12, 16), torch.randn(12, 16)
    shapes = {"x": {0: batch, 2: seq}, "cos": {0: seq}, "sin": {0: seq}}
    module = trimtab.trace(Model().eval(), inputs, dynamic_shapes=shapes)
    result, _ = rewritten(module, "cleanup,raise-rotary,cleanup")
    (op,) = (op for op in result.walk() if isinstance(op, ops.RotaryEmbedding))
    assert op.interleaved == FORMS[form]
    assert not {"mul", "add", "sub", "neg", "split"} & set(names(result))
    assert_same_results(module, result, *sizes_of(module))


@pytest.mark.parametrize("width", [0, 8])
@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("rank", [3, 4])
def test_the_definition_of_the_onnx_operator(rank: int, interleaved: int, width: int) -> None:
    attributes = {"interleaved": interleaved, "rotary_embedding_dim": width, "num_heads": 3 if rank == 3 else 0}
    x = info("x", [2, "seq", 48] if rank == 3 else [2, 3, "seq", 16])
    half = (width or 16) // 2
    tables = {"cos": normal(32, half), "sin": normal(32, half, seed=1)}
    nodes = [node("RotaryEmbedding", ["x", "cos", "sin", "at"], ["y"], **attributes)]
    module = from_onnx(model(nodes, [x, info("at", [2, "seq"], TensorProto.INT64)], ["y"], tables, opset=23))
    result, _ = rewritten(module, "cleanup,raise-rotary,cleanup")
    (op,) = (op for op in result.walk() if isinstance(op, ops.RotaryEmbedding))
    assert op.interleaved == bool(interleaved)
    assert not {"mul", "add", "sub", "slice", "split"} & set(names(result))
    assert_same_results(module, result, {"seq": 5}, {"seq": 2})


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (RotaryHalves(), "a slice is not a result of neg or a product with the constant -1"),
        (RotaryNeighbours(), "a concat is not a result of reshape"),
        (PartialRotary(), "a slice is not a result of rotary_embedding"),
    ],
    ids=str,
)
def test_the_reason_is_told(rule, reason: str) -> None:
    module = read("""
graph main(%x: f32[6, 8], %cos: f32[6, 8], %sin: f32[6, 8]) {
  %a = slice(%x) {dim=1, start=0, stop=4} : f32[6, 4]
  %b = slice(%x) {dim=1, start=4, stop=8} : f32[6, 4]
  %swapped = concat([%b, %a]) {dim=1} : f32[6, 8]
  %c = mul(%x, %cos) : f32[6, 8]
  %d = mul(%swapped, %sin) : f32[6, 8]
  %y = add(%c, %d) : f32[6, 8]
  return y=%y
}""")
    assert rule.explain(module).reason == reason


def test_tables_of_another_shape_of_x_stay() -> None:
    """The pairs are cut from x as [2, 2, 1, 8], so that the table's rows would meet other rows of it."""
    module = read("""
graph main(%x: f32[2, 2, 8], %cos: f32[2, 1, 8], %sin: f32[2, 1, 8]) {
  %pairs = reshape(%x) {shape=[2, 2, 1, 4, 2]} : f32[2, 2, 1, 4, 2]
  %a = select(%pairs) {dim=4, index=0} : f32[2, 2, 1, 4]
  %b = select(%pairs) {dim=4, index=1} : f32[2, 2, 1, 4]
  %minus_b = neg(%b) : f32[2, 2, 1, 4]
  %b_apart = reshape(%minus_b) {shape=[2, 2, 1, 4, 1]} : f32[2, 2, 1, 4, 1]
  %a_apart = reshape(%a) {shape=[2, 2, 1, 4, 1]} : f32[2, 2, 1, 4, 1]
  %joined = concat([%b_apart, %a_apart]) {dim=4} : f32[2, 2, 1, 4, 2]
  %rotated = reshape(%joined) {shape=[2, 2, 8]} : f32[2, 2, 8]
  %c = mul(%x, %cos) : f32[2, 2, 8]
  %d = mul(%rotated, %sin) : f32[2, 2, 8]
  %y = add(%c, %d) : f32[2, 2, 8]
  return y=%y
}""")
    assert rewritten(module, "raise-rotary")[0] == module
    assert (
        "are not the first and second channels of all pairs of f32[2, 2, 8]"
        in RotaryNeighbours().explain(module).reason
    )


# -- shared heads as models write them ------------------------------------------------------------------------------


def expanded(x: Tensor) -> Tensor:
    batch, heads, length, width = x.shape
    return x[:, :, None].expand(batch, heads, 3, length, width).reshape(batch, heads * 3, length, width)


def interleaved(x: Tensor) -> Tensor:
    return x.repeat_interleave(3, dim=1)


def repeated(x: Tensor) -> Tensor:
    return x.unsqueeze(2).repeat(1, 1, 3, 1, 1).flatten(1, 2)


def transposed(x: Tensor) -> Tensor:
    x = x.transpose(1, 2)
    batch, length, heads, width = x.shape
    return (
        x[:, :, :, None].expand(batch, length, heads, 3, width).reshape(batch, length, heads * 3, width).transpose(1, 2)
    )


def in_turn(x: Tensor) -> Tensor:
    """The order of ``Tensor.repeat``: all heads, and all again. No grouped attention reads this."""
    return x.repeat(1, 3, 1, 1)


def attention_of(repeat: Callable[[Tensor], Tensor], masked: bool) -> Module:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, repeat(k), repeat(v), mask if masked else None)

    batch, seq = torch.export.Dim("batch", min=1, max=8), torch.export.Dim("seq", min=2, max=64)
    inputs = torch.randn(2, 6, 12, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8), torch.randn(12, 12)
    shapes = {name: {0: batch, 2: seq} for name in "qkv"} | {"mask": {0: seq, 1: seq}}
    return trimtab.trace(Model().eval(), inputs, dynamic_shapes=shapes)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("repeat", [expanded, interleaved, repeated, transposed], ids=lambda repeat: repeat.__name__)
def test_shared_heads_are_not_repeated(repeat: Callable[[Tensor], Tensor], masked: bool) -> None:
    module = attention_of(repeat, masked)
    result, _ = rewritten(module, "cleanup,remove-repeat-kv,cleanup")
    (op,) = result.walk()
    assert isinstance(op, ops.Attention)
    assert (op.k.name, op.v.name) == ("k", "v")
    assert_same_results(module, result, *sizes_of(module))


def test_heads_in_turn_stay_repeated() -> None:
    module = attention_of(in_turn, False)
    result, _ = rewritten(module, "cleanup,remove-repeat-kv")
    assert names(result).count("tile") == 2
    assert GroupedHeads().explain(result).reason == "a tile is not a result of reshape or permute"


def test_keys_that_are_returned_stay_repeated() -> None:
    module = read("""
graph main(%q: f32[2, 4, 5, 8], %k: f32[2, 2, 5, 8]) {
  %apart = reshape(%k) {shape=[2, 2, 1, 5, 8]} : f32[2, 2, 1, 5, 8]
  %copies = expand(%apart) {shape=[2, 2, 2, 5, 8]} : f32[2, 2, 2, 5, 8]
  %joined = reshape(%copies) {shape=[2, 4, 5, 8]} : f32[2, 4, 5, 8]
  %y = attention(%q, %joined, %joined) {scale=0.35} : f32[2, 4, 5, 8]
  return y=%y, keys=%joined
}""")
    assert rewritten(module, "remove-repeat-kv")[0] == module
    reason = "an inner value, the result of reshape, is also read by the graph's outputs"
    assert GroupedHeads().explain(module).reason == reason
