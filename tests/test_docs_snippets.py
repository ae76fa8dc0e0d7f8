"""Every snippet of the documentation runs, and every link of it leads somewhere.

A page is one program: its ```python blocks share their names, its ``$ trimtab ...`` lines in ```console blocks run
between them, all from top to bottom in an empty folder.  An ```output block is what the ```python block before prints.
Blocks of other languages (text, sh, toml, cpp) are not run.
"""

from __future__ import annotations

import contextlib
import io
import linecache
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from trimtab.cli.main import main
from trimtab.ir import OP_CLASSES

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
EXPENSIVE = ("trimtab demo",)
"""Commands that tests of their own run."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page, in order; ``line`` is that of the first line inside."""
    opened: tuple[str, str, int] | None = None
    collected: list[str] = []
    for number, line in enumerate(page.splitlines(), start=1):
        fence = re.match(r"\s*(`{3,})\s*([^`]*)$", line)
        if opened is None and fence:
            opened, collected = (fence.group(1), fence.group(2).strip(), number + 1), []
        elif opened is not None and fence and fence.group(1) == opened[0] and not fence.group(2):
            yield Block(opened[1], "\n".join(collected) + "\n", opened[2])
            opened = None
        elif opened is not None:
            collected.append(line)
    assert opened is None, f"the block that begins in line {opened[2] - 1} is not closed"


def run_page(name: str, page: str) -> None:
    """Run the blocks of a page in the current folder."""
    module = ModuleType(f"docs_page_{re.sub(r'[^a-zA-Z0-9]', '_', name)}")
    sys.modules[module.__name__] = module  # dataclasses look their module up by name
    ops_of_trimtab = dict(OP_CLASSES)
    loaded = set(sys.modules)
    printed: str | None = None
    try:
        for block in blocks(page):
            if block.language == "python":
                printed = _run_python(block, name, module)
            elif block.language == "console":
                _run_commands(block, name)
            elif block.language == "output":
                assert printed is not None, f"{name}:{block.line}: output of what?"
                assert printed == block.text, f"{name}:{block.line}: the code prints\n{printed}"
    finally:
        # An op that a page declares must not take part in other tests.
        OP_CLASSES.clear()
        OP_CLASSES.update(ops_of_trimtab)
        del sys.modules[module.__name__]
        _forget_files_of_the_page(loaded)


def _forget_files_of_the_page(loaded: set[str]) -> None:
    # Two pages may each have a model.py, which the second would otherwise get from the first.
    for name in set(sys.modules) - loaded:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).is_relative_to(Path.cwd()):
            del sys.modules[name]


def _run_python(block: Block, name: str, module: ModuleType) -> str:
    # The code is compiled under a name of its own, in which line numbers are those of the page.
    source = "\n" * (block.line - 1) + block.text
    file = f"<{name}:{block.line}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    captured = io.StringIO()
    with contextlib.redirect_stdout(captured):
        exec(compile(source, file, "exec"), module.__dict__)
    return captured.getvalue()


def _run_commands(block: Block, name: str) -> None:
    for offset, line in enumerate(block.text.splitlines()):
        command = line.removeprefix("$ ").split("  #")[0].strip()
        if line.startswith("$ trimtab ") and not command.startswith(EXPENSIVE):
            captured = io.StringIO()
            with contextlib.redirect_stdout(captured), contextlib.redirect_stderr(captured):
                code = main(shlex.split(command)[1:])
            assert code == 0, f"{name}:{block.line + offset}: {command}\n{captured.getvalue()}"


def _large_image_model() -> None:
    """The ``model.trim`` that docs/deploying.md loads, in the current folder."""
    import torch
    from torch import nn

    import trimtab

    net = nn.Sequential(nn.Conv2d(3, 4, 32, stride=32), nn.Flatten(), nn.Linear(196, 10)).eval()
    trimtab.compile(trimtab.trace(net, (torch.zeros(1, 3, 224, 224),))).save("model.trim")


PREPARED: dict[str, Callable[[], None]] = {"docs/deploying.md": _large_image_model}
"""What a page takes for granted."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_snippets_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page.read_text(encoding="utf-8")
    if not any(block.language in ("python", "console") for block in blocks(text)):
        return
    pytest.importorskip("tvm")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    name = str(page.relative_to(ROOT))
    PREPARED.get(name, lambda: None)()
    run_page(name, text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page_have_known_languages(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8")):
        # "py" is for excerpts of our own sources on generated pages; what users read is "python", and runs.
        known = {"", "c", "cpp", "console", "json", "make", "output", "python", "sh", "text", "toml"}
        known |= {"py"} if page.name == "ir-reference.md" else set()
        assert block.language in known, f"{page}:{block.line}: {block.language!r}"


def heading_anchors(page: str) -> set[str]:
    """The anchors that headings get: lower case, punctuation dropped, blanks as dashes."""
    outside = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+\s+(.*?)\s*$", outside, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.replace("`", "")).strip().lower().replace(" ", "-") for heading in headings}


def broken_links(path: Path, root: Path) -> list[str]:
    """Relative links of a page that lead nowhere, or out of the repository."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        exists = found.exists() and found.is_relative_to(root)
        if exists and anchor and found.suffix == ".md":
            exists = anchor in heading_anchors(found.read_text(encoding="utf-8"))
        if not exists:
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    assert broken_links(page, ROOT) == []


def test_a_failing_snippet_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page("good", "```python\nx = 2\n```\ntext\n```python\nprint(x + 1)\n```\n```output\n3\n```\n")
    with pytest.raises(NameError):
        run_page("bad", "```python\nprint(y)\n```\n")
    with pytest.raises(AssertionError, match="the code prints"):
        run_page("bad", "```python\nprint(1)\n```\n```output\n2\n```\n")
    with pytest.raises(AssertionError, match=r"trimtab inspect none\.trim"):
        run_page("bad", "```console\n$ trimtab inspect none.trim\n```\n")
    with pytest.raises(AssertionError, match="not closed"):
        run_page("bad", "```python\nx = 1\n")


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# A heading, here\n[b](b.md) [c](c.md#two-words) [d](#a-heading-here) [e](#none)")
    (tmp_path / "c.md").write_text("## Two words\n```text\n# not a heading\n[x](y.md)\n```\n")
    assert broken_links(tmp_path / "a.md", tmp_path) == ["b.md", "#none"]
    assert broken_links(tmp_path / "c.md", tmp_path) == []
