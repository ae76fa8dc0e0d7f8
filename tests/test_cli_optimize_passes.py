"""``optimize`` and ``passes``: reports, dumps, expectations, calibration, and what each pass says about itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cli_harness import Commands, write_model_file

import trimtab
from trimtab.errors import CalibrationError, PassError
from trimtab.passes.pipeline import group_names
from trimtab.passes.registry import pass_names

_REDUNDANT = """
import torch

class Redundant(torch.nn.Module):
    def forward(self, x):
        return torch.relu(x * 1) + torch.relu(x * 1)

def build():
    return Redundant().eval(), (torch.randn(2, 3),)
"""


@pytest.fixture
def commands(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Commands run in a folder with the model file and a file whose model has something to optimize."""
    write_model_file(tmp_path)
    (tmp_path / "redundant.py").write_text(_REDUNDANT)
    monkeypatch.chdir(tmp_path)
    return Commands(capsys)


def test_optimize_writes_the_module_and_reports_each_pass(commands: Commands) -> None:
    document = commands.ok("optimize", "redundant.py:build", "-o", "out.ttir", "--json").json
    assert document["output"] == "out.ttir"
    assert document["ops"] == 2
    assert {row["name"] for row in document["report"]["passes"] if row["changed"]} >= {"cse"}
    assert [op.name for op in trimtab.read("out.ttir").walk()] == ["relu", "add"]
    text = commands.ok("optimize", "redundant.py:build").out
    assert "Pipeline cleanup,fuse" in text
    assert "cse" in text
    assert "2 ops" in text


def test_a_pipeline_that_changes_nothing(commands: Commands) -> None:
    text = commands.ok("optimize", "model.py:build", "--passes", "dce").out
    assert "changed nothing: dce" in text


def test_dump_writes_the_text_around_each_pass(commands: Commands, tmp_path: Path) -> None:
    commands.ok("optimize", "redundant.py:build", "--passes", "simplify-identities,cse", "--dump", "dumps")
    names = sorted(path.name for path in (tmp_path / "dumps").iterdir())
    assert names[0] == "000-input.ttir"
    assert any(name.endswith("-cse.ttir") for name in names)


def test_expectations(commands: Commands) -> None:
    commands.ok("optimize", "redundant.py:build", "--expect", "relu=1", "--expect", "add=1")
    outcome = commands("optimize", "redundant.py:build", "--expect", "relu=2", "-o", "out.ttir")
    assert outcome.code == PassError.exit_code
    assert "relu=1 instead of 2" in outcome.err
    assert not Path("out.ttir").exists()


def test_calibration_batches_are_checked(commands: Commands) -> None:
    np.savez("good.npz", x=np.ones((2, 3), np.float32))
    np.savez("bad.npz", x=np.full((2, 3), np.nan, np.float32))
    commands.ok("optimize", "redundant.py:build", "--calibration", "good.npz")
    outcome = commands("optimize", "redundant.py:build", "--calibration", "good.npz", "--calibration", "bad.npz")
    assert outcome.code == CalibrationError.exit_code
    assert "calibration batch 1" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["-o", "out.onnx"], "a module is written to a .ttir file"),
        (["-o", "nowhere/out.ttir"], "does not exist"),
        (["--passes", "cse{depth=2}"], "has no option depth"),
        (["--passes", "clean-up"], "did you mean `cleanup`"),
        (["--expect", "relu"], "cannot read --expect"),
        (["--expect", "relu=many"], "whole number"),
        (["--expect", "rellu=1"], "did you mean `relu`"),
        (["--calibration", "none.npz"], "no such input file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_optimize_refuses(commands: Commands, arguments: list[str], part: str) -> None:
    outcome = commands("optimize", "redundant.py:build", *arguments)
    assert outcome.code == 2
    assert part in outcome.err


def test_passes_lists_every_pass_and_group(commands: Commands) -> None:
    document = commands.ok("passes", "--json").json
    assert {row["name"] for row in document["passes"]} == pass_names()
    assert [row["name"] for row in document["groups"]] == group_names()
    for row in document["passes"]:
        assert row["contract"]
        assert row["summary"]
    text = commands.ok("passes").out
    for name in (*pass_names(), *group_names()):
        assert name in text


@pytest.mark.parametrize("name", sorted(pass_names()))
def test_passes_shows_one_in_full(commands: Commands, name: str) -> None:
    document = commands.ok("passes", name, "--json").json
    text = commands.ok("passes", name).out
    assert document["documentation"].splitlines()[-1].strip() in text
    assert f"contract:  {document['contract']}" in text
    for option in document["options"]:
        assert option["name"] in text


def test_passes_shows_a_group(commands: Commands) -> None:
    assert "dedup-weights" in commands.ok("passes", "cleanup").out
    assert commands.ok("passes", "cleanup", "--json").json["rounds"] > 1


def test_an_unknown_pass(commands: Commands) -> None:
    outcome = commands("passes", "cs")
    assert outcome.code == 2
    assert "did you mean `cse`" in outcome.err
