"""Operands that kernels read where they lie inside a larger tensor, without a copy."""

from __future__ import annotations

import pytest
import torch
from tvm_harness import Compiled

from trimtab.ir import Builder, DType, Module, TensorType, Value, interpret, symbol
from trimtab.ir.ops import Attention, Linear, Matmul, Permute, Reshape, Slice

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
    packed = build(Linear(x, build.weight("w", torch.randn(64, 32)), build.weight("b", torch.randn(64))))

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
        torch.testing.assert_close(compiled(x), interpret(module, [x]), rtol=1e-4, atol=1e-5)


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
