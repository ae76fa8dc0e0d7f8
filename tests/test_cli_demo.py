"""The demo, whole: its accuracy, its agreement with eager PyTorch, and that the artifact ran without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cli_harness import run_fresh

from trimtab.cli import demo_latency, demo_training
from trimtab.cli.demo import _print
from trimtab.cli.demo_model import DigitTransformer


def test_the_split_is_reproducible_stratified_and_a_third() -> None:
    digits = demo_training.load_digits()
    assert len(digits.held_out_images) == 599
    assert len(digits.train_images) == 1198
    assert digits.train_images.shape[1:] == (1, 8, 8)
    assert -1 <= digits.train_images.min() < digits.train_images.max() <= 1
    shares = np.bincount(digits.train_labels) / 1198 - np.bincount(digits.held_out_labels) / 599
    assert np.abs(shares).max() < 0.005
    again = demo_training.load_digits()
    assert np.array_equal(digits.held_out_images, again.held_out_images)


def test_training_sees_the_training_part_only() -> None:
    digits = demo_training.load_digits()
    blanked = demo_training.Digits(
        digits.train_images, digits.train_labels, np.zeros((0, 1, 8, 8), "f4"), np.zeros(0, "i8")
    )
    first, second = (demo_training.train(data, 1, 0, lambda done: None) for data in (digits, blanked))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_model_takes_any_batch() -> None:
    model = DigitTransformer(width=8, depth=1, heads=2).eval()
    for batch in (1, 3):
        assert model(torch.zeros(batch, 1, 8, 8)).shape == (batch, 10)


def test_contenders_are_measured_on_the_same_images() -> None:
    seen: dict[str, list[bytes]] = {"a": [], "b": []}

    def contender(name: str):  # type: ignore[no-untyped-def]
        return lambda images: seen[name].append(images.tobytes())

    images = np.random.default_rng(0).random((50, 1, 8, 8), np.float32)
    found = demo_latency.measure({name: contender(name) for name in seen}, images, 0, lambda done: None)
    assert seen["a"] == seen["b"]
    assert len({len(call) for call in seen["a"]}) == len(demo_latency.BATCHES)
    for latencies in found.values():
        assert set(latencies) == set(demo_latency.BATCHES)
        assert all(0 < latency.best <= latency.median for latency in latencies.values())


def test_a_busy_machine_is_noticed() -> None:
    quiet, busy = demo_latency.Latency((1.0, 1.1, 1.2)), demo_latency.Latency((1.0, 9.0, 9.5))
    latencies = {"a": {1: quiet, 64: quiet}, "b": {1: quiet, 64: busy}}
    assert not demo_latency.was_disturbed(latencies, 1)
    assert demo_latency.was_disturbed(latencies, 64)


def test_the_whole_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tvm")
    outcome = run_fresh("demo", "--json", "--keep", tmp_path / "kept", "--threads", "1")
    assert outcome.code == 0, outcome.err
    document = outcome.json
    contenders = {row["name"]: row for row in document["contenders"]}
    assert contenders["PyTorch eager"]["accuracy"] >= 0.97
    assert contenders["Trimtab"]["accuracy"] == contenders["PyTorch eager"]["accuracy"]
    assert contenders["Trimtab"]["max_difference"] < 1e-3
    assert document["artifact_process"]["compiler_packages"] == []
    assert (tmp_path / "kept" / "digits.trim").stat().st_size == document["file"]["bytes"]
    assert set(document["seconds"]) >= {"train", "trace", "optimize", "compile", "run all digits"}
    for row in document["contenders"]:
        for latency in row["latency"].values():
            assert 0 < latency["best_seconds"] <= latency["median_seconds"]
    if "ONNX Runtime" in contenders:
        assert contenders["ONNX Runtime"]["accuracy"] == contenders["PyTorch eager"]["accuracy"]
    _print(document)
    text = capsys.readouterr().out
    for part in ("PyTorch eager", "Trimtab", "accuracy", "file size", "train", "held-out digits"):
        assert part in text
