"""A graph as a networkx ``DiGraph``, for dominators, paths, components and drawing.

The view is a copy of the structure at one moment: it is for reading, and the IR stays the only storage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from trimtab.ir.core import Graph, Value

if TYPE_CHECKING:
    import networkx

ENTRY: Final = "entry"
EXIT: Final = "exit"


def graph_view(graph: Graph, *, weights: bool = True, boundary: bool = False) -> networkx.DiGraph:
    """The ops, inputs and weights of ``graph`` as nodes, and the values that flow between them as edges.

    Nodes are the :class:`~trimtab.ir.op.Op` and :class:`~trimtab.ir.core.Value` objects themselves, with the attributes
    ``kind`` ("op", "input", "weight", "entry" or "exit") and ``label``.  An edge has the attribute ``values``: the
    distinct values that its head reads from its tail, in operand order.  Regions are not entered.

    Args:
        graph: the graph.
        weights: include the weights that the graph reads.
        boundary: add the nodes :data:`ENTRY`, before everything that reads nothing, and :data:`EXIT`, after everything
            that is returned or that nothing reads, as dominators need them::

                view = graph_view(graph, boundary=True)
                networkx.immediate_dominators(view, ENTRY)
                networkx.immediate_dominators(view.reverse(copy=False), EXIT)  # post-dominators
    """
    import networkx

    view = networkx.DiGraph()
    for value in graph.inputs:
        view.add_node(value, kind="input", label=value.name or f"%{value.index}")
    if weights:
        for value in graph.weights:
            view.add_node(value, kind="weight", label=f"@{value.weight}")
    for op in graph.ops:
        view.add_node(op, kind="op", label=op.name)
        for value in op.operands:
            _connect(view, value, op, weights)
    if boundary:
        sources = [node for node, degree in view.in_degree() if degree == 0]
        sinks = [node for node, degree in view.out_degree() if degree == 0]
        view.add_node(ENTRY, kind="entry", label=ENTRY)
        view.add_node(EXIT, kind="exit", label=EXIT)
        for node in sources:
            view.add_edge(ENTRY, node, values=())
        for value in graph.outputs:
            _connect(view, value, EXIT, weights)
        for node in sinks:
            if not view.has_edge(node, EXIT):
                view.add_edge(node, EXIT, values=())
        if not sources:
            view.add_edge(ENTRY, EXIT, values=())
    return view


def _connect(view: networkx.DiGraph, value: Value, head: object, weights: bool) -> None:
    if value.is_weight and not weights:
        return
    tail = value.producer if value.producer is not None else value
    seen = view.edges[tail, head]["values"] if view.has_edge(tail, head) else ()
    if value not in seen:
        view.add_edge(tail, head, values=(*seen, value))
