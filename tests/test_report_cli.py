"""``--report`` of optimize and compile: the page is written at the end, also when the run fails."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from cli_harness import Commands, write_model_file

from trimtab.errors import MissingDependencyError, PassError, UsageError


@pytest.fixture
def commands(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    write_model_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    return Commands(capsys)


def _data(path: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', Path(path).read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found.group(1))


def test_optimize_writes_a_page(commands: Commands) -> None:
    document = commands.ok("optimize", "model.py:dynamic", "--report", "report.html", "--json").json
    assert document["report_page"] == "report.html"
    data = _data("report.html")
    assert data["title"] == "model.py:dynamic"
    assert data["failure"] is None
    names = [row["name"] for row in data["report"]["passes"]]
    assert names == [row["name"] for row in document["report"]["passes"]]
    assert data["report"]["passes"][0]["macs_before"] == 6 * 8 + 8 * 3
    assert data["report"]["seconds"] > 0
    assert "report in report.html" in commands.ok("optimize", "model.py:build", "--report", "report.html").out


def test_compile_writes_a_page(commands: Commands) -> None:
    document = commands.ok("compile", "model.py:build", "-o", "model.trim", "--report", "report.html", "--json").json
    assert document["report_page"] == "report.html"
    assert len(_data("report.html")["steps"]) == len(document["report"]["passes"]) + 1


def test_a_run_that_fails_leaves_a_page_that_says_why(commands: Commands) -> None:
    outcome = commands("optimize", "model.py:build", "--expect", "attention=1", "--report", "report.html")
    assert outcome.code == PassError.exit_code
    assert "attention=0 instead of 1" in outcome.err
    failure = _data("report.html")["failure"]
    assert failure["values"]["attention"] == "0 instead of 1"


def test_a_model_that_cannot_be_imported_leaves_no_page(commands: Commands, tmp_path: Path) -> None:
    assert commands("optimize", "model.py:training", "--report", "report.html").code != 0
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("optimize", "model.py:build", "--report", "no/such/report.html"), "the directory of --report does not exist"),
        (("compile", "model.py:build", "--passes", "", "--report", "report.html"), "there is nothing to report"),
    ],
)
def test_mistakes_are_told_before_anything_runs(commands: Commands, arguments: tuple[str, ...], part: str) -> None:
    outcome = commands(*arguments)
    assert outcome.code == UsageError.exit_code
    assert part in outcome.err


def test_a_missing_extra_is_told_before_anything_runs(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.report.page._LIBRARIES", {"xstatic.pkg.nothing": "nothing.js"})
    monkeypatch.setattr("trimtab.cli.model_argument.load_model", lambda model: pytest.fail("the model was imported"))
    outcome = commands("optimize", "model.py:build", "--report", "report.html")
    assert outcome.code == MissingDependencyError.exit_code
    assert 'pip install "trimtab[report]"' in outcome.err
