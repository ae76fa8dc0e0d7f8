"""Reading a block-structured TIR function into stages.

Relax legalisation, TE and FuseTIR all produce functions of one shape: allocations, then loop nests that each hold one
block which stores one element.  :func:`read_program` turns that into a list of :class:`Stage`, the form the kernel
generators work on, and returns None for anything else (hand-written loops stay as they are).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm import ir, s_tir, tirx
from tvm_ffi import structural_equal

from trimtab.backends.tvm.codegen.expression import Expr, int_value, loads_of, rewrite, variables_of, visit_nodes


@dataclass
class Stage:
    """One buffer computed element by element.

    Attributes:
        name: hint for people.
        buffer: what is written, at the point ``axes``.
        axes: spatial variables, one per dimension of ``buffer``.
        extents: range of each axis.
        reduce_axes: reduction variables with their extents.
        init: value before the reduction; None for a pointwise stage.
        value: the stored expression; for a reduction the operand ``v`` in ``acc = combine(acc, v)``.
        combine: ``add``, ``mul``, ``max`` or ``min`` for reductions, else "".
        materialize: keep the result in a buffer instead of recomputing it in its readers.
        scaled: for a sum of products whose second factor is integers times the scales of their groups, both in panels,
            the kind of data, e.g. ``f32*i4``, or ``f32*u4-u8`` with the type of zero points; "" for everything else.
    """

    name: str
    buffer: Any
    axes: list[Any]
    extents: list[Expr]
    value: Expr
    reduce_axes: list[tuple[Any, Expr]] = field(default_factory=list)
    init: Expr | None = None
    combine: str = ""
    materialize: bool = False
    scaled: str = ""

    @property
    def is_reduction(self) -> bool:
        return bool(self.combine)


@dataclass
class Program:
    """A function as stages in execution order.

    Attributes:
        function: the function read.
        stages: its stages.
        temporaries: buffers that live only inside the function.
    """

    function: Any
    stages: list[Stage]
    temporaries: list[Any]

    def readers(self, buffer: Any) -> list[Stage]:
        """Stages that load from ``buffer``."""
        return [stage for stage in self.stages if any(load.source.same_as(buffer) for load in loads_of(stage.value))]

    def is_temporary(self, buffer: Any) -> bool:
        return any(buffer.same_as(other) for other in self.temporaries)


SCALED = "trimtab.scaled"
"""Attribute with which a rule says :attr:`Stage.scaled`."""

LOOPS = "trimtab.loops"
"""Attribute of functions whose loops were written by a rule and stay as they are."""

_COMBINERS = {tirx.Add: "add", tirx.Mul: "mul", tirx.Max: "max", tirx.Min: "min"}


def read_program(function: Any) -> Program | None:
    """Stages of ``function``, or None when it is not made of single-store blocks."""
    root = function.body
    if LOOPS in function.attrs or not isinstance(root, s_tir.SBlockRealize):
        return None
    stages = []
    body = root.block.body
    for nest in body.seq if isinstance(body, tirx.SeqStmt) else [body]:
        stage = _read_stage(nest)
        if stage is None:
            return None
        stages.append(stage)
    return Program(function, stages, list(root.block.alloc_buffers))


def _read_stage(nest: Any) -> Stage | None:
    loops: dict[Any, Any] = {}
    while isinstance(nest, tirx.For):
        if nest.kind != tirx.ForKind.SERIAL or int_value(nest.min) != 0:
            return None
        loops[nest.loop_var] = nest.extent
        nest = nest.body
    if not isinstance(nest, s_tir.SBlockRealize) or int_value(nest.predicate) not in (1, None):
        return None
    block = nest.block
    if block.alloc_buffers or block.match_buffers or not isinstance(block.body, tirx.BufferStore):
        return None
    store = block.body
    spatial: dict[Any, Expr] = {}
    reduce_axes: list[tuple[Any, Expr]] = []
    for iter_var, bound in zip(block.iter_vars, nest.iter_values, strict=True):
        if int_value(iter_var.dom.min) != 0 or not (
            (isinstance(bound, ir.Var) and bound in loops) or int_value(bound) == 0
        ):
            return None
        if iter_var.iter_type == tirx.IterVar.CommReduce:
            reduce_axes.append((iter_var.var, iter_var.dom.extent))
        elif iter_var.iter_type == tirx.IterVar.DataPar:
            spatial[iter_var.var] = iter_var.dom.extent
        else:
            return None
    axes, extents = [], []
    for index in store.indices:
        if isinstance(index, ir.Var) and index in spatial and index not in axes:
            axes.append(index)
            extents.append(spatial[index])
        elif int_value(index) == 0:
            axes.append(tirx.Var("unit", "int64"))
            extents.append(tirx.const(1, "int64"))
        else:
            return None
    if any(int_value(spatial[axis]) != 1 for axis in spatial if axis not in axes):
        return None
    stage = Stage(block.name_hint, store.buffer, axes, extents, store.value, reduce_axes)
    stage.materialize = "materialize" in block.annotations
    stage.scaled = str(block.annotations.get(SCALED, ""))
    leftover = {axis: tirx.const(0, str(axis.ty.dtype)) for axis in spatial if axis not in axes}
    if leftover:
        stage.value = rewrite(stage.value, leftover)
    return _split_reduction(stage, block.init) if reduce_axes else stage


def _split_reduction(stage: Stage, init: Any) -> Stage | None:
    """Recognise ``acc = combine(acc, value)`` with an init store."""
    combine = _COMBINERS.get(type(stage.value))
    if combine is None or not isinstance(init, tirx.BufferStore):
        return None
    left, right = stage.value.a, stage.value.b
    for accumulator, operand in ((left, right), (right, left)):
        if isinstance(accumulator, ir.TensorLoad) and accumulator.source.same_as(stage.buffer):
            if any(load.source.same_as(stage.buffer) for load in loads_of(operand)):
                return None
            stage.combine, stage.value, stage.init = combine, operand, init.value
            return None if variables_of(init.value) & set(stage.axes) else stage
    return None


def inline_pointwise(program: Program) -> Program:
    """Substitute pointwise stages into the stage that reads them, where that repeats no work."""
    stages = list(program.stages)
    # The last stage first: what two stages read may have one reader when these two have been joined.
    for stage in reversed(program.stages):
        if stage.is_reduction or stage.materialize or not program.is_temporary(stage.buffer):
            continue
        readers = [
            other for other in stages if any(load.source.same_as(stage.buffer) for load in loads_of(other.value))
        ]
        if len(readers) == 1 and (value := _inlined(stage, readers[0])) is not None:
            readers[0].value = value
            stages.remove(stage)
    temporaries = [b for b in program.temporaries if any(s.buffer.same_as(b) for s in stages)]
    return Program(program.function, stages, temporaries)


def _inlined(stage: Stage, reader: Stage) -> Expr | None:
    """The value of ``reader`` with the element of ``stage`` computed in it, or None where it would be computed again.

    An element that is read several times gets a name.
    """
    first, *others = (load for load in loads_of(reader.value) if load.source.same_as(stage.buffer))
    at, axes = list(first.indices), variables_of(*first.indices)
    wide = [axis for axis, extent in [*zip(reader.axes, reader.extents, strict=True), *reader.reduce_axes]
            if int_value(extent) != 1]  # fmt: skip
    is_costly = any(isinstance(node, tirx.Div | ir.Call) for node in visit_nodes(stage.value))
    if is_costly and any(axis not in axes for axis in wide):
        return None

    def element(indices: Sequence[Expr]) -> Expr:
        return rewrite(stage.value, dict(zip(stage.axes, indices, strict=True)))

    if not others:
        # At the indices as they are rewritten: what a let names in them has another name by then.
        return rewrite(reader.value, load=lambda buffer, at: element(at) if buffer.same_as(stage.buffer) else None)
    named = {node.var for node in visit_nodes(reader.value) if isinstance(node, tirx.Let)}
    if axes & named or not all(all(map(structural_equal, load.indices, at)) for load in others):
        return None
    value = element(at)
    var = tirx.Var(stage.name, value.ty)
    body = rewrite(reader.value, load=lambda buffer, indices: var if buffer.same_as(stage.buffer) else None)
    return tirx.Let(var, value, body)
