"""The MLIR backend's errors, locations, weights and targets."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch

import trimtab
from trimtab.errors import BackendError, Location, MissingDependencyError, UnsupportedByBackendError, UsageError
from trimtab.ir import Builder, DType, Module, TensorType, ops, symbol

pytest.importorskip("torch_mlir")
pytest.importorskip("iree.compiler")

from trimtab.backends.mlir import availability, compiler, emitter, support, targets


def _linear(rows: int = 48, depth: int = 32) -> Module:
    builder = Builder()
    x = builder.input("x", TensorType(DType.F32, (symbol("n"), depth)))
    weight = builder.weight("weight", torch.randn(rows, depth, generator=torch.Generator().manual_seed(0)))
    builder.output(builder(ops.Linear(x, weight)))
    return builder.module


def test_weights_are_named_in_the_text_and_not_in_it() -> None:
    emitted = emitter.emit(_linear(512, 512))
    assert emitted.weights == ("weight",)
    assert '#flow.parameter.named<"model"::"weight">' in emitted.text
    assert len(emitted.text) < 10_000


def test_ops_carry_the_line_of_the_user() -> None:
    module = _linear()
    for op in module.walk():
        op.location = Location("model.py", 17, "forward")
    assert '"model.py":17' in emitter.emit(module).text


def test_every_unsupported_op_is_listed_with_its_line() -> None:
    module = trimtab.trace(_Exotic().eval(), (torch.randn(3, 3),))
    with pytest.raises(UnsupportedByBackendError) as caught:
        support.check_supported(module)
    assert "matrix_exp" in str(caught.value)
    assert "test_mlir_backend.py" in str(caught.value)


class _Exotic(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.matrix_exp(x)


def test_an_unknown_target_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="riscv64"):
        targets.find_target("z80")


def test_a_message_of_the_compiler_names_the_users_line() -> None:
    text = "func.func @main(%x: tensor<4xf32>) -> tensor<5xf32> { return %x : tensor<4xf32> }"
    with pytest.raises(BackendError, match="doesn't match function result type"):
        compiler.compile_text(text, targets.find_target("native").flags)
    explained = compiler._explain('<unknown>:0: error: loc("conv2d"("model.py":42:0)): failed to legalize')
    assert explained.location == Location("model.py", 42)
    assert explained.values["op"] == "conv2d"
    assert "crashed with signal 11" in str(compiler._explain("Error code: -11\nDiagnostics:\nPlease report"))


def test_a_missing_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="torch-mlir"):
        compiler.build(_linear())


def test_compiler_and_runtime_of_two_releases_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        return {"iree-base-compiler": "3.13.0", "iree-base-runtime": "3.11.0"}.get(name, "20261001")

    monkeypatch.setattr(availability.importlib.metadata, "version", version)
    status = availability.status()
    assert not status.works
    assert "iree-base-compiler 3.13.0 and iree-base-runtime 3.11.0" in status.reason


def test_code_of_another_release_is_refused_at_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = trimtab.compile(_linear(), target="native", backend="mlir").save(tmp_path / "m.trim")
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda n: "2.0.0" if n == "iree-base-runtime" else real(n))
    with pytest.raises(MissingDependencyError, match=r"built_for=3\.\d+\.\d+, installed=2\.0\.0"):
        trimtab.load(path)


def test_truncated_code_is_refused(tmp_path: Path) -> None:
    from trimtab.errors import ArtifactError
    from trimtab.runtime.iree_code import IreeFunction

    code = compiler.build(_linear(), "native")
    with pytest.raises(ArtifactError, match="does not load"):
        IreeFunction(code.library[: len(code.library) // 2], {}, "main", "local-task", 1, ["f32"])


def test_a_build_does_not_hold_the_weights_twice() -> None:
    """Weights are read a block at a time and only when they are written: a build touches none of them."""
    read = []

    class Watched:
        def __init__(self, data: torch.Tensor) -> None:
            self.data = data

        def tensor(self) -> torch.Tensor:
            read.append(self.data.nbytes)
            return self.data

    from trimtab.ir.weights import Weight

    module = _linear()
    weight = module.weights["weight"]
    module.weights["weight"] = Weight("weight", weight.type, Watched(weight.tensor()))
    code = compiler.build(module, "native")
    assert not read
    (stored,) = code.weights
    assert sum(len(bytes(block)) for block in stored.blocks()) == stored.nbytes == 48 * 32 * 4
    assert stored.layout is None


@pytest.mark.parametrize("name", [name for name in targets.target_names() if name not in ("native",)])
def test_every_target_compiles_a_product(name: str) -> None:
    assert len(compiler.build(_linear(), name).library) > 1000
