"""Channels are followed through ops that move elements, as the ops themselves move channel numbers."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pass_harness import read

from trimtab.ir import Builder, DType, Graph, Module, Op, TensorType, Value, interpret, ops
from trimtab.ir.analysis.channels import Channels, readers, source_of

MOVES = {
    "heads": """
  %h = reshape(%x) {shape=[batch, 5, 3, 4]} : f32[batch, 5, 3, 4]
  %p = permute(%h) {dims=[0, 2, 1, 3]} : f32[batch, 3, 5, 4]
  %y = neg(%p) : f32[batch, 3, 5, 4]
  return y=%y""",
    "packed, by index": """
  %h = reshape(%x) {shape=[batch, 5, 3, 2, 2]} : f32[batch, 5, 3, 2, 2]
  %p = permute(%h) {dims=[2, 0, 3, 1, 4]} : f32[3, batch, 2, 5, 2]
  %k = select(%p) {dim=0, index=1} : f32[batch, 2, 5, 2]
  %y = neg(%k) : f32[batch, 2, 5, 2]
  return y=%y""",
    "packed, by split": """
  %a, %b, %c = split(%x) {dim=2, sizes=[4, 4, 4]} : f32[batch, 5, 4], f32[batch, 5, 4], f32[batch, 5, 4]
  %y = neg(%b) : f32[batch, 5, 4]
  %z = neg(%c) : f32[batch, 5, 4]
  return y=%y, z=%z""",
    "steps": """
  %a = slice(%x) {dim=2, start=1, stop=12, step=3} : f32[batch, 5, 4]
  %b = reshape(%a) {shape=[batch, 5, 2, 2]} : f32[batch, 5, 2, 2]
  %c = slice(%b) {dim=1, start=1, stop=4} : f32[batch, 3, 2, 2]
  %y = neg(%c) : f32[batch, 3, 2, 2]
  return y=%y""",
    "one token": """
  %a = select(%x) {dim=1, index=0} : f32[batch, 12]
  %b = reshape(%a) {shape=[batch, 1, 1, 12]} : f32[batch, 1, 1, 12]
  %c = expand(%b) {shape=[2, batch, 1, 3, 12]} : f32[2, batch, 1, 3, 12]
  %y = neg(%c) : f32[2, batch, 1, 3, 12]
  return y=%y""",
    "flattened batch": """
  %a = reshape(%x) {shape=[5*batch, 12]} : f32[5*batch, 12]
  %b = reshape(%a) {shape=[5*batch, 3, 4]} : f32[5*batch, 3, 4]
  %c = reshape(%b) {shape=[batch, 5, 6, 2]} : f32[batch, 5, 6, 2]
  %y = neg(%c) : f32[batch, 5, 6, 2]
  return y=%y""",
    "rolled and flipped": """
  %a = roll(%x) {shifts=[1], dims=[1]} : f32[batch, 5, 12]
  %b = flip(%a) {dims=[0]} : f32[batch, 5, 12]
  %y = neg(%b) : f32[batch, 5, 12]
  return y=%y""",
}

MIXED = {
    "tokens and channels in one axis": """
  %a = reshape(%x) {shape=[batch, 60]} : f32[batch, 60]
  %b = permute(%a) {dims=[1, 0]} : f32[60, batch]
  %y = neg(%b) : f32[60, batch]
  return y=%y""",
    "channels of two tokens in one axis": """
  %a = slice(%x) {dim=1, start=0, stop=4} : f32[batch, 4, 12]
  %b = reshape(%a) {shape=[batch, 2, 24]} : f32[batch, 2, 24]
  %y = neg(%b) : f32[batch, 2, 24]
  return y=%y""",
    "heads joined in another order": """
  %a = reshape(%x) {shape=[batch, 5, 3, 4]} : f32[batch, 5, 3, 4]
  %b = permute(%a) {dims=[0, 1, 3, 2]} : f32[batch, 5, 4, 3]
  %c = reshape(%b) {shape=[batch, 5, 12]} : f32[batch, 5, 12]
  %y = neg(%c) : f32[batch, 5, 12]
  return y=%y""",
    "reversed channels": """
  %a = flip(%x) {dims=[2]} : f32[batch, 5, 12]
  %y = neg(%a) : f32[batch, 5, 12]
  return y=%y""",
    "a number of channels that is a symbol": """
  %a = slice(%x) {dim=2, start=batch, stop=8 + batch} : f32[batch, 5, 8]
  %y = neg(%a) : f32[batch, 5, 8]
  return y=%y""",
}


def module(body: str) -> Module:
    return read("symbols batch=1..4\ngraph main(%x: f32[batch, 5, 12]) {" + body + "\n}")


@pytest.mark.parametrize("name", MOVES)
def test_numbers_are_those_that_the_ops_move(name: str) -> None:
    m = module(MOVES[name])
    (x,) = m.main.inputs
    numbers = torch.arange(12.0).expand(3, 5, 12)
    found = {use.user: channels for use, channels in readers(x, 2)}
    assert {type(op).name for op in found} == {"neg"}
    for op, moved in zip(found, interpret(m, [numbers]), strict=True):
        channels = found[op]
        assert channels.shape == op.operands[0].type.shape
        assert torch.equal((channels.numbers() * torch.ones(moved.shape)), -moved)
        assert source_of(op.operands[0]) is x


@pytest.mark.parametrize("name", MIXED)
def test_an_op_that_mixes_channels_with_other_axes_is_a_reader(name: str) -> None:
    m = module(MIXED[name])
    ((use, _),) = readers(m.main.inputs[0], 2)
    assert type(use.user).name != "neg"


def random_move(value: Value, draw: random.Random) -> Op:
    """An op that moves elements of a value of static shape."""
    shape = [int(size) for size in value.type.shape]
    axis = draw.randrange(len(shape))
    kind = draw.choice(["reshape", "reshape", "reshape", "permute", "slice", "select", "split", "expand", "roll"])
    if kind == "permute":
        return ops.Permute(value, dims=tuple(draw.sample(range(len(shape)), len(shape))))
    if kind == "slice":
        start = draw.randrange(shape[axis])
        return ops.Slice(
            value, dim=axis, start=start, stop=draw.randint(start + 1, shape[axis]), step=draw.randint(1, 2)
        )
    if kind == "select" and len(shape) > 1:
        return ops.Select(value, dim=axis, index=draw.randrange(shape[axis]))
    if kind == "split" and shape[axis] > 1:
        first = draw.randint(1, shape[axis] - 1)
        return ops.Split(value, dim=axis, sizes=(first, shape[axis] - first))
    if kind == "expand":
        return ops.Expand(value, shape=(draw.randint(1, 2), *(draw.choice([1, 3]) if n == 1 else n for n in shape)))
    if kind == "roll":
        return ops.Roll(value, shifts=(1,), dims=(axis,))
    factors = [p for n in shape for p in (2, 2, 3) if n % p == 0] if draw.random() < 0.5 else []
    parts = list(shape)
    for factor in factors[:2]:
        found = next((i for i, n in enumerate(parts) if n % factor == 0 and n > factor), None)
        if found is not None:
            parts[found : found + 1] = [parts[found] // factor, factor]
    while len(parts) > 1 and draw.random() < 0.4:
        i = draw.randrange(len(parts) - 1)
        parts[i : i + 2] = [parts[i] * parts[i + 1]]
    return ops.Reshape(value, shape=tuple(parts))


@settings(max_examples=300)
@given(seed=st.integers(0, 2**32))
def test_random_moves(seed: int) -> None:
    """Where channels are followed they are right; in particular no reshape is followed that mixes them."""
    draw = random.Random(seed)
    b = Builder()
    x = b.input("x", TensorType(DType.F32, (2, 3, 12)))
    values = [x]
    for _ in range(draw.randint(1, 6)):
        if values[-1].type.rank < 7:
            values += b.add(random_move(values[-1], draw)).results
    ends = [b(ops.Neg(value)) for value in values]
    b.output(*ends)
    moved = dict(zip(ends, interpret(b.module, [torch.arange(12.0).expand(2, 3, 12)]), strict=True))
    for use, channels in readers(x, 2):
        if isinstance(use.user, ops.Neg):
            result = use.user.result
            assert torch.equal(channels.numbers().float().expand(result.type.shape), -moved[result])
            assert source_of(use.user.x) is x


def test_every_place_is_found_once() -> None:
    m = module("""
  %a = permute(%x) {dims=[1, 0, 2]} : f32[5, batch, 12]
  %b = mul(%a, %a) : f32[5, batch, 12]
  %c = add(%b, %a) : f32[5, batch, 12]
  return x=%x, c=%c, a=%a""")
    found = [use for use, _ in readers(m.main.inputs[0], 2)]
    assert len(found) == len(set(found)) == 5
    assert sum(isinstance(use.user, Graph) for use in found) == 2


def test_channels_meet_where_one_is_among_both() -> None:
    m = module("""
  %a, %b = split(%x) {dim=2, sizes=[5, 7]} : f32[batch, 5, 5], f32[batch, 5, 7]
  %c = slice(%x) {dim=2, start=4, stop=6} : f32[batch, 5, 2]
  return a=%a, b=%b, c=%c""")
    first, second, across = (channels for _, channels in sorted(readers(m.main.inputs[0], 2), key=lambda r: r[0].index))
    assert not first.meets(second)
    assert first.meets(across)
    assert second.meets(across)


def test_an_axis_of_one_channel() -> None:
    m = read("graph main(%x: f32[2, 1]) {\n  %a = reshape(%x) {shape=[2]} : f32[2]\n  return a=%a\n}")
    assert m.main.inputs[0].type.dtype is DType.F32
    ((_, channels),) = readers(m.main.inputs[0], 1)
    assert channels == Channels((2,), (0,))
    assert channels.numbers().tolist() == [0]
