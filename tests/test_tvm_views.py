"""Operands that kernels read where they lie inside a larger tensor, without a copy."""

from __future__ import annotations

import pytest
import torch
from tvm_harness import Compiled

from trimtab.ir import Builder, DType, Module, TensorType, Value, interpret, symbol
from trimtab.ir.fused import fuse
from trimtab.ir.ops import Add, Attention, Linear, Matmul, Mean, Neg, Permute, Reshape, Slice

pytest.importorskip("tvm", reason="the TVM backend is not installed")

from trimtab.backends.tvm.views import view_of

BATCH, SEQ = symbol("batch", 1, 8), symbol("seq", 1, 64)


def packed_input(*shape: object) -> tuple[Builder, Value]:
    build = Builder()
    return build, build.input("x", TensorType(DType.F32, shape))  # type: ignore[arg-type]


def test_heads_of_a_packed_projection() -> None:
    build, x = packed_input(BATCH, SEQ, 96)
    part = build(Slice(x, dim=2, start=32, stop=64))
    heads = build(Permute(build(Reshape(part, shape=(BATCH, SEQ, 4, 8))), dims=(0, 2, 1, 3)))
    view = view_of(heads)
    assert view.base is x
    assert view.shape == (BATCH, SEQ, 12, 8)
    assert view.order == (0, 2, 1, 3)
    assert view.starts == (0, 0, 4, 0)


def test_a_slice_with_a_symbolic_start() -> None:
    build, x = packed_input(BATCH, SEQ, 8)
    view = view_of(build(Slice(x, dim=1, start=SEQ - 1, stop=SEQ)))
    assert (view.base, view.shape, view.starts) == (x, (BATCH, SEQ, 8), (0, SEQ - 1, 0))
    assert view.moves


def test_every_other_row() -> None:
    build, x = packed_input(BATCH, 9, 8)
    view = view_of(build(Permute(build(Slice(x, dim=1, start=2, stop=9, step=2)), dims=(0, 2, 1))))
    assert (view.base, view.shape, view.order) == (x, (BATCH, 9, 8), (0, 2, 1))
    assert (view.starts, view.steps) == ((0, 2, 0), (1, 2, 1))
    assert view.moves


def test_a_group_that_only_moves_elements_is_seen_through() -> None:
    build, x = packed_input(BATCH, 9, 8)
    rows = build.add(Slice(x, dim=1, start=1, stop=9, step=2))
    turned = build.add(Permute(rows.result, dims=(0, 2, 1)))
    build.output(turned.result)
    (result,) = fuse(build.module, (rows, turned), turned).results
    view = view_of(result)
    assert (view.base, view.order, view.starts, view.steps) == (x, (0, 2, 1), (0, 1, 0), (1, 2, 1))


def test_a_group_that_computes_is_read_as_a_whole() -> None:
    build, x = packed_input(BATCH, 9, 8)
    twice = build.add(Add(x, x))
    turned = build.add(Permute(twice.result, dims=(0, 2, 1)))
    build.output(turned.result)
    (result,) = fuse(build.module, (twice, turned), turned).results
    assert view_of(result).base is result
    assert not view_of(result).moves


@pytest.mark.parametrize(
    ("start", "stop", "step", "shape"),
    [
        pytest.param(4, 36, 1, (2, 5, 4, 8), id="starts inside a head"),
        pytest.param(0, 24, 1, (2, 5, 3, 8), id="heads do not divide the whole axis"),
        pytest.param(0, 64, 2, (2, 5, 4, 8), id="every other channel"),
        pytest.param(0, 32, 1, (2, 20, 8), id="reshaped over the rows"),
        pytest.param(0, 32, 1, (10, 32), id="axes before the slice merged"),
    ],
)
def test_what_is_no_view_is_read_as_a_copy(start: int, stop: int, step: int, shape: tuple[int, ...]) -> None:
    build, x = packed_input(2, 5, 68)
    part = build(Slice(x, dim=2, start=start, stop=stop, step=step))
    folded = build(Reshape(part, shape=shape))
    view = view_of(folded)
    assert view.base is folded
    assert not view.moves


def _self_attention(rows: object) -> Module:
    """Grouped heads, 4 and 2, of one packed projection."""
    build, x = packed_input(2, rows, 32)
    packed = build(Linear(x, build.weight("w", torch.randn(64, 32) / 32**0.5), build.weight("b", torch.randn(64))))

    def heads(start: int, count: int) -> Value:
        part = build(Slice(packed, dim=2, start=start, stop=start + 8 * count))
        return build(Permute(build(Reshape(part, shape=(2, rows, count, 8))), dims=(0, 2, 1, 3)))  # type: ignore[arg-type]

    build.output(build(Attention(heads(0, 4), heads(32, 2), heads(48, 2), scale=0.3)))
    return build.module


@pytest.mark.parametrize("rows", [11, SEQ], ids=str)
def test_attention_reads_its_heads_from_the_packed_projection(rows: object) -> None:
    module = _self_attention(rows)
    compiled = Compiled(module)
    for length in (11,) if rows == 11 else (1, 5, 19):
        x = torch.randn(2, length, 32)
        (expected,) = interpret(module, [x], precision=torch.float64)
        torch.testing.assert_close(compiled(x)[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_nothing_is_copied() -> None:
    # The packed projection of 64 columns is all that is kept: the result is the output.
    assert Compiled(_self_attention(11)).code.memory["arena_bytes"] == 2 * 11 * 64 * 4


def test_matmul_reads_slices() -> None:
    build, x = packed_input(3, 6, 40)
    left = build(Slice(x, dim=2, start=8, stop=24))
    right = build(Permute(build(Slice(x, dim=2, start=24, stop=40)), dims=(0, 2, 1)))
    build.output(build(Matmul(left, right)), build(Matmul(right, left)))
    value = torch.randn(3, 6, 40)
    torch.testing.assert_close(Compiled(build.module)(value), interpret(build.module, [value]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [9, 30])
def test_matmul_reads_every_other_row_in_place(tokens: int) -> None:
    """Tokens at even positions against those at odd ones, as they are matched for merging."""
    build, x = packed_input(2, tokens, 32)
    unit = build(Neg(x))
    even, odd = (build(Slice(unit, dim=1, start=start, stop=tokens, step=2)) for start in (0, 1))
    build.output(build(Matmul(even, build(Permute(odd, dims=(0, 2, 1))))))
    compiled, value = Compiled(build.module), torch.randn(2, tokens, 32)
    torch.testing.assert_close(compiled(value), interpret(build.module, [value]), rtol=1e-4, atol=1e-5)
    assert [call.name for call in compiled.code.calls] == ["neg", "matmul"]


def test_a_mean_over_heads_reads_them_from_the_packed_projection() -> None:
    build, x = packed_input(2, 7, 96)
    packed = build(Neg(x))
    keys = build(Reshape(build(Slice(packed, dim=2, start=32, stop=64)), shape=(2, 7, 4, 8)))
    build.output(build(Mean(keys, dims=(2,))))
    compiled, value = Compiled(build.module), torch.randn(2, 7, 96)
    torch.testing.assert_close(compiled(value), interpret(build.module, [value]), rtol=1e-5, atol=1e-6)
    assert [call.name for call in compiled.code.calls] == ["neg", "mean"]
