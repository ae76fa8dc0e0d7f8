"""Compile to an artifact and run it: the facade, the self-check and what happens when things go wrong."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import trimtab
from trimtab.artifact import Artifact
from trimtab.errors import ArtifactError, UnsupportedByBackendError, UsageError
from trimtab.runtime.container import ArtifactReader

pytest.importorskip("tvm", reason="the TVM backend is not installed")


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 7)

    def forward(self, ids: Tensor, weight: Tensor) -> dict[str, Tensor]:
        pooled = (self.norm(self.embed(ids)) * weight.unsqueeze(-1)).sum(1)
        logits = self.head(pooled)
        return {"logits": logits, "choice": logits.argmax(-1)}


@pytest.fixture(scope="module")
def module() -> trimtab.Module:
    torch.manual_seed(1)
    example = (torch.zeros(2, 5, dtype=torch.long), torch.randn(2, 5))
    shapes = {"ids": {0: "batch", 1: "seq"}, "weight": {0: "batch", 1: "seq"}}
    return trimtab.trace(Classifier().eval(), example, dynamic_shapes=shapes)


@pytest.fixture(scope="module")
def artifact(module: trimtab.Module) -> Artifact:
    return trimtab.compile(module, target="native", name="classifier")


def test_a_saved_artifact_runs_at_every_size(artifact: Artifact, module: trimtab.Module, tmp_path: Path) -> None:
    path = artifact.save(tmp_path / "model.trim")
    assert os.listdir(tmp_path) == ["model.trim"]
    rng = np.random.default_rng(0)
    with trimtab.load(path) as session:
        for batch, length in ((1, 1), (3, 17), (8, 64)):
            ids = rng.integers(0, 50, (batch, length))
            weight = rng.standard_normal((batch, length)).astype(np.float32)
            result = session(weight=weight, ids=ids)
            logits, choice = trimtab.interpret(module, [torch.from_numpy(ids), torch.from_numpy(weight)])
            np.testing.assert_allclose(result["logits"], logits.numpy(), rtol=1e-4, atol=1e-5)
            assert np.array_equal(result["choice"], choice.numpy())


def test_the_manifest_tells_what_the_file_is(artifact: Artifact, module: trimtab.Module, tmp_path: Path) -> None:
    reader = ArtifactReader(artifact.save(tmp_path / "model.trim"))
    manifest = reader.manifest
    assert manifest.name == "classifier"
    assert [str(spec) for spec in manifest.inputs] == ["ids: i64[batch, seq]", "weight: f32[batch, seq]"]
    assert [spec.name for spec in manifest.outputs] == list(module.main.output_names)
    assert manifest.pipeline == "cleanup,fuse,channels-last,group-fusions"
    assert {weight.name for weight in manifest.weights} == set(artifact.module.weights)
    assert any(name.endswith("libtvm_runtime.so") for name in reader.names)
    assert manifest.versions["trimtab"] == trimtab.__version__


def test_the_runtime_library_can_be_left_out(module: trimtab.Module, artifact: Artifact, tmp_path: Path) -> None:
    with_library = artifact.save(tmp_path / "with.trim").stat().st_size
    without = replace(artifact, include_runtime=False).save(tmp_path / "without.trim").stat().st_size
    assert with_library - without > 3_000_000


def test_running_needs_neither_torch_nor_the_compiler(artifact: Artifact, tmp_path: Path) -> None:
    path = artifact.save(tmp_path / "model.trim")
    program = (
        "import sys, numpy, trimtab\n"
        f"session = trimtab.load({str(path)!r}, prefer_carried=True)\n"
        "out = session(numpy.zeros((2, 3), numpy.int64), numpy.ones((2, 3), numpy.float32))\n"
        "print(out['logits'].shape, sorted({'torch', 'tvm', 'onnx', 'networkx'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(2, 7) []"


def test_a_file_that_gives_wrong_outputs_is_not_written(artifact: Artifact, tmp_path: Path) -> None:
    sample = artifact.samples[0]
    wrong = replace(sample, outputs=tuple(array + 1 for array in sample.outputs))
    target = tmp_path / "model.trim"
    target.write_bytes(b"kept")
    with pytest.raises(ArtifactError, match="failed its self-check"):
        replace(artifact, samples=(wrong,)).save(target)
    assert target.read_bytes() == b"kept"
    assert os.listdir(tmp_path) == ["model.trim"]


def test_a_self_check_that_hangs_is_ended(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.artifact.SELF_CHECK_SECONDS", 0.01)
    with pytest.raises(ArtifactError, match="did not end"):
        artifact.save(tmp_path / "model.trim")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_nothing_behind(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("trimtab.runtime.container.ArtifactWriter.add_bytes", full)
    with pytest.raises((ArtifactError, OSError)):
        artifact.save(tmp_path / "model.trim")
    assert os.listdir(tmp_path) == []


def test_a_missing_directory_is_an_artifact_error(artifact: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="directory does not exist"):
        artifact.save(tmp_path / "nowhere" / "model.trim")


def test_unknown_names_are_usage_errors(module: trimtab.Module) -> None:
    with pytest.raises(UsageError, match="unknown backend: backend=cobol, known=tvm"):
        trimtab.compile(module, backend="cobol")
    with pytest.raises(UsageError, match="unknown target"):
        trimtab.compile(module, target="pdp-11")


def test_unsupported_ops_are_all_reported_before_lowering() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x) + torch.special.bessel_y1(x.abs() + 1)

    module = trimtab.trace(Odd().eval(), (torch.randn(4),))
    with pytest.raises(UnsupportedByBackendError) as caught:
        trimtab.compile(module)
    assert "bessel_j0" in str(caught.value)
    assert "bessel_y1" in str(caught.value)
    assert "test_compile_artifact.py" in str(caught.value)


def test_progress_and_seconds_name_the_stages(module: trimtab.Module) -> None:
    seen: list[tuple[str, float]] = []
    artifact = trimtab.compile(module, progress=lambda stage, fraction: seen.append((stage, fraction)))
    assert [stage for stage, _ in seen] == list(artifact.seconds)
    assert [fraction for _, fraction in seen] == sorted(fraction for _, fraction in seen)
