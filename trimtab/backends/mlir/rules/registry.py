"""The table of lowering rules: for an op class, a function that builds structured ops of MLIR for it.

A rule gets the op, the :class:`~trimtab.backends.mlir.tensors.Code` to build with, and one argument per declared
operand (a :class:`~trimtab.backends.mlir.tensors.Tensor`, a list of them, or None). It returns one tensor a result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from trimtab.ir.op import Op

RuleFunction = Callable[..., Any]


@dataclass(frozen=True)
class Rule:
    """How one op class is lowered.

    Attributes:
        function: makes tensors from ``(op, code, *operands)``.
        check: returns why this very op cannot be lowered, or "".
        reads_sub_byte: names of operands that may be of sub-byte types, where they are weights.
    """

    function: RuleFunction
    check: Callable[[Any], str] = field(default=lambda op: "")
    reads_sub_byte: tuple[str, ...] = ()


_RULES: dict[type[Op], Rule] = {}


def _supported(op: Any) -> str:
    return ""


def lowers(*classes: type[Op], check: Callable[[Any], str] = _supported) -> Callable[[RuleFunction], RuleFunction]:
    """Register a rule."""

    def register(function: RuleFunction) -> RuleFunction:
        for cls in classes:
            _RULES[cls] = Rule(function, check)
        return function

    return register


def rule_for(op: Op) -> Rule | None:
    """The rule for an op, or None when its class has none."""
    return _RULES.get(type(op))
