"""What the tests of the command line share: a small model file, and commands run in this process or a fresh one."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from trimtab.cli.main import main

MODEL_FILE = """\
import sys

import torch
from torch import nn

print("a user's model may print")


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu(self.hidden(x)))


def build():
    torch.manual_seed(0)
    return Classifier().eval(), (torch.randn(2, 6),)


def dynamic():
    model, args = build()
    return model, args, None, {"x": {0: "batch"}}


def tokens():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(20, 4), nn.Linear(4, 2)).eval(), (torch.randint(0, 20, (1, 5)),)


def training():
    model, args = build()
    return model.train(), args


def fails():
    values = {}
    return values["model"]


def leaves():
    sys.exit(3)


def number():
    return 3


def not_a_module():
    return "model", (torch.randn(2, 6),)


def slow():
    import time

    print("started", file=sys.stderr, flush=True)
    time.sleep(60)


table = 7
"""


@dataclass(frozen=True)
class Outcome:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON document and nothing else."""
        return json.loads(self.out)


class Commands:
    """Runs commands in this process and captures what they print."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str | Path) -> Outcome:
        self._capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = self._capsys.readouterr()
        return Outcome(code, out, err)

    def ok(self, *arguments: str | Path) -> Outcome:
        """Run a command that must succeed."""
        outcome = self(*arguments)
        assert outcome.code == 0, outcome.err + outcome.out
        return outcome


def run_fresh(*arguments: str | Path, cwd: Path | None = None) -> Outcome:
    """Run a command in a process of its own."""
    command = [sys.executable, "-m", "trimtab.cli.main", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, cwd=cwd)
    return Outcome(done.returncode, done.stdout, done.stderr)


def write_model_file(folder: Path) -> Path:
    path = folder / "model.py"
    path.write_text(MODEL_FILE)
    return path
