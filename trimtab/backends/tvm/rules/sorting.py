"""Scans, sorting and top-k, written as loops over one axis and parallel over the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

from trimtab.backends.tvm.codegen.comparison import is_float, is_nan, is_nonzero, sort_key
from trimtab.backends.tvm.codegen.elements import UNROLL
from trimtab.backends.tvm.codegen.expression import dtype_of, int_value
from trimtab.backends.tvm.codegen.loops import (
    Stmt,
    bind,
    blocks,
    index,
    lanes_of,
    load,
    loop,
    minimum,
    parallel_nest,
    scratch,
    sequence,
    store,
    vectors,
)
from trimtab.backends.tvm.rules.registry import Expr, Operand, Scope, Target, cast, const, i64, loops_for, work_type
from trimtab.ir import ops

At = Callable[[Expr], list[Expr]]
RANKED = 2048
"""Elements of the longest line that is sorted by counting, which compares each with each."""
INSERTED = 128
"""The most elements that are chosen by inserting one after the other."""


def _lines(x: Operand, dim: int, body: Callable[[At], Stmt]) -> Stmt:
    """Run ``body`` for every line along ``dim``, in parallel; it gets a function from position to full indices."""
    others = [extent for axis, extent in enumerate(x.shape) if axis != dim]
    return parallel_nest(others, lambda places: body(lambda at: [*places[:dim], at, *places[dim:]]))


@loops_for(ops.Cumsum)
def _cumsum(op: Any, scope: Scope, outs: list[Target], x: Operand) -> Stmt:
    (out,) = outs
    work = work_type(out.dtype)

    def sums(at: Callable[[Expr, Expr], list[Expr]], lanes: int, width: int) -> Stmt:
        """The running sums of ``width`` lines; ``at`` takes the position in a line and the number of the line."""

        def with_total(total: Any) -> Stmt:
            def step(i: Expr) -> Stmt:
                def add(slot: Expr) -> Stmt:
                    here = at(i, slot)
                    summand = x(*here)
                    if x.dtype == "bool":
                        summand = tirx.Select(is_nonzero(summand), const(1, work), const(0, work))
                    return sequence(
                        store(total, [slot], load(total, slot) + cast(summand, work)),
                        out.store(here, cast(load(total, slot), out.dtype)),
                    )

                return _chunks(width, lanes, add)

            start = _chunks(width, lanes, lambda slot: store(total, [slot], const(0, work)))
            return sequence(start, loop(x.shape[op.dim], step, name="i"))

        return scratch([width], work, with_total, "total")

    lanes = min(scope.machine.lanes(work), scope.machine.lanes(out.dtype), scope.machine.lanes(x.dtype))
    columns = int_value(x.shape[-1]) if op.dim < x.rank - 1 else None
    if columns is None or columns < lanes:
        return _lines(x, op.dim, lambda at: sums(lambda i, slot: at(i), 1, 1))
    # Neighbouring lines together; the last ones are done twice where their number is no multiple.
    width = lanes * max(n for n in (1, 2, 4) if n * lanes <= columns)
    count = -(-columns // width)
    before, between = x.shape[: op.dim], x.shape[op.dim + 1 : -1]

    def task(at: list[Expr]) -> Stmt:
        first = minimum(at[-1] * i64(width), i64(columns - width))
        outer, inner = at[: op.dim], at[op.dim : -1]
        return sums(lambda i, slot: [*outer, i, *inner, first + slot], lanes, width)

    return parallel_nest([*before, *between, i64(count)], task)


def _chunks(width: int, lanes: int, body: Callable[[Expr], Stmt]) -> Stmt:
    """``body`` at ``0 .. width - 1``, ``lanes`` at a time, with constant indices."""
    step = min(lanes, width)
    return sequence(*(lanes_of(index(begin), step, body) for begin in range(0, width, step)))


def _before(a: Expr, b: Expr, descending: bool, dtype: str) -> Expr:
    """Whether ``a`` sorts strictly before ``b``; NaN counts as larger than everything, as in torch."""
    if dtype == "bool":
        a, b = tirx.Cast("int8", a), tirx.Cast("int8", b)
    if not is_float(dtype):
        return a > b if descending else a < b
    a, b = cast(a, work_type(dtype)), cast(b, work_type(dtype))
    if descending:
        return tirx.Or(a > b, tirx.And(is_nan(a), tirx.Not(is_nan(b))))
    return tirx.Or(a < b, tirx.And(is_nan(b), tirx.Not(is_nan(a))))


@loops_for(ops.Sort)
def _sort(op: Any, scope: Scope, outs: list[Target], x: Operand) -> Stmt:
    size = int_value(x.shape[op.dim])
    if size is not None and size <= RANKED:
        return _by_ranks(scope, outs, x, op.dim, size, size, op.descending)
    return _by_merging(outs, x, op.dim, x.shape[op.dim], op.descending)


@loops_for(ops.Topk)
def _topk(op: Any, scope: Scope, outs: list[Target], x: Operand) -> Stmt:
    size = int_value(x.shape[op.dim])
    # Counting compares with a vector of elements at a time, insertion with each of the best so far.
    if size is not None and size <= min(RANKED, op.k * scope.machine.lanes("float32")):
        return _by_ranks(scope, outs, x, op.dim, size, op.k, op.largest)
    if op.k > INSERTED:
        return _by_merging(outs, x, op.dim, i64(op.k), op.largest)
    return _by_insertion(outs, x, op.dim, op.k, op.largest)


def _by_ranks(scope: Scope, outs: Sequence[Target], x: Operand, dim: int, size: int, k: int, descending: bool) -> Stmt:
    """The place of an element is the number of those before it, counted for vectors of elements at a time."""
    values, indices = outs
    kind = dtype_of(_key(x, [i64(0)] * x.rank))
    count_type = kind.removeprefix("u")
    lanes = scope.machine.lanes(kind)

    def line(at: At) -> Stmt:
        def count(keys: Any, ranks: Any) -> Callable[[Expr, int], Stmt]:
            def block(first: Expr, width: int) -> Stmt:
                def with_counts(counts: Any) -> Stmt:
                    def against(j: Expr, is_before: Callable[[Expr, Expr, Expr], Expr]) -> Stmt:
                        def step(slot: Expr) -> Stmt:
                            test = is_before(load(keys, j), load(keys, first + slot), slot)
                            return store(counts, [slot], load(counts, slot) + tirx.Cast(count_type, test))

                        return _chunks(width, lanes, step)

                    def strictly(other: Expr, own: Expr, slot: Expr) -> Expr:
                        return other > own if descending else other < own

                    def or_equal(other: Expr, own: Expr, slot: Expr) -> Expr:
                        return other >= own if descending else other <= own

                    def in_block(n: Expr) -> Stmt:
                        def test(other: Expr, own: Expr, slot: Expr) -> Expr:
                            earlier = tirx.Cast("int32", n) < tirx.Cast("int32", slot)
                            return tirx.Or(strictly(other, own, slot), tirx.And(tirx.EQ(other, own), earlier))

                        return against(first + n, test)

                    after = first + i64(width)
                    return sequence(
                        _chunks(width, lanes, lambda slot: store(counts, [slot], const(0, count_type))),
                        loop(first, lambda j: against(j, or_equal), name="before"),
                        loop(width, in_block, name="within"),
                        loop(i64(size) - after, lambda j: against(after + j, strictly), name="after"),
                        _chunks(width, lanes, lambda slot: store(ranks, [first + slot], load(counts, slot))),
                    )

                return scratch([width], count_type, with_counts, "counts")

            return block

        def rank(keys: Any, ranks: Any) -> Stmt:
            def place(i: Expr) -> Stmt:
                def put(to: Expr) -> Stmt:
                    stores = sequence(values.store(at(to), x(*at(i))), indices.store(at(to), i))
                    return stores if k == size else tirx.IfThenElse(to < i64(k), stores, None)

                return bind(tirx.Cast("int64", load(ranks, i)), put, "to")

            return sequence(
                vectors(size, lanes if dim == x.rank - 1 else 1, lambda i: store(keys, [i], _key(x, at(i)))),
                blocks(size, lanes * UNROLL, count(keys, ranks)),
                loop(size, place, name="i"),
            )

        return scratch(
            [size], kind, lambda keys: scratch([size], count_type, lambda ranks: rank(keys, ranks), "ranks"), "keys"
        )

    return _lines(x, dim, line)


def _key(x: Operand, at: Sequence[Expr]) -> Expr:
    return sort_key(cast(x(*at), work_type(x.dtype)))


def _by_merging(outs: Sequence[Target], x: Operand, dim: int, count: Expr, descending: bool) -> Stmt:
    """The first ``count`` of a bottom-up merge sort of positions: stable, n log n, between two scratch buffers."""
    values, indices = outs
    size = x.shape[dim]

    def line(at: At) -> Stmt:
        def sort(order: Any, spare: Any, width: Any) -> Stmt:
            def merge_all() -> Stmt:
                span = load(width, index(0))
                pairs = tirx.floordiv(size + span * i64(2) - i64(1), span * i64(2))
                return sequence(
                    loop(pairs, lambda p: _merge(descending, x, at, size, order, spare, span, p), name="pair"),
                    loop(size, lambda i: store(order, [i], load(spare, i)), name="i"),
                    store(width, [index(0)], span * i64(2)),
                )

            return sequence(
                loop(size, lambda i: store(order, [i], i), name="i"),
                store(width, [index(0)], i64(1)),
                tirx.While(load(width, index(0)) < size, merge_all()),
                loop(count, lambda i: sequence(
                    values.store(at(i), x(*at(load(order, i)))), indices.store(at(i), load(order, i))), name="i"),
            )  # fmt: skip

        return scratch([size], "int64", lambda order: scratch(
            [size], "int64", lambda spare: scratch([1], "int64", lambda width: sort(order, spare, width), "width"),
            "spare"), "order")  # fmt: skip

    return _lines(x, dim, line)


def _merge(descending: bool, x: Operand, at: At, size: Expr, order: Any, spare: Any, span: Expr, pair: Expr) -> Stmt:
    """Merge the runs ``[begin, middle)`` and ``[middle, end)`` of ``order`` into ``spare``."""

    def run(begin: Expr) -> Stmt:
        middle, end = minimum(begin + span, size), minimum(begin + span * i64(2), size)

        def merge(heads: Any) -> Stmt:
            left, right = load(heads, index(0)), load(heads, index(1))

            def step(i: Expr) -> Stmt:
                last = size - i64(1)
                first, second = load(order, minimum(left, last)), load(order, minimum(right, last))
                later = _before(x(*at(second)), x(*at(first)), descending, x.dtype)
                take_right = tirx.And(right < end, tirx.Or(left >= middle, later))
                return tirx.IfThenElse(
                    take_right,
                    sequence(store(spare, [begin + i], second), store(heads, [index(1)], right + i64(1))),
                    sequence(store(spare, [begin + i], first), store(heads, [index(0)], left + i64(1))),
                )

            return sequence(
                store(heads, [index(0)], begin), store(heads, [index(1)], middle), loop(end - begin, step, name="i")
            )

        return scratch([2], "int64", merge, "heads")

    return bind(pair * span * i64(2), run, "begin")


def _by_insertion(outs: Sequence[Target], x: Operand, dim: int, k: int, largest: bool) -> Stmt:
    """Insertion into the k best so far: one pass, cheap for small k."""
    values, indices = outs
    size = x.shape[dim]

    def line(at: At) -> Stmt:
        def select(best: Any, filled: Any) -> Stmt:
            def offer(i: Expr) -> Stmt:
                slot = load(filled, index(0))

                def value(position: Expr) -> Expr:
                    return x(*at(load(best, position)))

                def shift() -> Stmt:
                    place = load(filled, index(1))
                    above = tirx.max(place - i64(1), i64(0))
                    go_on = tirx.And(place > i64(0), _before(x(*at(i)), value(above), largest, x.dtype))
                    return tirx.While(
                        go_on,
                        sequence(
                            store(best, [place], load(best, place - i64(1))), store(filled, [index(1)], place - i64(1))
                        ),
                    )

                last = tirx.max(slot - i64(1), i64(0))
                wanted = tirx.Or(slot < i64(k), _before(x(*at(i)), value(last), largest, x.dtype))
                insert = sequence(
                    store(filled, [index(1)], minimum(slot, i64(k - 1))),
                    shift(),
                    store(best, [load(filled, index(1))], i),
                    store(filled, [index(0)], minimum(slot + i64(1), i64(k))),
                )
                return tirx.IfThenElse(wanted, insert, None)

            return sequence(
                loop(k, lambda i: store(best, [i], i64(0)), name="i"),
                store(filled, [index(0)], i64(0)), store(filled, [index(1)], i64(0)),
                loop(size, offer, name="i"),
                loop(k, lambda i: sequence(
                    values.store(at(i), x(*at(load(best, i)))), indices.store(at(i), load(best, i))), name="i"),
            )  # fmt: skip

        return scratch([max(k, 1)], "int64", lambda best: scratch(
            [2], "int64", lambda filled: select(best, filled), "filled"), "best")  # fmt: skip

    return _lines(x, dim, line)
