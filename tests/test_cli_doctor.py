"""``doctor``: says what works, and for what does not, why and what to install."""

from __future__ import annotations

import importlib.metadata
import shutil
from dataclasses import replace
from typing import Any

import pytest
from cli_harness import Commands

from trimtab.backends.base import BackendStatus
from trimtab.backends.cpu_targets import CPU_TARGETS, native, needed_to_run
from trimtab.compiler import BACKENDS, find_backend
from trimtab.cpu_features import host_architecture
from trimtab.errors import BackendError


@pytest.fixture
def commands(capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(capsys)


def test_doctor_reports_packages_processor_and_backends(commands: Commands) -> None:
    document = commands.ok("doctor", "--quick", "--json").json
    versions = {row["package"]: row["version"] for row in document["packages"]}
    assert versions["torch"] == importlib.metadata.version("torch")
    assert document["processor"]["usable_cores"] >= 1
    assert document["linker"] == shutil.which("cc") or document["linker"]
    assert [row["name"] for row in document["backends"]] == list(BACKENDS)
    assert document["trial"] is None
    text = commands.ok("doctor", "--quick").out
    for part in ("numpy", "apache-tvm", "native", "x86-64-v3", "trial: skipped"):
        assert part in text


@pytest.mark.parametrize(
    ("flags", "bf16", "int8"),
    [
        (
            frozenset({"avx512bf16", "amx-bf16", "avxvnni"}),
            "bf16 products: amx-bf16, avx512bf16\n",
            "int8 products: avxvnni\n",
        ),
        (frozenset({"avx2"}), "no instruction; operands are widened to float32", "widened to int16 or int32"),
        (None, "bf16 products: unknown", "int8 products: unknown"),
    ],
)
def test_doctor_says_which_narrow_products_are_native(
    commands: Commands, monkeypatch: pytest.MonkeyPatch, flags: frozenset[str] | None, bf16: str, int8: str
) -> None:
    monkeypatch.setattr("trimtab.cpu_features.host_features", lambda: flags)
    out = commands.ok("doctor", "--quick").out
    assert bf16 in out
    assert int8 in out


def test_doctor_compiles_a_tiny_model(commands: Commands) -> None:
    pytest.importorskip("tvm")
    trial = commands.ok("doctor", "--json").json["trial"]
    assert trial["works"], trial["message"]
    assert trial["error"] is None


def test_a_failing_trial_is_reported(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tvm")

    def fail(*arguments: Any, **options: Any) -> Any:
        raise BackendError("the code generator is out of order", fix="have it repaired")

    monkeypatch.setattr("trimtab.compile", fail, raising=False)
    outcome = commands("doctor")
    assert outcome.code == 1
    assert "trial: FAILED" in outcome.out
    assert "have it repaired" in outcome.out


def test_a_backend_that_does_not_work_says_why(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    status = BackendStatus("tvm", False, reason="the package apache-tvm is not installed", fix="pip install it")
    for name in BACKENDS:
        monkeypatch.setattr(type(find_backend(name)), "status", lambda self: status)
    outcome = commands.ok("doctor")
    assert "the package apache-tvm is not installed: pip install it" in outcome.out
    assert "trial: skipped" in outcome.out


def test_a_missing_package_says_how_to_get_it(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("trimtab.cli.machine_state.importlib.metadata.version", version)
    out = commands("doctor", "--quick").out
    assert "missing" in out
    assert 'pip install "trimtab[onnx]"' in out


def test_targets_of_other_machines_say_what_they_need(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    status = BackendStatus(
        "tvm", True, ("native", "mips"), missing_targets={"alpha": "a linker"}, foreign_targets={"mips": "a mips"}
    )
    monkeypatch.setattr(type(find_backend("tvm")), "status", lambda self: status)
    document = commands.ok("doctor", "--quick", "--json").json
    (row,) = (row for row in document["backends"] if row["name"] == "tvm")
    assert (row["missing_targets"], row["foreign_targets"]) == ({"alpha": "a linker"}, {"mips": "a mips"})
    out = commands.ok("doctor", "--quick").out
    assert "to run: a mips" in out
    assert "to compile: a linker" in out


def test_a_processor_says_what_its_code_needs() -> None:
    here = host_architecture()
    other = "riscv64" if here != "riscv64" else "aarch64"
    assert other in needed_to_run(CPU_TARGETS[other])
    assert needed_to_run(native()) == ""
    wanting = replace(native(), features=("no-such-feature",))
    assert "no-such-feature" in needed_to_run(wanting)
