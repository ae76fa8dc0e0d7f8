"""``trimtab bench``: latency, profiles against a measured or missing peak, and trace files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cli_harness import Commands, run_fresh, write_model_file

from trimtab.backends.tvm import peaks
from trimtab.errors import BackendError

pytest.importorskip("tvm")

PEAKS = peaks.Peaks(1, {"f32": {"fast": 2e11, "slow": 1e11}, "bf16": {}, "int8": {}}, 1e10)


@pytest.fixture
def commands(capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(capsys)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    write_model_file(folder)
    done = run_fresh("compile", "model.py:dynamic", "-o", "dynamic.trim", "--target", "native", cwd=folder)
    assert done.code == 0, done.err
    return folder / "dynamic.trim"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "measure_peaks", lambda threads: PEAKS)


def test_latency_only(commands: Commands, artifact: Path) -> None:
    document = commands.ok("bench", artifact, "--repeat", "5", "--threads", "1", "--json").json
    latency = document["latency"]
    assert latency["calls"] == 5
    order = [latency[f"{name}_seconds"] for name in ("best", "median", "p90", "worst")]
    assert order[0] > 0
    assert order == sorted(order)
    assert document["threads"] == 1
    assert "profile" not in document
    assert "5 calls on 1 thread(s): median" in commands.ok("bench", artifact, "--repeat", "5", "--threads", "1").out


@pytest.mark.usefixtures("measured")
def test_a_profile_with_a_trace(commands: Commands, artifact: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    arguments = ["bench", artifact, "--profile", "--repeat", "2", "--size", "batch=9", "--trace", trace]
    document = commands.ok(*arguments, "--json").json
    profile = document["profile"]
    kernels = [kernel for kernel in profile["kernels"] if kernel["ops"]]
    assert document["inputs"] == {"x": [9, 6]}
    assert sum(kernel["flops"] for kernel in kernels) == 2 * 9 * (6 * 8 + 8 * 3)
    assert profile["peaks"] == {"flops": {"f32": 2e11, "bf16": 0.0, "i8": 0.0, "u8": 0.0}, "bandwidth": 1e10}
    assert all(kernel["bound"] in ("compute", "memory", "cache") for kernel in kernels)
    assert any("model.py" in op for kernel in kernels for op in kernel["ops"])
    traced = [event["name"] for event in json.loads(trace.read_text())["traceEvents"] if event.get("cat") == "kernel"]
    assert sorted(set(traced)) == sorted(kernel["name"] for kernel in kernels)
    text = commands.ok(*arguments).out
    assert "this machine: f32 200 GFLOP/s; memory 10.0 GB/s" in text
    assert "linear at" in text
    assert "outside kernels, of the best call: " in text
    assert f"trace written to {trace}" in text


def test_without_a_peak_it_says_why(commands: Commands, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(threads: int) -> peaks.Peaks:
        raise BackendError("no probes here", rule="they are for other machines")

    monkeypatch.setattr(peaks, "measure_peaks", refuse)
    document = commands.ok("bench", artifact, "--profile", "--repeat", "1", "--json").json
    assert document["profile"]["peaks"] is None
    assert document["no_peaks"] == "no probes here. they are for other machines."
    assert all(kernel["of_compute"] is None for kernel in document["profile"]["kernels"])
    assert "peak: no probes here" in commands.ok("bench", artifact, "--profile", "--repeat", "1").out


def test_inputs_from_files(commands: Commands, artifact: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((4, 6), np.float32))
    document = commands.ok("bench", artifact, "--input", tmp_path / "x.npy", "--repeat", "1", "--json").json
    assert document["inputs"] == {"x": [4, 6]}


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--random", "0", "--input", "x.npz"], "exclude each other"),
        (["--size", "batch=2", "--input", "x.npz"], "--size belongs to --random"),
        (["--trace", "/no/such/folder/t.json"], "the directory of --trace does not exist"),
    ],
)
def test_what_it_refuses(commands: Commands, artifact: Path, arguments: list[str], part: str) -> None:
    outcome = commands("bench", artifact, *arguments)
    assert outcome.code == 2
    assert part in outcome.err
