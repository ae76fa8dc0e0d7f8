"""How many ops of each kind a module has, and how often each of them runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from trimtab.ir.core import Graph, Module
from trimtab.ir.op import Op
from trimtab.ir.ops.region import Repeat


def executions(graph: Graph, times: int = 1) -> Iterator[tuple[Op, int]]:
    """Every op of ``graph`` and of its regions with how often one run of ``graph`` runs it, multiplied by ``times``."""
    for op in graph.ops:
        yield op, times
        for region in op.regions:
            yield from executions(region, times * (op.n if isinstance(op, Repeat) else 1))


def count_ops(module: Module, *, executed: bool = False) -> Counter[str]:
    """Ops by mnemonic, most frequent first when iterated with ``most_common``.

    Args:
        module: the module; all of its graphs count.
        executed: count an op as often as it runs (the body of ``repeat(n)`` n times) instead of as often as it stands.
    """
    counts: Counter[str] = Counter()
    for graph in module.graphs.values():
        for op, times in executions(graph):
            counts[op.name] += times if executed else 1
    return counts
