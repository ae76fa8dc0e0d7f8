"""Compiles modules with the MLIR backend inside tests and runs them in IREE."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from trimtab.backends.mlir.compiler import build
from trimtab.backends.mlir.targets import find_target
from trimtab.ir import DType, Module
from trimtab.runtime.iree_code import IreeFunction


class Compiled:
    """A module compiled for this machine, callable with torch tensors."""

    def __init__(self, module: Module, target: str = "native", threads: int = 2) -> None:
        self.module = module
        self.code = build(module, target)
        weights = {
            weight.name: np.frombuffer(b"".join(bytes(block) for block in weight.blocks()), np.uint8)
            for weight in self.code.weights
        }
        outputs = [str(value.type.dtype) for value in module.main.outputs]
        driver = find_target(target).driver
        self.function = IreeFunction(self.code.library, weights, self.code.entry, driver, threads, outputs)

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        given = [
            (str(DType.from_torch(value.dtype)), (value.view(torch.uint16) if _is_bf16(value) else value).numpy())
            for value in map(torch.Tensor.contiguous, inputs)
        ]
        wanted: Sequence[DType] = [value.type.dtype for value in self.module.main.outputs]
        return [
            torch.from_numpy(array).view(dtype.to_torch())
            for array, dtype in zip(self.function(given), wanted, strict=True)
        ]


def _is_bf16(value: torch.Tensor) -> bool:
    return value.dtype is torch.bfloat16
