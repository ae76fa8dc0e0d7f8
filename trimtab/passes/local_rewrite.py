"""The driver of the simplifying passes: offers every op to a rule that may name a value to read instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from trimtab.ir.builder import Builder
from trimtab.ir.core import Module, Value
from trimtab.ir.op import Op
from trimtab.ir.rewrite import Rewrites

LocalRule: TypeAlias = Callable[[Op, Builder], Value | None]
"""Gives the value to read instead of the one result of the op that is read, or None. New ops go through the builder,
before the op."""


def rewrite_each(module: Module, rule: LocalRule, name: str, rewrites: Rewrites) -> bool:
    """Offer each op with one result that is read to ``rule``, in execution order, so that a rule sees new operands.

    A replaced op is removed.

    Args:
        module: the module to rewrite.
        rule: what to do with an op.
        name: of the pass; new ops get it.
        rewrites: counts the replacements, and may end them.

    Returns:
        Whether anything was replaced.
    """
    changed = False
    for graph in list(module.all_graphs()):
        for op in graph.ops:
            if rewrites.exhausted:
                return changed
            read = [result for result in op.results if result.uses]
            if len(read) != 1:
                continue
            value = rule(op, Builder(module, graph, before=op, made_by=name))
            if value is not None and rewrites.permit(name, op):
                read[0].replace_all_uses_with(value)
                graph.ops.remove(op)
                changed = True
    return changed
