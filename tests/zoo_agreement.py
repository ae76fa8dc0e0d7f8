"""Compiled code of a zoo model against the interpreter, at sizes that were not traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from trimtab.ir import Module, interpret
from zoo_models import ZooModel

Run = Callable[..., Sequence[torch.Tensor]]


def assert_zoo_model_agrees(entry: ZooModel, module: Module, run: Run) -> None:
    """Shapes and types of all outputs are the interpreter's, and values differ by less than 1e-5 of the largest."""
    has_length = any("sequence" in axes.values() for axes in entry.dynamic_axes.values())
    for batch, length in ((1, 33), (3, 7)) if has_length else ((1, 12), (3, 12)):
        inputs = list(entry.inputs(batch, length).values())
        for mine, reference in zip(run(*inputs), interpret(module, inputs), strict=True):
            assert mine.shape == reference.shape
            assert mine.dtype == reference.dtype
            error = (mine.double() - reference.double()).abs().max() / reference.double().abs().max()
            assert torch.isfinite(error)
            assert error < 1e-5
