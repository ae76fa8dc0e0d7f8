"""The Python snippets of docs/passes.md run as printed, in order."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "passes.md").read_text(encoding="utf-8")


def test_snippets_run(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("docs_passes")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    snippets = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(snippets) >= 4
    for snippet in snippets:
        exec(compile(snippet, "docs/passes.md", "exec", dont_inherit=True), module.__dict__)
