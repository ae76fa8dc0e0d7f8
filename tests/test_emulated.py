"""Transformers compiled for AArch64 by both backends, run in QEMU, agree with the interpreter at untraced sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_transformers import image_inputs, image_model, text_inputs, text_model

import emulated
import trimtab
from trimtab.ir import Module, interpret

COMPILERS = {"tvm": "tvm", "mlir": "iree.compiler"}
"""The package behind each backend."""


@pytest.mark.parametrize(
    ("target", "module", "inputs"),
    [
        ("aarch64", text_model, text_inputs(3, 7)),
        ("armv8.2-a", image_model, image_inputs(3)),
        ("armv8.6-a", text_model, text_inputs(1, 24)),
    ],
    ids=["aarch64", "armv8.2-a", "armv8.6-a"],
)
@pytest.mark.parametrize("backend", COMPILERS)
def test_transformers_agree_with_the_interpreter(
    backend: str, target: str, module: Callable[[], Module], inputs: list[torch.Tensor], tmp_path: Path
) -> None:
    pytest.importorskip(COMPILERS[backend])
    if missing := emulated.missing_runtime(backend):
        pytest.skip(f"code for AArch64 cannot be run here: {missing}")
    traced = module()
    made = trimtab.compile(traced, target=target, backend=backend, pipeline=None)
    with emulated.EmulatedModel(made.save(tmp_path / "model.trim"), target) as model:
        (got,) = model(*(x.numpy() for x in inputs))
    np.testing.assert_allclose(got, interpret(traced, inputs)[0].numpy(), rtol=1e-4, atol=1e-5)
