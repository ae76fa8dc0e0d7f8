"""Removal of what nobody reads."""

from __future__ import annotations

from trimtab.ir.core import Graph, Module


def remove_dead_ops(module: Module) -> int:
    """Take out the ops whose results nothing reads, those of regions too. Returns how many.

    Ops have no side effects, so an unread op cannot be noticed.
    """
    return sum(_sweep(graph) for graph in module.graphs.values())


def _sweep(graph: Graph) -> int:
    """The last op first, so that what only it reads becomes unread in time."""
    removed = 0
    for op in reversed(graph.ops):
        if not any(result.uses for result in op.results):
            graph.ops.remove(op)
            removed += 1
        else:
            removed += sum(map(_sweep, op.regions))
    return removed
