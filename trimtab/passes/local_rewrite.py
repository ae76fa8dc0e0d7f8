"""The driver of the simplifying passes: offers every op to a rule that may name a value to read instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from trimtab.ir.builder import Builder
from trimtab.ir.core import Module, Value
from trimtab.ir.op import Op

LocalRule: TypeAlias = Callable[[Op, Builder], Value | None]
"""Gives the value that replaces the op's only result, or None. New ops go through the builder, before the op."""


def rewrite_each(module: Module, rule: LocalRule) -> bool:
    """Offer each op with one result to ``rule``, in execution order, so that a rule sees rewritten operands.

    A replaced op is removed. Returns whether anything was replaced.
    """
    changed = False
    for graph in list(module.all_graphs()):
        for op in graph.ops:
            if len(op.results) != 1:
                continue
            value = rule(op, Builder(module, graph, before=op))
            if value is not None:
                op.result.replace_all_uses_with(value)
                graph.ops.remove(op)
                changed = True
    return changed
