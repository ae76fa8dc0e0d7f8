"""Zoo models with symbolic sizes: code of the MLIR backend agrees with the interpreter at untraced ones."""

from __future__ import annotations

import pytest
from zoo_agreement import assert_zoo_model_agrees

from trimtab import optimize, trace
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
    assert_zoo_model_agrees(entry, module, Compiled(module))
