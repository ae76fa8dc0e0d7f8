"""A reproducer is small, shows the failure from its files alone, and is written whole or not at all."""

from __future__ import annotations

import errno
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import broken_passes
import numpy as np
import pytest
import torch
from broken_passes import BadFusion, PeelNorm, PeelNormAndCorrupt, PeelNormAndRaise, Shift, never_shifted
from test_bisect import around, culprit, small_module, zoo_module

import trimtab
from trimtab.debug import Bisection, Reproducer, bisect, make_reproducer, write_reproducer
from trimtab.errors import ArtifactError, TrimtabError, UsageError
from trimtab.ir import Builder, DType, Module, TensorType, interpret, ops
from trimtab.passes import Exact, Pass
from trimtab.passes import registry as registry_module


def written(found: Bisection, folder: Path) -> Reproducer:
    reproducer = make_reproducer(found)
    write_reproducer(reproducer, folder)
    return reproducer


def run_program(folder: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """``reproduce.py`` in a fresh process and another folder, with ``path`` on Python's path."""
    environment = {**os.environ, "PYTHONPATH": str(path) if path is not None else ""}
    return subprocess.run(
        [sys.executable, str(folder / "reproduce.py")],
        capture_output=True, text=True, timeout=240, check=False, env=environment, cwd=folder.parent,
    )  # fmt: skip


def run_here(folder: Path) -> int:
    """The exit code of ``reproduce.py`` when this process runs it, which takes no time to start."""
    with pytest.raises(SystemExit) as leaving:
        runpy.run_path(str(folder / "reproduce.py"), run_name="__main__")
    assert isinstance(leaving.value.code, int)
    return leaving.value.code


@pytest.mark.parametrize(
    ("model", "pass_", "rule", "most"),
    [
        ("bert", PeelNorm(factor=2.0), "peel", 5),
        ("vit", BadFusion(), "bias-again", 2),
        ("bert", PeelNormAndRaise(), "peel", 5),
        ("vit", PeelNormAndCorrupt(), "peel", 5),
    ],
    ids=lambda value: value.name if isinstance(value, Pass) else None,
)
def test_a_reproducer_is_small_and_shows_the_failure_from_its_files(
    model: str, pass_: Pass, rule: str, most: int, tmp_path: Path
) -> None:
    found = bisect(zoo_module(model), around(pass_), "rtol=1e-3")
    reproducer = written(found, tmp_path / "out")
    assert reproducer.notes == []
    assert len(reproducer.module.main.ops) <= most
    assert reproducer.module.weight_bytes < 1000
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) < 30_000
    assert culprit(reproducer.shown).after.is_like(culprit(found).after)
    assert culprit(reproducer.shown).rewrite.rule == rule  # type: ignore[union-attr]
    done = run_program(tmp_path / "out")
    assert done.returncode == 1, done.stderr
    assert f"rewrite   {3 if rule == 'peel' else 1} of" in done.stdout
    assert f": {rule}\n" in done.stdout
    readme = (tmp_path / "out" / "README.md").read_text()
    assert f"A failure of the pass {pass_.name}" in readme
    assert "python reproduce.py" in readme
    assert str(found) in readme


def test_a_pass_of_an_installed_package_is_named_by_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry_module._OWN, "peel-norm", "broken_passes:PeelNorm")  # type: ignore[index]
    written(bisect(zoo_module("vit"), around(PeelNorm(factor=3.0))), tmp_path / "out")
    broken_passes.install(tmp_path / "site")
    assert "'peel-norm{factor=3.0}'" in (tmp_path / "out" / "reproduce.py").read_text()
    assert "trimtab bisect reproducer.ttir --passes 'peel-norm{factor=3.0}'" in (tmp_path / "out/README.md").read_text()
    done = run_program(tmp_path / "out", tmp_path / "site")
    assert done.returncode == 1, done.stderr
    # Once the pass is mended, the same program says so.
    mended = (tmp_path / "site" / "broken_passes.py").read_text().replace("peeled == self.wrong", "False")
    (tmp_path / "site" / "broken_passes.py").write_text(mended)
    done = run_program(tmp_path / "out", tmp_path / "site")
    assert (done.returncode, done.stderr) == (0, "")
    assert "nothing is wrong" in done.stdout


def test_the_outputs_say_what_is_expected_and_what_is_found(tmp_path: Path) -> None:
    reproducer = written(bisect(small_module(), [Shift(2.0)]), tmp_path / "out")
    module = trimtab.read(tmp_path / "out" / "reproducer.ttir", check="now")
    assert module == reproducer.module
    inputs = dict(np.load(tmp_path / "out" / "inputs.npz"))
    outputs = np.load(tmp_path / "out" / "outputs.npz")
    (expected,) = interpret(module, inputs)
    np.testing.assert_array_equal(outputs["expected/y"], expected.numpy())
    np.testing.assert_allclose(outputs["found/y"], expected.numpy() + 2, rtol=1e-6)
    assert "is expected" in (tmp_path / "out" / "README.md").read_text()


def test_a_module_without_weights_has_no_weights_file(tmp_path: Path) -> None:
    written(bisect(small_module(), [Shift(2.0)]), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "inputs.npz", "outputs.npz", "reproduce.py", "reproducer.ttir"}


def test_bfloat16_inputs_come_back(tmp_path: Path) -> None:
    build = Builder()
    x = build.input("x", TensorType(DType.BF16, (3, 5)))
    build.output(build(ops.Relu(x)))
    written(bisect(build.module, [Shift(2.0)], "rtol=1e-2"), tmp_path / "out")
    assert np.load(tmp_path / "out" / "inputs.npz")["x"].dtype == np.float32
    assert run_here(tmp_path / "out") == 1


