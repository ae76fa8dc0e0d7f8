"""The same module with other sizes: symbols fixed, axes shortened, weights cut to their leading elements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, get_args

from trimtab.ir.core import Graph, Module, Value
from trimtab.ir.dims import Dim, DimExpr, Symbol, evaluate, symbol
from trimtab.ir.op import Op
from trimtab.ir.types import TensorType
from trimtab.ir.weights import ComputedSource, Weight

if TYPE_CHECKING:
    import torch


def resized(module: Module, change: Callable[[Dim], Dim]) -> Module:
    """A module in which ``change`` has been applied to every size: of inputs, of weights, and in attributes.

    The types of all other values are inferred anew.  A weight keeps the leading elements of each axis; ``change`` may
    not make an axis of a weight longer.

    Raises:
        TrimtabError: some op does not accept the new sizes.
    """
    table = [_cut(weight, _type(weight.type, change)) for weight in module.weights.values()]
    result = Module(weights=table)
    result.graphs = {name: _graph(graph, result, change) for name, graph in module.graphs.items()}
    return result


def fix_symbols(module: Module, sizes: Mapping[str, int]) -> Module:
    """A module in which the symbols named in ``sizes`` are numbers. Errors as in :func:`resized`."""

    def bind(found: Symbol) -> Dim:
        return sizes.get(found.name, symbol(found.name, found.min, found.max))

    bindings = {s.name: bind(s) for graph in module.graphs.values() for s in graph.symbols().values()}

    def change(dim: Dim) -> Dim:
        fixed: Dim = evaluate(dim, bindings)
        return fixed

    return resized(module, change)


def _type(type: TensorType, change: Callable[[Dim], Dim]) -> TensorType:
    return TensorType(type.dtype, tuple(map(change, type.shape)))


def _cut(weight: Weight, type: TensorType) -> Weight:
    if type == weight.type:
        return weight

    def leading() -> torch.Tensor:
        data = weight.tensor()
        for axis, size in enumerate(type.shape):
            data = data.narrow(axis, 0, int(size))  # type: ignore[arg-type]  # weights have static types
        return data.clone()

    return Weight(weight.id, type, ComputedSource(leading, keep=True), trainable=weight.trainable)


def _graph(graph: Graph, module: Module, change: Callable[[Dim], Dim]) -> Graph:
    made = Graph(graph.name, (Value(_type(value.type, change), name=value.name) for value in graph.inputs))
    table = dict(zip(graph.inputs, made.inputs, strict=True))

    def read(value: Value) -> Value:
        return made.weight(module.weights[value.weight]) if value.is_weight else table[value]

    for op in graph.ops:
        clone = made.ops.append(_op(op, read, [_graph(region, module, change) for region in op.regions], change))
        for old, new in zip(op.results, clone.results, strict=True):
            new.name = old.name
            table[old] = new
    made.set_outputs([read(value) for value in graph.outputs], graph.output_names)
    return made


def _op(op: Op, read: Callable[[Value], Value], regions: list[Graph], change: Callable[[Dim], Dim]) -> Op:
    arguments: dict[str, Any] = dict(zip(op.region_fields, regions, strict=True))
    for field, held in op.arguments():
        if isinstance(held, tuple):
            arguments[field.name] = [read(value) for value in held]
        elif held is not None:
            arguments[field.name] = read(held)
    hints = op._attribute_hints()
    for name, value in op.attributes.items():
        arguments[name] = _attribute(value, change) if _may_be_a_size(hints[name]) else value
    made = type(op)(**arguments)
    made.location, made.made_by = op.location, op.made_by
    return made


def _attribute(value: Any, change: Callable[[Dim], Dim]) -> Any:
    if isinstance(value, tuple):
        return tuple(_attribute(part, change) for part in value)
    return change(value) if isinstance(value, int | DimExpr) and not isinstance(value, bool) else value


def _may_be_a_size(declared: Any) -> bool:
    """Whether an attribute is declared as a dimension, or as several: axes and counts are plain integers."""
    return declared is DimExpr or any(map(_may_be_a_size, get_args(declared)))
