"""Turning every block-structured function of a module into loops ready for code generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import ir, tirx
from tvm_ffi import structural_equal

from trimtab.backends.tvm.codegen.contraction import Contraction, find_contraction
from trimtab.backends.tvm.codegen.expression import Expr, loads_of, rewrite
from trimtab.backends.tvm.codegen.gemm import ContractionKernel
from trimtab.backends.tvm.codegen.loops import Stmt, sequence
from trimtab.backends.tvm.codegen.machine import Machine
from trimtab.backends.tvm.codegen.program import Program, Stage, inline_pointwise, read_program
from trimtab.backends.tvm.codegen.rows import RowKernel, group_stages


def schedule_module(module: Any, machine: Machine) -> Any:
    """A copy of an IRModule in which every PrimFunc made of blocks is replaced by generated loops."""
    scheduled = ir.IRModule(dict(module.functions_items()), attrs=module.attrs)
    for name, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc):
            scheduled.update_func(name, schedule_function(function, machine))
    return scheduled


def schedule_function(function: Any, machine: Machine) -> Any:
    """Loops for one function; functions that are loops already are returned unchanged."""
    program = read_program(function)
    if program is None:
        return function
    program = inline_pointwise(program)
    segments = _segments(program)
    body = sequence(*(_generate(program, segment, segments, machine) for segment in segments))
    shared = [b for b in program.temporaries if not _is_local(program, b, segments)]
    body = sequence(*(tirx.AllocBuffer(buffer) for buffer in shared), body)
    return tirx.PrimFunc(function.params, body, function.ret_type, function.attrs)


Segment = Contraction | list[Stage]


def _segments(program: Program) -> list[Segment]:
    segments: list[Segment] = []
    pending: list[Stage] = []

    def flush() -> None:
        segments.extend(group.stages for group in group_stages(program, pending))
        pending.clear()

    stages = list(program.stages)
    while stages:
        stage = stages.pop(0)
        contraction = find_contraction(stage) if stage.is_reduction else None
        if contraction is None:
            pending.append(stage)
            continue
        flush()
        while stages and _extend_epilogue(program, contraction, stages[0]):
            stages.pop(0)
        segments.append(contraction)
    flush()
    return segments


def _extend_epilogue(program: Program, contraction: Contraction, stage: Stage) -> bool:
    """Make ``stage`` (part of) the epilogue of a contraction when it only reads the tile at its own position."""
    previous = contraction.output or contraction.stage
    if stage.is_reduction or not program.is_temporary(previous.buffer) or len(stage.axes) != len(previous.axes):
        return False
    if any(reader is not stage for reader in program.readers(previous.buffer)):
        return False
    # A slice from 0 reads the tile at its own position too, but covers less of it.
    if not all(map(structural_equal, stage.extents, previous.extents)):
        return False
    own = [access for access in loads_of(stage.value) if access.source.same_as(previous.buffer)]
    if not own:
        return False
    for access in own:
        for position, axis, extent in zip(access.indices, stage.axes, stage.extents, strict=True):
            unit = getattr(position, "value", None) == 0 and getattr(extent, "value", None) == 1
            if not position.same_as(axis) and not unit:
                return False
    if contraction.output is None:
        contraction.output = stage
        return True
    inner = contraction.output
    var = tirx.Var("inner", inner.value.ty)

    def substitute(buffer: Any, indices: list[Expr]) -> Expr | None:
        return var if buffer.same_as(inner.buffer) else None

    value = rewrite(inner.value, dict(zip(inner.axes, stage.axes, strict=True)))
    stage.value = tirx.Let(var, value, rewrite(stage.value, load=substitute))
    contraction.output = stage
    return True


def _generate(program: Program, segment: Segment, segments: Sequence[Segment], machine: Machine) -> Stmt:
    if isinstance(segment, Contraction):
        return ContractionKernel(segment, machine).generate()
    local = [b for b in program.temporaries if _is_local(program, b, [segment])]
    (group,) = group_stages(program, segment)
    return RowKernel(machine, group, local).generate()


def _is_local(program: Program, buffer: Any, segments: Sequence[Segment]) -> bool:
    """Whether one of ``segments`` both writes a temporary and is the only one to read it."""
    for segment in segments:
        if isinstance(segment, Contraction):
            if segment.output is not None and (segment.stage.buffer.same_as(buffer)):
                return True
            continue
        if len(segment) > 1 and any(stage.buffer.same_as(buffer) for stage in segment):
            return all(any(reader is stage for stage in segment) for reader in program.readers(buffer))
    return False
