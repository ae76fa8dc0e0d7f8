"""Compiled graphs in which fusion or flattened axes once went wrong; each is compared with the interpreter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import trimtab
from trimtab.ir import Builder, DType, Module, TensorType, symbol
from trimtab.ir.ops import Add, Attention, Conv1d, Matmul, Permute, Reshape, Roll, RotaryEmbedding, Slice

pytest.importorskip("tvm", reason="the TVM backend is not installed")

BATCH = symbol("batch", 1, 64)


def check(module: Module, folder: Path, *shapes: tuple[int, ...]) -> None:
    """Compile, run at the given input shapes and compare."""
    path = trimtab.compile(module, target="native", pipeline=None).save(folder / "model.trim")
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    with trimtab.load(path) as session:
        result = session(*(tensor.numpy() for tensor in inputs))
    (expected,) = trimtab.interpret(module, inputs)
    np.testing.assert_allclose(result, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_a_slice_from_zero_is_not_an_epilogue_of_the_whole_tile(tmp_path: Path) -> None:
    b = Builder()
    x = b.input("x", TensorType(DType.F32, (BATCH, 8, 18)))
    weight = b.weight("w", torch.randn(8, 8, 4))
    bias = b.weight("b", torch.randn(8))
    wide = b(Conv1d(x, weight, bias, stride=(1,), padding=(2,), dilation=(1,)))
    b.output(b(Slice(wide, dim=2, start=0, stop=18)))
    check(b.module, tmp_path, (3, 8, 18))


def test_an_elementwise_epilogue_covers_the_whole_tile(tmp_path: Path) -> None:
    b = Builder()
    x = b.input("x", TensorType(DType.F32, (BATCH, 7, 24)))
    product = b(Matmul(x, b.weight("w", torch.randn(24, 40))))
    b.output(b(Add(product, b.weight("b", torch.randn(40)))))
    check(b.module, tmp_path, (5, 7, 24))


def test_heads_may_be_a_multiple_of_the_batch(tmp_path: Path) -> None:
    b = Builder()
    x = b.input("x", TensorType(DType.F32, (BATCH, 4, 6, 16)))
    heads = b(Reshape(x, shape=(BATCH * 4, 6, 16)))
    attended = b(Attention(heads, heads, heads, scale=0.25))
    b.output(b(Reshape(attended, shape=(BATCH, 4, 6, 16))))
    check(b.module, tmp_path, (3, 4, 6, 16))


def test_rows_that_merge_a_fixed_axis_with_the_batch(tmp_path: Path) -> None:
    b = Builder()
    x = b.input("x", TensorType(DType.F32, (BATCH, 16, 24)))
    turned = b(Permute(x, dims=(1, 0, 2)))
    b.output(b(Matmul(turned, b.weight("w", torch.randn(24, 32)))))
    for batch in (1, 5):
        check(b.module, tmp_path, (batch, 16, 24))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_embedding_reads_and_writes_through_permutations(tmp_path: Path, interleaved: bool) -> None:
    b = Builder()
    x = b.input("x", TensorType(DType.F32, (BATCH, 6, 4, 40)))
    table = b.input("table", TensorType(DType.F32, (6, 36)))
    heads = b(Permute(x, dims=(0, 2, 1, 3)))
    turned = b(RotaryEmbedding(heads, table, table, interleaved=interleaved))
    b.output(b(Permute(turned, dims=(0, 2, 3, 1))))
    check(b.module, tmp_path, (3, 6, 4, 40), (6, 36))


@pytest.mark.parametrize("shifts", [(-2, -2), (3, 1), (8, -9)])
def test_two_rolled_axes_of_one_image(shifts: tuple[int, int], tmp_path: Path) -> None:
    """TVM once merged the remainders of both axes to a wrong index; more images, or a free batch, hid it."""
    b = Builder()
    x = b.input("x", TensorType(DType.F32, (1, 8, 8, 16)))
    b.output(b(Roll(x, shifts=shifts, dims=(1, 2))))
    check(b.module, tmp_path, (1, 8, 8, 16))
