"""Walks an exported program's graph and builds ours, node by node."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from trimtab.errors import ImportModelError, InternalError, Location, TrimtabError, UnsupportedOpError
from trimtab.frontend.torch_export.call import Call, UnrepresentableNumber, location_of
from trimtab.frontend.torch_export.registry import Refusal, find_converter
from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.dims import Symbol
from trimtab.ir.inference import dim_from_sympy
from trimtab.ir.ops import Opaque
from trimtab.ir.ops.opaque import encode_call


class Importer:
    """State of one import: the builder, the symbols, and what each node became.

    Args:
        builder: where the ops go.
        symbols: our symbol for each of torch's.
    """

    def __init__(self, builder: Builder, symbols: Mapping[Any, Symbol]) -> None:
        self.builder = builder
        self.symbols = symbols
        self.unsupported: dict[str, list[tuple[str, Location | None]]] = {}

    def run(self, graph_module: GraphModule, arguments: Sequence[Any]) -> list[Any]:
        """Import a graph on given placeholder values; returns what its output node returns, flattened by the caller."""
        environment: dict[Node, Any] = {}
        placeholders = iter(arguments)
        for node in graph_module.graph.nodes:
            if node.op == "placeholder":
                environment[node] = next(placeholders)
            elif node.op == "get_attr":
                environment[node] = self._attribute(graph_module, node)
            elif node.op == "call_function":
                with self.builder.at(location_of(node)):
                    environment[node] = self._call(node, environment)
            elif node.op == "output":
                return list(_resolve(node.args[0], environment))
        raise InternalError("an exported graph has no output node")

    def raise_unsupported(self) -> None:
        """Report every operator that was met and could not be imported, all at once."""
        if not self.unsupported:
            return
        lines = []
        for target, places in sorted(self.unsupported.items()):
            reason, location = places[0]
            lines.append(f"{target} ({len(places)}x, {reason}{f', first at {location}' if location else ''})")
        raise UnsupportedOpError(
            "the model uses operators that cannot be imported",
            values={"operators": "; ".join(lines)},
            rule="an operator needs a converter, a decomposition, or a fixed result shape to ride along as opaque",
            fix="rewrite these lines, or register a converter (trimtab.frontend.torch_export.registry.converts)",
            location=next(iter(self.unsupported.values()))[0][1],
        )

    def _attribute(self, graph_module: GraphModule, node: Node) -> Any:
        held: Any = graph_module
        for part in str(node.target).split("."):
            held = getattr(held, part)
        if isinstance(held, torch.Tensor):
            return self.builder.weight(str(node.target), held)
        return held

    def _call(self, node: Node, environment: Mapping[Node, Any]) -> Any:
        target = node.target
        args = _resolve(node.args, environment)
        kwargs = _resolve(node.kwargs, environment)
        if target is operator.getitem:
            return args[0][args[1]]
        meta = node.meta.get("val")
        if isinstance(meta, torch.SymInt | torch.SymBool | torch.SymFloat | int | bool | float):
            return self._number(node, meta)
        name = str(target)
        if name in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            # (enabled, body, *inputs) or (device, dtype, enabled, cache, body, *inputs): run the body in place.
            body = next(index for index, arg in enumerate(args) if isinstance(arg, GraphModule))
            return self.run(args[body], args[body + 1 :])
        converter = find_converter(name)
        call = Call(self.builder, self.symbols, node)
        try:
            if converter is None:
                return self._opaque(call, args, kwargs)
            result = converter(call, **_bind(target, args, kwargs))
        except Refusal as refusal:
            return self._unsupported(call, str(refusal))
        except TrimtabError as error:
            raise ImportModelError(
                f"{name} was converted wrongly or has operands the IR rejects",
                values=error.values,
                rule=f"{error.what}. {error.rule}".rstrip(". "),
                where=f"node {node.name}",
                location=location_of(node),
            ) from error
        return _check_result(call, result)

    def _number(self, node: Node, meta: Any) -> Any:
        if not isinstance(meta, torch.SymInt | torch.SymBool | torch.SymFloat):
            return meta
        expression = meta.node.expr
        if expression.is_number:
            return int(expression) if expression.is_Integer else float(expression)
        if isinstance(meta, torch.SymInt):
            return dim_from_sympy(expression, self.symbols)
        return UnrepresentableNumber(f"{node.name} = {expression}")

    def _opaque(self, call: Call, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        target: Any = call.node.target
        if not isinstance(target, torch._ops.OpOverload):
            return self._unsupported(call, "not a torch operator")
        bound = list(_bind(target, args, kwargs).values())
        tensors = [
            item
            for arg in bound
            for item in (arg if isinstance(arg, list | tuple) else [arg])
            if isinstance(item, Value)
        ]
        metas = call.meta if isinstance(call.meta, tuple | list) else (call.meta,)
        if not all(isinstance(meta, torch.Tensor) for meta in metas):
            return self._unsupported(call, "does not return tensors")
        for meta in metas:
            call.type_of(meta)  # refuses dtypes that the IR lacks
        try:
            op = Opaque(
                tuple(dict.fromkeys(tensors)), str(target), encode_call(tuple(bound), list(dict.fromkeys(tensors)))
            )
        except (TypeError, TrimtabError) as error:
            return self._unsupported(call, str(error).splitlines()[0])
        results = self.builder.add(op).results
        return results if isinstance(call.meta, tuple | list) else results[0]

    def _unsupported(self, call: Call, reason: str) -> Any:
        """Note the operator and go on with made-up inputs of the right types, so that all are reported together."""
        self.unsupported.setdefault(str(call.node.target), []).append((reason, location_of(call.node)))

        def stand_in(meta: Any) -> Any:
            return Value(call.type_of(meta)) if isinstance(meta, torch.Tensor) else None

        return tuple(map(stand_in, call.meta)) if isinstance(call.meta, tuple | list) else stand_in(call.meta)


def _resolve(arg: Any, environment: Mapping[Node, Any]) -> Any:
    if isinstance(arg, Node):
        return environment[arg]
    if isinstance(arg, list | tuple):
        return [_resolve(item, environment) for item in arg]
    if isinstance(arg, Mapping):
        return {name: _resolve(item, environment) for name, item in arg.items()}
    return arg


def _bind(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by schema name, with defaults filled in; ``self`` and ``input`` become ``x``."""
    bound: dict[str, Any] = {}
    for index, argument in enumerate(target._schema.arguments):
        if index < len(args):
            value = args[index]
        elif argument.name in kwargs:
            value = kwargs[argument.name]
        else:
            value = argument.default_value
        bound["x" if argument.name in ("self", "input") else argument.name] = value
    return bound


def _check_result(call: Call, result: Any) -> Any:
    """Compare what a converter made with what torch computed; a difference is a bug of the converter."""
    metas = call.meta if isinstance(call.meta, tuple | list) else (call.meta,)
    values = result if isinstance(result, tuple | list) else (result,)
    for value, meta in zip(values, metas, strict=False):
        if not isinstance(value, Value) or not isinstance(meta, torch.Tensor):
            continue
        expected = call.type_of(meta)
        same_dims = len(expected.shape) == len(value.type.shape) and all(
            a == b or not (isinstance(a, int) and isinstance(b, int))
            for a, b in zip(expected.shape, value.type.shape, strict=True)
        )
        if expected.dtype is not value.type.dtype or not same_dims:
            raise InternalError(
                f"the converter of {call.node.target} disagrees with torch",
                values={"node": call.node.name, "torch": expected, "converted": value.type},
                fix="please report this with the model",
                location=location_of(call.node),
            )
    return result
