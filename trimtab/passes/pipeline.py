"""Pipelines as text: ``cleanup,fuse,merge-tokens{r=13},quantize{bits=8}``, parsed and printed inversely.

An item is a pass with options, or the name of a group.  A group is a named sequence of passes, run until none of them
changes the module any more.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from trimtab.errors import ParseError, UsageError
from trimtab.passes.base import Pass
from trimtab.passes.options import build_pass, did_you_mean, read_value
from trimtab.passes.registry import load_pass, pass_names

_NAME = re.compile(r"[A-Za-z][\w-]*")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_BARE = re.compile(r"[^\s,\[\]{}\"=]+")
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Group:
    """A named sequence of passes.

    Attributes:
        name: what the group is called in pipelines.
        items: the passes in order, and groups of them.
        rounds: how often to run them at most; they stop as soon as a whole round changes nothing.
        summary: one line about the group.
    """

    name: str
    items: tuple[Pass | Group, ...]
    rounds: int = 1
    summary: str = ""

    def __str__(self) -> str:
        return self.name

    @property
    def passes(self) -> Iterator[Pass]:
        """Every pass once, inner groups opened."""
        return _passes_of(self.items)


@dataclass(frozen=True)
class _GroupDeclaration:
    passes: str
    rounds: int
    summary: str


_GROUPS = {
    # Equal weights make equal expressions, and a weight is folded only when one op is left that reads it: hence the
    # order.
    "cleanup": _GroupDeclaration(
        "dedup-weights,simplify-identities,simplify-reshapes,simplify-permutes,cse,fold-constants,dce",
        rounds=8,
        summary="exact clean-up, repeated until nothing changes",
    ),
    # Quantized products first, as long as what dequantizes their operands stands before them. Attention last: it is
    # found between linear layers, once masks and shared heads have their simplest form.
    "raise": _GroupDeclaration(
        "raise-quantized,simplify-expands,raise-linear,raise-activations,raise-gelu,raise-silu,raise-layer-norm,"
        "raise-rms-norm,raise-group-norm,raise-rotary,simplify-indexing,unmerge-batch-axes,raise-attention,"
        "simplify-masks,remove-repeat-kv,cleanup",
        rounds=4,
        summary="whole layers from the pieces in which models and exporters write them",
    ),
    # Scales go into the weights while these are still apart; packing comes when nothing is folded any more.
    "fuse": _GroupDeclaration(
        "raise,merge-adapters,sink-permutes,fold-conv-affine,raise-patch-embedding,fold-layer-scale,fold-scale,"
        "fold-norm-affine,reassociate-matmuls,drop-dead-heads,push-slices,pack-linears,cleanup",
        rounds=1,
        summary="exact raising, folding, packing and the removal of work that nobody reads",
    ),
}


def group_names() -> list[str]:
    return list(_GROUPS)


def load_group(name: str) -> Group:
    """The group called ``name``, one of :func:`group_names`."""
    declared = _GROUPS[name]
    parts = declared.passes.split(",")
    items = tuple(load_group(part) if part in _GROUPS else load_pass(part)() for part in parts)
    return Group(name, items, declared.rounds, declared.summary)


@dataclass(frozen=True)
class Pipeline:
    """Passes and groups in the order they run. ``parse_pipeline(str(p)) == p``."""

    items: tuple[Pass | Group, ...] = ()

    def __str__(self) -> str:
        return ",".join(map(str, self.items))

    @property
    def passes(self) -> Iterator[Pass]:
        """Every pass once, groups opened."""
        return _passes_of(self.items)


def _passes_of(items: tuple[Pass | Group, ...]) -> Iterator[Pass]:
    for item in items:
        yield from item.passes if isinstance(item, Group) else (item,)


def parse_pipeline(text: str) -> Pipeline:
    """Read a pipeline; blanks between its parts do not matter, and the empty text is the empty pipeline.

    Raises:
        ParseError: the text does not follow the grammar.
        UsageError: a pass or option is unknown, or an option has the wrong type.
    """
    return _Parser(text).pipeline()


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def pipeline(self) -> Pipeline:
        items: list[Pass | Group] = []
        while self._more():
            items.append(self._item())
            if self._more():
                self._expect(",", "between two passes")
                if not self._more():
                    self._fail("a pass is missing after the comma")
        return Pipeline(tuple(items))

    def _item(self) -> Pass | Group:
        name = self._match(_NAME, "the name of a pass")
        options = self._options() if self._accept("{") else {}
        if name in _GROUPS:
            if options:
                raise UsageError(
                    f"the group {name} has no options",
                    values={"given": ", ".join(options)},
                    fix=f"name the pass of the group that has them: {_GROUPS[name].passes}",
                )
            return load_group(name)
        if name not in pass_names():
            known = [*_GROUPS, *sorted(pass_names())]
            raise UsageError(
                f"there is no pass {name}",
                values={"known": ", ".join(known)},
                fix=did_you_mean(name, known) or "install the package that provides it",
            )
        return build_pass(load_pass(name), options)

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if self._accept("}"):
            return options
        while True:
            name = self._match(_NAME, "the name of an option").replace("-", "_")
            if name in options:
                self._fail(f"the option {name} is given twice")
            self._expect("=", f"after the option {name}")
            options[name] = self._value()
            if self._accept("}"):
                return options
            self._expect(",", "or } after the value of an option")

    def _value(self) -> Any:
        if self._accept("["):
            items: list[Any] = []
            while not self._accept("]"):
                items.append(self._value())
                if not self._accept(","):
                    self._expect("]", "after a list")
                    break
            return tuple(items)
        self._more()
        found = _STRING.match(self._text, self._at) or _BARE.match(self._text, self._at)
        if found is None:
            self._fail("a value is missing")
        self._at = found.end()
        try:
            return read_value(found.group())
        except ValueError:
            self._fail("a quoted string is malformed")

    def _more(self) -> bool:
        space = _SPACE.match(self._text, self._at)
        self._at = space.end() if space else self._at
        return self._at < len(self._text)

    def _accept(self, char: str) -> bool:
        if self._more() and self._text.startswith(char, self._at):
            self._at += len(char)
            return True
        return False

    def _expect(self, char: str, why: str) -> None:
        if not self._accept(char):
            self._fail(f"expected {char} {why}")

    def _match(self, pattern: re.Pattern[str], what: str) -> str:
        self._more()
        found = pattern.match(self._text, self._at)
        if found is None:
            self._fail(f"expected {what}")
        self._at = found.end()
        return found.group()

    def _fail(self, what: str) -> NoReturn:
        raise ParseError(
            f"cannot read a pipeline: {what}",
            rule="a pipeline reads like cleanup,merge-tokens{r=13},quantize{bits=8}",
            where=f"{self._text}\n     {' ' * self._at}^",
        )
