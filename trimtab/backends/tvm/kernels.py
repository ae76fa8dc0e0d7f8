"""From the ops of one kernel to its TIR function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from tvm import s_tir, te, tirx

from trimtab.backends.tvm.codegen.machine import Machine
from trimtab.backends.tvm.codegen.program import LOOPS
from trimtab.backends.tvm.codegen.vector_rounding import with_roundings
from trimtab.backends.tvm.layouts import PLAIN, Layout
from trimtab.backends.tvm.rules import rule_for
from trimtab.backends.tvm.rules.creation import constant_of
from trimtab.backends.tvm.rules.registry import Operand, Rule, Scope, Target, const, tvm_dtype
from trimtab.errors import BackendError, InternalError, TrimtabError
from trimtab.ir.core import Value
from trimtab.ir.dims import Dim
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op
from trimtab.ir.types import TensorType


@dataclass(frozen=True)
class Leaf:
    """What a kernel reads from outside.

    Attributes:
        type: its type in the IR.
        expr: the Relax expression of the tensor; None for a constant, and where there is nothing to read.
        constant: the op that makes the constant.
        layout: how it is stored.
        order, starts, steps, stored: which axis of the tensor each axis is, where the leaf begins along the tensor's
            axes, how far apart its elements are there, and the tensor's type, when the leaf is a view of a larger or
            permuted tensor.
    """

    type: TensorType
    expr: Any = None
    constant: Op | None = None
    layout: Layout = PLAIN
    order: tuple[int, ...] = ()
    starts: tuple[Dim, ...] = ()
    steps: tuple[int, ...] = ()
    stored: TensorType | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for leaves that give the same code."""
        constant = self.constant and (self.constant.name, *map(repr, self.constant.attributes.values()))
        return (self.type, self.layout, self.order, self.starts, self.steps, self.stored, constant, self.expr is None)


@dataclass(frozen=True)
class Inner:
    """A value that an earlier op of the same kernel computes: result ``result`` of op number ``op``."""

    op: int
    result: int


Source: TypeAlias = "int | Inner"
"""Where an operand comes from: a leaf by its number, or inside the kernel."""


