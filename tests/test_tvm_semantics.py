"""Corners where a code generator easily differs from torch: integer division, NaN, small types, masks, long rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tvm_harness import assert_matches

from trimtab.ir import Builder, DType, Module, TensorType, ops

pytest.importorskip("tvm")
Make = Callable[..., Any]


def _module(inputs: Sequence[torch.Tensor], makes: Sequence[Make]) -> Module:
    """A module with the results of each op that ``makes`` builds from the inputs."""
    b = Builder()
    types = [TensorType(DType.from_torch(x.dtype), tuple(x.shape)) for x in inputs]
    values = [b.input(f"x{i}", type) for i, type in enumerate(types)]
    b.output(*(result for make in makes for result in b.add(make(*values)).results))
    return b.module


def _check(inputs: Sequence[torch.Tensor], *makes: Make, tolerance: float = 1e-5, atol: float = 1e-6) -> None:
    assert_matches(_module(inputs, makes), inputs, rtol=tolerance, atol=atol)


def test_signs_of_integer_division() -> None:
    x = torch.tensor([-7, -6, -1, 0, 1, 5, 6, 7], dtype=torch.int32)
    y = torch.tensor([3, -3, 2, -2, 5, -5, 4, -4], dtype=torch.int32)
    _check(
        (x, y),
        lambda a, b: ops.Div(a, b, rounding="trunc"),
        lambda a, b: ops.Div(a, b, rounding="floor"),
        ops.Remainder,
        ops.Fmod,
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int64], ids=str)
def test_integers_wrap_and_order_as_in_torch(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 100, (5, 9), generator=generator).to(dtype)
    y = torch.randint(1, 7, (9,), generator=generator).to(dtype)
    _check(
        (x, y),
        *(ops.Add, ops.Sub, ops.Mul, ops.Maximum, ops.Remainder, ops.Lt, ops.BitwiseXor, ops.ShiftLeft, ops.Pow),
        lambda a, b: ops.Div(a, b, rounding="floor"),
        lambda a, b: ops.Sum(a, (1,)),
        lambda a, b: ops.Amax(a, (0,)),
        lambda a, b: ops.Argmax(a, 1),
        lambda a, b: ops.Sort(a, 1),
        lambda a, b: ops.Cumsum(a, 1, DType.I64),
        lambda a, b: ops.Clamp(a, 2, 50),
        lambda a, b: ops.Cast(a, DType.F32),
    )


def test_nan_infinity_and_signed_zero() -> None:
    x = torch.tensor([math.nan, 1.0, -2.0, math.inf, 0.0, -0.0, 3.5, -3.5])
    y = torch.tensor([1.0, math.nan, 2.0, 1.0, 0.0, 0.0, -2.0, 2.0])
    _check(
        (x, y),
        *(ops.Maximum, ops.Minimum, ops.Eq, ops.Ne, ops.Lt, ops.Ge, ops.Remainder, ops.Fmod, ops.Pow),
        lambda a, b: ops.Div(a, b, rounding="floor"),
        lambda a, b: ops.Div(a, b, rounding="trunc"),
        lambda a, b: ops.Sort(a, 0),
        lambda a, b: ops.Sort(a, 0, descending=True),
        lambda a, b: ops.Topk(a, 0, 3),
        lambda a, b: ops.Argmax(a, 0),
        lambda a, b: ops.Argmin(a, 0),
        lambda a, b: ops.Amax(a, (0,)),
        lambda a, b: ops.Clamp(a, -1.0, 1.0),
        lambda a, b: ops.Any(a, (0,)),
        *(lambda a, b, cls=cls: cls(a) for cls in (ops.LogicalNot, ops.Round, ops.Sign, ops.Softplus, ops.Elu)),
        lambda a, b: ops.Cast(b, DType.BOOL),
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)]
)
def test_other_floating_types(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(1)
    q, w, image, kernel = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((1, 4, 9, 16), (20, 16), (2, 6, 9, 9), (8, 3, 3, 3))
    )
    _check(
        (q, w, image, kernel),
        lambda q, w, x, k: ops.Attention(q, q, q, scale=0.25, causal=True),
        lambda q, w, x, k: ops.LayerNorm(q),
        lambda q, w, x, k: ops.Softmax(q, 3),
        lambda q, w, x, k: ops.Mean(q, (2, 3)),
        lambda q, w, x, k: ops.Linear(q, w),
        lambda q, w, x, k: ops.Gelu(q),
        lambda q, w, x, k: ops.Conv2d(x, k, stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=2),
        lambda q, w, x, k: ops.MaxPool2d(x, (2, 2), (2, 2)),
        lambda q, w, x, k: ops.Resize2d(x, (5, 7)),
        tolerance=tolerance,
        atol=8 * tolerance,
    )


def test_long_rows() -> None:
    x = torch.randn(3, 5000, generator=torch.Generator().manual_seed(2))
    _check(
        (x,),
        lambda a: ops.Sort(a, 1),
        lambda a: ops.Topk(a, 1, 50),
        lambda a: ops.Sum(a, (1,)),
        lambda a: ops.Softmax(a, 1),
        lambda a: ops.Argmax(a, 1),
        atol=1e-4,
    )


def test_fully_masked_rows_of_attention_give_zeros() -> None:
    mask = torch.full((2, 1, 5, 5), -math.inf)
    mask[0] = 0
    q = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(3))
    _check((q, mask), lambda a, m: ops.Attention(a, a, a, m, scale=0.3), lambda a, m: ops.Softmax(m, 3))


def test_indices_outside_of_a_tensor_never_touch_foreign_memory() -> None:
    """Reads are clamped and writes dropped; the reference raises an error for these."""
    from tvm_harness import Compiled

    table = torch.arange(12.0).reshape(4, 3)
    indices = torch.tensor([0, 3, 4, 1 << 40, -(1 << 40)])
    module = _module((table, indices), (ops.Embedding,))
    (rows,) = Compiled(module)(table, indices)
    assert rows[:, 0].tolist() == [0.0, 9.0, 9.0, 9.0, 0.0]
    target, places, updates = torch.zeros(1, 4), torch.tensor([[2, 9, -7]]), torch.ones(1, 3)
    module = _module((target, places, updates), (lambda x, i, u: ops.Scatter(x, i, u, 1),))
    (written,) = Compiled(module)(target, places, updates)
    assert written.tolist() == [[0.0, 0.0, 1.0, 0.0]]
