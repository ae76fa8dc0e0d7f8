"""The command line as a whole: help, errors for people and as JSON, exit codes, Ctrl-C, closed pipes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_harness import Commands, run_fresh, write_model_file

import trimtab
from trimtab.cli import main as main_module
from trimtab.cli.progress import part, time_left
from trimtab.errors import ContractError


def _id(value: object) -> str | None:
    return " ".join(value) if isinstance(value, list) else None


@pytest.fixture
def commands(capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(capsys)


def test_help_lists_every_command(commands: Commands) -> None:
    out = commands.ok("--help").out
    for name in main_module.COMMANDS:
        assert f"  {name} " in out


@pytest.mark.parametrize("name", list(main_module.COMMANDS))
def test_every_command_has_json_debug_and_a_one_line_summary(commands: Commands, name: str) -> None:
    out = commands.ok(name, "--help").out
    assert "--json" in out
    assert "--debug" in out
    assert (main_module.COMMANDS[name].__doc__ or "").strip()


def test_version(commands: Commands) -> None:
    assert commands.ok("--version").out == f"trimtab {trimtab.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "part_of_message"),
    [
        (["frobnicate"], "no such command"),
        (["compile"], "missing argument 'MODEL'"),
        (["compile", "m.onnx", "--frob"], "no such option"),
        (["run", "x.trim", "--repeat", "0"], "--repeat"),
        (["compile", "m.onnx", "--threads", "zero"], "--threads"),
    ],
    ids=_id,
)
def test_a_wrong_command_line_is_a_usage_error(commands: Commands, arguments: list[str], part_of_message: str) -> None:
    plain = commands(*arguments)
    assert (plain.code, plain.out) == (2, "")
    assert part_of_message in plain.err.lower().replace("'model'", "'MODEL'")
    assert "Traceback" not in plain.err
    as_json = commands(*arguments, "--json")
    assert as_json.code == 2
    assert as_json.json["error"]["code"] == "usage"
    assert as_json.json["error"]["exit_code"] == 2


def test_without_a_command_the_help_is_shown(commands: Commands) -> None:
    assert commands.ok().out == commands.ok("--help").out


def _raise(error: BaseException) -> object:
    def command(**options: object) -> None:
        raise error

    return command


def _replace_passes_command(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    monkeypatch.setattr("trimtab.cli.passes._passes", _raise(error))


def test_an_error_shows_its_parts_and_gives_its_exit_code(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    _replace_passes_command(
        monkeypatch, ContractError("a pass drifted", values={"by": 3}, rule="r", fix="f", where="w")
    )
    outcome = commands("passes")
    assert outcome.code == ContractError.exit_code
    assert outcome.err == "error: a pass drifted: by=3. r. f.\n  at w\n"
    error = commands("passes", "--json").json["error"]
    assert error == {
        "code": "contract", "what": "a pass drifted", "values": {"by": "3"}, "rule": "r", "fix": "f", "where": "w",
        "location": None, "exit_code": 5,
    }  # fmt: skip


def test_markup_in_a_message_is_printed_as_it_is(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    _replace_passes_command(monkeypatch, ContractError("shape [bold]f32[2, 3][/bold]"))
    assert "shape [bold]f32[2, 3][/bold]." in commands("passes").err


def test_debug_shows_the_traceback(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    _replace_passes_command(monkeypatch, ContractError("a pass drifted"))
    assert "Traceback" not in commands("passes").err
    assert "in _passes" in commands("passes", "--debug").err or "Traceback" in commands("passes", "--debug").err


def test_a_bug_writes_a_report(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    _replace_passes_command(monkeypatch, RuntimeError("unforeseen"))
    error = commands("passes", "--json").json["error"]
    assert error["code"] == "internal"
    assert error["exit_code"] == 70
    report = Path(error["values"]["report"])
    text = report.read_text()
    report.unlink()
    assert "command: trimtab passes --json" in text
    assert "RuntimeError: unforeseen" in text


def test_lack_of_memory_is_not_called_a_bug(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    _replace_passes_command(monkeypatch, MemoryError())
    outcome = commands("passes")
    assert outcome.code == 1
    assert "not enough memory" in outcome.err


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    write_model_file(tmp_path)
    command = [sys.executable, "-m", "trimtab.cli.main", "compile", "model.py:slow", "-o", "slow.trim"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.strip() == "started":
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert {path.name for path in tmp_path.iterdir()} <= {"model.py", "__pycache__"}


@pytest.mark.skipif(os.name != "posix", reason="uses a shell")
def test_a_closed_pipe_is_no_error() -> None:
    script = f"{sys.executable} -m trimtab.cli.main passes | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in (0, 141)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_json_is_the_only_output_even_when_the_model_prints(tmp_path: Path) -> None:
    write_model_file(tmp_path)
    outcome = run_fresh("inspect", "model.py:build", "--json", cwd=tmp_path)
    assert outcome.json["op_count"] == 3
    assert "a user's model may print" in outcome.err


def test_time_left_and_parts_of_progress() -> None:
    assert time_left(5.0, 0.0) == ""
    assert time_left(10.0, 0.25) == "about 30 s left"
    assert time_left(100.0, 0.25) == "about 5 min left"
    seen: list[tuple[str, float]] = []
    part(lambda stage, fraction: seen.append((stage, fraction)), 0.5, 0.9)("work", 0.5)
    assert seen == [("work", pytest.approx(0.7))]