def test_a_failure_on_special_values_comes_with_them(tmp_path: Path) -> None:
    build = Builder()
    x = build.input("x", TensorType(DType.F32, (4, 4)))
    build.output(build(ops.Neg(x)))

    found = bisect(build.module, [broken_passes.Shift(0.0)], "exact")  # -0.0 + 0.0 is 0.0
    written(found, tmp_path / "out")
    assert not np.isfinite(np.load(tmp_path / "out" / "inputs.npz")["x"]).all()
    assert run_here(tmp_path / "out") == 1


def test_calibration_batches_are_kept(tmp_path: Path) -> None:
    batch = {"x": torch.randn(2, 3)}
    reproducer = written(bisect(small_module(), [Shift(2.0)], calibration=[batch]), tmp_path / "out")
    assert (tmp_path / "out" / "calibration.0.npz").exists()
    assert reproducer.shown.data.calibration
    assert run_here(tmp_path / "out") == 1


def test_a_drift_that_adds_up_gets_a_finer_tolerance(tmp_path: Path) -> None:
    found = bisect(small_module(), [Shift(1e-3)] * 5, "rtol=0,atol=2.5e-3")
    reproducer = written(found, tmp_path / "out")
    assert any("hence the tolerance" in note for note in reproducer.notes)
    assert run_here(tmp_path / "out") == 1


def test_a_check_of_the_user_goes_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(bisect(small_module(), [Shift(2.0)], never_shifted), tmp_path / "out")
    assert run_here(tmp_path / "out") == 1
    assert "broken_passes.py:never_shifted returned False" in capsys.readouterr().out


@dataclass(frozen=True)
class Outer:
    """A namespace."""

    @dataclass(frozen=True)
    class Nested(Shift):
        """Shift."""

        name: ClassVar[str] = "nested"


def test_a_nested_class_can_be_imported(tmp_path: Path) -> None:
    written(bisect(small_module(), [Outer.Nested()]), tmp_path / "out")
    assert run_here(tmp_path / "out") == 1


def test_what_no_file_defines_has_no_program(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Local(Shift):
        """Shift."""

        name: ClassVar[str] = "local"

    written(bisect(small_module(), [Local()]), tmp_path / "pass")
    written(bisect(small_module(), [Shift()], lambda module: never_shifted(module)), tmp_path / "check")
    for name in ("pass", "check"):
        assert not (tmp_path / name / "reproduce.py").exists()
        assert "in no file that a program could load" in (tmp_path / name / "README.md").read_text()


def test_two_wrong_rules_are_told_apart() -> None:
    """A module on which the other rule fails is smaller, but shows another fault."""

    @dataclass(frozen=True)
    class TwoFaults(Pass):
        """Spoil tanh and exp; tanh comes first."""

        name: ClassVar[str] = "two-faults"
        contract: ClassVar[Exact] = Exact()

        def run(self, module: Module, ctx: Any) -> bool:
            changed = False
            for kind in (ops.Tanh, ops.Exp):
                for op in [op for op in module.main.ops if isinstance(op, kind)]:
                    if ctx.rewrites.permit(kind.name, op):
                        build = Builder(module, before=op)
                        again = build(kind(build(kind(op.x))))
                        op.result.replace_all_uses_with(again)
                        module.main.ops.remove(op)
                        changed = True
            return changed

    build = Builder()
    x = build.input("x", TensorType(DType.F32, (3,)))
    build.output(build(ops.Exp(build(ops.Neg(build(ops.Tanh(x)))))))
    found = bisect(build.module, [TwoFaults()])
    assert culprit(found).rewrite.rule == "tanh"  # type: ignore[union-attr]
    reproducer = make_reproducer(found)
    assert culprit(reproducer.shown).rewrite.rule == "tanh"  # type: ignore[union-attr]
    assert [op.name for op in reproducer.module.walk()] == ["tanh"]
    assert reproducer.notes == []


def test_nothing_to_reproduce() -> None:
    with pytest.raises(UsageError, match="there is nothing to reproduce"):
        make_reproducer(bisect(small_module(), "cleanup"))


# -- writing ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reproducer() -> Reproducer:
    return make_reproducer(bisect(zoo_module("vit"), around(PeelNorm())))


def test_a_folder_with_something_in_it_is_left_alone(reproducer: Reproducer, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_reproducer(reproducer, tmp_path / "out")  # an empty folder is as good as none
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for taken in (tmp_path / "out", tmp_path / "out" / "README.md"):
        with pytest.raises(UsageError, match="something is there"):
            write_reproducer(reproducer, taken)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_missing_parent_is_named(reproducer: Reproducer, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere is no folder.*mkdir -p"):
        write_reproducer(reproducer, tmp_path / "nowhere" / "out")


def test_a_parent_that_may_not_be_written(
    reproducer: Reproducer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ArtifactError, match="may not be written"):
        write_reproducer(reproducer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["reproducer.ttir", "reproducer.safetensors", "inputs.npz", "README.md", "reproduce.py"]
)
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_full_disk_or_an_interrupt_leaves_nothing(
    reproducer: Reproducer, name: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.replace

    def replace(source: Any, target: Any, **kwargs: Any) -> None:
        if Path(target).name == name:
            raise error
        real(source, target, **kwargs)

    monkeypatch.setattr(os, "replace", replace)
    kind = ArtifactError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(kind) as caught:
        write_reproducer(reproducer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    if isinstance(caught.value, TrimtabError):
        assert "not enough space" in str(caught.value)
