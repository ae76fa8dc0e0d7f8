"""``compile``, ``run`` and ``inspect`` together: from a model file to outputs, with and without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_harness import Commands, run_fresh, write_model_file

from trimtab.errors import ArtifactError, InputError

pytest.importorskip("tvm")


def _id(value: object) -> str | None:
    return " ".join(value) if isinstance(value, list) else None


@pytest.fixture
def commands(capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(capsys)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with artifacts of three of the model file's functions."""
    folder = tmp_path_factory.mktemp("built")
    write_model_file(folder)
    for function in ("build", "dynamic", "tokens"):
        done = run_fresh("compile", f"model.py:{function}", "-o", f"{function}.trim", "--target", "native", cwd=folder)
        assert done.code == 0, done.err
    return folder


def _eager(folder: Path, x: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    torch.manual_seed(0)
    hidden, head = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)
    with torch.no_grad():
        result: np.ndarray = head(torch.relu(hidden(torch.from_numpy(x)))).numpy()  # type: ignore[type-arg]
    return result


def test_compile_says_what_it_built(commands: Commands, tmp_path: Path) -> None:
    model = write_model_file(tmp_path)
    output = tmp_path / "out.trim"
    document = commands.ok("compile", f"{model}:dynamic", "-o", output, "--threads", "1", "--json").json
    assert document["artifact"] == str(output)
    assert document["bytes"] == output.stat().st_size
    assert document["inputs"] == ["x: f32[batch, 6]"]
    assert document["pipeline"] == "cleanup,fuse,channels-last,group-fusions"
    assert {"import the model", "optimize", "generate code", "write and check"} <= set(document["seconds"])
    text = commands.ok("compile", f"{model}:build", "-o", output).out
    assert f"compiled {output} (" in text
    assert "passes   cleanup,fuse,channels-last,group-fusions" in text


def test_the_default_name_is_the_models(commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    commands.ok("compile", "model.py:build", "--passes", "", "--no-runtime-library")
    document = commands.ok("inspect", "build.trim", "--json").json
    assert document["pipeline"] == "channels-last,group-fusions"  # what the backend asks for
    assert document["variants"][0]["runtime_in_file"] is False


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["-o", "nowhere/out.trim"], 2, "mkdir -p"),
        (["-o", "."], 2, "is a directory"),
        (["--target", "pdp-11"], 2, "unknown target"),
        (["--backend", "abacus"], 2, "unknown backend"),
        (["--passes", "cleanup,frobnicate"], 2, "there is no pass frobnicate"),
        (["--passes", "cleanup,,"], 3, "cannot read a pipeline"),
    ],
    ids=_id,
)
def test_compile_refuses(
    commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, part: str
) -> None:
    write_model_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    outcome = commands("compile", "model.py:build", *arguments)
    assert outcome.code == code
    assert part in outcome.err
    assert not list(tmp_path.glob("*.trim"))


def test_an_artifact_is_not_overwritten_by_itself(commands: Commands, built: Path) -> None:
    outcome = commands("compile", built / "build.trim", "-o", built / "build.trim")
    assert outcome.code == 2
    assert "would replace the model" in outcome.err


