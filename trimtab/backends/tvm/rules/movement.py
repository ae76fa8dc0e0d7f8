"""Ops that move elements: every result element is one operand element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx

from trimtab.backends.tvm.rules.registry import Expr, Operand, Scope, compute, const, i64, lowers
from trimtab.ir import ops


@lowers(ops.Reshape)
def _reshape(op: Any, scope: Scope, x: Operand) -> Any:
    """Only reached where the emitter cannot use a view: of constants, and of tensors without elements."""
    if 0 in op.shape:
        return compute(scope.shape(op.shape), lambda *i: const(0, x.dtype), "reshape")
    return compute(scope.shape(op.result.type.shape), lambda *i: unflatten_read(x, i, scope.shape(op.result.type.shape)), "reshape")


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

    def element(*indices: Expr) -> Expr:
        return x(*(tirx.floormod(i - i64(shifts[a]), x.shape[a]) if a in shifts else i for a, i in enumerate(indices)))

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
    # A constant pad keeps one test per element; the other modes fold the position back into the tensor.
    def element(*indices: Expr) -> Expr:
        inside, source = None, []
        for axis, (index, extent) in enumerate(zip(indices, x.shape, strict=True)):
            low, high = op.before[axis], op.after[axis]
            if not low and not high:
                source.append(index)
                continue
            at = index - i64(low)
            source.append(_fold(op.mode, at, extent))
            test = tirx.And(at >= i64(0), at < extent)
            inside = test if inside is None else tirx.And(inside, test)
        value = x(*source)
        if op.mode != "constant" or inside is None:
            return value
        fill = bool(op.value) if x.dtype == "bool" else float(op.value) if op.x.type.dtype.is_floating else int(op.value)
        return tirx.Select(inside, value, const(fill, x.dtype))

    return compute(scope.shape(op.result.type.shape), element, "pad")


def _fold(mode: str, at: Expr, size: Expr) -> Expr:
    """A position outside ``0 .. size - 1`` brought inside; clamped for constant pads, whose value is not used."""
    if mode in ("constant", "edge"):
        return tirx.max(i64(0), tirx.min(at, size - i64(1)))
    if mode == "wrap":
        return tirx.floormod(at, size)
    period = tirx.max(i64(1), i64(2) * (size - i64(1)))
    folded = tirx.floormod(at, period)
    return tirx.min(folded, period - folded) if mode == "reflect" else folded


@lowers(ops.Concat)
def _concat(op: Any, scope: Scope, values: list[Operand]) -> Any:
    starts: list[Expr] = [scope.dim(0)]
    for value in values[:-1]:
        starts.append(starts[-1] + value.shape[op.dim])

    def element(*indices: Expr) -> Expr:
        at = indices[op.dim]

        def read(position: int) -> Expr:
            source = list(indices)
            own = at - starts[position]
            # Clamped, because both arms of a select are computed.
            source[op.dim] = tirx.max(i64(0), tirx.min(own, values[position].shape[op.dim] - i64(1)))
            return values[position](*source)

        result = read(len(values) - 1)
        for position in range(len(values) - 2, -1, -1):
            result = tirx.Select(at < starts[position + 1], read(position), result)
        return result

    return compute(scope.shape(op.result.type.shape), element, "concat")
