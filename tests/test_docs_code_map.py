"""``docs/code-map.md`` has one line for every folder and file of the package: the first sentence of its docstring.

``pytest tests/test_docs_code_map.py --update-golden`` writes it anew.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "code-map.md"

_HEAD = """\
# Code map

One line for every folder and file of the package, taken from their docstrings. Written by
`pytest tests/test_docs_code_map.py --update-golden`; do not edit.

Which folder may import which is in `tests/test_package_layers.py`, and why in [concepts.md](concepts.md) and
[design/](design/README.md).
"""


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring's first paragraph, on one line, with single backquotes."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    paragraph = re.sub(r":[a-z:]+:`~?([^`]+)`", r"`\1`", paragraph).replace("``", "`")
    sentence = re.split(r"(?<=\.)\s+(?=[A-Z`])", paragraph, maxsplit=1)[0].rstrip(".:")
    return sentence.replace("|", "\\|")


def code_map(package: Path) -> str:
    """The page for the package rooted at ``package``; files without a docstring have an empty line."""
    lines = [_HEAD]
    folders = [package, *sorted(path for path in package.rglob("*") if path.is_dir())]
    for folder in folders:
        files = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
        about = folder / "__init__.py"
        if not files and not about.exists():
            continue
        summary = _summary(about) if about.exists() else ""
        lines += [f"## `{folder.relative_to(package.parent)}/`", "", f"{summary}.", ""]
        if files:
            lines += ["| file | |", "|---|---|"]
            lines += [f"| `{path.name}` | {_summary(path)} |" for path in files]
            lines.append("")
    return "\n".join(lines)


def _summary(path: Path) -> str:
    return first_sentence(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")


def test_the_code_map_is_up_to_date(request: pytest.FixtureRequest) -> None:
    text = code_map(ROOT / "trimtab")
    if request.config.getoption("--update-golden"):
        PAGE.write_text(text, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == text, "run: pytest tests/test_docs_code_map.py --update-golden"


@pytest.mark.parametrize("path", sorted((ROOT / "trimtab").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_says_what_it_is(path: Path) -> None:
    assert len(_summary(path)) > 5


def test_the_first_sentence() -> None:
    assert first_sentence("A ``thing``: what\nit does.  And more.\n\nDetails.") == "A `thing`: what it does"
    assert first_sentence("Uses :class:`~a.B` a lot.") == "Uses `a.B` a lot"


def test_a_new_file_changes_the_map(tmp_path: Path) -> None:
    package = tmp_path / "p"
    (package / "room").mkdir(parents=True)
    (package / "__init__.py").write_text('"""The package."""')
    (package / "room" / "__init__.py").write_text('"""A room."""')
    before = code_map(package)
    (package / "room" / "new.py").write_text('"""Does | something new."""')
    assert "| `new.py` | Does \\| something new |" in code_map(package)
    assert "new.py" not in before
    assert "## `p/room/`\n\nA room.\n" in before
