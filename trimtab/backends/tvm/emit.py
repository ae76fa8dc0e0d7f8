"""IR module to Relax module.

Every op becomes a call of a TIR function made by its rule; equal ops share one function.  Weights are parameters of
the functions, never constants in the code.  A ``repeat`` body becomes a function of its own, called n times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm import ir, relax, s_tir, te, tirx

from trimtab.backends.tvm.codegen.machine import Machine
from trimtab.backends.tvm.codegen.program import LOOPS
from trimtab.backends.tvm.layouts import Layout, choose_layouts, packed_inputs
from trimtab.backends.tvm.rules import rule_for
from trimtab.backends.tvm.rules.creation import constant_of
from trimtab.backends.tvm.rules.registry import Operand, Rule, Scope, Target, const, tvm_dtype
from trimtab.errors import BackendError, InternalError, TrimtabError
from trimtab.ir import ops
from trimtab.ir.attributes import attribute_symbols
from trimtab.ir.core import Graph, Module, Value
from trimtab.ir.dims import as_symbol
from trimtab.ir.op import Op
from trimtab.ir.types import TensorType

ALIGNMENT = 64
"""Bytes to which generated code expects every tensor to be aligned."""


@dataclass
class Emitted:
    """A Relax module and what is needed to call it.

    Attributes:
        relax: the module; ``main`` takes the graph's inputs, then the weights.
        weights: ids of the weights in the order of the parameters.
        layouts: how each weight is stored.
        origins: for the name of each TIR function the ops it was made from.
    """

    relax: Any
    weights: list[str]
    layouts: dict[str, Layout]
    origins: dict[str, list[Op]] = field(default_factory=dict)


def emit(module: Module, machine: Machine) -> Emitted:
    """The Relax module for ``module``, whose ops must have passed the capability check."""
    return _ModuleEmitter(module, machine).emit()


@dataclass(frozen=True)
class _Body:
    """The function of a repeat's body and the parameters it takes after the body's inputs."""

    function: Any
    weights: list[str]
    symbols: list[str]


class _ModuleEmitter:
    def __init__(self, module: Module, machine: Machine) -> None:
        self.module = module
        self.machine = machine
        self.layouts = choose_layouts(module, machine)
        self.builder = relax.BlockBuilder()
        self.functions: dict[Any, Any] = {}
        self.origins: dict[str, list[Op]] = {}
        self.bodies: dict[Op, _Body] = {}
        self.packed: dict[Value, int] = packed_inputs(module, self.layouts)

    def emit(self) -> Emitted:
        graph = self.module.main
        weights = _weights_read(graph)
        for op in graph.walk():
            if isinstance(op, ops.Repeat):
                self._emit_body(op)
        self.emit_function("main", graph, weights)
        return Emitted(self.builder.get(), weights, self.layouts, self.origins)

    def _emit_body(self, op: Any) -> None:
        """The function of a repeat's body. Nested ones come first, because it calls them."""
        if op in self.bodies:
            return
        for inner in op.body.walk():
            if isinstance(inner, ops.Repeat):
                self._emit_body(inner)
        weights = _weights_read(op.body)
        types = [value.type for value in op.body.inputs]
        used = {s.name for inner in op.body.walk() for v in (*inner.operands, *inner.results) for s in v.type.symbols}
        used |= {s.name for inner in op.body.walk() for a in inner.attributes.values() for s in attribute_symbols(a)}
        shown = {found.name for type in types for dim in type.shape if (found := as_symbol(dim)) is not None}
        symbols = sorted((used | {s.name for type in types for s in type.symbols}) - shown)
        function = self.emit_function(f"repeat_body_{len(self.bodies)}", op.body, weights, symbols)
        self.bodies[op] = _Body(function, weights, symbols)

    def emit_function(self, name: str, graph: Graph, weights: Sequence[str], symbols: Sequence[str] = ()) -> Any:
        """A Relax function for ``graph`` with its weights, and the symbols its shapes do not show, as parameters."""
        scope = Scope(self.machine)
        inputs = [
            relax.Var(value.name or f"input{i}", self._input_type(value, scope)) for i, value in enumerate(graph.inputs)
        ]
        tables = [relax.Var(_identifier(id), self._weight_type(id)) for id in weights]
        sizes = [scope.dim_variable(symbol) for symbol in symbols]
        private = name != "main"
        attributes = {} if private else {"num_input": len(inputs)}
        with self.builder.function(name, [*inputs, *tables, *sizes], attrs=attributes, private=private):
            with self.builder.dataflow():
                body = _GraphEmitter(self, graph, scope)
                body.values.update(zip(graph.inputs, inputs, strict=True))
                body.weights.update(zip(weights, tables, strict=True))
                results = body.run()
                output = self.builder.emit_output(relax.Tuple(results))
            self.builder.emit_func_output(output)
        return self.builder.get().get_global_var(name)

    def _input_type(self, value: Value, scope: Scope) -> Any:
        block = self.packed.get(value, 0)
        if not block:
            return _relax_type(value.type, scope)
        shape = Layout("panels", block).stored_shape(tuple(int(d) for d in value.type.shape))  # type: ignore[arg-type]
        return relax.TensorType([tirx.const(d, "int64") for d in shape], tvm_dtype(value.type.dtype))

    def _weight_type(self, id: str) -> Any:
        weight = self.module.weights[id]
        shape = self.layouts[id].stored_shape(tuple(int(d) for d in weight.type.shape))  # type: ignore[arg-type]
        return relax.TensorType([tirx.const(d, "int64") for d in shape], tvm_dtype(weight.type.dtype))


