"""Runs token reductions that are built as graphs: in float64 by the interpreter, in float32 by the TVM backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from tvm_harness import assert_matches

from trimtab.ir import Builder, DType, Module, TensorType, Value, interpret, symbol, verify

BATCH = symbol("batch", 1, 64)
Array = NDArray[np.float64]
Make = Callable[..., Sequence[Value]]


def built(make: Make, *inputs: Array) -> Module:
    """A module of ``make(build, *values)`` with a symbolic batch, one f32 input an array."""
    build = Builder()
    values = [build.input(f"x{i}", TensorType(DType.F32, (BATCH, *array.shape[1:]))) for i, array in enumerate(inputs)]
    build.output(*make(build, *values))
    verify(build.module)
    return build.module


def evaluated(make: Make, *inputs: Array) -> list[Array]:
    """The results of ``make`` in float64."""
    tensors = [torch.from_numpy(array) for array in inputs]
    module = built(make, *inputs)
    return [value.numpy() for value in interpret(module, [t.float() for t in tensors], precision=torch.float64)]


def check_compiled(make: Make, *inputs: Array, tolerance: float = 1e-5) -> None:
    """Compiled code gives what the interpreter does in float32."""
    module = built(make, *inputs)
    assert_matches(module, [torch.from_numpy(array).float() for array in inputs], rtol=tolerance, atol=tolerance)


def normal(*shape: int, seed: int = 0) -> Array:
    """Normal numbers that float32 holds exactly."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32).astype(np.float64)


def signs(*shape: int, seed: int = 0) -> Array:
    """Rows of +-1/sqrt(D), D a power of 4: of length 1, and with few different products, all without rounding."""
    generator = np.random.default_rng(seed)
    return generator.choice([-1.0, 1.0], size=shape) / np.sqrt(shape[-1])