@dataclass(frozen=True)
class Kernel:
    """Ops that are compiled to one function.

    Attributes:
        ops: the ops in order of execution; only a kernel of one op may have a rule that writes loops.
        leaves: what they read from outside, each once.
        sources: for each op, for each declared operand, where it comes from: a source, a list of them, or None.
        outputs: the values to write.
        order: the axis order to store the only output in; empty for its own.
    """

    ops: Sequence[Op]
    leaves: Sequence[Leaf]
    sources: Sequence[Sequence[Source | list[Source] | None]]
    outputs: Sequence[Inner]
    order: tuple[int, ...] = ()

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for kernels of the same code, whatever tensors they are called with."""
        ops = tuple(
            (type(op), tuple(tuple(s) if isinstance(s, list) else s for s in sources), _attributes_key(op))
            for op, sources in zip(self.ops, self.sources, strict=True)
        )
        return (ops, tuple(leaf.key for leaf in self.leaves), tuple(self.outputs), self.order)

    @property
    def output_types(self) -> list[TensorType]:
        """The types of the outputs as they are stored."""
        return [stored_type(self.value(place).type, self.order) for place in self.outputs]

    def value(self, place: Inner) -> Value:
        return self.ops[place.op].results[place.result]


def is_one_kernel(ops: Sequence[Op], outputs: Sequence[Value]) -> bool:
    """Whether one function can compute ``outputs`` by the rules of ``ops``: loops that a rule wrote stand alone."""
    joined = all((rule := rule_for(op)) is not None and not rule.loops for op in ops)
    return joined and len(set(outputs)) == len(outputs) and all(value.producer in ops for value in outputs)


def stored_type(type: TensorType, order: tuple[int, ...]) -> TensorType:
    """The type as stored when logical axis i lies at ``order[i]``."""
    if not order:
        return type
    shape = list(type.shape)
    for axis, place in enumerate(order):
        shape[place] = type.shape[axis]
    return type.with_shape(*shape)


def build_function(kernel: Kernel, machine: Machine) -> tuple[Any, list[str]]:
    """The TIR function of a kernel, and the symbols that it takes between its leaves and its outputs."""
    scope = Scope(machine)
    (first, *others) = [_rule(op) for op in kernel.ops]
    loops = first.loops and not others
    operands, params = _leaf_operands(kernel, scope, tirx.decl_buffer if loops else te.placeholder)
    stored = [leaf.stored or leaf.type for leaf in kernel.leaves if leaf.expr is not None]
    make = _loop_function if loops else _tensor_function
    function = make(kernel, scope, operands, params, stored)
    function = function.with_attr({"tirx.noalias": True, "s_tir": True})
    if "global_symbol" in function.attrs:
        function = function.without_attr("global_symbol")
    return function, scope.free_symbols(stored)


@contextmanager
def lowering(op: Op) -> Iterator[None]:
    """Report whatever goes wrong inside as a failure to lower ``op``."""
    try:
        yield
    except TrimtabError:
        raise
    except Exception as error:
        raise BackendError(
            "an op could not be lowered", values={"op": op.name, "error": str(error).strip().splitlines()[-1:]},
            rule="the TVM backend failed on an op that it claims to support", fix="report the module as a bug",
            where=f"op {op!r}", location=op.location,
        ) from error  # fmt: skip


def _rule(op: Op) -> Rule:
    rule = rule_for(op)
    if rule is None:
        raise InternalError("an op without a rule passed the capability check", values={"op": op.name})
    return rule


def _leaf_operands(kernel: Kernel, scope: Scope, declare: Callable[..., Any]) -> tuple[list[Operand], list[Any]]:
    """An operand per leaf, and the tensors among them in order."""
    operands: list[Operand] = []
    tensors: list[Any] = []
    for leaf in kernel.leaves:
        shape, dtype = scope.shape(leaf.type.shape), tvm_dtype(leaf.layout.stored_dtype(leaf.type.dtype))
        if leaf.expr is None:
            value = constant_of(leaf.constant, scope) if leaf.constant is not None else const(0, dtype)
            operands.append(Operand(leaf.type, shape, constant=value))
            continue
        stored = scope.shape((leaf.stored or leaf.type).shape)
        if not leaf.layout.is_plain:
            stored = scope.shape(leaf.layout.stored_shape(tuple(int(d) for d in leaf.type.shape)))  # type: ignore[arg-type]
        tensors.append(declare(stored, dtype, name=f"x{len(tensors)}"))
        starts = tuple(scope.shape(leaf.starts))
        operands.append(Operand(leaf.type, shape, tensors[-1], layout=leaf.layout, order=leaf.order, starts=starts,
                                steps=leaf.steps))  # fmt: skip
    return operands, tensors


def _loop_function(
    kernel: Kernel, scope: Scope, leaves: Sequence[Operand], params: list[Any], stored: Sequence[TensorType]
) -> Any:
    """The function of one op whose rule writes the loops itself."""
    (op,), (sources,) = kernel.ops, kernel.sources
    targets = []
    for i, value in enumerate(op.results):
        type = stored_type(value.type, kernel.order)
        buffer = tirx.decl_buffer(scope.shape(type.shape), tvm_dtype(type.dtype), name=f"out{i}")
        targets.append(Target(value.type, scope.shape(value.type.shape), buffer, kernel.order))
    body = _rule(op).function(op, scope, targets, *_resolve(sources, leaves.__getitem__))
    if any(target.type.dtype is DType.BF16 for target in targets):
        body = with_roundings(scope.machine, body)
    symbols = [scope.variables[name] for name in scope.free_symbols(stored)]
    # Passes that look for blocks expect a root block in every function.
    root = s_tir.SBlockRealize([], True, s_tir.SBlock([], [], [], "root", body))
    return tirx.PrimFunc([*params, *symbols, *(t.buffer for t in targets)], root).with_attr(LOOPS, 1)


def _tensor_function(
    kernel: Kernel, scope: Scope, leaves: Sequence[Operand], params: list[Any], stored: Sequence[TensorType]
) -> Any:
    """The function of ops whose rules make tensors, each reading those of the ops before it."""
    made: list[list[Any]] = []

    def operand(source: Source) -> Operand:
        if isinstance(source, int):
            return leaves[source]
        type = kernel.value(source).type
        return Operand(type, scope.shape(type.shape), made[source.op][source.result])

    for op, sources in zip(kernel.ops, kernel.sources, strict=True):
        with lowering(op):
            outcome = _rule(op).function(op, scope, *_resolve(sources, operand))
        made.append(outcome if isinstance(outcome, list) else [outcome])
    symbols = [scope.variables[name] for name in scope.free_symbols(stored)]
    return te.create_prim_func([*params, *symbols, *(made[place.op][place.result] for place in kernel.outputs)])


def _resolve(sources: Sequence[Any], operand: Callable[[Any], Operand]) -> list[Any]:
    """The arguments of a rule: an operand, a list of them, or None for each declared operand."""
    return [
        None if source is None else [operand(s) for s in source] if isinstance(source, list) else operand(source)
        for source in sources
    ]


def _attributes_key(op: Op) -> tuple[Any, ...]:
    return tuple(sorted((name, repr(value)) for name, value in op.attributes.items()))
