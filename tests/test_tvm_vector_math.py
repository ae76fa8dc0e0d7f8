"""The vectorised transcendental functions: a few units in the last place over their whole range."""

from __future__ import annotations

import math

import pytest
import torch
from tvm_harness import Compiled

from trimtab.ir import Builder, DType, TensorType, ops

pytest.importorskip("tvm")
EDGES = [
    0.0,
    -0.0,
    math.inf,
    -math.inf,
    math.nan,
    1e-45,
    -1e-45,
    1e-38,
    3e38,
    -3e38,
    88.72,
    88.73,
    -87.4,
    -103.9,
    -104.1,
    4.0,
]
FUNCTIONS = {
    ops.Exp: torch.exp,
    ops.Log: torch.log,
    ops.Tanh: torch.tanh,
    ops.Erf: torch.erf,
    ops.Sigmoid: torch.sigmoid,
}


def test_float32_functions_are_accurate_and_keep_special_values() -> None:
    n = 20000
    b = Builder()
    x = b.input("x", TensorType(DType.F32, (n,)))
    b.output(*(b(cls(x)) for cls in FUNCTIONS))
    compiled = Compiled(b.module)
    generator = torch.Generator().manual_seed(0)
    for spread in (1e-6, 1e-2, 1.0, 10.0, 100.0):
        data = torch.randn(n, generator=generator) * spread
        data[: len(EDGES)] = torch.tensor(EDGES)
        for mine, (cls, function) in zip(compiled(data), FUNCTIONS.items(), strict=True):
            exact = function(data.double())
            rounded = exact.float()
            assert torch.equal(torch.isnan(mine), torch.isnan(rounded)), cls.__name__
            assert torch.equal(torch.isinf(mine), torch.isinf(rounded)), cls.__name__
            ordinary = torch.isfinite(rounded) & (rounded.abs() > 1.2e-38)
            error = ((mine.double() - exact) / exact)[ordinary].abs().max() if ordinary.any() else 0.0
            assert error < 1e-6, (cls.__name__, spread, float(error))
            tiny = torch.isfinite(rounded) & ~ordinary
            assert not ((mine.double() - exact)[tiny].abs() > 1e-38).any(), cls.__name__


def test_results_rounded_to_bfloat16_are_off_by_little_more_than_the_rounding() -> None:
    n = 20000
    b = Builder()
    x = b.input("x", TensorType(DType.F32, (n,)))
    functions = {
        ops.Erf: torch.erf, ops.Sigmoid: torch.sigmoid, ops.Gelu: torch.nn.functional.gelu,
        ops.Silu: torch.nn.functional.silu,
    }  # fmt: skip
    b.output(*(b(ops.Cast(b(cls(x)), DType.BF16)) for cls in functions))
    compiled = Compiled(b.module)
    for spread in (1e-2, 1.0, 10.0, 100.0):
        data = torch.randn(n, generator=torch.Generator().manual_seed(0)) * spread
        data[:3] = torch.tensor([math.nan, 1e30, -1e30])
        for mine, (cls, function) in zip(compiled(data), functions.items(), strict=True):
            exact = function(data.double())
            assert mine.dtype is torch.bfloat16
            assert torch.equal(torch.isnan(mine), torch.isnan(exact)), cls.__name__
            error = (mine.double() - exact).abs() / (exact.abs() + 0.05)
            assert error[~torch.isnan(exact)].max() < 1.1 * 2**-8, (cls.__name__, spread, float(error[3:].max()))


def test_rounding_to_bfloat16_is_to_the_nearest_even() -> None:
    bits = torch.randint(-(2**31), 2**31, (4099,), generator=torch.Generator().manual_seed(1), dtype=torch.int64)
    data = bits.to(torch.int32).view(torch.float32)
    ties = torch.arange(0x3F800000, 0x3F900000, 0x8000, dtype=torch.int32).view(torch.float32)
    data[: len(ties)] = ties
    data[(data.abs() < 1.2e-38) | data.isnan()] = 0.0  # an instruction of x86 takes numbers below this for 0
    data[-4:] = torch.tensor([math.nan, math.inf, -math.inf, 3.4e38])
    b = Builder()
    b.output(b(ops.Cast(b.input("x", TensorType(DType.F32, tuple(data.shape))), DType.BF16)))
    for target in ("native", ""):
        (mine,) = Compiled(b.module, target=target)(data)
        torch.testing.assert_close(mine, data.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


def test_float64_stays_with_libm() -> None:
    b = Builder()
    x = b.input("x", TensorType(DType.F64, (257,)))
    b.output(*(b(cls(x)) for cls in FUNCTIONS))
    data = torch.randn(257, generator=torch.Generator().manual_seed(0), dtype=torch.float64).abs() + 0.01
    for mine, function in zip(Compiled(b.module)(data), FUNCTIONS.values(), strict=True):
        torch.testing.assert_close(mine, function(data), rtol=1e-14, atol=1e-15)
