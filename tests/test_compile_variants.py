"""Several codes in one file: what is stored once, what a machine takes, and the choice of the faster backend."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import trimtab
from trimtab.errors import UsageError
from trimtab.ir import Builder, DType, Module, TensorType, interpret, ops, symbol

pytest.importorskip("tvm")
pytest.importorskip("torch_mlir")
pytest.importorskip("iree.compiler")


def _module() -> Module:
    generator = torch.Generator().manual_seed(0)
    builder = Builder()
    x = builder.input("x", TensorType(DType.F32, (symbol("rows"), 32)))
    weight = builder.weight("weight", torch.randn(48, 32, generator=generator))
    bias = builder.weight("bias", torch.randn(48, generator=generator))
    builder.output(builder(ops.Gelu(builder(ops.Linear(x, weight, bias)))))
    return builder.module


def _agrees(module: Module, session: trimtab.Session, rows: int) -> bool:
    x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(rows))
    (expected,) = interpret(module, [x])
    return bool(np.allclose(session(x.numpy()), expected.numpy(), rtol=1e-4, atol=1e-5))


@pytest.mark.parametrize("backend", ["tvm", "mlir"])
def test_each_backend_makes_a_file_that_runs(tmp_path: Path, backend: str) -> None:
    module = _module()
    with trimtab.load(trimtab.compile(module, target="native", backend=backend).save(tmp_path / "m.trim")) as session:
        assert session.variant.backend == backend
        assert _agrees(module, session, 7)
        assert _agrees(module, session, 1)


def test_codes_of_both_backends_lie_side_by_side_over_weights_stored_once_a_form(tmp_path: Path) -> None:
    module = _module()
    made = trimtab.compile(module, target=["x86-64-v3", "aarch64"], backend="tvm,mlir")
    variants = made.manifest.variants
    assert [(v.backend, v.target.split("-")[0]) for v in variants] == [
        ("tvm", "x86_64"), ("tvm", "aarch64"), ("mlir", "x86_64"), ("mlir", "aarch64"),
    ]  # fmt: skip
    assert len({v.library for v in variants}) == 4
    # The bias has one form; both codes of a backend that read a weight in the same form share it.
    stored = [weight.name for weight in made.manifest.weights]
    assert stored.count("bias") == 1
    assert not any(name.startswith("bias#") for name in stored)
    assert variants[2].weights == variants[3].weights
    for backend in ("tvm", "mlir"):
        with trimtab.load(made.of_backend(backend).save(tmp_path / f"{backend}.trim")) as session:
            assert _agrees(module, session, 9)
    with trimtab.load(made.save(tmp_path / "all.trim")) as session:
        assert _agrees(module, session, 3)


def test_a_machine_takes_the_code_that_uses_most_of_it(tmp_path: Path) -> None:
    from trimtab.cpu_features import host_level

    if host_level() != "x86-64-v4":
        pytest.skip(f"needs a machine of level x86-64-v4, this one is {host_level()}")
    module = _module()
    path = trimtab.compile(module, target="x86-64-v3,x86-64-v4,aarch64").save(tmp_path / "m.trim")
    with trimtab.load(path) as session:
        assert "avx512f" in session.variant.features
        assert _agrees(module, session, 5)


def test_auto_keeps_the_backend_that_took_the_least_time(tmp_path: Path) -> None:
    made = trimtab.compile(_module(), target="native", backend="auto")
    assert set(made.measured) == {"tvm", "mlir"}
    assert made.code.backend == min(made.measured, key=made.measured.__getitem__)
    assert {code.backend for code in made.codes} == {made.code.backend}


def test_auto_refuses_a_target_that_cannot_be_timed_here() -> None:
    with pytest.raises(UsageError, match="cannot be compared"):
        trimtab.compile(_module(), target="armv8.6-a", backend="auto")