class _GraphEmitter:
    """Emits the ops of one graph into the current function of the builder."""

    def __init__(self, owner: _ModuleEmitter, graph: Graph, scope: Scope) -> None:
        self.owner = owner
        self.graph = graph
        self.scope = scope
        self.values: dict[Value, Any] = {}
        self.weights: dict[str, Any] = {}

    def run(self) -> list[Any]:
        for op in self.graph.ops:
            try:
                self._emit(op)
            except TrimtabError:
                raise
            except Exception as error:
                raise BackendError(
                    "an op could not be lowered", values={"op": op.name, "error": str(error).strip().splitlines()[-1:]},
                    rule="the TVM backend failed on an op that it claims to support", fix="report the module as a bug",
                    where=f"op {op!r}", location=op.location,
                ) from error  # fmt: skip
        return [self.read(value) for value in self.graph.outputs]

    def read(self, value: Value) -> Any:
        """The Relax expression of a value in its plain form."""
        if value.is_weight:
            layout = self.owner.layouts[value.weight]
            if not layout.is_plain:
                raise InternalError("a packed weight is read as a plain one", values={"weight": value.weight})
            return self.weights[value.weight]
        if value not in self.values:
            producer = value.producer
            assert producer is not None
            self._call(producer)
        return self.values[value]

    def _emit(self, op: Op) -> None:
        if isinstance(op, ops.Repeat):
            self._emit_repeat(op)
        elif isinstance(op, ops.Reshape) and _constant_producer(op.x) is None and 0 not in op.shape:
            shape = relax.ShapeExpr(self.scope.shape(op.shape))
            self.values[op.result] = self.owner.builder.emit(relax.op.reshape(self.read(op.x), shape))
        elif _constant_producer(op.results[0]) is not None:
            return  # constants are folded into their readers, or made when something needs a tensor
        elif all(result in self.values for result in op.results):
            return  # absorbed by the op that reads it
        else:
            self._call(op)

    def _call(self, op: Op) -> None:
        """Emit a call of the TIR function for ``op``."""
        rule = rule_for(op)
        if rule is None:
            raise InternalError("an op without a rule passed the capability check", values={"op": op.name})
        arguments = [self._argument(op, rule, held) for _, held in op.arguments()]
        target, order = self._absorbed_result(op, rule)
        key = (type(op), _hashable(arguments), tuple(sorted((k, repr(v)) for k, v in op.attributes.items())), order)
        found = self.owner.functions.get(key)
        if found is None:
            found = self.owner.functions[key] = _build_function(self.owner, op, rule, arguments, order)
        function, symbols = found
        self.owner.origins.setdefault(function.name_hint, []).append(op)
        tensors = [a.expr for a in _flat(arguments) if a.expr is not None]
        sizes = [self.scope.dim_variable(name) for name in symbols]
        types = [_relax_type(_ordered(value.type, order), self.scope) for value in op.results]
        call = relax.call_tir(function, relax.Tuple([*tensors, *sizes]), types if len(types) > 1 else types[0])
        outcome = self.owner.builder.emit(call)
        if len(types) == 1:
            self.values[target] = outcome
        else:
            for index, value in enumerate(op.results):
                self.values[value] = self.owner.builder.emit(relax.TupleGetItem(outcome, index))

    def _absorbed_result(self, op: Op, rule: Rule) -> tuple[Value, tuple[int, ...]]:
        """Write straight into the permuted form when a permutation is the only reader of a result."""
        value = op.results[0]
        if not (rule.absorbs_permute and rule.loops) or len(value.uses) != 1 or value.is_output:
            return value, ()
        reader = value.uses[0].user
        if not isinstance(reader, ops.Permute):
            return value, ()
        order = tuple(reader.dims.index(axis) for axis in range(len(reader.dims)))
        return reader.result, order

    def _argument(self, op: Op, rule: Rule, held: Any) -> Any:
        if held is None:
            return None
        if isinstance(held, tuple):
            return [self._one(op, rule, value) for value in held]
        return self._one(op, rule, held)

    def _one(self, op: Op, rule: Rule, value: Value) -> _Argument:
        constant = _constant_producer(value)
        if constant is not None:
            return _Argument(value.type, None, constant=constant)
        if 0 in value.type.shape:
            return _Argument(value.type, None)  # nothing will be read from it
        if value.is_weight:
            layout = self.owner.layouts[value.weight]
            return _Argument(value.type, self.weights[value.weight], packed=layout.block if not layout.is_plain else 0)
        producer = value.producer
        if (
            rule.absorbs_permute
            and isinstance(producer, ops.Permute)
            and not (producer.x.is_weight or _constant_producer(producer.x) is not None)
        ):
            # Result axis i of a permutation is stored as axis dims[i] of its operand.
            return _Argument(value.type, self.read(producer.x), order=producer.dims, stored=producer.x.type)
        return _Argument(value.type, self.read(value), packed=self.owner.packed.get(value, 0))

    def _emit_repeat(self, op: Any) -> None:
        """n calls of the body's function; slices of stacked weights are views, so nothing is copied."""
        body = self.owner.bodies[op]
        builder = self.owner.builder
        tables = [self.weights[id] for id in body.weights]
        sizes = [self.scope.dim_variable(name) for name in body.symbols]
        carried = [self.read(value) for value in op.carried]
        invariants = [self.read(value) for value in op.invariants]
        for iteration in range(op.n):
            slices = [self._slice(value, iteration) for value in op.stacked]
            call = ir.Call(body.function, [*carried, *slices, *invariants, *tables, *sizes])
            outcome = builder.emit(call)
            carried = [builder.emit(relax.TupleGetItem(outcome, n)) for n in range(len(carried))]
        self.values.update(zip(op.results, carried, strict=True))

    def _slice(self, value: Value, iteration: int) -> Any:
        """Slice ``iteration`` of a stacked value along its leading axis."""
        builder = self.owner.builder
        if value.is_weight:
            layout = self.owner.layouts[value.weight]
            shape = layout.stored_shape(tuple(int(d) for d in value.type.shape))[1:]  # type: ignore[arg-type]
            size = math.prod(shape) * max(value.type.dtype.bits // 8, 1)
            if size % ALIGNMENT == 0:
                extents = relax.ShapeExpr([tirx.const(d, "int64") for d in shape])
                view = relax.op.memory.view(
                    self.weights[value.weight], extents, None, tirx.const(iteration * size, "int64")
                )
                # The kernels want their data at offset 0: on CPUs this moves the pointer and copies nothing.
                return builder.emit(relax.op.memory.ensure_zero_offset(builder.emit(view)))
        return self._call_one(ops.Select(value, 0, iteration))

    def _call_one(self, op: Op) -> Any:
        """Emit an op that is not part of the graph."""
        self._call(op)
        outcome = self.values.pop(op.result)
        op._drop_reads()
        return outcome


@dataclass(frozen=True)
class _Argument:
    """An operand of a call before its TIR function exists."""

    type: TensorType
    expr: Any
    constant: Op | None = None
    packed: int = 0
    order: tuple[int, ...] = ()
    stored: TensorType | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        constant = (
            None if self.constant is None else (self.constant.name, tuple(map(repr, self.constant.attributes.values())))
        )
        return (self.type, self.packed, self.order, constant, self.expr is None)


def _constant_producer(value: Value) -> Op | None:
    """The op that fills a value with one constant, or None."""
    producer = value.producer
    return producer if isinstance(producer, ops.Full | ops.DimValue) else None


def _flat(arguments: Sequence[Any]) -> list[_Argument]:
    flat: list[_Argument] = []
    for argument in arguments:
        if isinstance(argument, list):
            flat += argument
        elif argument is not None:
            flat.append(argument)
    return flat


def _hashable(arguments: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(None if a is None else tuple(x.key for x in a) if isinstance(a, list) else a.key for a in arguments)


def _ordered(type: TensorType, order: tuple[int, ...]) -> TensorType:
    """The type as stored when logical axis i lies at ``order[i]``."""
    if not order:
        return type
    shape = list(type.shape)
    for axis, place in enumerate(order):
        shape[place] = type.shape[axis]
    return type.with_shape(*shape)


def _build_function(owner: _ModuleEmitter, op: Op, rule: Rule, arguments: Sequence[Any], order: tuple[int, ...]) -> Any:
    """The TIR function for an op: its global variable and the symbols it takes after the tensors."""
    scope = Scope(owner.machine)
    stored_types: list[TensorType] = []
    leaves: list[Any] = []

    def operand(argument: _Argument) -> Operand:
        if argument.constant is not None:
            return Operand(
                argument.type, scope.shape(argument.type.shape), constant=constant_of(argument.constant, scope)
            )
        if argument.expr is None:
            return Operand(
                argument.type, scope.shape(argument.type.shape), constant=const(0, tvm_dtype(argument.type.dtype))
            )
        stored = argument.stored or argument.type
        shape = scope.shape(stored.shape)
        if argument.packed:
            columns, depth = (int(d) for d in argument.type.shape)  # type: ignore[arg-type]
            shape = scope.shape((-(-columns // argument.packed), depth, argument.packed))
        name = f"x{len(leaves)}"
        dtype = tvm_dtype(argument.type.dtype)
        leaf = tirx.decl_buffer(shape, dtype, name=name) if rule.loops else te.placeholder(shape, dtype, name=name)
        leaves.append(leaf)
        stored_types.append(stored)
        return Operand(
            argument.type, scope.shape(argument.type.shape), leaf, packed=argument.packed, order=argument.order
        )

    operands = [
        None if a is None else [operand(x) for x in a] if isinstance(a, list) else operand(a) for a in arguments
    ]
    if rule.loops:
        targets = []
        for i, value in enumerate(op.results):
            stored = _ordered(value.type, order)
            buffer = tirx.decl_buffer(scope.shape(stored.shape), tvm_dtype(stored.dtype), name=f"out{i}")
            targets.append(Target(value.type, scope.shape(value.type.shape), buffer, order))
        body = rule.function(op, scope, targets, *operands)
        symbols = scope.free_symbols(stored_types)
        params = [*leaves, *(scope.variables[name] for name in symbols), *(target.buffer for target in targets)]
        # Passes that look for blocks expect a root block in every function.
        root = s_tir.SBlock([], [], [], "root", body)
        function = tirx.PrimFunc(params, s_tir.SBlockRealize([], True, root)).with_attr(LOOPS, 1)
    else:
        outcome = rule.function(op, scope, *operands)
        results = outcome if isinstance(outcome, list) else [outcome]
        symbols = scope.free_symbols(stored_types)
        function = te.create_prim_func([*leaves, *(scope.variables[name] for name in symbols), *results])
    function = function.with_attr({"tirx.noalias": True, "s_tir": True})
    if rule.pattern is not None:
        function = function.with_attr("op_pattern", rule.pattern)
    return owner.builder.add_func(
        function.without_attr("global_symbol") if "global_symbol" in function.attrs else function, op.name
    ), symbols


def _relax_type(type: TensorType, scope: Scope) -> Any:
    return relax.TensorType(scope.shape(type.shape), tvm_dtype(type.dtype))


def _identifier(id: str) -> str:
    return "w_" + "".join(c if c.isalnum() else "_" for c in id)


def _weights_read(graph: Graph) -> list[str]:
    """Ids of the weights that a graph and its regions read, in order of first reading."""
    found = dict.fromkeys(value.weight for value in graph.weights)
    for op in graph.walk():
        for region in op.regions:
            found.update(dict.fromkeys(value.weight for value in region.weights))
    return list(found)
