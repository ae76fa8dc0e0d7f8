"""``trimtab bisect``: the story, the folder, JSON, exit codes, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import broken_passes
import numpy as np
import pytest
from cli_harness import Commands, write_model_file

from trimtab.errors import InputError, PassError
from trimtab.passes import registry as registry_module


@pytest.fixture
def commands(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Commands run in a folder with the model file, and a broken pass among the installed ones."""
    write_model_file(tmp_path)
    for cls in (broken_passes.Shift, broken_passes.Refuse):
        monkeypatch.setitem(registry_module._OWN, cls.name, f"broken_passes:{cls.__name__}")  # type: ignore[index]
    monkeypatch.chdir(tmp_path)
    return Commands(capsys)


def test_the_story_and_the_folder(commands: Commands) -> None:
    outcome = commands("bisect", "model.py:dynamic", "--passes", "cleanup,shift{by=2.0},dce", "--check", "rtol=1e-3")
    assert outcome.code == PassError.exit_code
    assert "shift{by=2.0}" in outcome.out
    assert "rewrite   1 of 1: shift" in outcome.out
    assert "model.py:16 in forward" in outcome.out
    assert "reproducer reproducer-shift: " in outcome.out
    assert "run       python reproducer-shift/reproduce.py" in outcome.out
    assert outcome.err == ""
    assert Path("reproducer-shift/reproducer.ttir").exists()
    assert "reproducer-shift-2" in commands("bisect", "model.py:build", "--passes", "shift").out


def test_json(commands: Commands) -> None:
    outcome = commands("bisect", "model.py:build", "--passes", "shift", "--out", "there", "--json")
    assert outcome.code == PassError.exit_code
    document = outcome.json
    assert document["culprit"]["pass"] == "shift"
    assert document["culprit"]["rewrite"]["number"] == 1
    assert document["culprit"]["after"]["kind"] == "drift"
    assert document["reproducer"]["folder"] == "there"
    assert document["reproducer"]["ops"] <= 2
    assert document["check"] == "rtol=0.001"


def test_nothing_wrong(commands: Commands) -> None:
    outcome = commands.ok("bisect", "model.py:build", "--check", "rounding")
    assert "nothing is wrong" in outcome.out
    assert sorted(os.listdir()) == ["model.py"]
    assert commands.ok("bisect", "model.py:build", "--json").json["culprit"] is None


def test_search_only(commands: Commands) -> None:
    outcome = commands("bisect", "model.py:build", "--passes", "refuse", "--no-reproducer", "--thorough")
    assert outcome.code == PassError.exit_code
    assert "this module is not for me" in outcome.out
    assert sorted(os.listdir()) == ["model.py"]


def test_without_reduction(commands: Commands) -> None:
    commands("bisect", "model.py:build", "--passes", "shift", "--evaluations", "0")
    assert "linear" in Path("reproducer-shift/reproducer.ttir").read_text()


def test_inputs_and_a_check_of_the_user(commands: Commands) -> None:
    np.savez("x.npz", x=np.ones((2, 6), np.float32))
    text = "import numpy as np\n\ndef small(module):\n    return len(list(module.walk())) < 4\n"
    Path("check.py").write_text(text)
    outcome = commands(
        "bisect", "model.py:build", "--passes", "shift", "--check", "check.py:small", "--inputs", "x.npz"
    )
    assert outcome.code == PassError.exit_code
    assert "check.py:small returned False" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["--check", "rtol"], 2, "cannot read the contract to check"),
        (["--check", "none.py:f"], 2, "no such check file"),
        (["--check", "model.py:number"], 2, "takes 0 positional arguments"),
        (["--passes", "shif"], 2, "there is no pass shif"),
        (["--inputs", "none.npz"], 2, "no such input file"),
        (["--inputs", "bad.npz"], InputError.exit_code, "wrong input names"),
        (["--out", "nowhere/out"], 2, "nowhere is no folder"),
        (["--out", "."], 2, "something is there"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_is_refused(commands: Commands, arguments: list[str], code: int, part: str) -> None:
    np.savez("bad.npz", z=np.ones((2, 6), np.float32))
    outcome = commands("bisect", "model.py:build", *arguments)
    assert outcome.code == code
    assert part in outcome.err


def test_a_pass_of_an_installed_package_in_a_fresh_process(tmp_path: Path) -> None:
    write_model_file(tmp_path)
    broken_passes.install(tmp_path / "site")

    def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "trimtab.cli.main", "bisect", *arguments],
            capture_output=True, text=True, timeout=240, check=False, cwd=folder,
            env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        )  # fmt: skip

    done = run("model.py:build", "--passes", "cleanup,shift", folder=tmp_path)
    assert done.returncode == PassError.exit_code, done.stderr
    command = next(
        line.split()[2:]
        for line in (tmp_path / "reproducer-shift" / "README.md").read_text().splitlines()
        if line.startswith("    trimtab bisect ")
    )
    again = run(*command, folder=tmp_path / "reproducer-shift")
    assert again.returncode == PassError.exit_code, again.stderr
    assert "rewrite   1 of 1: shift" in again.stdout
