"""Dead-code elimination."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trimtab.ir.core import Graph, Module
from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.contracts import Contract, Exact


@dataclass(frozen=True)
class Dce(Pass):
    """Remove ops whose results nobody reads, and weights that no op reads.

    Ops have no side effects, so an unread op cannot be noticed. Regions are cleaned too. Inputs stay: they are the
    module's signature.
    """

    name: ClassVar[str] = "dce"
    contract: ClassVar[Contract] = Exact()

    def run(self, module: Module, ctx: Context) -> Changed:
        removed = sum(_sweep(graph) for graph in module.graphs.values())
        return removed + module.drop_unused_weights() > 0


def _sweep(graph: Graph) -> int:
    """Remove the unread ops of ``graph``, the last first so that what only they read becomes unread in time."""
    removed = 0
    for op in reversed(graph.ops):
        if not any(result.uses for result in op.results):
            graph.ops.remove(op)
            removed += 1
        else:
            removed += sum(map(_sweep, op.regions))
    return removed
