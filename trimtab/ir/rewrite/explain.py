"""Answers the question why a rule did not match."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.errors import UsageError
from trimtab.ir.core import Graph, Module, Value
from trimtab.ir.op import Op
from trimtab.ir.printer import describe_op
from trimtab.ir.rewrite.matcher import Failure

if TYPE_CHECKING:
    from trimtab.ir.rewrite.rule import Rule


@dataclass(frozen=True)
class Explanation:
    """Why a rule does or does not match at one place. ``str()`` of it is the text for people.

    Attributes:
        rule: name of the rule.
        matches: whether it matches.
        matched, of: ops of the pattern that matched, and all of them.
        root: the op that was taken as the root, None when no op of the module can be one.
        reason: the first thing that does not fit, or the condition that fails; empty for a match.
        op: the op that does not fit, None when it is an input or a weight.
    """

    rule: str
    matches: bool
    matched: int
    of: int
    root: Op | None
    reason: str = ""
    op: Op | None = None

    def __str__(self) -> str:
        if self.root is None:
            return f"{self.rule} does not match: {self.reason}"
        place = _described(self.root)
        if self.matches:
            return f"{self.rule} matches {self.matched} ops at\n  {place}"
        lines = [f"{self.rule} does not match at", f"  {place}", f"{self.matched} of {self.of} ops match, but"]
        lines.append(f"  {self.reason}")
        if self.op is not None and self.op is not self.root:
            lines.append(f"  {_described(self.op)}")
        return "\n".join(lines)


def explain(rule: Rule, module: Module, at: Value | Op | str | None = None) -> Explanation:
    """See :meth:`trimtab.ir.rewrite.Rule.explain`."""
    from trimtab.ir.rewrite.rule import compile_rule

    compiled = compile_rule(rule)
    best: Explanation | None = None
    for graph, value in _places(module, at):
        op = value.producer
        assert op is not None
        if at is None and compiled.roots is not None and type(op) not in compiled.roots:
            continue
        found = compiled.match(module, graph, value)
        if not isinstance(found, Failure):
            return Explanation(rule.name, True, len(found.ops), compiled.size, op)
        if best is None or (found.complete, found.matched) > (best.matched == best.of, best.matched):
            best = Explanation(rule.name, False, found.matched, compiled.size, op, found.reason, found.op)
    roots = "any op" if compiled.roots is None else " or ".join(sorted(cls.name for cls in compiled.roots))
    return best or Explanation(rule.name, False, 0, compiled.size, None, f"the module has no {roots}")


def _places(module: Module, at: Value | Op | str | None) -> Iterator[tuple[Graph, Value]]:
    if at is None:
        for op in module.walk():
            assert op.graph is not None
            yield op.graph, op.results[0]
        return
    if isinstance(at, str):
        at = _named(module, at)
    value = at.results[0] if isinstance(at, Op) else at
    if value.producer is None or value.producer.graph is None:
        raise UsageError(
            "a rule is explained at a value that no op of the module computes",
            values={"at": value},
            rule="a match starts at the result of an op",
        )
    yield value.producer.graph, value


def _named(module: Module, name: str) -> Value:
    for op in module.walk():
        text = describe_op(op).split(" = ")[0] if not name.isidentifier() else ""
        for value in op.results:
            if value.name == name.lstrip("%") or name in text.split(", "):
                return value
    raise UsageError("no value of the module has this name", values={"name": name}, fix="take a name from its text")


def _described(op: Op) -> str:
    return f"{describe_op(op)}" + (f"   # {op.location}" if op.location is not None else "")
