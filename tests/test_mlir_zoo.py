"""Zoo models with symbolic sizes: code of the MLIR backend agrees with the interpreter at untraced ones."""

from __future__ import annotations

import pytest
import torch

from trimtab import optimize, trace
from trimtab.ir import interpret
from zoo_models import ZooModel, get

pytest.importorskip("torch_mlir")
pytest.importorskip("iree.compiler")

from mlir_harness import Compiled

MODELS = ("vit", "swin", "bert", "gpt2", "mamba", "resnet")


@pytest.mark.parametrize("entry", [get(name) for name in MODELS], ids=MODELS)
def test_zoo_model_with_symbolic_sizes(entry: ZooModel) -> None:
    example = entry.inputs(2, 12)
    module = trace(entry.build(), tuple(example.values()), dynamic_shapes=entry.dynamic_shapes())
    module = optimize(module, "cleanup,fuse").module
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
