"""A rewrite rule: a pattern, a condition, and what to build instead."""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trimtab.errors import UsageError
from trimtab.ir.core import Graph, Module, Value
from trimtab.ir.op import Op
from trimtab.ir.rewrite.match import Match
from trimtab.ir.rewrite.matcher import Failure, Matcher
from trimtab.ir.rewrite.patterns import KINDS, Pattern, bound_names, count_ops

if TYPE_CHECKING:
    from trimtab.ir.builder import Builder
    from trimtab.ir.rewrite.explain import Explanation


class Rule(ABC):
    """Base of rewrite rules: three methods, no state.

    ::

        class RaiseSilu(Rule):
            \"\"\"``x * sigmoid(x)``\"\"\"

            def pattern(self, x: Var) -> Pattern:
                return x * op.sigmoid(x)

            def rewrite(self, m: Match, build: Builder) -> Value:
                return build(ops.Silu(m.x))

    The docstring says what the rule looks for.  A rule with options is a frozen dataclass.
    """

    name: str = ""
    """What the rule is called in logs; by default the class name in lower case with dashes."""
    tolerance: float = 1e-6
    """How far, relatively, a constant may be from the number in the pattern."""
    private: bool = True
    """Whether inner values of a match may be read inside it only, so that the rewrite leaves nothing behind."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in cls.__dict__:
            cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__.lstrip("_")).lower()

    @abstractmethod
    def pattern(self, *args: Any, **kwargs: Any) -> Pattern | tuple[Pattern, ...]:
        """What to look for. The parameters are the variables, and their annotations the kinds of these.

        A tuple has a pattern for each value that the rule replaces; the first is the root.
        """

    def check(self, m: Match) -> str | None:
        """None when the match may be rewritten, else the reason why not. Reads, never edits."""
        return None

    @abstractmethod
    def rewrite(self, m: Match, build: Builder) -> Value | tuple[Value, ...]:
        """Build the ops that take the place of the match, and return a value of the same type for each output."""

    def explain(self, module: Module, at: Value | Op | str | None = None) -> Explanation:
        """Why the rule does or does not match.

        Args:
            module: where to look.
            at: the value or op that should be the root, or its name as it is printed; by default every op is tried and
                the match that gets furthest is told.
        """
        from trimtab.ir.rewrite.explain import explain

        return explain(self, module, at)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class CompiledRule:
    """A rule with its pattern built.

    Attributes:
        rule: the rule.
        outputs: the patterns of its outputs, the root first.
        roots: classes of op that the root may be; None for any.
        size: ops of a complete match.
        names: what a match has a name for.
    """

    rule: Rule
    outputs: tuple[Pattern, ...]
    roots: frozenset[type[Op]] | None
    size: int
    names: tuple[str, ...]

    def match(self, module: Module, graph: Graph, root: Value) -> Match | Failure:
        """Look for the rule at ``root``, a value of ``graph``. A failure counts ops of the pattern."""
        rule = self.rule
        matcher = Matcher(self.outputs, self.names, module, rule.tolerance, rule.private, rule.check)
        found = matcher.at(root, graph)
        if isinstance(found, Match):
            return found
        # Products, scalings and repetitions may cover more ops of the module than the pattern has.
        return replace(found, matched=self.size if found.complete else min(found.matched, self.size))


def compile_rule(rule: Rule) -> CompiledRule:
    """Build the pattern of a rule.

    Raises:
        UsageError: a parameter of ``pattern`` has an annotation that is no kind of variable, or a reserved name.
    """
    arguments = {}
    for name, parameter in inspect.signature(rule.pattern).parameters.items():
        annotation = parameter.annotation
        kind = (
            "Var" if annotation is parameter.empty else getattr(annotation, "__name__", str(annotation)).split(".")[-1]
        )
        if kind not in KINDS or hasattr(Match, name) or name in ("outputs", "ops", "module", "graph", "leaves"):
            raise UsageError(
                f"the rule {rule.name} declares a variable that cannot be one",
                values={"parameter": name, "annotation": kind},
                rule=f"a variable is annotated as {', '.join(KINDS)}, and no attribute of a match has its name",
            )
        arguments[name] = KINDS[kind](name)
    built = rule.pattern(**arguments)
    outputs = built if isinstance(built, tuple) else (built,)
    seen: set[int] = set()
    size = sum(count_ops(pattern, seen) for pattern in outputs)
    return CompiledRule(rule, outputs, outputs[0].roots(), size, (*arguments, *bound_names(outputs)))
