"""IR module to MLIR module: one function a graph, one global a weight, structured ops on tensors inside.

Weights are external parameters, named in the text and never in it. Every op carries the user's line as its location, so
that a message of the compiler can be traced back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch_mlir import ir
from torch_mlir.dialects import func, tensor
from torch_mlir.dialects import torch as torch_dialect

from trimtab.backends.mlir.rules import rule_for
from trimtab.backends.mlir.scalar import constant
from trimtab.backends.mlir.tensors import Code, Tensor, mlir_type
from trimtab.errors import InternalError
from trimtab.ir import ops
from trimtab.ir.core import Graph, Module, Value
from trimtab.ir.dims import as_symbol
from trimtab.ir.op import Op

PARAMETER_SCOPE = "model"
"""The scope in which the code asks for its weights."""


@dataclass(frozen=True)
class Emitted:
    """An MLIR module as text and what is needed to run it.

    Attributes:
        text: the module with locations.
        weights: ids of the weights it reads, which are its parameters.
    """

    text: str
    weights: tuple[str, ...]


def emit(module: Module) -> Emitted:
    """The MLIR of ``module``, whose ops must have passed the capability check."""
    with ir.Context() as context, ir.Location.unknown():
        torch_dialect.register_dialect(context)
        # The compiler's own ops (globals for parameters) are written in generic form; the compiler verifies them.
        context.allow_unregistered_dialects = True
        built = ir.Module.create()
        emitter = _ModuleEmitter(module, built)
        with ir.InsertionPoint(built.body):
            emitter.emit()
        if not built.operation.verify():
            raise InternalError("the MLIR that was built does not verify")
        return Emitted(built.operation.get_asm(enable_debug_info=True), tuple(emitter.globals))


class _ModuleEmitter:
    def __init__(self, module: Module, built: Any) -> None:
        self.module = module
        self.built = built
        self.globals: dict[str, str] = {}
        self.bodies: dict[Op, str] = {}

    def emit(self) -> None:
        self.function("main", self.module.main, public=True)

    def function(self, name: str, graph: Graph, *, public: bool = False) -> None:
        types = [mlir_type(value.type) for value in graph.inputs]
        results = [mlir_type(value.type) for value in graph.outputs]
        symbols = [] if public else _free_symbols(graph)
        built = func.FuncOp(name, ([*types, *[ir.IndexType.get()] * len(symbols)], results))
        if not public:
            built.attributes["sym_visibility"] = ir.StringAttr.get("private")
        block = built.add_entry_block()
        with ir.InsertionPoint(block):
            _FunctionEmitter(self, graph, list(block.arguments), symbols).emit()

    def weight(self, id: str, type: Any) -> Any:
        """The value of a weight, whose global is made at its first use."""
        shape = mlir_type(type)
        if id not in self.globals:
            name = self.globals[id] = f"weight_{len(self.globals)}"
            with ir.InsertionPoint.at_block_begin(self.built.body):
                ir.Operation.create(
                    "util.global",
                    attributes={
                        "sym_name": ir.StringAttr.get(name),
                        "sym_visibility": ir.StringAttr.get("private"),
                        "type": ir.TypeAttr.get(shape),
                        "initial_value": ir.Attribute.parse(
                            f"#flow.parameter.named<{_quoted(PARAMETER_SCOPE)}::{_quoted(id)}> : {shape}"
                        ),
                    },
                )
        name = self.globals[id]
        load = ir.Operation.create(
            "util.global.load", results=[shape], attributes={"global": ir.FlatSymbolRefAttr.get(name)}
        )
        return load.result


class _FunctionEmitter:
    """Builds the function of one graph."""

    def __init__(self, owner: _ModuleEmitter, graph: Graph, arguments: Sequence[Any], symbols: Sequence[str]) -> None:
        self.owner = owner
        self.graph = graph
        self.values: dict[Value, Tensor] = {
            value: Tensor(argument, value.type) for value, argument in zip(graph.inputs, arguments, strict=False)
        }
        given = dict(zip(symbols, arguments[len(graph.inputs) :], strict=True))
        self.code = Code({**_symbol_values(graph, self.values), **given})

    def emit(self) -> None:
        self.ops(self.graph)
        func.ReturnOp([self.read(value).value for value in self.graph.outputs])

    def ops(self, graph: Graph) -> None:
        for op in graph.ops:
            with _location(op):
                if isinstance(op, ops.Repeat):
                    self.repeat(op)
                elif isinstance(op, ops.Fused):
                    self.inline(op)
                else:
                    self.op(op)

    def op(self, op: Op) -> None:
        rule = rule_for(op)
        if rule is None:
            raise InternalError("an op without a rule passed the capability check", values={"op": op.name})
        arguments = [
            None if held is None else [self.read(v) for v in held] if isinstance(held, tuple) else self.read(held)
            for _, held in op.arguments()
        ]
        made = rule.function(op, self.code, *arguments)
        tensors = made if isinstance(made, list) else [made]
        self.values.update(zip(op.results, tensors, strict=True))

    def inline(self, op: Any) -> None:
        """The ops of a fused group, one by one: the compiler makes its own groups."""
        self.values.update(zip(op.body.inputs, map(self.read, op.inputs), strict=True))
        self.ops(op.body)
        self.values.update(zip(op.results, map(self.read, op.body.outputs), strict=True))

    def repeat(self, op: Any) -> None:
        """n calls of one function, each with its slices of the stacked values."""
        name = self.owner.bodies.get(op)
        if name is None:
            name = self.owner.bodies[op] = f"body_{len(self.owner.bodies)}"
            with ir.InsertionPoint(self.owner.built.body):
                self.owner.function(name, op.body)
        sizes = [self.code.symbols[symbol] for symbol in _free_symbols(op.body)]
        carried = [self.read(value) for value in op.carried]
        invariants = [self.read(value).value for value in op.invariants]
        stacked = [self.read(value) for value in op.stacked]
        for iteration in range(op.n):
            slices = [self.slice(tensor, iteration).value for tensor in stacked]
            operands = [*(t.value for t in carried), *slices, *invariants, *sizes]
            call = func.CallOp([t.value.type for t in carried], name, operands)
            carried = [Tensor(value, t.type) for value, t in zip(call.results, carried, strict=True)]
        self.values.update(zip(op.results, carried, strict=True))

    def slice(self, stack: Tensor, iteration: int) -> Tensor:
        starts = [iteration, *[0] * (stack.rank - 1)]
        piece = self.code.slice(stack, starts, (1, *stack.shape[1:]), [1] * stack.rank)
        return self.code.reshape(piece, stack.shape[1:])

    def read(self, value: Value) -> Tensor:
        if value.is_weight:
            return Tensor(self.owner.weight(value.weight, value.type), value.type)
        return self.values[value]


def _symbol_values(graph: Graph, values: dict[Value, Tensor]) -> dict[str, Any]:
    """The symbols that are sizes of inputs, as values of type index."""
    found: dict[str, Any] = {}
    for value in graph.inputs:
        for axis, dim in enumerate(value.type.shape):
            symbol = as_symbol(dim)
            if symbol is not None and symbol.name not in found:
                found[symbol.name] = tensor.dim(values[value].value, constant(axis, None).value)
    return found


def _free_symbols(graph: Graph) -> list[str]:
    """Symbols that a region reads and that no axis of its inputs equals."""
    from trimtab.ir.attributes import attribute_symbols

    shown = {s.name for value in graph.inputs for dim in value.type.shape if (s := as_symbol(dim)) is not None}
    used = {s.name for value in graph.inputs for s in value.type.symbols}
    for op in graph.walk():
        used |= {s.name for value in (*op.operands, *op.results) for s in value.type.symbols}
        used |= {s.name for attribute in op.attributes.values() for s in attribute_symbols(attribute)}
    return sorted(used - shown)


def _location(op: Op) -> Any:
    place = op.location
    if place is None:
        return ir.Location.name(op.name)
    return ir.Location.name(op.name, ir.Location.file(place.file, place.line, 0))


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
