"""Structural equality of modules: everything but inner names and source locations."""

from __future__ import annotations

from collections.abc import Hashable

from trimtab.ir.attributes import print_attribute
from trimtab.ir.core import Graph, Module, Value
from trimtab.ir.op import Op


def modules_equal(left: Module, right: Module) -> bool:
    """Same graphs, and weights with the same ids, types, flags and contents."""
    if list(left.graphs) != list(right.graphs) or set(left.weights) != set(right.weights):
        return False
    for id, weight in left.weights.items():
        other = right.weights[id]
        if (weight.type, weight.trainable) != (other.type, other.trainable):
            return False
        if weight.source is not other.source and weight.sha256 != other.sha256:
            return False
    return all(graphs_equal(left.graphs[name], right.graphs[name]) for name in left.graphs)


def graphs_equal(left: Graph, right: Graph) -> bool:
    """Same signature and the same ops in the same order on corresponding values."""
    if len(left.inputs) != len(right.inputs) or len(left.ops) != len(right.ops):
        return False
    if left.output_names != right.output_names:
        return False
    same: dict[Value, Value] = {}
    for a, b in zip(left.inputs, right.inputs, strict=True):
        if a.type != b.type or (left.name and a.name != b.name):
            return False
        same[a] = b

    def match(a: Value, b: Value) -> bool:
        return a.weight == b.weight if a.is_weight else same.get(a) is b

    for op, other in zip(left.ops, right.ops, strict=True):
        if not _ops_equal(op, other) or not all(map(match, op.operands, other.operands)):
            return False
        same.update(zip(op.results, other.results, strict=True))
    return all(map(match, left.outputs, right.outputs))


def op_signature(op: Op) -> Hashable:
    """All that two ops must have in common to compute the same from the same operands, but for their regions."""
    groups = tuple(len(held) if isinstance(held, tuple) else held is not None for _, held in op.arguments())
    # Text keeps 0.0 and -0.0, and 1 and 1.0, apart.
    attributes = tuple((name, print_attribute(value)) for name, value in op.attributes.items())
    return type(op), groups, attributes, tuple(result.type for result in op.results)


def _ops_equal(a: Op, b: Op) -> bool:
    return op_signature(a) == op_signature(b) and all(map(graphs_equal, a.regions, b.regions))
