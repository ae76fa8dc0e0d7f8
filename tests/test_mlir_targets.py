"""Every target of the MLIR backend takes a transformer; code for Vulkan is run where there is a driver."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from tiny_transformers import image_inputs, image_model, text_inputs, text_model

import trimtab
from trimtab.errors import MissingDependencyError
from trimtab.ir import Module, interpret

pytest.importorskip("torch_mlir")
pytest.importorskip("iree.compiler")

from trimtab.backends.mlir.compiler import build
from trimtab.backends.mlir.targets import find_target, target_names

# What the code is made of: the magic number of an ELF file's kind of machine, or of the device's code.
MARKS = {"x86-64": b"\x3e\x00", "aarch64": b"\xb7\x00", "armv8": b"\xb7\x00", "riscv64": b"\xf3\x00"}


@pytest.fixture(scope="module")
def image() -> Module:
    return image_model(symbolic=False)


@pytest.mark.parametrize("target", target_names())
def test_every_target_compiles_a_transformer(image: Module, target: str) -> None:
    code = build(image, target)
    spec = find_target(target)
    assert (code.triple, code.driver) == (spec.triple, spec.driver)
    mark = next((mark for start, mark in MARKS.items() if target.startswith(start)), None)
    if mark is not None:
        start = code.library.index(b"\x7fELF")
        assert code.library[start + 18 : start + 20] == mark


def test_vulkan_agrees_with_the_interpreter(image: Module, tmp_path: Path) -> None:
    for module, samples in ((image, [image_inputs(2)]), (text_model(), [text_inputs(2, 9), text_inputs(1, 5)])):
        made = trimtab.compile(module, target="vulkan-spirv", backend="mlir", pipeline=None)
        path = made.save(tmp_path / "model.trim", check=False)
        specs = made.manifest.inputs
        for inputs in samples:
            got = _run_in_process(path, {spec.name: x.numpy() for spec, x in zip(specs, inputs, strict=True)})
            expected = interpret(module, inputs)[0].numpy()
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def _run_in_process(path: Path, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """The first output of an artifact, from a process of its own.

    Mesa's software driver keeps two threads busy until the process ends, which would slow all tests after this one.
    """
    given, written = path.with_name("inputs.npz"), path.with_name("outputs.npz")
    np.savez(given, **inputs)
    command = [sys.executable, "-m", "trimtab.cli.main", "run", path, "-i", given, "-o", written, "--repeat", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode == MissingDependencyError.exit_code:
        pytest.skip(f"no Vulkan driver (make vulkan): {done.stderr}")
    assert done.returncode == 0, done.stderr
    with np.load(written) as outputs:
        return outputs[outputs.files[0]]
