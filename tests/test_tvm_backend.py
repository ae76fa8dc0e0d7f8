"""The TVM backend's outside: targets, capability check, weight layouts, status and errors."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from trimtab.backends.tvm import Layout, check_supported, find_target, status, target_names, unsupported_ops
from trimtab.backends.tvm.layouts import packed_blocks
from trimtab.errors import BackendError, Location, MissingDependencyError, UnsupportedByBackendError, UsageError
from trimtab.ir import OP_CLASSES, Builder, DType, TensorType, Weight, ops


def test_importing_the_backend_does_not_import_tvm() -> None:
    script = "import sys, trimtab.backends.tvm as t; t.status(); t.target_names(); assert 'tvm' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_status_says_what_works() -> None:
    found = status()
    assert found.works == (not found.reason)
    assert bool(found.fix) == bool(found.reason)
    if found.works:
        assert "native" in found.targets
        assert set(found.targets) <= set(target_names())


def test_status_without_tvm_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    found = status()
    assert not found.works
    assert "pip install" in found.fix


def test_unknown_target_lists_the_known_ones() -> None:
    with pytest.raises(UsageError) as caught:
        find_target("z80")
    assert "x86-64-v3" in str(caught.value)
    assert "native" in target_names()


def test_default_target_is_the_portable_baseline() -> None:
    spec = find_target()
    assert spec.name in ("x86-64-v3", "aarch64")
    assert find_target(spec.name, threads=3).machine.threads == 3


def test_missing_compiler_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.backends.tvm.compiler import find_compiler

    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(MissingDependencyError) as caught:
        find_compiler(find_target("x86-64-v3"))
    assert "gcc" in str(caught.value)


def test_all_unsupported_ops_are_reported_at_once_with_their_lines() -> None:
    b = Builder()
    x = b.input("x", TensorType(DType.F32, (3, 5)))
    with b.at(Location("model.py", 12, "forward")):
        y = b(ops.Opaque((x,), "aten.erfinv.default", '[{"operand": 0}]'))
    with b.at(Location("model.py", 15, "forward")):
        z = b(ops.Opaque((y,), "aten.lgamma.default", '[{"operand": 0}]'))
    b.output(b(ops.Add(y, z)))
    assert [problem.location.line for problem in unsupported_ops(b.module) if problem.location] == [12, 15]
    with pytest.raises(UnsupportedByBackendError) as caught:
        check_supported(b.module)
    text = str(caught.value)
    assert "model.py:12" in text
    assert "aten.erfinv.default" in text
    assert "model.py:15" in text
    assert "aten.lgamma.default" in text


def test_every_op_class_is_compiled_or_refused_with_a_reason() -> None:
    pytest.importorskip("tvm")
    from trimtab.backends.tvm.rules.registry import _RULES

    without = {
        name for name, cls in OP_CLASSES.items() if cls.__module__.startswith("trimtab.ir.ops") and cls not in _RULES
    }
    assert without == {"fused", "repeat", "opaque"}  # the emitter and the capability check handle these


@pytest.mark.parametrize(
    ("shape", "group"), [((64, 8), 1), ((65, 7), 1), ((1, 3), 1), ((3, 50, 9), 1), ((65, 8), 2), ((3, 50, 12), 4)]
)
def test_panel_layout_is_invertible_and_streams_the_same_bytes(shape: tuple[int, ...], group: int) -> None:
    data = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    layout = Layout("panels", 48, group)
    stored = layout.pack(data)
    assert stored.shape == layout.stored_shape(shape)
    assert torch.equal(layout.unpack(stored, shape), data)
    assert Layout.from_dict(layout.to_dict()) == layout
    streamed = b"".join(
        bytes(block) for block in packed_blocks(Weight.from_tensor("w", data), layout, panels_at_once=1)
    )
    assert streamed == stored.numpy().tobytes()
    n, k = shape[-2] - 1, shape[-1] - 1
    place = (n // 48, k // group, n % 48, k % group) if group > 1 else (n // 48, k, n % 48)
    assert stored[(..., *place)].tolist() == data[..., n, k].tolist()


def test_a_failure_of_tvm_is_traced_to_the_op_and_the_user_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tvm")
    from trimtab.backends.tvm import build, pipeline

    def fail(module: object, target: object) -> None:
        raise RuntimeError("Check failed: LLVM module verification failed\n  in kernel tanh: bad operand")

    monkeypatch.setattr(pipeline, "build_executable", fail)
    b = Builder()
    with b.at(Location("model.py", 7, "forward")):
        b.output(b(ops.Tanh(b.input("x", TensorType(DType.F32, (3,))))))
    with pytest.raises(BackendError) as caught:
        build(b.module)
    assert caught.value.values["kernel"] == "tanh"
    assert caught.value.location == Location("model.py", 7, "forward")
    assert "bad operand" in str(caught.value)
