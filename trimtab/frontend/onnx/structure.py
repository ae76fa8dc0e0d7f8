"""Checks on the raw messages of a model, before anything is built from them.

A file may be damaged or hostile.  These checks cost one walk over the file and allocate nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trimtab.errors import ImportModelError
from trimtab.frontend.onnx.initializers import check_tensor_proto

MAX_SUBGRAPH_DEPTH = 32
"""Deepest nesting of subgraphs (``If`` in ``If`` ...) that is read."""
EXPANSION_LIMIT, EXPANSION_FACTOR = 100_000, 50
"""A model whose functions expand to more nodes than both allow (in number, and times those stored) is refused."""


def check_structure(model: Any) -> None:
    """Check a ``ModelProto``.

    Raises:
        ImportModelError: no graph, unknown IR version, names defined twice, tensors whose data does not fit, subgraphs
            nested too deep, functions that call themselves.
    """
    if not model.HasField("graph") or not (model.graph.node or model.graph.output):
        raise ImportModelError(
            "the file is not an ONNX model",
            values={"nodes": len(model.graph.node), "outputs": len(model.graph.output)},
            rule="a model has a graph with outputs",
            fix="check that the file is complete and is ONNX",
        )
    if not model.graph.output:
        raise ImportModelError("the model has no outputs", values={"nodes": len(model.graph.node)},
                               rule="a graph without outputs computes nothing")  # fmt: skip
    domains = [entry.domain for entry in model.opset_import]
    if len(set(domains)) != len(domains):
        raise ImportModelError("a domain is imported twice", values={"domains": domains})
    _check_graph(model.graph, "the main graph", 0)
    _check_functions(model)


def _check_graph(graph: Any, where: str, depth: int) -> None:
    if depth > MAX_SUBGRAPH_DEPTH:
        raise ImportModelError(
            "subgraphs are nested too deep",
            values={"limit": MAX_SUBGRAPH_DEPTH},
            rule="a broken or hostile file must not exhaust the stack",
            where=where,
        )
    _check_distinct("input", (info.name for info in graph.input), where)
    _check_distinct("initializer", (tensor.name for tensor in graph.initializer), where)
    _check_distinct("output", (info.name for info in graph.output), where)
    defined = {info.name for info in graph.input} | {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        for name in node.output:
            if name and name in defined:
                raise ImportModelError(
                    "a value is defined twice",
                    values={"value": name, "node": node.name or node.op_type},
                    rule="every value of a graph has one definition",
                    fix="export the model again",
                    where=where,
                )
            defined.add(name)
    for tensor in graph.initializer:
        check_tensor_proto(tensor, where)
    if graph.sparse_initializer:
        raise ImportModelError(
            "the model stores sparse tensors",
            values={"count": len(graph.sparse_initializer)},
            rule="the IR has dense tensors only",
            fix="export with dense initializers",
            where=where,
        )
    _check_attributes(graph.node, where, depth)


def _check_attributes(nodes: Any, where: str, depth: int) -> None:
    for node in nodes:
        label = f"node {node.name or node.op_type!r} of {where}" if node.attribute else ""
        for attribute in node.attribute:
            if attribute.HasField("t"):
                check_tensor_proto(attribute.t, label)
            for tensor in attribute.tensors:
                check_tensor_proto(tensor, label)
            for graph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                _check_graph(graph, label, depth + 1)


def _check_functions(model: Any) -> None:
    """Model-local functions are distinct and do not call themselves, directly or through others."""
    functions: dict[Any, Any] = {}
    for function in model.functions:
        key = (function.domain, function.name, getattr(function, "overload", ""))
        if key in functions:
            raise ImportModelError("a function is defined twice", values={"function": function.name})
        functions[key] = function
        _check_attributes(function.node, f"function {function.name}", 0)
        defined = set(function.input)
        for node in function.node:
            for name in node.output:
                if name and name in defined:
                    raise ImportModelError("a value is defined twice", values={"value": name},
                                           where=f"function {function.name}")  # fmt: skip
                defined.add(name)
    stored = len(model.graph.node) + sum(len(function.node) for function in model.functions)
    expanded: dict[Any, int] = {}
    state: dict[Any, int] = {}
    for root in functions:
        # Depth-first search with an explicit stack: a chain of calls may be longer than Python's stack.
        stack: list[tuple[Any, Iterator[Any]]] = []
        if root not in state:
            state[root] = 1
            stack.append((root, _calls(functions[root].node, functions)))
        while stack:
            key, calls = stack[-1]
            callee = next(calls, None)
            if callee is None:
                state[key] = 2
                stack.pop()
                expanded[key] = _expanded(functions[key].node, functions, expanded)
            elif state.get(callee) == 1:
                raise ImportModelError(
                    "a function calls itself",
                    values={"function": callee[1]},
                    rule="functions are expanded where they are called, so they cannot recurse",
                )
            elif callee not in state:
                state[callee] = 1
                stack.append((callee, _calls(functions[callee].node, functions)))

    total = _expanded(model.graph.node, functions, expanded)
    if total > EXPANSION_LIMIT and total > EXPANSION_FACTOR * stored:
        raise ImportModelError(
            "the model's functions expand to too many nodes",
            values={"nodes": total, "stored": stored},
            rule="functions are expanded where they are called; a hostile file must not exhaust memory",
        )


def _expanded(nodes: Any, functions: dict[Any, Any], known: dict[Any, int]) -> int:
    return len(nodes) + sum(known[key] for key in _calls(nodes, functions))


def _calls(nodes: Any, functions: dict[Any, Any]) -> Iterator[Any]:
    for node in nodes:
        key = (node.domain, node.op_type, getattr(node, "overload", ""))
        if key in functions:
            yield key
        for attribute in node.attribute:
            for graph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from _calls(graph.node, functions)


def _check_distinct(kind: str, names: Iterator[str], where: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen or not name:
            raise ImportModelError(
                f"{kind} names are not distinct" if name else f"an {kind} has no name",
                values={"name": repr(name)},
                rule="values are found by name",
                fix="export the model again",
                where=where,
            )
        seen.add(name)