def test_run_gives_what_eager_gives(commands: Commands, built: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    np.save(tmp_path / "x.npy", x)
    expected = _eager(built, x)
    for given in (tmp_path / "x.npz", tmp_path / "x.npy", f"x={tmp_path / 'x.npy'}", f"x={tmp_path / 'x.npz'}"):
        commands.ok("run", built / "dynamic.trim", "--input", given, "-o", tmp_path / "y.npz")
        with np.load(tmp_path / "y.npz") as outputs:
            assert list(outputs) == ["output"]
            np.testing.assert_allclose(outputs["output"], expected, rtol=1e-5, atol=1e-6)


def test_run_reports_outputs_and_latency(commands: Commands, built: Path) -> None:
    arguments = ["run", built / "dynamic.trim", "--random", "1", "--size", "batch=7", "--repeat", "3", "--threads", "1"]
    document = commands.ok(*arguments, "--json").json
    assert document["outputs"][0]["shape"] == [7, 3]
    assert document["outputs"][0]["min"] <= document["outputs"][0]["mean"] <= document["outputs"][0]["max"]
    latency = document["latency"]
    assert latency["calls"] == 3
    assert 0 < latency["best_seconds"] <= latency["median_seconds"]
    assert document["threads"] == 1
    text = commands.ok(*arguments).out
    assert "[7, 3]" in text
    assert "latency: median" in text


def test_random_inputs_are_reproducible(commands: Commands, built: Path, tmp_path: Path) -> None:
    outputs = []
    for seed in ("5", "5", "6"):
        commands.ok("run", built / "build.trim", "--random", seed, "-o", tmp_path / "y.npz")
        outputs.append(np.load(tmp_path / "y.npz")["output"])
    assert np.array_equal(outputs[0], outputs[1])
    assert not np.array_equal(outputs[0], outputs[2])


def test_random_integers_are_valid_indices(commands: Commands, built: Path) -> None:
    for seed in range(5):
        document = commands.ok("run", built / "tokens.trim", "--random", str(seed), "--json").json
        assert 0 <= document["inputs"][0]["min"] <= document["inputs"][0]["max"] < 20


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        ([], 2, "run needs inputs"),
        (["--random", "0", "--input", "x.npz"], 2, "exclude each other"),
        (["--size", "batch=2", "--input", "x.npz"], 2, "--size belongs to --random"),
        (["--random", "0", "--size", "length=2"], 2, "there is no such size"),
        (["--random", "0", "--size", "batch=0"], 2, "out of its range"),
        (["--random", "0", "--size", "batch"], 2, "cannot read --size"),
        (["--random", "0", "--size", "batch=two"], 2, "whole number"),
        (["--input", "missing.npz"], 2, "no such input file"),
        (["--input", "broken.npz"], InputError.exit_code, "cannot read an input file"),
        (["--input", "objects.npy"], InputError.exit_code, "plain arrays"),
        (["--input", "wrong.npz"], InputError.exit_code, "unknown input"),
        (["--input", "double.npz"], InputError.exit_code, "wrong dtype"),
        (["--input", "good.npz", "--input", "good.npz"], InputError.exit_code, "given twice"),
        (["--random", "0", "-o", "nowhere/y.npz"], 2, "does not exist"),
    ],
    ids=_id,
)
def test_run_refuses(
    commands: Commands,
    built: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    part: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 and nothing more")
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "wrong.npz", z=np.zeros((1, 6), np.float32))
    np.savez(tmp_path / "double.npz", x=np.zeros((1, 6)))
    np.savez(tmp_path / "good.npz", x=np.zeros((1, 6), np.float32))
    outcome = commands("run", built / "dynamic.trim", *arguments)
    assert outcome.code == code, outcome.err
    assert part in outcome.err


