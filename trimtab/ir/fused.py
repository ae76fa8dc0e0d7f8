"""Making one fused op of several ops, and inlining it again: the two are inverse up to the order of independent ops."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.ir.core import Graph, Module, Value
from trimtab.ir.op import Op
from trimtab.ir.ops import DimValue, Full, Fused


def is_constant(value: Value) -> bool:
    """Whether an op makes ``value`` from nothing, so that every reader may have a copy of it."""
    return isinstance(value.producer, Full | DimValue)


def fuse(module: Module, ops: Sequence[Op], anchor: Op) -> Fused:
    """Replace ``ops``, in order of execution and of one graph, by a fused op at the place of ``anchor``, one of them.

    What they read from outside must stand before ``anchor`` and whoever reads their results after it.  The results of
    the fused op are those that somebody outside reads, in order.  Constants are copied into the body.
    """
    assert anchor.graph is not None
    members = set(ops)
    body = Graph()
    inside: dict[Value, Value] = {}
    inputs: list[Value] = []

    def read(value: Value) -> Value:
        if value.is_weight:
            return body.weight(module.weights[value.weight])
        if value not in inside:
            if is_constant(value):
                assert value.producer is not None
                inside[value] = body.ops.append(value.producer.clone()).result
            else:
                inputs.append(value)
                inside[value] = body.add_input(value.type, value.name)
        return inside[value]

    for op in ops:
        _copy(op, body, [read(value) for value in op.operands], inside)
    outputs = [v for op in ops for v in op.results if any(use.user not in members for use in v.uses)]
    body.set_outputs([inside[value] for value in outputs])
    fused = Fused(inputs, body, "+".join(op.name for op in ops))
    fused.location = next((op.location for op in ops if op.location is not None), None)
    anchor.graph.ops.insert_before(anchor, fused)
    _replace(ops, dict(zip(outputs, fused.results, strict=True)))
    return fused


def inline(module: Module, fused: Fused) -> None:
    """Replace a fused op by the ops of its body."""
    graph = fused.graph
    assert graph is not None
    outside = dict(zip(fused.body.inputs, fused.inputs, strict=True))
    for op in fused.body.ops:
        operands = [graph.weight(module.weights[v.weight]) if v.is_weight else outside[v] for v in op.operands]
        _copy(op, graph, operands, outside, before=fused)
    made = [outside[value] for value in fused.body.outputs]
    _replace([fused], dict(zip(fused.results, made, strict=True)))


def ungroup(module: Module) -> int:
    """Inline every fused op of ``module``, for backends that do not know them. Returns how many there were."""
    found = [op for op in module.walk() if isinstance(op, Fused)]
    for op in found:
        inline(module, op)
    return len(found)


def _copy(op: Op, graph: Graph, operands: Sequence[Value], table: dict[Value, Value], before: Op | None = None) -> None:
    """Put a copy of ``op`` that reads ``operands`` into ``graph``, and its results into ``table``."""
    clone = op.clone(operands)
    if before is None:
        graph.ops.append(clone)
    else:
        graph.ops.insert_before(before, clone)
    for old, new in zip(op.results, clone.results, strict=True):
        new.name = old.name
        table[old] = new


def _replace(ops: Sequence[Op], table: dict[Value, Value]) -> None:
    """Let the readers of the table's keys read its values, and remove ``ops`` with the constants only they read."""
    for old, new in table.items():
        old.replace_all_uses_with(new)
    for op in reversed(ops):
        assert op.graph is not None
        operands, graph = op.operands, op.graph
        graph.ops.remove(op)
        for value in dict.fromkeys(operands):
            if is_constant(value) and not value.uses:
                assert value.producer is not None
                graph.ops.remove(value.producer)
