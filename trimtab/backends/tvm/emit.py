"""IR module to Relax module.

Every op becomes a call of a TIR function made by its rule, and a ``fused`` op one call of a function made by the rules
of its body; equal ones share one function.  Weights are parameters of the functions, never constants in the code.  A
``repeat`` body becomes a function of its own, called n times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm import ir, relax, tirx

from trimtab.backends.base import KernelCall
from trimtab.backends.tvm.codegen.machine import Machine
from trimtab.backends.tvm.kernel_calls import calls_in_order, describe_call
from trimtab.backends.tvm.kernels import Inner, Kernel, Leaf, Source, build_function, is_one_kernel, lowering
from trimtab.backends.tvm.layouts import PLAIN, Layout, choose_layouts, packed_inputs, stored_form
from trimtab.backends.tvm.rules import rule_for
from trimtab.backends.tvm.rules.registry import Scope, tvm_dtype
from trimtab.backends.tvm.views import View, view_of
from trimtab.errors import InternalError
from trimtab.ir import ops
from trimtab.ir.attributes import attribute_symbols
from trimtab.ir.core import Graph, Module, Value
from trimtab.ir.dims import Dim, as_symbol
from trimtab.ir.op import Op
from trimtab.ir.types import TensorType

ALIGNMENT = 64
"""Bytes to which generated code expects every tensor to be aligned."""
_PRODUCTS = (
    ops.Linear, ops.Matmul, ops.Einsum, ops.Conv1d, ops.Conv2d, ops.Conv3d, ops.ConvTranspose1d, ops.ConvTranspose2d,
    ops.LinearInteger, ops.MatmulInteger, ops.ConvInteger, ops.LinearGroupwise,
)  # fmt: skip
"""Ops whose rules widen what they read."""


@dataclass
class Emitted:
    """A Relax module and what is needed to call it.

    Attributes:
        relax: the module; ``main`` takes the graph's inputs, then the weights.
        weights: ids of the weights in the order of the parameters.
        layouts: how each weight is stored.
        origins: for the name of each TIR function the ops it was made from.
        calls: the kernel calls of ``main`` in order of execution.
    """

    relax: Any
    weights: list[str]
    layouts: dict[str, Layout]
    origins: dict[str, list[Op]] = field(default_factory=dict)
    calls: tuple[KernelCall, ...] = ()


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
        self.functions: dict[Any, tuple[Any, list[str]]] = {}
        self.origins: dict[str, list[Op]] = {}
        self.calls: dict[str, KernelCall] = {}
        self.bodies: dict[Op, _Body] = {}
        self.packed: dict[Value, Layout] = packed_inputs(module, self.layouts)

    def emit(self) -> Emitted:
        graph = self.module.main
        weights = _weights_read(graph)
        for op in graph.walk():
            if isinstance(op, ops.Repeat):
                self._emit_body(op)
        self.emit_function("main", graph, weights)
        # Ops whose results are only read through views were emitted too: nobody calls them.
        relax_module = relax.transform.DeadCodeElimination()(self.builder.get())
        calls = tuple(calls_in_order(relax_module, self.calls))
        return Emitted(relax_module, weights, self.layouts, self.origins, calls)

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

    def function(self, kernel: Kernel, name: str) -> tuple[Any, list[str]]:
        """The TIR function for a kernel, as a global variable, and the symbols it takes after the tensors."""
        key = kernel.key
        if key not in self.functions:
            function, symbols = build_function(kernel, self.machine)
            self.functions[key] = self.builder.add_func(function, name.replace("+", "_")), symbols
        found = self.functions[key]
        self.origins.setdefault(found[0].name_hint, []).extend(kernel.ops)
        return found

    def _input_type(self, value: Value, scope: Scope) -> Any:
        layout = self.packed.get(value, PLAIN)
        if layout.is_plain:
            return _relax_type(value.type, scope)
        shape = layout.stored_shape(tuple(int(d) for d in value.type.shape))  # type: ignore[arg-type]
        dtype = tvm_dtype(layout.stored_dtype(value.type.dtype))
        return relax.TensorType([tirx.const(d, "int64") for d in shape], dtype)

    def _weight_type(self, id: str) -> Any:
        weight, layout = self.module.weights[id], self.layouts[id]
        shape = layout.stored_shape(tuple(int(d) for d in weight.type.shape))  # type: ignore[arg-type]
        dtype = tvm_dtype(layout.stored_dtype(weight.type.dtype))
        return relax.TensorType([tirx.const(d, "int64") for d in shape], dtype)


class _GraphEmitter:
    """Emits the ops of one graph into the current function of the builder.

    Attributes:
        values: the Relax variables of the values emitted so far.
        weights: those of the weights, by id.
        outside: what the inputs of the bodies of fused ops stand for.
        reshaped: values that are read under another shape, by that.
    """

    def __init__(self, owner: _ModuleEmitter, graph: Graph, scope: Scope) -> None:
        self.owner = owner
        self.graph = graph
        self.scope = scope
        self.values: dict[Value, Any] = {}
        self.weights: dict[str, Any] = {}
        self.outside: dict[Value, Value] = {}
        self.reshaped: dict[tuple[Value, tuple[Dim, ...]], Any] = {}

    def run(self) -> list[Any]:
        for op in self.graph.ops:
            self._emit(op)
        return [self.read(value) for value in self.graph.outputs]

    def read(self, value: Value) -> Any:
        """The Relax expression of a value in its plain form."""
        value = self.outside.get(value, value)
        if value.is_weight:
            layout = self.owner.layouts[value.weight]
            if not layout.is_plain:
                raise InternalError("a packed weight is read as a plain one", values={"weight": value.weight})
            return self.weights[value.weight]
        if value not in self.values:
            producer = value.producer
            assert producer is not None
            self._call([producer], producer.results)
        return self.values[value]

    def _emit(self, op: Op) -> None:
        with lowering(op):
            if isinstance(op, ops.Repeat):
                self._emit_repeat(op)
            elif isinstance(op, ops.Fused):
                self._emit_fused(op)
            elif isinstance(op, ops.Reshape) and _constant_producer(op.x) is None and 0 not in op.shape:
                shape = relax.ShapeExpr(self.scope.shape(op.shape))
                self.values[op.result] = self.owner.builder.emit(relax.op.reshape(self.read(op.x), shape))
            elif _constant_producer(op.results[0]) is not None or stored_form(op.results[0]) is not op.results[0]:
                return  # folded into their readers, or made when something needs a tensor
            elif all(result in self.values for result in op.results):
                return  # absorbed by the op that reads it
            else:
                self._call([op], op.results)

    def _emit_fused(self, op: Any) -> None:
        """One call where the code generator can make one kernel of the body, else a call per op."""
        self.outside.update(zip(op.body.inputs, op.inputs, strict=True))
        members = [inner for inner in op.body.ops if _constant_producer(inner.results[0]) is None]
        if is_one_kernel(members, op.body.outputs):
            self._call(members, op.body.outputs, op.kind)
        else:
            for inner in op.body.ops:
                self._emit(inner)
        for result, value in zip(op.results, op.body.outputs, strict=True):
            self.values[result] = self.read(value)

    def _call(self, members: Sequence[Op], outputs: Sequence[Value], name: str = "") -> None:
        """Emit a call of the TIR function for ``members``, which computes ``outputs``."""
        targets, order = self._absorbed_permute(members[0]) if len(members) == 1 else (outputs, ())
        kernel = self._kernel(members, outputs, order)
        function, symbols = self.owner.function(kernel, name or members[0].name)
        tensors = [leaf.expr for leaf in kernel.leaves if leaf.expr is not None]
        sizes = [self.scope.dim_variable(symbol) for symbol in symbols]
        types = [_relax_type(type, self.scope) for type in kernel.output_types]
        call = relax.call_tir(function, relax.Tuple([*tensors, *sizes]), types if len(types) > 1 else types[0])
        outcome = self.owner.builder.emit(call)
        self.owner.calls[outcome.name] = describe_call(function.name_hint, kernel)
        if len(types) == 1:
            self.values[targets[0]] = outcome
        else:
            for index, value in enumerate(targets):
                self.values[value] = self.owner.builder.emit(relax.TupleGetItem(outcome, index))

    def _kernel(self, members: Sequence[Op], outputs: Sequence[Value], order: tuple[int, ...]) -> Kernel:
        made = {value: Inner(i, j) for i, op in enumerate(members) for j, value in enumerate(op.results)}
        leaves: list[Leaf] = []

        def sources(op: Op) -> list[Source | list[Source] | None]:
            # A tensor is passed once, but not to one op: TVM takes x - x for 0, which NaN and infinity are not.
            known, rule = list(leaves), rule_for(op)
            broadcast = rule.broadcasts if rule is not None else ()

            def source(field: str, value: Value) -> Source:
                if value in made:
                    return made[value]
                value = self.outside.get(value, value)
                if field in broadcast and isinstance(value.producer, ops.Expand):
                    value = self.outside.get(value.producer.x, value.producer.x)
                leaf = self._leaf(op, value)
                for number, other in enumerate(known):
                    if leaf.expr is not None and leaf.expr is other.expr and leaf.key == other.key:
                        return number
                leaves.append(leaf)
                return len(leaves) - 1

            return [
                None
                if held is None
                else [source(field.name, value) for value in held]
                if isinstance(held, tuple)
                else source(field.name, held)
                for field, held in op.arguments()
            ]

        return Kernel(members, leaves, [sources(op) for op in members], [made[value] for value in outputs], order)

    def _absorbed_permute(self, op: Op) -> tuple[Sequence[Value], tuple[int, ...]]:
        """What to store and in which axis order: straight the permuted form if only a permute reads the result."""
        rule, value = rule_for(op), op.results[0]
        if rule is None or not (rule.absorbs_permute and rule.loops) or len(value.uses) != 1:
            return op.results, ()
        reader = value.uses[0].user
        if not isinstance(reader, ops.Permute):
            return op.results, ()
        return reader.results, tuple(reader.dims.index(axis) for axis in range(len(reader.dims)))

    def _leaf(self, op: Op, value: Value) -> Leaf:
        """How ``op`` reads ``value`` from outside of its kernel."""
        constant = _constant_producer(value)
        if constant is not None:
            return Leaf(value.type, constant=constant)
        if 0 in value.type.shape:
            return Leaf(value.type)  # nothing will be read from it
        if isinstance(op, _PRODUCTS):
            narrow = stored_form(value)
            value = self.outside.get(narrow, narrow)
        if value.is_weight:
            return Leaf(value.type, self.weights[value.weight], layout=self.owner.layouts[value.weight])
        rule = rule_for(op)
        if rule is not None and rule.absorbs_permute:
            view = view_of(value)
            if view.moves and not view.base.is_weight and _constant_producer(view.base) is None:
                return self._viewed(value, view)
        return Leaf(value.type, self.read(value), layout=self.owner.packed.get(value, PLAIN))

    def _viewed(self, value: Value, view: View) -> Leaf:
        """``value`` read where it lies in the base of ``view``."""
        stored, expr = view.base.type.with_shape(*view.shape), self.read(view.base)
        if stored != view.base.type:
            # Queries, keys and values that are views of one projection share its form by heads.
            key = view.base, view.shape
            if key not in self.reshaped:
                shape = relax.ShapeExpr(self.scope.shape(view.shape))
                self.reshaped[key] = self.owner.builder.emit(relax.op.reshape(expr, shape))
            expr = self.reshaped[key]
        starts = view.starts if any(start != 0 for start in view.starts) else ()
        steps = view.steps if any(step != 1 for step in view.steps) else ()
        return Leaf(value.type, expr, order=view.order, starts=starts, steps=steps, stored=stored)

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
        self._call([op], op.results)
        outcome = self.values.pop(op.result)
        op._drop_reads()
        return outcome


def _constant_producer(value: Value) -> Op | None:
    """The op that fills a value with one constant, or None."""
    producer = value.producer
    return producer if isinstance(producer, ops.Full | ops.DimValue) else None


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
