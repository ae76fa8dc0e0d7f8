"""Loops for reductions, and for stages that work on the same rows.

Stages that share their leading axes (softmax, layer norm, group norm, ...) become one loop over rows in which the
intermediate results of a row live in a small buffer.  Innermost axes are vectorised whenever some access is
contiguous along them, reductions included: those keep a vector of partial results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.sym import Analyzer, detect_linear_equation

from trimtab.backends.tvm.codegen.comparison import larger, smaller
from trimtab.backends.tvm.codegen.contraction import Axes, Flattener, accesses_of, has_only_loads_as_users
from trimtab.backends.tvm.codegen.elements import UNROLL, lanes_for, loop_kind, split_inner, stage_accesses
from trimtab.backends.tvm.codegen.expression import Expr, as_index, dtype_of, int_value, loads_of, rewrite
from trimtab.backends.tvm.codegen.loops import (
    Stmt,
    blocks,
    flat_offset,
    index,
    lanes_of,
    load,
    loop,
    scratch,
    sequence,
    store,
    vectors,
)
from trimtab.backends.tvm.codegen.machine import Machine
from trimtab.backends.tvm.codegen.program import Program, Stage
from trimtab.backends.tvm.codegen.vector_math import lowering_of


@dataclass
class RowGroup:
    """Stages computed row by row; the first ``depth`` axes of each are the row."""

    stages: list[Stage]
    depth: int


def group_stages(program: Program, stages: Sequence[Stage]) -> list[RowGroup]:
    """Split consecutive stages into groups that share leading axes."""
    groups: list[RowGroup] = []
    for stage in stages:
        if groups:
            joined = [*groups[-1].stages, stage]
            depth = shared_depth(program, joined)
            if depth >= 1 and _reads_any(stage, groups[-1].stages):
                groups[-1] = RowGroup(joined, depth)
                continue
        groups.append(RowGroup([stage], 0))
    return groups


def _reads_any(stage: Stage, others: Sequence[Stage]) -> bool:
    return any(access.source.same_as(other.buffer) for access in loads_of(stage.value) for other in others)


def share_all_axes(program: Program, stages: Sequence[Stage]) -> bool:
    """Whether all stages run over the same axes and read each other at their own index."""
    ranks = {len(stage.axes) for stage in stages}
    return len(ranks) == 1 and (len(stages) == 1 or shared_depth(program, stages) == max(ranks))


def shared_depth(program: Program, stages: Sequence[Stage]) -> int:
    """How many leading axes all stages and all accesses to their intermediate results have in common."""
    depth = min(len(stage.axes) for stage in stages)
    first = stages[0]
    for stage in stages[1:]:
        for position in range(depth):
            if not Analyzer().can_prove_equal(as_index(stage.extents[position]), as_index(first.extents[position])):
                depth = position
                break
    written = [stage.buffer for stage in stages]
    for stage in stages:
        for access in loads_of(stage.value):
            if any(access.source.same_as(buffer) for buffer in written):
                agreeing = 0
                for position, axis in zip(access.indices, stage.axes, strict=False):
                    if not position.same_as(axis):
                        break
                    agreeing += 1
                # A unit axis is addressed by a constant instead of by its variable.
                while agreeing < min(len(access.indices), depth) and int_value(stage.extents[agreeing]) == 1:
                    agreeing += 1
                depth = min(depth, agreeing)
    return depth


class RowKernel:
    """Generates the loops of one group.

    Args:
        machine: vector width and threads.
        group: the stages.
        local: buffers of the group that nothing outside reads; they shrink to one row.
    """

    def __init__(self, machine: Machine, group: RowGroup, local: Sequence[Any]) -> None:
        self.machine = machine
        self.group = group
        self.local = list(local)

    def generate(self) -> Stmt:
        stages, depth = self.group.stages, self._depth()
        row_axes = [Flattener(list(zip(s.axes[:depth], s.extents[:depth], strict=True))) for s in stages]
        linear = all(
            axes.is_linear([a for a in stage_accesses(stage) if not self._is_local(a[0])])
            and has_only_loads_as_users(stage.value, axes.axes)
            for axes, stage in zip(row_axes, stages, strict=True)
        )
        count = row_axes[0].extent

        def row(flat: Expr) -> Stmt:
            def with_scratch(position: int, table: list[tuple[Any, Any]]) -> Stmt:
                if position == len(self.local):
                    return sequence(
                        *(
                            self._stage(s, f.at(flat, linear), depth, table)
                            for s, f in zip(stages, row_axes, strict=True)
                        )
                    )
                buffer = self.local[position]
                shape = [as_index(extent) for extent in buffer.shape[depth:]] or [index(1)]
                return scratch(
                    shape,
                    str(buffer.dtype),
                    lambda b: with_scratch(position + 1, [*table, (buffer, b)]),
                    "row_" + buffer.name,
                )

            return with_scratch(0, [])

        return loop(count, row, loop_kind(stages, self.machine), "row")

    def _depth(self) -> int:
        """How many axes make the row."""
        stages = self.group.stages
        depth = self.group.depth if len(stages) > 1 else len(stages[0].axes)
        # Keep the innermost axis inside the row when the operands are contiguous along it, not along a reduction.
        across = (s for s in stages if s.is_reduction and len(s.axes) == depth)
        return depth - any(depth and not self._vectorises_reduction(s, s.axes[-1:]) for s in across)

    def _stage(self, stage: Stage, row: dict[Any, Expr], depth: int, table: list[tuple[Any, Any]]) -> Stmt:
        rest = list(zip(stage.axes[depth:], stage.extents[depth:], strict=True))

        def redirect(buffer: Any, indices: list[Expr]) -> Expr | None:
            for full, small in table:
                if buffer.same_as(full):
                    return tirx.BufferLoad(small, indices[depth:] or [index(0)])
            return None

        def value(axes: dict[Any, Expr]) -> Expr:
            return rewrite(stage.value, {**row, **axes}, redirect, lowering_of(stage.value))

        def write(axes: dict[Any, Expr], result: Expr) -> Stmt:
            inner = [axes[axis] for axis, _ in rest]
            for full, small in table:
                if stage.buffer.same_as(full):
                    return store(small, inner or [index(0)], result)
            return store(stage.buffer, [*(row[axis] for axis in stage.axes[:depth]), *inner], result)

        if stage.is_reduction:
            return self._reduction(stage, rest, value, write)
        outer, inner = split_inner([stage], rest)
        lanes = lanes_for(stage, self.machine)

        def innermost(axes: dict[Any, Expr]) -> Stmt:
            if not inner.axes:
                return write(axes, value(axes))

            def at(flat: Expr) -> Stmt:
                point = {**axes, **inner.at(flat, linear=True)}
                return write(point, value(point))

            return vectors(inner.extent, lanes, at)

        return self._nest(outer, innermost)

    def _reduction(
        self,
        stage: Stage,
        rest: Axes,
        value: Callable[[dict[Any, Expr]], Expr],
        write: Callable[[dict[Any, Expr], Expr], Stmt],
    ) -> Stmt:
        dtype = dtype_of(stage.value)
        lanes = lanes_for(stage, self.machine)
        if rest and not self._vectorises_reduction(stage, [axis for axis, _ in rest]):
            outer, (inner, extent) = rest[:-1], rest[-1]

            def columns(axes: dict[Any, Expr]) -> Stmt:
                def block(start: Expr, width: int) -> Stmt:
                    return self._accumulate_columns(stage, {**axes}, inner, start, width, dtype, value, write)

                return blocks(extent, lanes, block)

            return self._nest(outer, columns)

        def total(axes: dict[Any, Expr]) -> Stmt:
            return self._accumulate_depth(stage, axes, dtype, lanes, value, write)

        return self._nest(rest, total)

    def _accumulate_columns(
        self,
        stage: Stage,
        axes: dict[Any, Expr],
        inner: Any,
        start: Expr,
        width: int,
        dtype: str,
        value: Any,
        write: Any,
    ) -> Stmt:
        """A vector of results: reduction loops outside, lanes inside."""

        def with_acc(acc: Any) -> Stmt:
            def update(reduced: dict[Any, Expr]) -> Stmt:
                def lane_update(lane: Expr) -> Stmt:
                    operand = value({**axes, inner: start + lane, **reduced})
                    return store(acc, [lane], combine(stage.combine, load(acc, lane), operand))

                return loop(width, lane_update, "vectorized", "lane")

            return sequence(
                loop(width, lambda lane: store(acc, [lane], stage.init), "vectorized", "lane"),
                self._nest(stage.reduce_axes, update),
                loop(width, lambda lane: write({**axes, inner: start + lane}, load(acc, lane)), "vectorized", "lane"),
            )

        return scratch([width], dtype, with_acc, "acc")

    def _accumulate_depth(
        self, stage: Stage, axes: dict[Any, Expr], dtype: str, lanes: int, value: Any, write: Any
    ) -> Stmt:
        """One result: lanes run along the innermost reduction axes and are combined at the end."""
        outer, inner = self._split_reduce(stage)
        known = int_value(inner.extent)
        width = lanes * UNROLL
        if known is not None:
            while width > max(1, known):
                width //= 2
        neutral = identity(stage.combine, dtype)

        def block(acc: Any, reduced: dict[Any, Expr], start: Expr, first: Expr | None, width: int) -> Stmt:
            def update(slot: Expr) -> Stmt:
                operand = value({**axes, **reduced, **inner.at(start + slot, linear=True)})
                if first is not None and stage.combine in ("add", "mul"):
                    operand = tirx.Select(start + slot >= first, operand, neutral)
                return store(acc, [slot], combine(stage.combine, load(acc, slot), operand))

            return _chunks(width, lanes, update)

        def walk(acc: Any, width: int) -> Stmt:
            def run(reduced: dict[Any, Expr]) -> Stmt:
                if known is not None:
                    full, rest = divmod(known, width)
                    main = loop(full, lambda i: block(acc, reduced, i * index(width), None, width), name="block")
                    last = block(acc, reduced, index(known - width), index(full * width), width) if rest else None
                    return sequence(main, last)
                extent = inner.extent
                full = tirx.floordiv(extent, index(width))
                main = loop(full, lambda i: block(acc, reduced, i * index(width), None, width), name="block")
                rest = loop(
                    extent - full * index(width),
                    lambda i: block(acc, reduced, full * index(width) + i, None, 1),
                    name="element",
                )
                return sequence(main, rest)

            return self._nest(outer, run)

        def with_acc(acc: Any) -> Stmt:
            in_one_step = min(lanes, width) if stage.combine == "add" and dtype in ("int32", "int64") else 1
            folds, size = [], width
            while size > in_one_step:
                size //= 2
                folds.append(self._fold(stage.combine, acc, size, lanes))
            fill = _chunks(width, lanes, lambda slot: store(acc, [slot], neutral))
            total = _lane_sum(acc, in_one_step)
            result = combine(stage.combine, stage.init, total)
            if getattr(stage.init, "value", None) == getattr(neutral, "value", 1):
                result = total
            return sequence(fill, walk(acc, width), *folds, write(axes, result))

        return scratch([width], dtype, with_acc, "acc")

    def _fold(self, kind: str, acc: Any, half: int, lanes: int) -> Stmt:
        """Combine the upper ``half`` partial results into the lower ones."""
        return _chunks(
            half, lanes, lambda slot: store(acc, [slot], combine(kind, load(acc, slot), load(acc, slot + index(half))))
        )

    def _split_reduce(self, stage: Stage) -> tuple[Axes, Flattener]:
        axes = [axis for axis in stage.reduce_axes if int_value(axis[1]) != 1] or stage.reduce_axes[-1:]
        outer, inner = split_inner([stage], axes)
        units = [axis for axis in stage.reduce_axes if all(axis[0] is not a for a, _ in axes)]
        return [*units, *outer], inner

    def _vectorises_reduction(self, stage: Stage, spatial: Sequence[Any]) -> bool:
        """Whether operands are contiguous along the innermost reduction axis rather than along the last spatial one."""
        reduce_axes = [axis for axis, extent in stage.reduce_axes if int_value(extent) != 1]
        if not reduce_axes:
            return False
        if not spatial:
            return True
        return self._contiguous(stage, reduce_axes[-1]) >= max(1, self._contiguous(stage, spatial[-1]))

    def _contiguous(self, stage: Stage, axis: Any) -> int:
        count = 0
        for buffer, indices in accesses_of(stage.value):
            found = list(detect_linear_equation(Analyzer().simplify(flat_offset(buffer.shape, indices)), [axis]))
            count += len(found) == 2 and int_value(found[0]) == 1
        return count

    def _is_local(self, buffer: Any) -> bool:
        return any(buffer.same_as(other) for other in self.local)

    def _nest(self, axes: Axes, body: Callable[[dict[Any, Expr]], Stmt]) -> Stmt:
        def level(position: int, values: dict[Any, Expr]) -> Stmt:
            if position == len(axes):
                return body(values)
            axis, extent = axes[position]
            return loop(extent, lambda v: level(position + 1, {**values, axis: v}), name="r")

        return level(0, {})


def _chunks(width: int, lanes: int, body: Callable[[Expr], Stmt]) -> Stmt:
    """``body`` at ``0 .. width - 1`` as vector operations of at most ``lanes``, both powers of two."""
    step = min(lanes, width)
    return sequence(*(lanes_of(index(begin), step, body) for begin in range(0, width, step)))


def _lane_sum(acc: Any, lanes: int) -> Expr:
    """The sum of the first ``lanes`` integers of ``acc``.

    LLVM's own reduction, since halves added by hand to products of bytes meet a defect of LLVM 22 for x86: it takes
    them for one vpdpbusd and drops the sum of the four lanes that are left.
    """
    if lanes == 1:
        return load(acc, index(0))
    vector = tirx.BufferLoad(acc, [tirx.Ramp(index(0), index(1), lanes)])
    return tirx.call_llvm_pure_intrin(str(acc.dtype), "llvm.vector.reduce.add", vector)


def combine(kind: str, a: Expr, b: Expr) -> Expr:
    """One reduction step. ``max`` and ``min`` of floats return NaN when either operand is NaN, as torch does."""
    if kind == "add":
        return a + b
    if kind == "mul":
        return a * b
    return larger(a, b) if kind == "max" else smaller(a, b)


def identity(kind: str, dtype: str) -> Expr:
    """The neutral element of a reduction."""
    if kind in ("add", "mul"):
        return tirx.const(0 if kind == "add" else 1, dtype)
    if "float" in dtype and dtype != "bfloat16":
        return tirx.const(float("-inf") if kind == "max" else float("inf"), dtype)
    return tirx.min_value(dtype) if kind == "max" else tirx.max_value(dtype)
