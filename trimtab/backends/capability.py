"""The capability check that backends share: every op without code is reported at once, before lowering starts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Set
from dataclasses import dataclass
from typing import Any, Protocol

from trimtab.errors import Location, UnsupportedByBackendError
from trimtab.ir import ops
from trimtab.ir.core import Module, Value
from trimtab.ir.op import Op

_MOST_SHOWN = 20


@dataclass(frozen=True)
class Unsupported:
    """One op that cannot be compiled.

    Attributes:
        op: mnemonic.
        text: the op as printed.
        reason: why, in words.
        fix: what the user can do.
        location: the user's source line.
    """

    op: str
    text: str
    reason: str
    fix: str
    location: Location | None

    def __str__(self) -> str:
        where = f" (from {self.location})" if self.location is not None else ""
        return f"{self.op}{where}: {self.reason}; {self.fix}"


class Rule(Protocol):
    """What a backend's table of rules holds for an op class.

    ``check`` says why a very op cannot be lowered, or "". ``reads_sub_byte`` names the operands that may be weights of
    sub-byte types.
    """

    @property
    def check(self) -> Callable[[Any], str]: ...

    @property
    def reads_sub_byte(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Capability:
    """What a backend can compile: the ops it has rules for.

    Attributes:
        backend: the backend's name for people.
        page: the page of the docs that lists what it supports.
        rules: imports the table of rules, and returns what finds the rule of an op in it.
    """

    backend: str
    page: str
    rules: Callable[[], Callable[[Op], Rule | None]]

    def unsupported_ops(self, module: Module) -> list[Unsupported]:
        """Every op of ``module`` that the backend has no code for."""
        rule_for, found = self.rules(), []
        passed_on = {value for op in module.walk() for region in op.regions for value in region.inputs}
        for op in module.walk():
            reason, fix = _examine(op, rule_for, passed_on)
            if reason:
                found.append(Unsupported(op.name, repr(op), reason, fix, op.location))
        return found

    def check_supported(self, module: Module) -> None:
        """Raise one error that lists every unsupported op.

        Raises:
            UnsupportedByBackendError: there are some.
        """
        problems = self.unsupported_ops(module)
        if not problems:
            return
        shown = [str(problem) for problem in problems[:_MOST_SHOWN]]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        raise UnsupportedByBackendError(
            f"the {self.backend} backend cannot compile some ops",
            values={"count": len(problems), "ops": sorted({problem.op for problem in problems})},
            rule="\n  - ".join(["unsupported ops", *shown]),
            fix=f"rewrite these parts of the model with supported ops ({self.page} lists them)",
            location=next((problem.location for problem in problems if problem.location is not None), None),
        )


def _examine(op: Op, rule_for: Callable[[Op], Rule | None], passed_on: Set[Value]) -> tuple[str, str]:
    """Why ``op`` has no code in a backend with these rules, and what to do; two empty texts when it has.

    Args:
        passed_on: the inputs of regions. The op that has the region is examined for what it passes on.
    """
    rule = rule_for(op)
    packed = sorted({str(value.type.dtype) for value in _sub_byte_values(op, rule, passed_on)})
    if packed:
        return f"it uses the sub-byte types {', '.join(packed)}", "convert to i8, u8 or a floating type first"
    if isinstance(op, ops.Repeat | ops.Fused):
        return "", ""
    if isinstance(op, ops.Opaque):
        return f"it calls the torch operator {op.target}, for which there is no code", "express it with other operators"
    if rule is None:
        return "there is no lowering rule for it", "express it with other operators"
    reason = rule.check(op)
    return reason, "change the model so that this holds" if reason else ""


def _sub_byte_values(op: Op, rule: Rule | None, passed_on: Set[Value]) -> Iterator[Value]:
    """Operands and results of sub-byte types, but for weights that ``op`` can read or passes on to ops that can."""
    yield from (value for value in op.results if value.type.dtype.is_sub_byte)
    readable: Collection[Value] = ()
    if isinstance(op, ops.Repeat):
        readable = op.stacked
    elif isinstance(op, ops.Fused):
        readable = op.operands
    elif rule is not None and rule.reads_sub_byte:
        held = [value for field, value in op.arguments() if field.name in rule.reads_sub_byte]
        readable = [value for value in held if isinstance(value, Value)]
    for value in op.operands:
        if value.type.dtype.is_sub_byte and not (value in readable and (value.is_weight or value in passed_on)):
            yield value
