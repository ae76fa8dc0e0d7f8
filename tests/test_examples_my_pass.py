"""The example of a third-party package: installed as a user would install it, then used in processes of its own."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "examples" / "my-pass"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables for a process that sees the package as installed."""
    import shutil

    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"  # a build leaves files behind, which do not belong into the checkout
    shutil.copytree(PACKAGE, source)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--target", str(folder / "site"), str(source)], check=True, timeout=300)
    paths = [str(folder / "site"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


def trimtab(environment: dict[str, str], *arguments: str) -> str:
    command = [sys.executable, "-m", "trimtab.cli.main", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_its_passes_are_listed_and_documented(environment: dict[str, str]) -> None:
    listed = {row["name"]: row for row in json.loads(trimtab(environment, "passes", "--json"))["passes"]}
    assert listed["multiply-by-rsqrt"]["contract"] == "exact up to rounding"
    assert listed["round-weights"]["provider"] == "my-pass"
    assert listed["round-weights"]["options"][0]["default"] == "1024"
    assert "to the precision of bfloat16" in trimtab(environment, "passes", "round-weights")


def test_its_passes_run_in_a_pipeline(environment: dict[str, str], tmp_path: Path) -> None:
    model = tmp_path / "model.py"
    model.write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.linear = torch.nn.Linear(64, 64)\n"
        "    def forward(self, x):\n"
        "        y = self.linear(x)\n"
        "        return y / (y * y + 1).sqrt()\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    return Net().eval(), (torch.randn(2, 64),)\n"
    )
    pipeline = "multiply-by-rsqrt,round-weights{min_elements=4096}"
    printed = json.loads(trimtab(environment, "optimize", f"{model}:make", "--passes", pipeline, "--json"))
    first, second = printed["report"]["passes"]
    assert [first["changed"], second["changed"]] == [True, True]
    assert first["rules"][0]["rule"] == "divide-by-sqrt"
    assert second["notes"][0] == "1 of 2 weights rounded"


def test_its_own_tests_pass(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(PACKAGE / "tests")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=PACKAGE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout


@pytest.mark.parametrize("name", ["multiply_by_rsqrt", "round_weights"])
def test_each_pass_takes_less_than_25_lines(name: str) -> None:
    text = (PACKAGE / "my_pass" / f"{name}.py").read_text()
    body = text[text.index("\n\n\n") :]  # what comes after the imports
    assert len([line for line in inspect.cleandoc(body).splitlines() if line.strip()]) < 25
