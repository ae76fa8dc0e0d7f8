"""Turning every block-structured function of a module into loops ready for code generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tvm import ir, tirx
from tvm_ffi import structural_equal

from trimtab.backends.tvm.codegen.contraction import Contraction, find_contraction
from trimtab.backends.tvm.codegen.elements import ElementKernel
from trimtab.backends.tvm.codegen.expression import Expr, as_index, int_value, loads_of, name_invariants, product
from trimtab.backends.tvm.codegen.gemm import ContractionKernel
from trimtab.backends.tvm.codegen.loops import Stmt, sequence
from trimtab.backends.tvm.codegen.machine import Machine
from trimtab.backends.tvm.codegen.program import Program, Stage, inline_pointwise, read_program
from trimtab.backends.tvm.codegen.rows import RowKernel, group_stages, share_all_axes
from trimtab.backends.tvm.codegen.scaled_product import scaled_product
from trimtab.backends.tvm.codegen.vector_rounding import rounds, with_roundings
from trimtab.backends.tvm.codegen.window_reduction import Window, find_window, window_kernel


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
    invariants, program = _name_invariants(inline_pointwise(program))
    segments = _segments(program, machine)
    body = sequence(*(_generate(program, segment, segments, machine) for segment in segments))
    if rounds([stage.value for stage in program.stages]):
        body = with_roundings(machine, body)
    shared = [b for b in program.temporaries if not _is_local(program, b, segments)]
    named = (tirx.Bind(var, value) for var, value in invariants)
    body = sequence(*(_allocated(buffer) for buffer in shared), *named, body)
    return tirx.PrimFunc(function.params, body, function.ret_type, function.attrs)


def _allocated(buffer: Any) -> Stmt:
    """Memory for all of ``buffer``.

    TVM cuts what it allocates to the ranges that it sees indices in, each within its axis, but one index may run
    through several axes here. It leaves alone a buffer whose address is taken, even where nobody wants the address.
    """
    size = product([as_index(extent) for extent in buffer.shape])
    return sequence(tirx.AllocBuffer(buffer), tirx.Evaluate(buffer.access_ptr("rw", extent=size)))


def _name_invariants(program: Program) -> tuple[list[tuple[Any, Expr]], Program]:
    """What is the same for all elements of a stage, such as the reciprocal of a scale, and the program without it."""
    written = [stage.buffer for stage in program.stages]
    named: list[tuple[Any, Expr]] = []
    stages = []
    for stage in program.stages:
        # With no axis there is one element, and nothing to be had.
        found, value = name_invariants(stage.value, written) if stage.axes else ([], stage.value)
        named += found
        stages.append(replace(stage, value=value) if found else stage)
    return named, replace(program, stages=stages)


Segment = Contraction | Window | list[Stage]


def _segments(program: Program, machine: Machine) -> list[Segment]:
    segments: list[Segment] = []
    pending: list[Stage] = []

    def flush() -> None:
        segments.extend(group.stages for group in group_stages(program, pending))
        pending.clear()

    stages = list(program.stages)
    while stages:
        stage = stages.pop(0)
        tiled = find_contraction(stage) or find_window(stage) if stage.is_reduction else None
        if tiled is None or (isinstance(tiled, Window) and not window_kernel(tiled, machine).is_short):
            pending.append(stage)
            continue
        flush()
        if stages and _take_epilogue(program, tiled, stages[0]):
            stages.pop(0)
        segments.append(tiled)
    flush()
    return segments


def _take_epilogue(program: Program, tiled: Contraction | Window, stage: Stage) -> bool:
    """Make ``stage`` the epilogue of what is computed by tiles where it turns each element into one of its own.

    The axes of the result may be in another order than those of the tiles.
    """
    product = tiled.stage
    if stage.is_reduction or not program.is_temporary(product.buffer):
        return False
    if any(reader is not stage for reader in program.readers(product.buffer)):
        return False
    own = [load for load in loads_of(stage.value) if load.source.same_as(product.buffer)]
    found = [_places(load.indices, stage, product) for load in own]
    if not found or any(places is None or places != found[0] for places in found):
        return False
    tiled.output, tiled.places = stage, list(found[0] or ())
    return True


def _places(indices: Sequence[Expr], reader: Stage, product: Stage) -> list[Any] | None:
    """For each axis of ``product`` the axis of ``reader`` that addresses it, if they are in one-to-one relation."""
    extents = dict(zip(reader.axes, reader.extents, strict=True))
    places: list[Any] = [index if index in extents else None for index in indices]
    # An axis of size 1 is addressed by a constant instead of by its variable.
    units = [axis for axis in reader.axes if axis not in places and int_value(extents[axis]) == 1]
    for position, (index, extent) in enumerate(zip(indices, product.extents, strict=True)):
        if places[position] is None and int_value(index) == 0 and int_value(extent) == 1 and units:
            places[position] = units.pop(0)
    if set(places) != set(reader.axes) or len(places) != len(reader.axes):
        return None
    # A slice from 0 reads the product at its own position too, but covers less of it.
    matching = all(
        structural_equal(extents[axis], extent) for axis, extent in zip(places, product.extents, strict=True)
    )
    return places if matching else None


def _generate(program: Program, segment: Segment, segments: Sequence[Segment], machine: Machine) -> Stmt:
    if isinstance(segment, Contraction):
        if segment.stage.scaled:
            return scaled_product(segment, machine)
        return ContractionKernel(segment, machine).generate()
    if isinstance(segment, Window):
        return window_kernel(segment, machine).generate()
    local = [b for b in program.temporaries if _is_local(program, b, [segment])]
    if not any(stage.is_reduction for stage in segment) and share_all_axes(program, segment):
        return ElementKernel(machine, segment, local).generate()
    (group,) = group_stages(program, segment)
    return RowKernel(machine, group, local).generate()


def _is_local(program: Program, buffer: Any, segments: Sequence[Segment]) -> bool:
    """Whether one of ``segments`` both writes a temporary and is the only one to read it."""
    for segment in segments:
        if isinstance(segment, Contraction | Window):
            if segment.output is not None and (segment.stage.buffer.same_as(buffer)):
                return True
            continue
        if len(segment) > 1 and any(stage.buffer.same_as(buffer) for stage in segment):
            return all(any(reader is stage for stage in segment) for reader in program.readers(buffer))
    return False
