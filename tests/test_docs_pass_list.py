"""``docs/pass-list.md`` describes every group and pass of the package, from their declarations.

``pytest tests/test_docs_pass_list.py --update-golden`` writes it anew.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from trimtab.passes import RewritePass
from trimtab.passes.options import describe_options
from trimtab.passes.pipeline import group_names, load_group
from trimtab.passes.registry import load_pass, pass_names, provider

PAGE = Path(__file__).parent.parent / "docs" / "pass-list.md"

_HEAD = """\
# The passes

Every group and pass of Trimtab, from their declarations; `trimtab passes NAME` prints the same. Written by
`pytest tests/test_docs_pass_list.py --update-golden`; do not edit. What contracts mean is in [passes.md](passes.md).

## Groups

| group | runs, in this order | rounds at most |
|---|---|---|
"""


def pass_list() -> str:
    """The whole page."""
    lines = [_HEAD.rstrip("\n")]
    for name in group_names():
        group = load_group(name)
        parts = " ".join(f"`{item}`" for item in group.items)
        lines.append(f"| `{name}`: {group.summary} | {parts} | {group.rounds} |")
    names = sorted(name for name in pass_names() if provider(name) == "trimtab")
    lines += ["", "## Passes", "", "| pass | | contract |", "|---|---|---|"]
    for name in names:
        cls = load_pass(name)
        lines.append(f"| [`{name}`](#{name}) | {_line(cls.summary())} | {cls.contract} |")
    for name in names:
        lines += ["", *_section(name)]
    return "\n".join(lines) + "\n"


def _section(name: str) -> list[str]:
    cls = load_pass(name)
    lines = [f"### {name}", "", _text(inspect.getdoc(cls) or ""), ""]
    facts = [f"Contract: {cls.contract}."]
    for key in ("requires", "establishes", "breaks"):
        if getattr(cls, key):
            facts.append(f"{key.capitalize()}: {', '.join(sorted(getattr(cls, key)))}.")
    if cls.grows_weights:
        facts.append("May increase the bytes of the weights.")
    options = [f"`{o['name']}={o['default']}` ({o['type']})" for o in describe_options(cls)]
    if options:
        facts.append(f"Options: {', '.join(options)}.")
    lines.append(" ".join(facts))
    if issubclass(cls, RewritePass):
        lines += ["", "| rule | |", "|---|---|"]
        lines += [f"| `{rule.name}` | {_line(_text(inspect.getdoc(rule) or ''))} |" for rule in cls().rules()]
    return lines


def _text(docstring: str) -> str:
    return docstring.replace("``", "`")


def _line(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


def test_the_list_of_passes_is_up_to_date(request: pytest.FixtureRequest) -> None:
    text = pass_list()
    if request.config.getoption("--update-golden"):
        PAGE.write_text(text, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == text, "run: pytest tests/test_docs_pass_list.py --update-golden"


@pytest.mark.parametrize("name", sorted(name for name in pass_names() if provider(name) == "trimtab"))
def test_every_rule_says_what_it_looks_for(name: str) -> None:
    cls = load_pass(name)
    if issubclass(cls, RewritePass):
        for rule in cls().rules():
            assert type(rule).__doc__, f"the rule {rule.name} has no docstring"
