"""benchmarks/cpu_peers.py: figures from given times, one small model through what is installed, and reasons."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import cpu_peers
from cpu_peers_job import Facts, Job, write_job
from cpu_peers_report import (
    Missing,
    Results,
    Row,
    draw_chart,
    geometric_mean,
    least_seconds,
    model_lines,
    summary_lines,
)
from cpu_peers_systems import SYSTEMS, Eager, OnnxRuntime, System, Trimtab
from cpu_peers_worker import Worker, WorkerError, prepare
from machine_peaks import last_level_cache_bytes
from measuring import as_arrays, largest_error, time_calls
from trimtab.backends.tvm.peaks import Peaks

PEAKS = Peaks(threads=2, rates={"f32": {"FMA": 100e9}}, read_bandwidth=10e9)


def given_results() -> Results:
    """Two transformers and a convolution net with times that make round ratios."""
    results = Results({"processor": "test", "threads": 2}, {"python": "3"}, "python benchmarks/cpu_peers.py")
    for model, kind, times in (
        ("a", "transformer", {"trimtab": 10.0, "peer": 20.0, "other": 5.0}),
        ("b", "transformer", {"trimtab": 10.0, "peer": 80.0}),
        ("c", "convolution", {"trimtab": 4.0, "peer": 3.0}),
    ):
        results.models[model] = Facts(kind, macs=10**9, weight_bytes=4 << 20, cache_bytes=0)
        results.rows += [Row(model, system, "f32", ms, ms, 1e-6) for system, ms in times.items()]
    results.rows.append(Row("a", "peer", "bf16", 1.0, 1.0, 1e-2))
    results.missing.append(Missing("b", "other", "f32", "not installed: other"))
    return results


def test_ratios_are_taken_at_the_same_precision() -> None:
    results = given_results()
    assert results.ratios("peer", "f32", "transformer") == {"a": 2.0, "b": 8.0}
    assert results.ratios("peer", "f32", "convolution") == {"c": 0.75}
    assert results.ratios("peer", "bf16", "transformer") == {}  # Trimtab has no bf16 row
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    best = results.best_peer("a", "f32")
    assert best is not None
    assert (best.system, results.ratio(best)) == ("other", 0.5)


def test_tables_show_means_gaps_and_where_trimtab_is_slower() -> None:
    results = given_results()
    summary = list(summary_lines(results))
    assert "peer          f32  transformers 4.00 (2), convolutions 0.75 (1)" in summary
    assert [line for line in summary if "slower" in line] == [
        "a             f32  other         0.50  Trimtab is slower",
        "c             f32  peer          0.75  Trimtab is slower",
    ]
    assert list(model_lines(results, "b"))[-1] == "other         f32  missing: not installed: other"


def test_the_limit_is_compute_or_the_weights_that_no_cache_holds() -> None:
    small = Facts("transformer", macs=10**9, weight_bytes=4, cache_bytes=0)
    assert least_seconds(small, "f32", PEAKS) == (0.02, "compute")
    large = Facts("transformer", macs=10**6, weight_bytes=2 * last_level_cache_bytes(), cache_bytes=80)
    assert least_seconds(large, "f32", PEAKS) == ((large.weight_bytes + 80) / 10e9, "memory")
    assert least_seconds(small, "bf16", PEAKS) is None


def test_results_survive_the_json_file(tmp_path: Path) -> None:
    results = given_results()
    results.write(tmp_path / "figures.json")
    written = json.loads((tmp_path / "figures.json").read_text())
    assert {"model", "system", "precision", "median_ms", "best_ms", "error", "efficiency"} <= written["rows"][0].keys()
    assert Results.read(tmp_path / "figures.json") == results


def test_the_chart_is_the_same_for_the_same_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="make peers installs it")
    draw_chart(given_results(), tmp_path / "1.svg")
    draw_chart(given_results(), tmp_path / "2.svg")
    assert (tmp_path / "1.svg").read_bytes() == (tmp_path / "2.svg").read_bytes()


def test_errors_are_relative_and_the_worst_output_counts() -> None:
    expected = as_arrays(([1.0, -4.0], [10.0]))
    assert largest_error(as_arrays(([1.0, -4.0], [10.0])), expected) == 0.0
    with pytest.raises(ValueError, match="not finite"):
        largest_error(as_arrays(([1.0, float("nan")], [10.0])), as_arrays(([1.0, 1.0], [10.0])))


class Absent(System):
    """A system that nobody has."""

    name, packages, modules = "absent", (), ("no_such_package.runtime",)

    def load(self, job: Job) -> Any:
        raise AssertionError

    compile = load


class TinyModel:
    """What `write_job` and the systems ask a benchmark model for."""

    kind = "transformer"

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 8)).eval()

    def inputs(self, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        return {"input": torch.linspace(-1, 1, 48).reshape(3, 16).to(dtype)}


class Inline:
    """A worker without a process: importing torch and transformers once more for each system takes seconds."""

    def __init__(self, job: Job, label: str | None, limit: float) -> None:
        if label is None:
            write_job(job)
        else:
            system = next(system for system in cpu_peers.SYSTEMS if system.label == label)
            self.call, self.report = prepare(job, system)

    def block(self, runs: int) -> list[float]:
        return time_calls(self.call, runs)

    def close(self) -> None:
        pass


@pytest.fixture
def torch_settings() -> Iterator[None]:
    """Systems switch gradients off and set the number of threads, for what would be their own process."""
    threads = torch.get_num_threads()
    yield
    torch.set_grad_enabled(True)
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("torch_settings")
def test_a_small_model_through_the_command_and_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu_peers, "SYSTEMS", (Trimtab("f32"), Eager("f32"), OnnxRuntime("f32"), Absent("f32")))
    monkeypatch.setattr(cpu_peers, "Worker", Inline)
    monkeypatch.setattr("cpu_peers_job.find_model", lambda name: TinyModel())
    monkeypatch.setattr(cpu_peers, "measure_peaks", lambda threads: PEAKS)
    monkeypatch.setattr(cpu_peers, "take_turns", lambda blocks, runs: {k: block(runs) for k, block in blocks.items()})
    monkeypatch.setattr(cpu_peers, "tempfile", SimpleNamespace(TemporaryDirectory=lambda: nullcontext(tmp_path)))
    figures = tmp_path / "figures.json"
    assert cpu_peers.main(["--models", "tiny-bert", "--runs", "2", "--threads", "1", "--json", str(figures)]) == 0
    results = Results.read(figures)
    assert [row.system for row in results.rows] == ["trimtab", "eager", "onnxruntime"]
    for row in results.rows:
        assert 0 < row.best_ms <= row.median_ms
        assert row.error < 1e-5
        assert (row.compile_seconds is None) == (row.system == "eager")
    assert [(gap.system, gap.reason) for gap in results.missing] == [
        ("absent", "not installed: no_such_package.runtime (make peers)")
    ]
    assert "absent        f32  missing: not installed" in capsys.readouterr().out
    assert set(results.versions) >= {"python", "trimtab", "torch", "onnxruntime"}

    worker = Worker(Job(tmp_path, "tiny-bert", threads=1), "onnxruntime f32", limit=60)
    assert worker.report["error"] < 1e-5
    assert len(worker.block(3)) == 3
    worker.close()


def test_a_worker_says_why_it_failed_and_when_it_is_too_slow(tmp_path: Path) -> None:
    """The folder is empty, so there is nothing to load."""
    job = Job(tmp_path, "tiny-bert", threads=1)
    with pytest.raises(WorkerError, match=r"model\.onnx"):
        Worker(job, "onnxruntime f32", limit=60)
    with pytest.raises(WorkerError, match="no result within 0 s"):
        Worker(job, "onnxruntime f32", limit=0.05)


def test_every_system_has_a_label_of_its_own() -> None:
    assert len({system.label for system in SYSTEMS}) == len(SYSTEMS)
