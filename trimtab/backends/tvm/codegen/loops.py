"""Small constructors for TIR loops, scratch buffers and vector accesses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

from trimtab.backends.tvm.codegen.expression import Expr, as_index, hoist_lets, int_value, product, rewrite
from trimtab.backends.tvm.codegen.vector_rounding import divide_at_roundings, rounds
from trimtab.backends.tvm.microkernels import ROUNDED_TOGETHER

Stmt = Any
INDEX = "int64"


def index(value: int) -> Expr:
    return tirx.const(value, INDEX)


def nothing() -> Stmt:
    """A statement without effect."""
    return tirx.Evaluate(tirx.const(0, "int32"))


def sequence(*statements: Stmt | None) -> Stmt:
    """Statements in order; ``None`` entries are skipped, nested sequences flattened."""
    flat: list[Stmt] = []
    for statement in statements:
        if statement is None:
            continue
        flat += list(statement.seq) if isinstance(statement, tirx.SeqStmt) else [statement]
    return flat[0] if len(flat) == 1 else tirx.SeqStmt(flat)


def loop(
    extent: Expr | int,
    body: Callable[[Expr], Stmt],
    kind: str = "serial",
    name: str = "i",
) -> Stmt:
    """A loop from 0; extent 1 vanishes. ``kind`` is serial, parallel, vectorized or unrolled."""
    if int_value(extent) == 1:
        return body(index(0))
    if int_value(extent) == 0:
        return nothing()
    var = tirx.Var(name, INDEX)
    inner = body(var)
    if kind != "vectorized":
        return tirx.For(var, index(0), as_index(extent), getattr(tirx.ForKind, kind.upper()), inner)
    allocations, inner = _widen_temporaries(inner, var, extent)
    return sequence(*allocations, *_vector_operations(inner, var, extent))


def _vector_operations(body: Stmt, lane: Expr, width: Expr | int) -> list[Stmt]:
    """Vectorised loops that do ``body`` for every lane, and between them what is done by a call for all lanes."""

    def every_lane(statements: Sequence[Stmt]) -> Stmt:
        return tirx.For(lane, index(0), as_index(width), tirx.ForKind.VECTORIZED, sequence(*statements))

    statements = list(body.seq) if isinstance(body, tirx.SeqStmt) else [body]
    lanes = int_value(width)
    are_stores = all(isinstance(statement, tirx.BufferStore) for statement in statements)
    if lanes not in ROUNDED_TOGETHER or not are_stores or not rounds([statement.value for statement in statements]):
        return [every_lane(statements)]
    allocations, parts = divide_at_roundings(statements, lane, lanes)
    return [*allocations, *(every_lane(part) if isinstance(part, list) else part for part in parts)]


def parallel_nest(extents: Sequence[Expr], body: Callable[[list[Expr]], Stmt], kind: str = "parallel") -> Stmt:
    """One loop over all the axes of ``extents``."""

    def task(flat: Expr) -> Stmt:
        places: list[Expr] = []
        for extent in reversed(extents[1:]):
            places.insert(0, tirx.floormod(flat, as_index(extent)))
            flat = tirx.floordiv(flat, as_index(extent))
        return body([flat, *places] if extents else [])

    return loop(product(extents), task, kind, "task")


def _widen_temporaries(body: Stmt, lane: Expr, width: Expr | int) -> tuple[list[Stmt], Stmt]:
    """Give the one-element temporaries of a vectorised body one element a lane, allocated outside of it."""
    statements = list(body.seq) if isinstance(body, tirx.SeqStmt) else [body]
    wide: list[tuple[Any, Any]] = []
    for statement in statements:
        if isinstance(statement, tirx.AllocBuffer):
            narrow = statement.buffer
            wide.append((narrow, tirx.decl_buffer([as_index(width)], str(narrow.dtype), name=narrow.name)))
    if not wide:
        return [], body

    def widened(buffer: Any) -> Any:
        return next((w for n, w in wide if n.same_as(buffer)), None)

    def redirect(buffer: Any, indices: list[Expr]) -> Expr | None:
        found = widened(buffer)
        return None if found is None else tirx.BufferLoad(found, [lane])

    rewritten = []
    for statement in statements:
        if isinstance(statement, tirx.AllocBuffer):
            continue
        found = widened(statement.buffer)
        indices = [lane] if found is not None else [rewrite(i, load=redirect) for i in statement.indices]
        rewritten.append(tirx.BufferStore(found if found is not None else statement.buffer,
                                          rewrite(statement.value, load=redirect), indices))  # fmt: skip
    return [tirx.AllocBuffer(w) for _, w in wide], sequence(*rewritten)


def bind(value: Expr, body: Callable[[Expr], Stmt], name: str = "v") -> Stmt:
    """Compute ``value`` once before ``body``."""
    if int_value(value) is not None:
        return body(value)
    var = tirx.Var(name, value.ty)
    return sequence(tirx.Bind(var, value), body(var))


def bind_all(values: dict[Any, Expr], body: Callable[[dict[Any, Expr]], Stmt], name: str = "at") -> Stmt:
    """Name every value that is not constant, so that ``body`` may use it often; ``values`` maps axes to positions."""
    known = {axis: value for axis, value in values.items() if int_value(value) is not None}
    pending = [(axis, value) for axis, value in values.items() if axis not in known]

    def step(position: int, bound: dict[Any, Expr]) -> Stmt:
        if position == len(pending):
            return body(bound)
        axis, value = pending[position]
        return bind(value, lambda v: step(position + 1, {**bound, axis: v}), name)

    return step(0, known)


def scratch(shape: Sequence[Expr | int], dtype: str, body: Callable[[Any], Stmt], name: str = "scratch") -> Stmt:
    """Allocate a buffer that lives during ``body``.

    TVM puts constant sizes below 1 KB on the stack, where LLVM may turn them into registers, and larger ones into a
    per-thread pool. That holds for the global scope only: buffers of "local" scope always come from the pool.
    """
    buffer = tirx.decl_buffer([as_index(extent) for extent in shape], dtype, name=name, data_alignment=64)
    return sequence(tirx.AllocBuffer(buffer), body(buffer))


def store(buffer: Any, indices: Sequence[Expr], value: Expr) -> Stmt:
    """Write one element; let expressions in the value become temporaries filled before it.

    Not let statements: TVM's simplifier substitutes those back, in time exponential in their number.
    """
    bindings, plain = hoist_lets(value)
    table: dict[Any, Expr] = {}
    parts: list[Stmt] = []
    for var, bound in bindings:
        buffer_of = tirx.decl_buffer([index(1)], str(var.ty.dtype), name=var.name)
        parts += [tirx.AllocBuffer(buffer_of), tirx.BufferStore(buffer_of, rewrite(bound, table), [index(0)])]
        table[var] = tirx.BufferLoad(buffer_of, [index(0)])
    return sequence(*parts, tirx.BufferStore(buffer, rewrite(plain, table) if table else plain, list(indices)))


def load(buffer: Any, *indices: Expr) -> Expr:
    return tirx.BufferLoad(buffer, list(indices))


def minimum(a: Expr, b: Expr) -> Expr:
    return tirx.min(a, b)


def zero(dtype: str) -> Expr:
    return tirx.const(0, dtype)


def ceil_div(a: Expr | int, b: int) -> Expr:
    value = int_value(a)
    if value is not None:
        return index(-(-value // b))
    return tirx.floordiv(as_index(a) + index(b - 1), index(b))


def floor_div(a: Expr | int, b: int) -> Expr:
    value = int_value(a)
    return index(value // b) if value is not None else tirx.floordiv(as_index(a), index(b))


def divide(a: Expr, b: Expr) -> tuple[Expr, Expr]:
    """Quotient and remainder of two indices, ``b`` positive.

    By an unknown ``b``, the division is the one that truncates, as neither is negative. TVM does not know that, and
    turns the other one into a let expression, on which its simplifier fails when it meets it in two branches.
    """
    if int_value(b) is None:
        return tirx.Div(a, b), tirx.Mod(a, b)
    return tirx.floordiv(a, b), tirx.floormod(a, b)


def vectors(extent: Expr | int, lanes: int, body: Callable[[Expr], Stmt]) -> Stmt:
    """Apply ``body`` to every index below ``extent``, ``lanes`` at a time, as :func:`blocks` does."""
    return blocks(extent, lanes, lambda start, width: lanes_of(start, width, body))


def lanes_of(start: Expr, width: int, body: Callable[[Expr], Stmt]) -> Stmt:
    """``body`` at ``start .. start + width`` as one vector operation."""
    return loop(width, lambda lane: body(start + lane), "vectorized", "lane")


def blocks(extent: Expr | int, width: int, body: Callable[[Expr, int], Stmt]) -> Stmt:
    """Cover ``range(extent)`` with calls ``body(start, width)``.

    A remainder is done by a last block that ends at ``extent`` and overlaps the one before it, which is right for
    bodies that may run twice on an element.  Ranges shorter than a block use narrower ones; ranges of unknown length
    shorter than a block go element by element.
    """
    known = int_value(extent)
    if known == 0:
        return nothing()
    if known is not None:
        if known < width:
            width = 1 << (known.bit_length() - 1)
        full, rest = divmod(known, width)
        main = loop(full, lambda i: body(i * index(width), width), name="block")
        return sequence(main, body(index(known - width), width) if rest else None)
    extent = as_index(extent)
    overlapped = loop(
        ceil_div(extent, width),
        lambda i: bind(minimum(i * index(width), extent - index(width)), lambda start: body(start, width), "start"),
        name="block",
    )
    return tirx.IfThenElse(extent >= index(width), overlapped, loop(extent, lambda i: body(i, 1), name="element"))


def disjoint_vectors(extent: Expr | int, lanes: int, body: Callable[[Expr], Stmt]) -> Stmt:
    """Apply ``body`` to every index below ``extent`` exactly once, as bodies that add to what is there need it."""
    full = floor_div(extent, lanes)
    main = loop(full, lambda i: lanes_of(i * index(lanes), lanes, body), name="block")
    known = int_value(extent)
    if known is None:
        done = full * index(lanes)
        return sequence(main, loop(as_index(extent) - done, lambda i: body(done + i), name="element"))
    parts, start = [main], known - known % lanes
    while start < known:
        width = 1 << ((known - start).bit_length() - 1)
        parts.append(lanes_of(index(start), width, body))
        start += width
    return sequence(*parts)


def flat_offset(shape: Sequence[Expr], indices: Sequence[Expr]) -> Expr:
    """Row-major position of ``indices`` in a buffer of ``shape``."""
    total: Expr = index(0)
    for extent, position in zip(shape, indices, strict=True):
        total = total * as_index(extent) + as_index(position)
    return total
