"""Zoo models with symbolic batch and sequence: compiled code agrees with the interpreter at untraced sizes."""

from __future__ import annotations

import pytest
import torch
from tvm_harness import Compiled

from trimtab import trace
from trimtab.ir import interpret
from zoo_models import ZooModel, zoo

pytest.importorskip("tvm")


@pytest.mark.parametrize("entry", zoo(quick=True), ids=lambda entry: entry.name)
def test_zoo_model_with_symbolic_sizes(entry: ZooModel) -> None:
    example = entry.inputs(2, 12)
    module = trace(entry.build(), tuple(example.values()), dynamic_shapes=entry.dynamic_shapes())
    compiled = Compiled(module)
    has_length = any("sequence" in axes.values() for axes in entry.dynamic_axes.values())
    for batch, length in ((1, 33), (3, 7)) if has_length else ((1, 12), (3, 12)):
        inputs = list(entry.inputs(batch, length).values())
        for mine, reference in zip(compiled(*inputs), interpret(module, inputs), strict=True):
            assert mine.shape == reference.shape
            assert mine.dtype == reference.dtype
            error = (mine.double() - reference.double()).abs().max() / reference.double().abs().max()
            assert torch.isfinite(error)
            assert error < 1e-5
