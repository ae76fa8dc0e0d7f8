"""Zoo models with symbolic batch and sequence: compiled code agrees with the interpreter at untraced sizes."""

from __future__ import annotations

import pytest
from tvm_harness import Compiled
from zoo_agreement import assert_zoo_model_agrees

from trimtab import trace
from zoo_models import ZooModel, zoo

pytest.importorskip("tvm")


@pytest.mark.parametrize("entry", zoo(quick=True), ids=lambda entry: entry.name)
def test_zoo_model_with_symbolic_sizes(entry: ZooModel) -> None:
    example = entry.inputs(2, 12)
    module = trace(entry.build(), tuple(example.values()), dynamic_shapes=entry.dynamic_shapes())
    assert_zoo_model_agrees(entry, module, Compiled(module))
