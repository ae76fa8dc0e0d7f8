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


def test_float64_stays_with_libm() -> None:
    b = Builder()
    x = b.input("x", TensorType(DType.F64, (257,)))
    b.output(*(b(cls(x)) for cls in FUNCTIONS))
    data = torch.randn(257, generator=torch.Generator().manual_seed(0), dtype=torch.float64).abs() + 0.01
    for mine, function in zip(Compiled(b.module)(data), FUNCTIONS.values(), strict=True):
        torch.testing.assert_close(mine, function(data), rtol=1e-14, atol=1e-15)
