"""Ops that write at positions given by data.

Writes outside of a tensor are dropped.  Two writes may hit one place of the result, and happen in the order of the
indices then: results are the same with any number of threads, because tasks share only axes along which nothing can
collide, those of the batch and the innermost one.  Each task copies its part of the tensor, then writes into it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from trimtab.backends.tvm.codegen.expression import int_value, product
from trimtab.backends.tvm.codegen.loops import (
    Stmt,
    bind,
    disjoint_vectors,
    index,
    loop,
    nothing,
    parallel_nest,
    sequence,
    vectors,
)
from trimtab.backends.tvm.codegen.machine import Machine
from trimtab.backends.tvm.codegen.rows import combine
from trimtab.backends.tvm.rules.registry import Expr, Operand, Scope, Target, cast, i64, loops_for, work_type
from trimtab.ir import ops

At = list[Expr]
_TASKS = 2
"""Parts of the innermost axis for each thread, where the batch is not known to keep all threads busy."""


@loops_for(ops.Scatter, broadcasts=("indices", "updates"))
def _scatter(op: Any, scope: Scope, outs: list[Target], x: Operand, indices: Operand, updates: Operand) -> Stmt:
    dim, last = op.dim, x.rank - 1

    def positions(at: At) -> dict[int, Expr]:
        return {dim: indices.broadcast(at)}

    def target(at: At, places: dict[int, Expr]) -> At:
        return [places.get(axis, own) for axis, own in enumerate(at)]

    extents = scope.shape(op.indices.type.shape)
    by_rows = dim != last and not _varies_innermost(indices)
    writes = _Writes(
        scope.machine, outs[0], x, updates, op.reduce, extents, dim, dim != last, by_rows, positions, target
    )
    return writes.generate()


@loops_for(ops.IndexPut)
def _index_put(op: Any, scope: Scope, outs: list[Target], x: Operand, indices: list[Operand], updates: Operand) -> Stmt:
    rank = max(operand.rank for operand in indices)
    common: list[Expr] = []
    for axis in range(rank):
        sizes = [o for o in indices if o.rank >= rank - axis]
        # Of the extents that broadcast along this axis the one that is not 1 counts.
        best = next((o for o in sizes if o.type.shape[axis - rank] != 1), sizes[0])
        common.append(best.shape[axis - rank])

    def positions(at: At) -> dict[int, Expr]:
        return {axis: operand.broadcast(at[:rank]) for axis, operand in enumerate(indices)}

    def target(at: At, places: dict[int, Expr]) -> At:
        return [*places.values(), *at[rank:]]

    extents, reduce = [*common, *x.shape[len(indices) :]], "add" if op.accumulate else "none"
    by_rows = len(indices) < x.rank
    return _Writes(
        scope.machine, outs[0], x, updates, reduce, extents, 0, by_rows, by_rows, positions, target
    ).generate()


@dataclass(frozen=True)
class _Writes:
    """The elements of ``updates`` written into a copy of ``x``, in the order of loops of ``extents``.

    Attributes:
        reduce: how an element is combined with the one at its place, as in ``Scatter``.
        batch: how many leading loops go over the leading axes of the result themselves.
        innermost: whether the last loop goes over the last axis of the result itself.
        by_rows: whether, besides, the positions are the same all along that loop.
        positions: from the loops' variables to the index along each axis of the result that is given by data.
        target: from the loops' variables and the places along those axes to the indices of the result.
    """

    machine: Machine
    out: Target
    x: Operand
    updates: Operand
    reduce: str
    extents: list[Expr]
    batch: int
    innermost: bool
    by_rows: bool
    positions: Callable[[At], dict[int, Expr]]
    target: Callable[[At, dict[int, Expr]], At]

    def generate(self) -> Stmt:
        shape = self.out.shape
        if not self.batch and not self.innermost:
            return sequence(parallel_nest(shape[:-1], self._copy_row, self._kind()), self._write([], index(0), None))
        parts = self._parts()
        width = shape[-1] if parts == 1 else index(int(int_value(shape[-1]) or 0) // parts)
        inner = shape[self.batch : -1]

        def task(at: At) -> Stmt:
            *batch, part = at
            first = part * width

            def copy(row: At) -> Stmt:
                return vectors(width, self._lanes(), lambda i: self._copy([*batch, *row, first + i]))

            if not self.innermost:
                return sequence(
                    _nest(inner, lambda row: self._copy_row([*batch, *row])), self._write(batch, first, None)
                )
            return sequence(_nest(inner, copy), self._write(batch, first, width))

        return parallel_nest([*shape[: self.batch], index(parts)], task, self._kind())

    def _parts(self) -> int:
        """How many parts the innermost axis is divided into, so that all threads have tasks."""
        columns, tasks = int_value(self.out.shape[-1]), int_value(product(self.out.shape[: self.batch]))
        wanted = _TASKS * self.machine.threads // (tasks if self.batch and tasks else 1)
        if not self.innermost or columns is None or int_value(self.extents[-1]) != columns:
            return 1
        return max((n for n in range(1, wanted + 1) if columns % (n * self._lanes()) == 0), default=1)

    def _write(self, batch: At, first: Expr, width: Expr | None) -> Stmt:
        """The writes of one task: of its part of the last loop, or of all of it where it goes over indices too."""
        inside = [at < extent for at, extent, size in zip(batch, self.extents, self.out.shape, strict=False)
                  if int_value(extent) is None or int_value(extent) != int_value(size)]  # fmt: skip
        rows = self.extents[self.batch : len(self.extents) - self.innermost]
        # Fewer updates than the result has elements along the axis: then it is not divided.
        columns = width if self._parts() > 1 else self.extents[-1]

        def row(at: At) -> Stmt:
            before = [*batch, *at]
            if not self.innermost:
                return self._at_places(before, lambda places: self._store(before, places))
            if not self.by_rows:

                def element(i: Expr) -> Stmt:
                    here = [*before, first + i]
                    return self._at_places(here, lambda places: self._store(here, places))

                return loop(columns, element, name="column")

            def whole(places: dict[int, Expr]) -> Stmt:
                return disjoint_vectors(columns, self._lanes(), lambda i: self._store([*before, first + i], places))

            return self._at_places([*before, first], whole)

        writes = _nest(rows, row)
        return tirx.IfThenElse(_all(inside), writes, None) if inside else writes

    def _at_places(self, at: At, body: Callable[[dict[int, Expr]], Stmt]) -> Stmt:
        """``body`` with the places that the data gives for ``at``, where these are inside of the result."""
        given = [(axis, cast(value, "int64")) for axis, value in self.positions(at).items()]

        def step(places: dict[int, Expr]) -> Stmt:
            if len(places) == len(given):
                tests = [tirx.And(p >= i64(0), p < self.out.shape[axis]) for axis, p in places.items()]
                return tirx.IfThenElse(_all(tests), body(places), None)
            axis, position = given[len(places)]
            return bind(position, lambda at: bind(tirx.Select(at < i64(0), at + self.out.shape[axis], at),
                                                  lambda p: step({**places, axis: p}), "place"), "index")  # fmt: skip

        return step({})

    def _store(self, at: At, places: dict[int, Expr]) -> Stmt:
        target = self.target(at, places)
        return self.out.store(target, _update(self.reduce, self.out.load(*target), self.updates.broadcast(at)))

    def _copy(self, at: At) -> Stmt:
        return self.out.store(at, self.x(*at))

    def _copy_row(self, row: At) -> Stmt:
        return vectors(self.out.shape[-1], self._lanes(), lambda i: self._copy([*row, i])) if self.x.rank else nothing()

    def _lanes(self) -> int:
        if self.out.dtype == "bfloat16" and not _varies_innermost(self.updates):
            return 1  # TVM has no code for storing one bfloat16 to all lanes of a vector
        return self.machine.lanes(work_type(self.out.dtype) if self.reduce != "none" else self.out.dtype)

    def _kind(self) -> str:
        """Parallel where there is enough work."""
        work = int_value(product([*self.out.shape]) + product(self.extents))
        return "serial" if work is not None and work < self.machine.serial_work // 8 else "parallel"


def _varies_innermost(operand: Operand) -> bool:
    """Whether an operand that is read by broadcasting differs along the innermost axis."""
    return operand.constant is None and operand.rank > 0 and operand.type.shape[-1] != 1


def _all(tests: Sequence[Expr]) -> Expr:
    first, *others = tests
    for test in others:
        first = tirx.And(first, test)
    return first


def _nest(extents: Sequence[Expr], body: Callable[[At], Stmt]) -> Stmt:
    def level(places: At) -> Stmt:
        if len(places) == len(extents):
            return body(places)
        return loop(extents[len(places)], lambda v: level([*places, v]), name="i")

    return level([])


def _update(kind: str, old: Expr, new: Expr) -> Expr:
    """An element of a scatter; half types are combined in float32."""
    work = work_type(str(old.ty.dtype))
    if kind == "none":
        return new
    if str(old.ty.dtype) == "bool":
        return tirx.Or(old, new) if kind in ("add", "amax") else tirx.And(old, new)
    names = {"amax": "max", "amin": "min"}
    return cast(combine(names.get(kind, kind), cast(old, work), cast(new, work)), str(old.ty.dtype))
