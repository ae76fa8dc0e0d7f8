"""Ops that move elements: every result element is one operand element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx

from trimtab.backends.tvm.codegen.expression import int_value, product
from trimtab.backends.tvm.codegen.loops import loop, nothing, sequence, vectors
from trimtab.backends.tvm.rules.registry import (
    Expr,
    Operand,
    Scope,
    Target,
    compute,
    const,
    guarded,
    i64,
    loops_for,
    lowers,
)
from trimtab.ir import ops


@lowers(ops.Reshape)
def _reshape(op: Any, scope: Scope, x: Operand) -> Any:
    """Only reached where the emitter cannot use a view: of constants, and of tensors without elements."""
    if 0 in op.shape:
        return compute(scope.shape(op.shape), lambda *i: const(0, x.dtype), "reshape")
    return compute(
        scope.shape(op.result.type.shape), lambda *i: unflatten_read(x, i, scope.shape(op.result.type.shape)), "reshape"
    )


def unflatten_read(x: Operand, indices: Sequence[Expr], shape: Sequence[Expr]) -> Expr:
    """The element of ``x`` at the row-major position of ``indices`` in ``shape``."""
    flat: Expr = i64(0)
    for index, extent in zip(indices, shape, strict=True):
        flat = flat * extent + index
    own: list[Expr] = []
    for extent in reversed(x.shape):
        own.insert(0, tirx.floormod(flat, extent))
        flat = tirx.floordiv(flat, extent)
    return x(*own)


@lowers(ops.Permute)
def _permute(op: Any, scope: Scope, x: Operand) -> Any:
    def element(*indices: Expr) -> Expr:
        source = [indices[0]] * len(indices) if indices else []
        for place, axis in enumerate(op.dims):
            source[axis] = indices[place]
        return x(*source)

    return compute(scope.shape(op.result.type.shape), element, "permute")


@lowers(ops.Expand)
def _expand(op: Any, scope: Scope, x: Operand) -> Any:
    return compute(scope.shape(op.shape), lambda *i: x.broadcast(i), "expand")


@lowers(ops.Slice)
def _slice(op: Any, scope: Scope, x: Operand) -> Any:
    start = scope.dim(op.start)

    def element(*indices: Expr) -> Expr:
        source = list(indices)
        source[op.dim] = indices[op.dim] * i64(op.step) + start
        return x(*source)

    return compute(scope.shape(op.result.type.shape), element, "slice")


@lowers(ops.Select)
def _select(op: Any, scope: Scope, x: Operand) -> Any:
    at = scope.dim(op.index)
    return compute(scope.shape(op.result.type.shape), lambda *i: x(*i[: op.dim], at, *i[op.dim :]), "select")


@lowers(ops.Split)
def _split(op: Any, scope: Scope, x: Operand) -> list[Any]:
    parts, start = [], scope.dim(0)
    for part, size in zip(op.results, op.sizes, strict=True):

        def element(*indices: Expr, begin: Expr = start) -> Expr:
            source = list(indices)
            source[op.dim] = indices[op.dim] + begin
            return x(*source)

        parts.append(compute(scope.shape(part.type.shape), element, "split"))
        start = start + scope.dim(size)
    return parts


@lowers(ops.Tile)
def _tile(op: Any, scope: Scope, x: Operand) -> Any:
    extra = len(op.repeats) - x.rank

    def element(*indices: Expr) -> Expr:
        return x(*(tirx.floormod(i, extent) for i, extent in zip(indices[extra:], x.shape, strict=True)))

    return compute(scope.shape(op.result.type.shape), element, "tile")


@lowers(ops.Flip)
def _flip(op: Any, scope: Scope, x: Operand) -> Any:
    def element(*indices: Expr) -> Expr:
        return x(*(x.shape[a] - i64(1) - i if a in op.dims else i for a, i in enumerate(indices)))

    return compute(x.shape, element, "flip")


@lowers(ops.Roll)
def _roll(op: Any, scope: Scope, x: Operand) -> Any:
    shifts: dict[int, int] = {}
    for shift, dim in zip(op.shifts, op.dims, strict=True):
        shifts[dim] = shifts.get(dim, 0) + shift

    # Not floormod(i - shift, extent): TVM merges two of those, of neighbouring axes, to a wrong index.
    def source(axis: int, i: Expr) -> Expr:
        if axis not in shifts:
            return i
        extent = x.shape[axis]
        shift = tirx.floormod(i64(shifts[axis]), extent)
        return i - shift + tirx.Select(i < shift, extent, i64(0))

    def element(*indices: Expr) -> Expr:
        return x(*(source(axis, i) for axis, i in enumerate(indices)))

    return compute(x.shape, element, "roll")


@lowers(ops.Tril, ops.Triu)
def _triangle(op: Any, scope: Scope, x: Operand) -> Any:
    def element(*indices: Expr) -> Expr:
        row, column = indices[-2], indices[-1]
        limit = row + i64(op.diagonal)
        keep = column <= limit if isinstance(op, ops.Tril) else column >= limit
        return tirx.Select(keep, x(*indices), const(0, x.dtype))

    return compute(x.shape, element, op.name)


@lowers(ops.Pad)
def _pad(op: Any, scope: Scope, x: Operand) -> Any:
    axes = [axis for axis in range(x.rank) if op.before[axis] or op.after[axis]]

    def element(*indices: Expr) -> Expr:
        places = [indices[axis] - i64(op.before[axis]) for axis in axes]

        def read(at: Sequence[Expr]) -> Expr:
            source = list(indices)
            for axis, place in zip(axes, at, strict=True):
                source[axis] = place
            return x(*source)

        if not axes:
            return x(*indices)
        if op.mode != "constant":
            return read([_fold(op.mode, place, x.shape[axis]) for axis, place in zip(axes, places, strict=True)])
        fill = (
            bool(op.value) if x.dtype == "bool" else float(op.value) if op.x.type.dtype.is_floating else int(op.value)
        )
        return guarded(places, [x.shape[axis] for axis in axes], read, const(fill, x.dtype))

    return compute(scope.shape(op.result.type.shape), element, "pad")


def _fold(mode: str, at: Expr, size: Expr) -> Expr:
    """A position outside ``0 .. size - 1`` brought inside."""
    if mode == "edge":
        return tirx.max(i64(0), tirx.min(at, size - i64(1)))
    if mode == "wrap":
        return tirx.floormod(at, size)
    period = tirx.max(i64(1), i64(2) * (size - i64(1)))
    folded = tirx.floormod(at, period)
    return tirx.min(folded, period - folded) if mode == "reflect" else folded


@loops_for(ops.Concat)
def _concat(op: Any, scope: Scope, outs: list[Target], values: list[Operand]) -> Any:
    """One copy loop per part."""
    (out,) = outs
    parts, start = [], scope.dim(0)
    for value in values:
        if 0 not in value.type.shape:
            parts.append(_copy_part(scope, out, value, op.dim, start))
        start = start + value.shape[op.dim]
    return sequence(*parts) if parts else nothing()


def _copy_part(scope: Scope, out: Target, value: Operand, dim: int, start: Expr) -> Any:
    # The axes from `dim` on are contiguous in a part and, shifted, in the result.
    rows, inner = product(value.shape[:dim]), product(value.shape[dim:])
    lanes = scope.machine.lanes(value.dtype)

    def at(indices: list[Expr], shift: Expr) -> list[Expr]:
        return [*indices[:dim], indices[dim] + shift, *indices[dim + 1 :]]

    def row(flat: Expr) -> Any:
        outer = unflatten(flat, value.shape[:dim])

        def element(position: Expr) -> Any:
            # All of the inner position goes to the last axis: the address is the same, and it needs no divisions.
            inside = [i64(0)] * (value.rank - dim - 1) + [position]
            return out.store(
                at([*outer, *inside], start) if value.rank - dim > 1 else [*outer, position + start],
                value(*outer, *inside),
            )

        return vectors(inner, lanes, element)

    size = int_value(rows * inner)
    small = size is not None and size < scope.machine.serial_work
    return loop(rows, row, "serial" if small else "parallel", "row")


def unflatten(flat: Expr, shape: Sequence[Expr]) -> list[Expr]:
    """Indices of the row-major position ``flat`` in ``shape``."""
    places: list[Expr] = []
    for position, extent in reversed(list(enumerate(shape))):
        places.insert(0, tirx.floormod(flat, extent) if position else flat)
        flat = tirx.floordiv(flat, extent)
    return places
