"""Loops over elements: pointwise stages that run over the same axes, as one loop whose innermost part is vectorised.

Also what row kernels share with them: which axes can be walked as one, how many lanes fit, and when to run in parallel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

from trimtab.backends.tvm.codegen.contraction import Axes, Flattener, accesses_of, has_only_loads_as_users
from trimtab.backends.tvm.codegen.expression import (
    Expr,
    calls_of,
    dtype_of,
    int_value,
    loads_of,
    name_positions,
    product,
    rewrite,
    variables_of,
)
from trimtab.backends.tvm.codegen.loops import (
    Stmt,
    bind,
    bind_all,
    ceil_div,
    index,
    lanes_of,
    load,
    loop,
    minimum,
    sequence,
    store,
    vectors,
)
from trimtab.backends.tvm.codegen.machine import Machine
from trimtab.backends.tvm.codegen.program import Stage
from trimtab.backends.tvm.codegen.vector_math import lowering_of

UNROLL = 4
"""Vectors that a loop body works on, to keep the units busy."""

_SCALAR_CALLS = {"prim.if_then_else", "tirx.call_extern", "tirx.call_pure_extern"}


class ElementKernel:
    """Generates the loop of pointwise stages over the same axes, each of which reads the earlier ones at its own index.

    Args:
        machine: vector width and threads.
        stages: the stages.
        local: buffers that nothing else reads; they shrink to one element.
    """

    def __init__(self, machine: Machine, stages: Sequence[Stage], local: Sequence[Any] = ()) -> None:
        self.machine = machine
        self.local = list(local)
        self.stages = [_with_axes(stage, stages[0].axes) for stage in stages]

    def generate(self) -> Stmt:
        # Axes of size 1 first, so that the innermost one is worth a vector.
        axes = sorted(zip(self.stages[0].axes, self.stages[0].extents, strict=True), key=lambda a: int_value(a[1]) != 1)
        outer, inner = split_inner(self.stages, axes)
        lanes = min(lanes_for(stage, self.machine) for stage in self.stages)
        kind = loop_kind(self.stages, self.machine)
        positions, stages = self._name_positions([axis for axis, _ in inner.axes])
        if not axes:
            return self._element(stages, {})

        def element(row: dict[Any, Expr]) -> Callable[[Expr], Stmt]:
            return lambda flat: self._element(stages, {**row, **inner.at(flat, linear=True)})

        if all(int_value(extent) == 1 for _, extent in outer):
            unit = {axis: index(0) for axis, _ in outer}
            return _with_positions(positions, unit, lambda row: self._flat(inner, lanes, kind, element(row)))

        rows = Flattener(outer)

        def at_row(axes: dict[Any, Expr]) -> Stmt:
            return _with_positions(positions, axes, lambda row: vectors(inner.extent, lanes, element(row)))

        return loop(rows.extent, lambda flat: bind_all(rows.at(flat, linear=False), at_row), kind, "row")

    def _name_positions(self, inner: Sequence[Any]) -> tuple[list[tuple[Any, Expr]], list[Stage]]:
        """Positions that all elements of a row read, and the stages that use them by name."""
        written = [stage.buffer for stage in self.stages]
        positions: list[tuple[Any, Expr]] = []
        stages = []
        for stage in self.stages:
            found, value = name_positions(stage.value, inner)
            # What a stage of this kernel computes is not there yet when the row begins.
            if any(load.source.same_as(b) for _, position in found for load in loads_of(position) for b in written):
                found, value = [], stage.value
            positions += found
            stages.append(Stage(stage.name, stage.buffer, stage.axes, stage.extents, value))
        return positions, stages

    def _element(self, stages: Sequence[Stage], point: dict[Any, Expr]) -> Stmt:
        """All stages at one point. A vectorised loop around it gives local buffers an element per lane."""
        small = {buffer: tirx.decl_buffer([index(1)], str(buffer.dtype), name=buffer.name) for buffer in self.local}

        def redirect(buffer: Any, indices: list[Expr]) -> Expr | None:
            return load(small[buffer], index(0)) if buffer in small else None

        def write(stage: Stage) -> Stmt:
            value = rewrite(stage.value, point, redirect, lowering_of(stage.value))
            if stage.buffer in small:
                return sequence(tirx.AllocBuffer(small[stage.buffer]), store(small[stage.buffer], [index(0)], value))
            return store(stage.buffer, [point[axis] for axis in stage.axes], value)

        return sequence(*map(write, stages))

    def _flat(self, inner: Flattener, lanes: int, kind: str, element: Callable[[Expr], Stmt]) -> Stmt:
        width = lanes * UNROLL
        total = inner.extent
        known = int_value(total)
        if kind == "serial" or (known is not None and known < width):
            return vectors(total, lanes, element)

        def block(i: Expr) -> Stmt:
            def at(start: Expr) -> Stmt:
                return sequence(*(lanes_of(start + index(u * lanes), lanes, element) for u in range(UNROLL)))

            if known is not None and known % width == 0:
                return at(i * index(width))
            return bind(minimum(i * index(width), total - index(width)), at, "start")

        main = loop(ceil_div(total, width), block, kind, "block")
        if known is not None:
            return main
        return tirx.IfThenElse(total >= index(width), main, vectors(total, lanes, element))


def _with_positions(
    positions: Sequence[tuple[Any, Expr]], row: dict[Any, Expr], body: Callable[[dict[Any, Expr]], Stmt]
) -> Stmt:
    """``body`` after the positions that hold for the row have been computed one after the other."""
    if not positions:
        return body(row)
    (var, value), *others = positions
    return bind(rewrite(value, row), lambda known: _with_positions(others, {**row, var: known}, body), "position")


def _with_axes(stage: Stage, axes: Sequence[Any]) -> Stage:
    """The same pointwise stage over the axes of another one."""
    value = rewrite(stage.value, dict(zip(stage.axes, axes, strict=True)))
    return Stage(stage.name, stage.buffer, list(axes), stage.extents, value)


def split_inner(stages: Sequence[Stage], axes: Axes) -> tuple[Axes, Flattener]:
    """Outer axes, and the longest run of innermost axes that all stages can walk as one."""
    if not axes:
        return [], Flattener([])
    accesses = [access for stage in stages for access in stage_accesses(stage)]
    best = len(axes) - 1
    for start in range(len(axes) - 2, -1, -1):
        candidate = axes[start:]
        if not all(has_only_loads_as_users(stage.value, candidate) for stage in stages):
            break
        if not Flattener(candidate).is_linear(accesses):
            break
        best = start
    return axes[:best], Flattener(axes[best:])


def stage_accesses(stage: Stage) -> list[tuple[Any, Sequence[Expr]]]:
    """What a stage reads and, unless it reduces, writes, as pairs for :meth:`Flattener.is_linear`."""
    own = [] if stage.is_reduction else [(stage.buffer, stage.axes)]
    return [*own, *accesses_of(stage.value)]


def lanes_for(stage: Stage, machine: Machine) -> int:
    """Lanes for a stage: those of its widest element type, one for calls that have no vector form."""
    if any(name in _SCALAR_CALLS for name in calls_of(stage.value)):
        return 1
    wide = [axis for axis, extent in zip(stage.axes, stage.extents, strict=True) if int_value(extent) != 1]
    if dtype_of(stage.value) == "bfloat16" and wide and wide[-1] not in variables_of(stage.value):
        return 1  # TVM has no code for storing one bfloat16 to all lanes of a vector
    kinds = {str(stage.buffer.dtype), dtype_of(stage.value), *(str(a.source.dtype) for a in loads_of(stage.value))}
    if kinds == {"bool"}:
        return machine.lanes("int8")
    return min(machine.lanes(kind) for kind in kinds if kind != "bool")


def loop_kind(stages: Sequence[Stage], machine: Machine) -> str:
    """``parallel`` for loops with enough work for several threads, else ``serial``."""
    work = sum_work(stages)
    return "serial" if work is not None and work < machine.serial_work // 8 else "parallel"


def sum_work(stages: Sequence[Stage]) -> int | None:
    """Elements visited by all stages, or None when some extent is symbolic."""
    total = 0
    for stage in stages:
        work = int_value(product([*stage.extents, *(extent for _, extent in stage.reduce_axes)]))
        if work is None:
            return None
        total += work * (8 if any(name.startswith("tirx.") for name in calls_of(stage.value)) else 1)
    return total
