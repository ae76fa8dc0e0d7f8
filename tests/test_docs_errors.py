"""``docs/errors.md`` lists every error class with its code, its exit code and a message that the program really gives.

``pytest tests/test_docs_errors.py --update-golden`` writes the messages anew.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import trimtab
from trimtab import errors
from trimtab.cli.error_report import report
from trimtab.cli.model_argument import load_model, require_torch
from trimtab.errors import TrimtabError
from trimtab.ir import Builder, DType, TensorType, ops, verify
from trimtab.passes import Contract, Exact, Pass
from trimtab.passes.base import Changed, Context
from trimtab.passes.pipeline import Pipeline, parse_pipeline
from trimtab.runtime import Signature, TensorSpec

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "errors.md"

MODEL_FILE = """\
import torch


class Positive(torch.nn.Module):
    def forward(self, x):
        return x[x > 0]


class Exponential(torch.nn.Module):
    def forward(self, x):
        return torch.linalg.matrix_exp(x)


def positive():
    return Positive().eval(), (torch.eye(3),)


def exponential():
    return Exponential().eval(), (torch.eye(3),)
"""


def _module() -> trimtab.Module:
    builder = Builder()
    x = builder.input("x", TensorType(DType.F32, (2, 3)))
    builder.output(builder.add(ops.Relu(x)).result)
    return builder.module


def _verification() -> None:
    module = _module()
    module.main.add_input(TensorType(DType.F32, (2, 3)), "x")
    verify(module)


def _training() -> None:
    trimtab.trace(nn.Linear(2, 2), (torch.zeros(1, 2),))


@dataclass(frozen=True)
class _Doubles(Pass):
    """Claims to change nothing and doubles the first output."""

    name: ClassVar[str] = "double"
    contract: ClassVar[Contract] = Exact()

    def run(self, module: trimtab.Module, ctx: Context) -> Changed:
        graph = module.main
        first = graph.outputs[0]
        doubled = ops.Add(first, first)
        graph.ops.append(doubled)
        graph.set_outputs([doubled.result])
        return True


def _backend() -> None:
    from trimtab.backends.tvm.compiler import _explain

    raise _explain(RuntimeError("Check failed: extent is not a constant"), {"fused_linear_gelu": ()})


def _unsupported_by_backend() -> None:
    from trimtab.compiler import find_backend

    find_backend("tvm").check(load_model("model.py:exponential"))


def _artifact() -> None:
    Path("model.trim").write_bytes(b"PK\x03\x04 the beginning of a file")
    trimtab.load("model.trim")


def _input() -> None:
    Signature((TensorSpec("images", "f32", (1, 3, 224, 224)),), ()).check([np.zeros((1, 224, 224, 3), np.float32)])


def _calibration() -> None:
    trimtab.optimize(_module(), calibration=[np.full((2, 3), np.nan, np.float32)])


def _missing_dependency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    require_torch()


EXAMPLES: dict[type[TrimtabError], Callable[[], object]] = {
    errors.UsageError: lambda: load_model("pytorch_model.bin"),
    errors.VerificationError: _verification,
    errors.ParseError: lambda: parse_pipeline("cleanup,,fuse"),
    errors.ImportModelError: _training,
    errors.UnsupportedOpError: lambda: load_model("model.py:positive"),
    errors.PassError: lambda: trimtab.optimize(_module(), expect={"attention": 12}),
    errors.ContractError: lambda: trimtab.optimize(_module(), Pipeline((_Doubles(),))),
    errors.UnsupportedByBackendError: _unsupported_by_backend,
    errors.BackendError: _backend,
    errors.ArtifactError: _artifact,
    errors.InputError: _input,
    errors.CalibrationError: _calibration,
}
"""How to get an error of each class, in a folder with the model file above."""


def classes() -> list[type[TrimtabError]]:
    """Every error class below the base."""
    found = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, TrimtabError)]
    return [cls for cls in found if cls is not TrimtabError]


def section(page: str, name: str) -> str:
    """The text of the page's section about a class."""
    found = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", page, flags=re.MULTILINE | re.DOTALL)
    assert found is not None, f"docs/errors.md has no section {name}"
    return found.group(1)


def message(cls: type[TrimtabError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The example's message as the command line prints it, without what differs from run to run."""
    if cls is errors.InternalError:
        error: BaseException = ZeroDivisionError("division by zero")
    else:
        example = EXAMPLES.get(cls, lambda: _missing_dependency(monkeypatch))
        with pytest.raises(cls) as caught:
            example()
        monkeypatch.undo()
        assert type(caught.value) is cls
        error = caught.value
    assert report(error, []) == cls.exit_code
    printed = capsys.readouterr().err
    for path in re.findall(r"[^\s=]*/trimtab-error-\w+\.txt", printed):
        Path(path).unlink()
    printed = re.sub(r"[^\s=]*/trimtab-error-\w+\.txt", "trimtab-error-x1y2z3.txt", printed)
    return printed.replace(f"{Path.cwd()}/", "")


@pytest.mark.parametrize("cls", classes(), ids=lambda cls: cls.__name__)
def test_the_page_shows_the_message(
    cls: type[TrimtabError],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.MonkeyPatch.context() as outer:
        outer.chdir(tmp_path)
        (tmp_path / "model.py").write_text(MODEL_FILE)
        with pytest.MonkeyPatch.context() as inner:
            text = message(cls, inner, capsys)
    page = PAGE.read_text(encoding="utf-8")
    body = section(page, cls.__name__)
    shown = re.search(r"```text\n(.*?)```", body, flags=re.DOTALL)
    assert shown is not None
    if request.config.getoption("--update-golden"):
        updated = body.replace(shown.group(0), f"```text\n{text}```")
        PAGE.write_text(page.replace(body, updated), encoding="utf-8")
        return
    assert shown.group(1) == text, "run: pytest tests/test_docs_errors.py --update-golden"


@pytest.mark.parametrize("cls", classes(), ids=lambda cls: cls.__name__)
def test_the_page_shows_code_and_exit_code(cls: type[TrimtabError]) -> None:
    body = section(PAGE.read_text(encoding="utf-8"), cls.__name__)
    assert f"Code `{cls.code}`, exit code {cls.exit_code}." in body


def test_the_page_has_no_class_that_does_not_exist() -> None:
    headings = re.findall(r"^## (\w+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert headings == [cls.__name__ for cls in classes()]


def test_the_table_of_exit_codes_is_complete() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*?) \|$", (ROOT / "docs" / "cli.md").read_text(encoding="utf-8"), re.MULTILINE)
    listed = {int(code): text for code, text in rows}
    assert {0, 1, 130, 141} <= set(listed)
    for cls in classes():
        assert f"`{cls.code}`" in listed[cls.exit_code]
