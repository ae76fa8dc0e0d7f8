"""The Python snippets of docs/passes.md run as printed, in order, and its tables list the passes there are."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

from trimtab.passes.pipeline import group_names, load_group
from trimtab.passes.registry import load_pass, pass_names, provider

PAGE = (Path(__file__).parent.parent / "docs" / "passes.md").read_text(encoding="utf-8")


def test_snippets_run(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("docs_passes")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    snippets = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(snippets) >= 5
    for snippet in snippets:
        exec(compile(snippet, "docs/passes.md", "exec", dont_inherit=True), module.__dict__)


def test_tables_list_every_pass_with_its_contract() -> None:
    for name in pass_names():
        if provider(name) == "trimtab":
            row = re.search(rf"^\| `{name}(?:{{.*?}})?` \|.*\| (.*) \|$", PAGE, re.MULTILINE)
            assert row is not None, f"{name} is missing"
            assert row[1] == str(load_pass(name).contract)
    for name in group_names():
        passes = " ".join(f"`{pass_}`" for pass_ in load_group(name).items)
        assert f"| `{name}` | {passes} |" in PAGE
