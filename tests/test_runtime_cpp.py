"""The C++ example, compiled and run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import runtime_fixture as fixture

from trimtab.runtime.manifest import Manifest, WeightEntry
from trimtab.runtime.samples import Sample, encode_samples

EXAMPLE = Path(__file__).parent.parent / "examples" / "cpp"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None or shutil.which("make") is None:
        pytest.skip("g++ and make are not installed")
    folder = tmp_path_factory.mktemp("cpp") / "example"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("run_artifact", "call_model"))
    done = subprocess.run(
        ["make", f"PYTHON={sys.executable}"], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    return folder / "run_artifact"


def run(program: Path, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), str(path), "3"], capture_output=True, text=True, timeout=60, check=False)


def test_it_runs_the_samples_of_an_artifact(program: Path, tmp_path: Path) -> None:
    fixture.write_artifact(tmp_path / "m.trim")
    done = run(program, tmp_path / "m.trim")
    assert done.returncode == 0, done.stderr
    for line in ("sample 0, output z: max difference", "sample 1, output y: max difference", "passed"):
        assert line in done.stdout


def test_a_model_is_called_with_arrays_from_files(program: Path, tmp_path: Path) -> None:
    fixture.write_artifact(tmp_path / "m.trim")
    inputs = fixture.random_inputs()
    files = [tmp_path / f"{name}.npy" for name in ("x", "scale", "z", "y")]
    for file, array in zip(files, inputs, strict=False):
        np.save(file, array)
    command = [program.with_name("call_model"), tmp_path / "m.trim", *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    for file, expected in zip(files[2:], fixture.expected(*inputs), strict=True):
        np.testing.assert_allclose(np.load(file), expected, rtol=1e-5, atol=1e-6)
    np.save(files[0], inputs[0].astype(np.float64))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 7
    assert "x.npy is not of dtype f32" in done.stderr


def test_it_notices_wrong_results(program: Path, tmp_path: Path) -> None:
    inputs = fixture.random_inputs()
    z, y = fixture.expected(*inputs)
    for wrong in (z + 1, np.where(z == z[0, 0], np.float32("nan"), z)):
        fixture.write_artifact(tmp_path / "m.trim", check=encode_samples([Sample(inputs, (wrong, y))]))
        done = run(program, tmp_path / "m.trim")
        assert done.returncode == 7
        assert "FAILED" in done.stdout


def test_it_takes_the_weights_of_the_variant(program: Path, tmp_path: Path) -> None:
    """Weights listed in another order than the code takes them, with one more between."""
    weights = {"b": fixture.WEIGHTS["b"], "unused": np.zeros(3, np.float32), "w": fixture.WEIGHTS["w"]}

    def reorder(manifest: Manifest) -> Manifest:
        entries = tuple(WeightEntry(name, "f32", array.shape) for name, array in weights.items())
        variants = tuple(replace(variant, weights=("w", "b")) for variant in manifest.variants)
        return replace(manifest, weights=entries, variants=variants)

    fixture.write_artifact(tmp_path / "m.trim", weights=weights, change=reorder)
    assert run(program, tmp_path / "m.trim").returncode == 0


def test_it_refuses_cut_files_and_other_machines(program: Path, tmp_path: Path) -> None:
    fixture.write_artifact(tmp_path / "m.trim")
    good = (tmp_path / "m.trim").read_bytes()
    for length in (0, 1, 100, len(good) // 2, len(good) - 1, len(good) - 300, len(good) - 3000):
        (tmp_path / "cut.trim").write_bytes(good[:length])
        done = run(program, tmp_path / "cut.trim")
        assert done.returncode == 7, length
        assert done.stderr.startswith("error: ")
    assert run(program, tmp_path / "absent.trim").returncode == 7

    def elsewhere(manifest: Manifest) -> Manifest:
        return replace(manifest, variants=tuple(replace(v, target="mips-linux") for v in manifest.variants))

    fixture.write_artifact(tmp_path / "m.trim", change=elsewhere)
    done = run(program, tmp_path / "m.trim")
    assert done.returncode == 7
    assert "only for mips-linux" in done.stderr
