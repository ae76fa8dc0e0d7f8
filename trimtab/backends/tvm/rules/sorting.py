"""Scans, sorting and top-k, written as loops over one axis and parallel over the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from trimtab.backends.tvm.codegen.comparison import is_float, is_nan, is_nonzero
from trimtab.backends.tvm.codegen.expression import as_index, product
from trimtab.backends.tvm.codegen.loops import Stmt, bind, index, load, loop, minimum, scratch, sequence, store
from trimtab.backends.tvm.rules.registry import Expr, Operand, Scope, Target, cast, const, i64, loops_for, work_type
from trimtab.ir import ops

At = Callable[[Expr], list[Expr]]


def _lines(x: Operand, dim: int, body: Callable[[At], Stmt]) -> Stmt:
    """Run ``body`` for every line along ``dim``, in parallel; it gets a function from position to full indices."""
    others = [extent for axis, extent in enumerate(x.shape) if axis != dim]

    def line(flat: Expr) -> Stmt:
        places: list[Expr] = []
        rest = flat
        for position, extent in reversed(list(enumerate(others))):
            places.insert(0, tirx.floormod(rest, as_index(extent)) if position else rest)
            rest = tirx.floordiv(rest, as_index(extent))
        return body(lambda at: [*places[:dim], at, *places[dim:]])

    return loop(product(others), line, "parallel", "line")


@loops_for(ops.Cumsum)
def _cumsum(op: Any, scope: Scope, outs: list[Target], x: Operand) -> Stmt:
    (out,) = outs
    work = work_type(out.dtype)

    def line(at: At) -> Stmt:
        def with_total(total: Any) -> Stmt:
            def step(i: Expr) -> Stmt:
                value = x(*at(i))
                value = (
                    tirx.Select(is_nonzero(value), const(1, work), const(0, work))
                    if x.dtype == "bool"
                    else cast(value, work)
                )
                return sequence(
                    store(total, [index(0)], load(total, index(0)) + value),
                    out.store(at(i), cast(load(total, index(0)), out.dtype)),
                )

            return sequence(store(total, [index(0)], const(0, work)), loop(x.shape[op.dim], step, name="i"))

        return scratch([1], work, with_total, "total")

    return _lines(x, op.dim, line)


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
    """Bottom-up merge sort of positions: stable, n log n, between two scratch buffers."""
    values, indices = outs
    size = x.shape[op.dim]

    def line(at: At) -> Stmt:
        def sort(order: Any, spare: Any, width: Any) -> Stmt:
            def merge_all() -> Stmt:
                span = load(width, index(0))
                pairs = tirx.floordiv(size + span * i64(2) - i64(1), span * i64(2))
                return sequence(
                    loop(pairs, lambda p: _merge(op, x, at, size, order, spare, span, p), name="pair"),
                    loop(size, lambda i: store(order, [i], load(spare, i)), name="i"),
                    store(width, [index(0)], span * i64(2)),
                )

            return sequence(
                loop(size, lambda i: store(order, [i], i), name="i"),
                store(width, [index(0)], i64(1)),
                tirx.While(load(width, index(0)) < size, merge_all()),
                loop(size, lambda i: sequence(
                    values.store(at(i), x(*at(load(order, i)))), indices.store(at(i), load(order, i))), name="i"),
            )  # fmt: skip

        return scratch([size], "int64", lambda order: scratch(
            [size], "int64", lambda spare: scratch([1], "int64", lambda width: sort(order, spare, width), "width"),
            "spare"), "order")  # fmt: skip

    return _lines(x, op.dim, line)


def _merge(op: Any, x: Operand, at: At, size: Expr, order: Any, spare: Any, span: Expr, pair: Expr) -> Stmt:
    """Merge the runs ``[begin, middle)`` and ``[middle, end)`` of ``order`` into ``spare``."""

    def run(begin: Expr) -> Stmt:
        middle, end = minimum(begin + span, size), minimum(begin + span * i64(2), size)

        def merge(heads: Any) -> Stmt:
            left, right = load(heads, index(0)), load(heads, index(1))

            def step(i: Expr) -> Stmt:
                last = size - i64(1)
                first, second = load(order, minimum(left, last)), load(order, minimum(right, last))
                later = _before(x(*at(second)), x(*at(first)), op.descending, x.dtype)
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


@loops_for(ops.Topk)
def _topk(op: Any, scope: Scope, outs: list[Target], x: Operand) -> Stmt:
    """Insertion into the k best so far: one pass, cheap for small k."""
    values, indices = outs
    size, k = x.shape[op.dim], op.k

    def line(at: At) -> Stmt:
        def select(best: Any, filled: Any) -> Stmt:
            def offer(i: Expr) -> Stmt:
                slot = load(filled, index(0))

                def value(position: Expr) -> Expr:
                    return x(*at(load(best, position)))

                def shift() -> Stmt:
                    place = load(filled, index(1))
                    above = tirx.max(place - i64(1), i64(0))
                    go_on = tirx.And(place > i64(0), _before(x(*at(i)), value(above), op.largest, x.dtype))
                    return tirx.While(
                        go_on,
                        sequence(
                            store(best, [place], load(best, place - i64(1))), store(filled, [index(1)], place - i64(1))
                        ),
                    )

                last = tirx.max(slot - i64(1), i64(0))
                wanted = tirx.Or(slot < i64(k), _before(x(*at(i)), value(last), op.largest, x.dtype))
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

    return _lines(x, op.dim, line)