@pytest.fixture
def without_torch(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command in a process in which torch, tvm and networkx cannot be imported."""
    for name in ("torch", "tvm", "networkx"):
        text = f"raise ModuleNotFoundError(\"No module named '{name}'\", name='{name}')\n"
        (tmp_path / f"{name}.py").write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "trimtab.cli.main", *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

    return run


@pytest.mark.parametrize(
    "command", [["run", "--random", "0"], ["bench", "--profile"], ["inspect"], ["inspect", "--ops"]], ids=_id
)
def test_artifacts_need_no_torch(
    built: Path, without_torch: Callable[..., subprocess.CompletedProcess[str]], command: list[str]
) -> None:
    done = without_torch(command[0], built / "build.trim", *command[1:])
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_doctor_works_without_torch_and_says_what_is_missing(
    without_torch: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = without_torch("doctor")
    assert done.returncode == 0, done.stderr
    assert "No module named 'torch'" in done.stdout
    assert "trial: skipped" in done.stdout


@pytest.mark.parametrize("command", ["passes", "inspect", "optimize"])
def test_what_needs_torch_says_so(
    built: Path, without_torch: Callable[..., subprocess.CompletedProcess[str]], command: str
) -> None:
    arguments = {"passes": ["cse"], "inspect": [built / "build.trim", "--full"], "optimize": [built / "build.trim"]}
    done = without_torch(command, *arguments[command], "--json")
    assert done.returncode == 2
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "missing-dependency"
    assert "pip install" in error["fix"]


def test_inspect_an_artifact(commands: Commands, built: Path) -> None:
    document = commands.ok("inspect", built / "dynamic.trim", "--json").json
    assert document["kind"] == "artifact"
    assert document["inputs"] == ["x: f32[batch, 6]"]
    assert document["symbols"] == ["1 <= batch"]
    assert document["weights"] == 4
    (variant,) = document["variants"]
    assert variant["runs_here"]
    assert variant["runtime_in_file"]
    assert variant["backend"] == "tvm"
    assert "apache-tvm" in variant["requires"]
    assert document["bytes"] == (built / "dynamic.trim").stat().st_size
    assert "macs" not in document
    text = commands.ok("inspect", built / "dynamic.trim").out
    for part in ("x: f32[batch, 6]", "runs here", "cleanup,fuse", "built with"):
        assert part in text


def test_full_counts_the_ops_of_an_artifact(commands: Commands, built: Path) -> None:
    document = commands.ok("inspect", built / "dynamic.trim", "--full", "--size", "batch=10", "--json").json
    assert document["macs"] == 10 * (6 * 8 + 8 * 3)
    assert document["parameters"] == 6 * 8 + 8 + 8 * 3 + 3


def test_inspect_a_model(commands: Commands, built: Path) -> None:
    document = commands.ok("inspect", f"{built / 'model.py'}:dynamic", "--size", "batch=4", "--json").json
    assert document["macs"] == 4 * (6 * 8 + 8 * 3)
    assert document["parameters"] == 6 * 8 + 8 + 8 * 3 + 3
    assert document["weight_bytes"] == 4 * document["parameters"]
    # The input and the first linear layer's result, then that and the result of relu: the latter is more.
    assert document["activation_peak_bytes"] == 4 * 4 * (8 + 8)
    assert {row["op"]: row["count"] for row in document["ops"]} == {"linear": 2, "relu": 1}


def test_inspect_ops_prints_the_text(commands: Commands, built: Path) -> None:
    for model in (f"{built / 'model.py'}:build", built / "build.trim"):
        text = commands.ok("inspect", model, "--ops").out
        assert "graph main(%x: f32[2, 6]) {" in text
        assert "= linear(" in text
        assert "graph main" in commands.ok("inspect", model, "--ops", "--json").json["text"]


def test_compiling_an_artifact_again_keeps_its_results(commands: Commands, built: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(3).standard_normal((2, 6)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    commands.ok("compile", built / "dynamic.trim", "-o", tmp_path / "again.trim")
    commands.ok("run", tmp_path / "again.trim", "--input", tmp_path / "x.npz", "-o", tmp_path / "y.npz")
    np.testing.assert_allclose(np.load(tmp_path / "y.npz")["output"], _eager(built, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("command", [["run", "--random", "0"], ["inspect"]], ids=["run", "inspect"])
def test_a_damaged_artifact_is_refused(commands: Commands, built: Path, tmp_path: Path, command: list[str]) -> None:
    content = (built / "build.trim").read_bytes()
    (tmp_path / "cut.trim").write_bytes(content[: len(content) // 2])
    outcome = commands(command[0], tmp_path / "cut.trim", *command[1:])
    assert outcome.code == ArtifactError.exit_code
    assert commands(command[0], tmp_path / "none.trim", *command[1:]).code == 2
