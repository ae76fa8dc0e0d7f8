"""Loops for scaled dot-product attention.

One task handles a key head and the query heads that read it, or a share of their queries.  Keys are transposed once
into panels and values copied into panels; then for each tile of queries the scores are computed, turned into powers
and multiplied by the values while they are in cache.  The full score matrix never exists: where its rows are long, a
block of keys at a time is taken, and the sums are corrected when a larger score is found (T. Dao et al.,
"FlashAttention", 2022).  A row that may attend to nothing gives zeros, as in torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tvm import ir, tirx

from trimtab.backends.tvm.codegen.expression import Expr, as_index, int_value, product
from trimtab.backends.tvm.codegen.loops import (
    Stmt,
    bind,
    ceil_div,
    floor_div,
    index,
    lanes_of,
    load,
    loop,
    minimum,
    scratch,
    sequence,
    store,
    vectors,
)
from trimtab.backends.tvm.codegen.machine import Machine
from trimtab.backends.tvm.codegen.packed_product import PackedProduct
from trimtab.backends.tvm.codegen.softmax_row import RowSoftmax
from trimtab.backends.tvm.codegen.tile_product import without_casts

Read = Callable[..., Expr]
Write = Callable[..., Stmt]

TILES_TOGETHER = 8
"""Tiles of queries that take a block of keys one after the other while it is in the cache."""
TASKS_PER_THREAD = 4
"""With so many tasks for each thread it does not matter that the number of threads does not divide them."""


@dataclass
class AttentionProblem:
    """Extents and accessors of one attention.

    Attributes:
        batch: extents of the leading axes.
        heads, key_heads: query heads and key heads, the second dividing the first.
        queries, keys: lengths; depth: of a head's queries and keys; width: of its values.
        q, k, v: read ``(*batch, head, position, channel)`` in the working type.
        mask: read ``(*batch, head, query, key)``; bool or an addend in the working type; None for no mask.
        mask_is_of_keys: whether the mask is the same for all queries and query heads that read a key head.
        out: store at ``(*batch, head, query, channel)``.
    """

    batch: list[Expr]
    heads: int
    key_heads: int
    queries: Expr
    keys: Expr
    depth: Expr
    width: int
    q: Read
    k: Read
    v: Read
    mask: Read | None
    mask_is_bool: bool
    mask_is_of_keys: bool
    out: Write
    scale: float
    causal: bool
    dtype: str


@dataclass(frozen=True)
class _Buffers:
    """What a task keeps: packed operands, a tile of scores, their powers as a factor, and sums of a few tiles."""

    keys: Any
    values: Any
    scores: Any
    powers: Any
    sums: Any
    largest: Any
    totals: Any
    bias: Any = None


def attention_loops(machine: Machine, p: AttentionProblem) -> Stmt:
    """The whole kernel, parallel over batch, key heads and, when those are few, the queries of a head."""
    return _Attention(machine, _heads_as_queries(p) if int_value(p.queries) == 1 else p).generate()


def _heads_as_queries(p: AttentionProblem) -> AttentionProblem:
    """A problem of one query per head, with the query heads that read a key head as the queries of one head.

    They read the keys together that way. A causal query is the first one, and sees the first key only.
    """
    shared = p.heads // p.key_heads

    def at_head(access: Callable[..., Any]) -> Callable[..., Any]:
        def at(*place: Expr, **stored: Expr) -> Any:
            *batch, head, query, last = place
            return access(*batch, head * index(shared) + query, index(0), last, **stored)

        return at

    return replace(
        p, heads=p.key_heads, queries=index(shared), keys=index(1) if p.causal else p.keys, causal=False,
        q=at_head(p.q), out=at_head(p.out), mask=None if p.mask is None else at_head(p.mask),
    )  # fmt: skip


class _Attention:
    def __init__(self, machine: Machine, problem: AttentionProblem) -> None:
        self.p = problem
        self.machine = machine
        self.product = PackedProduct(machine, problem.dtype, self._stored_type(), int_value(problem.depth))
        self.softmax = RowSoftmax(problem.dtype, self.product.lanes, problem.scale, problem.mask_is_bool)
        self.rows = self._rows()
        self.block = self._block()
        known = int_value(problem.keys)
        self.single = known is not None and known <= self.block
        self.together = 1 if self.single else TILES_TOGETHER
        self.panels = self.product.panels(problem.keys, equal=not self.single)
        self.width = sum(columns for _, columns in self.product.known_panels(problem.width))
        self.shared = problem.heads // problem.key_heads
        # Copied once, with room behind its end, an addend costs no more than a load per vector of scores.
        self.biased = problem.mask is not None and problem.mask_is_of_keys and not problem.mask_is_bool

    def _stored_type(self) -> str:
        """The type in which queries, keys and values lie in memory, or the working type where they differ."""
        p = self.p
        at = [index(0)] * (len(p.batch) + 3)
        reads = [without_casts(read(*at)) for read in (p.q, p.k, p.v)]
        types = {str(read.source.dtype) if isinstance(read, ir.TensorLoad) else p.dtype for read in reads}
        return types.pop() if len(types) == 1 else p.dtype

    def _rows(self) -> int:
        """Rows of a tile: the number that wastes least on the last tile, which ends at the last query."""
        most, queries = self.product.rows, int_value(self.p.queries)
        if queries is None:
            return most
        # A tile costs about one row more than it has.
        return min(range(1, min(most, queries) + 1), key=lambda rows: -(-queries // rows) * (rows + 1))

    def _block(self) -> int:
        """Keys in a block: blocks of equal size whose scores leave most of the second-level cache to the panels."""
        columns = self.product.columns
        most = max(1, self.machine.cache_bytes // 16 // (4 * self.rows * columns)) * columns
        keys = int_value(self.p.keys)
        if keys is None:
            return most
        blocks = -(-keys // most)
        return -(-keys // (blocks * columns)) * columns

    def generate(self) -> Stmt:
        p, parts = self.p, self._parts()

        def task(flat: Expr) -> Stmt:
            part, rest = (tirx.floormod(flat, index(parts)), tirx.floordiv(flat, index(parts))) if parts > 1 else (
                index(0), flat)  # fmt: skip
            head, outer = tirx.floormod(rest, index(p.key_heads)), tirx.floordiv(rest, index(p.key_heads))
            places: list[Expr] = []
            for extent in reversed(p.batch[1:]):
                places.insert(0, tirx.floormod(outer, as_index(extent)))
                outer = tirx.floordiv(outer, as_index(extent))
            places = [outer, *places] if p.batch else []
            return self._bound([*places, head, part], lambda *v: self._task(list(v[:-2]), v[-2], v[-1], parts), [])

        return self.product.link(loop(product(p.batch) * index(p.key_heads * parts), task, "parallel", "task"))

    def _bound(self, values: list[Expr], body: Callable[..., Stmt], bound: list[Expr]) -> Stmt:
        if not values:
            return body(*bound)
        return bind(values[0], lambda v: self._bound(values[1:], body, [*bound, v]), "at")

    def _parts(self) -> int:
        """Parts into which the queries of a key head are divided, so that the threads get equal numbers of tasks."""
        threads = self.machine.threads
        tasks = self.p.key_heads * math.prod(int_value(extent) or 1 for extent in self.p.batch)
        queries = int_value(self.p.queries)
        most = self.shared * (-(-queries // (self.rows * self.together)) if queries is not None else threads)
        candidates = range(1, max(1, min(most, threads)) + 1)
        even = (n for n in candidates if tasks * n % threads == 0 or tasks * n >= TASKS_PER_THREAD * threads)
        return next(even, candidates[-1])

    def _task(self, batch: list[Expr], head: Expr, part: Expr, parts: int) -> Stmt:
        """Pack the keys and values of a head, then compute every ``parts``-th group of tiles of its queries."""
        p, product = self.p, self.product
        padded = sum((count * index(columns) for _, count, columns in self.panels), index(0))
        state = [index(self.together), index(self.rows)]
        # A vector more: the last one of a row may be partly past the keys, and rows do not collide in the cache.
        pitch = self.block + product.lanes

        def allocate(shapes: list[tuple[str, list[Any]]], buffers: list[Any]) -> Stmt:
            if shapes:
                (name, shape), *others = shapes
                return scratch(shape, p.dtype, lambda buffer: allocate(others, [*buffers, buffer]), name)
            b = _Buffers(*buffers) if product.narrow else replace(_Buffers(*buffers), powers=buffers[2])
            return sequence(
                product.pack_transposed(b.keys, p.keys, p.depth, lambda j, d: p.k(*batch, head, j, d), self.panels),
                product.pack(b.values, p.keys, p.width, lambda j, e: p.v(*batch, head, j, e)),
                self._bias(batch, head, b) if self.biased else None,
                self._groups(batch, head, part, parts, b),
            )

        states = [index(self.together * self.rows)]
        powers = pitch // product.group if product.narrow else 1
        return allocate([
            ("keys", [padded * floor_div(p.depth, product.group)]),
            ("values", [product.words_of(p.keys) * index(self.width)]),
            ("scores", [index(self.rows), index(pitch)]), ("powers", [index(self.rows), index(powers)]),
            ("sums", [*state, index(self.width)]), ("largest", states), ("totals", states),
            *([("bias", [as_index(p.keys) + index(product.lanes)])] if self.biased else []),
        ], [])  # fmt: skip

    def _bias(self, batch: list[Expr], key_head: Expr, b: _Buffers) -> Stmt:
        """Copy what the mask adds to exponents."""
        p, lanes, mask = self.p, self.product.lanes, self.p.mask
        assert mask is not None
        head, zero = key_head * index(self.shared), tirx.const(0, p.dtype)
        return sequence(
            vectors(p.keys, lanes, lambda j: store(
                b.bias, [j], self.softmax.bias_of(mask(*batch, head, index(0), j)))),
            lanes_of(index(0), lanes, lambda j: store(b.bias, [as_index(p.keys) + j], zero)),
        )  # fmt: skip

    def _groups(self, batch: list[Expr], key_head: Expr, part: Expr, parts: int, b: _Buffers) -> Stmt:
        queries = as_index(self.p.queries)

        def tiles(height: int) -> Stmt:
            count = ceil_div(queries, height)
            groups = ceil_div(count, self.together)
            total = groups * index(self.shared)

            def at(n: Expr) -> Stmt:
                unit = part + n * index(parts)
                head = key_head * index(self.shared) + tirx.floordiv(unit, groups)
                return self._bound(
                    [head, tirx.floormod(unit, groups) * index(self.together)],
                    lambda head, first: self._group(batch, head, first, height, count, b),
                    [],
                )

            mine = total if parts == 1 else tirx.floordiv(total - part + index(parts - 1), index(parts))
            return self.product.around(height, loop(mine, at, name="group"))

        if int_value(queries) is not None:
            return tiles(self.rows)
        return tirx.IfThenElse(queries >= index(self.rows), tiles(self.rows), tiles(1))

    def _group(self, batch: list[Expr], head: Expr, first: Expr, height: int, count: Expr, b: _Buffers) -> Stmt:
        """Some tiles, from the tile ``first`` of ``count`` on: all of them with a block of keys before the next one."""
        queries = as_index(self.p.queries)
        held = index(1) if self.together == 1 else minimum(index(self.together), count - first)

        def each(body: Callable[[Expr, Expr], Stmt]) -> Stmt:
            def at(t: Expr) -> Stmt:
                start = minimum((first + t) * index(height), queries - index(height))
                return bind(start, lambda query: body(t, query), "query")

            return loop(held, at, name="tile")

        def finish(t: Expr, query: Expr) -> Stmt:
            return loop(height, lambda r: self._write(batch, head, t, query, r, b), name="row")

        if self.single:
            return each(lambda t, query: sequence(
                self._with_queries(batch, head, query, height, lambda q, stride: self._tile(
                    batch, head, t, query, height, q, stride, index(0), b)),
                finish(t, query),
            ))  # fmt: skip

        def step(start: Expr) -> Stmt:
            def tile(t: Expr, query: Expr) -> Stmt:
                body = self._with_queries(batch, head, query, height, lambda q, stride: self._tile(
                    batch, head, t, query, height, q, stride, start, b))  # fmt: skip
                return tirx.IfThenElse(start < query + index(height), body, None) if self.p.causal else body

            return each(tile)

        low, zero = tirx.const(-math.inf, self.p.dtype), tirx.const(0, self.p.dtype)
        states = self.together * self.rows
        clear = loop(states, lambda i: sequence(store(b.largest, [i], low), store(b.totals, [i], zero)), name="row")
        blocks = ceil_div(self.p.keys, self.block)
        return sequence(
            clear,
            loop(blocks, lambda n: bind(n * index(self.block), step, "block"), name="block"),
            each(finish),
        )

    def _with_queries(
        self, batch: list[Expr], head: Expr, query: Expr, height: int, body: Callable[[Any, Expr], Stmt]
    ) -> Stmt:
        """``body(q, stride)`` with a tile's queries as rows in memory, copied where they are not."""
        p = self.p

        def element(r: Expr, d: Expr) -> Expr:
            return p.q(*batch, head, query + r, d)

        place = self.product.in_place(element)
        if place is not None:
            return body(*place)
        words = floor_div(p.depth, self.product.group)

        def copied(rows: Any) -> Stmt:
            copy = loop(
                height,
                lambda r: loop(
                    words, lambda w: store(rows, [r, w], self.product.word(lambda d: element(r, d), w)), name="word"
                ),
                name="row",
            )
            return sequence(copy, body(lambda r, d: load(rows, r, d), as_index(p.depth)))

        return scratch([height, words], p.dtype, copied, "queries")

    def _tile(
        self, batch: list[Expr], head: Expr, t: Expr, query: Expr, height: int, q: Any, stride: Expr, start: Expr,
        b: _Buffers,
    ) -> Stmt:  # fmt: skip
        """Scores and powers of a tile in the block of keys that begins at ``start``, added to the tile's sums."""
        p, product = self.p, self.product
        pitch = b.scores.shape[1]
        inside = as_index(p.keys) if self.single else minimum(index(self.block), as_index(p.keys) - start)
        again = tirx.const(0, "int32") if self.single else tirx.Cast("int32", start > index(0))

        def visible(seen: Expr) -> Stmt:
            """``seen``: keys of the block that any query of the tile attends to."""

            def panel(column: Expr, columns: int) -> Stmt:
                return product.multiply(
                    (height, columns), q, stride, b.keys, (start + column) * floor_div(p.depth, product.group),
                    as_index(p.depth),
                    b.scores, [index(0), column], pitch, tirx.const(0, "int32"),
                )  # fmt: skip

            def run(first: Expr, count: Expr, columns: int) -> Stmt:
                if not self.single or p.causal:
                    count = tirx.max(minimum(count, ceil_div(seen - first, columns)), index(0))
                return loop(count, lambda n: panel(first + n * index(columns), columns), name="panel")

            return sequence(
                *(run(*one) for one in self.panels),
                loop(height, lambda r: self._powers(batch, head, t, query + r, r, start, inside, seen, b), name="row"),
                *(
                    product.multiply(
                        (height, columns), lambda r, j: load(b.powers, r, j), pitch, b.values,
                        index(channel) * product.words_of(p.keys) + floor_div(start, product.group) * index(columns),
                        ceil_div(seen, product.step) * index(product.step),
                        b.sums, [t, index(0), index(channel)], index(self.width), again,
                    )
                    for channel, columns in product.known_panels(p.width)
                ),
            )  # fmt: skip

        if p.causal:
            return bind(minimum(inside, query + index(height) - start), visible, "seen")
        return bind(inside, visible, "seen")

    def _powers(
        self, batch: list[Expr], head: Expr, t: Expr, query: Expr, r: Expr, start: Expr, inside: Expr, seen: Expr,
        b: _Buffers,
    ) -> Stmt:  # fmt: skip
        p, lanes = self.p, self.product.lanes
        mask = None if self.biased else p.mask

        def rescale(factor: Expr) -> Stmt:
            def vector(n: Expr) -> Stmt:
                return lanes_of(
                    n * index(lanes), lanes, lambda e: store(b.sums, [t, r, e], load(b.sums, t, r, e) * factor)
                )

            return tirx.IfThenElse(start > index(0), loop(self.width // lanes, vector, name="vector"), None)

        covered = ceil_div(seen, self.product.step) * index(self.product.step)

        def row(count: Expr) -> Stmt:
            powers = self.softmax.block(
                b.scores, r, count, covered,
                None if mask is None else lambda j: mask(*batch, head, query, start + j),
                b.largest, b.totals, t * index(self.rows) + r, None if self.single else rescale,
                (lambda j: load(b.bias, start + j)) if self.biased else None,
            )  # fmt: skip
            rounded = self.product.round_row(b.scores, b.powers, r, covered) if self.product.narrow else None
            return sequence(powers, rounded)

        if p.causal:
            return bind(tirx.max(minimum(inside, query + index(1) - start), index(0)), row, "count")
        return bind(inside, row, "count")

    def _write(self, batch: list[Expr], head: Expr, t: Expr, query: Expr, r: Expr, b: _Buffers) -> Stmt:
        """Divide a finished row of sums by its total and store it."""

        def row(factor: Expr) -> Stmt:
            return vectors(self.p.width, self.product.lanes, lambda e: self.p.out(
                *batch, head, query + r, e, value=load(b.sums, t, r, e) * factor))  # fmt: skip

        return bind(self.softmax.reciprocal(load(b.totals, t * index(self.rows) + r)), row, "factor")
