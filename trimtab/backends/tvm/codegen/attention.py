"""Loops for scaled dot-product attention.

One task handles a head (or a block of its queries): the keys are transposed once into panels, then for each tile of
queries the scores are computed by the register-tiled product, masked, normalised and multiplied by the values while
they are in cache.  The full score matrix never exists.  A row that may attend to nothing gives zeros, as in torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from trimtab.backends.tvm.codegen.comparison import eq, larger
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
)
from trimtab.backends.tvm.codegen.machine import Machine
from trimtab.backends.tvm.codegen.register_tile import Tile, accumulate_tile, each_vector
from trimtab.backends.tvm.codegen.vector_math import lower_call

Read = Callable[..., Expr]
Write = Callable[..., Stmt]


@dataclass
class AttentionProblem:
    """Extents and accessors of one attention.

    Attributes:
        batch: extents of the leading axes.
        heads, key_heads: query heads and key heads, the second dividing the first.
        queries, keys: lengths; depth: of a head's queries and keys; width: of its values.
        q, k, v: read ``(*batch, head, position, channel)`` in the working type.
        mask: read ``(*batch, head, query, key)``; bool or an addend in the working type; None for no mask.
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
    out: Write
    scale: float
    causal: bool
    dtype: str


def attention_loops(machine: Machine, p: AttentionProblem) -> Stmt:
    """The whole kernel, parallel over batch, heads and, when heads are few, blocks of queries."""
    return _Attention(machine, p).generate()


class _Attention:
    def __init__(self, machine: Machine, problem: AttentionProblem) -> None:
        self.p = problem
        self.machine = machine
        self.lanes = machine.lanes(problem.dtype)
        rows, vectors = self._choose_tile()
        known = int_value(problem.queries)
        # Tiles of nearly equal height: the last one starts early, and rows computed twice are lost.
        self.rows = rows if known is None else -(-known // -(-known // rows))
        self.panel = vectors * self.lanes
        self.panels = ceil_div(problem.keys, self.panel)
        self.padded_width = -(-problem.width // self.lanes) * self.lanes
        self.low = tirx.const(-math.inf, problem.dtype)

    def _choose_tile(self) -> tuple[int, int]:
        """Rows and vectors of the register tile: the one that pads known keys least, else a balanced one."""
        balanced = next((tile for tile in self.machine.tiles if tile[0] == 6), self.machine.tiles[0])
        keys = int_value(self.p.keys)
        if keys is None:
            return balanced

        def padded(tile: tuple[int, int]) -> int:
            panel = tile[1] * self.lanes
            return -(-keys // panel) * panel

        return min(dict.fromkeys((balanced, *self.machine.tiles)), key=padded)

    def generate(self) -> Stmt:
        p = self.p
        blocks = self._query_blocks()
        total = product(p.batch) * index(p.heads) * blocks

        def task(flat: Expr) -> Stmt:
            block = tirx.floormod(flat, blocks) if int_value(blocks) != 1 else index(0)
            rest = tirx.floordiv(flat, blocks) if int_value(blocks) != 1 else flat
            head = tirx.floormod(rest, index(p.heads))
            outer = tirx.floordiv(rest, index(p.heads))
            places: list[Expr] = []
            for extent in reversed(p.batch):
                places.insert(0, tirx.floormod(outer, as_index(extent)))
                outer = tirx.floordiv(outer, as_index(extent))
            if len(p.batch) == 1:
                places = [tirx.floordiv(rest, index(p.heads))]
            return self._bound([*places, head, block], lambda *v: self._head(list(v[:-2]), v[-2], v[-1], blocks), [])

        return loop(total, task, "parallel", "task")

    def _bound(self, values: list[Expr], body: Callable[..., Stmt], bound: list[Expr]) -> Stmt:
        if not values:
            return body(*bound)
        return bind(values[0], lambda v: self._bound(values[1:], body, [*bound, v]), "at")

    def _query_blocks(self) -> Expr:
        p = self.p
        if p.heads >= 2 * self.machine.threads:
            return index(1)
        return ceil_div(p.queries, self.rows * 16)

    def _head(self, batch: list[Expr], head: Expr, block: Expr, blocks: Expr) -> Stmt:
        p = self.p
        shared = p.heads // p.key_heads
        key_head = tirx.floordiv(head, index(shared)) if shared > 1 else head
        pack_values = p.width != self.padded_width

        def with_keys(keys: Any) -> Stmt:
            def with_values(values: Any) -> Stmt:
                def read_value(j: Expr, channel: Expr) -> Expr:
                    return load(values, j, channel) if values is not None else p.v(*batch, key_head, j, channel)

                def with_scores(scores: Any) -> Stmt:
                    return self._queries(batch, head, block, blocks, keys, scores, read_value)

                return sequence(
                    self._pack_keys(keys, batch, key_head),
                    self._pack_values(values, batch, key_head) if values is not None else None,
                    scratch([self.rows, self.panels * index(self.panel)], p.dtype, with_scores, "scores"),
                )

            if pack_values:
                return scratch([p.keys, self.padded_width], p.dtype, with_values, "values")
            return with_values(None)

        return scratch([self.panels, p.depth, self.panel], p.dtype, with_keys, "keys")

    def _pack_keys(self, keys: Any, batch: list[Expr], head: Expr) -> Stmt:
        p = self.p

        def panel(n: Expr) -> Stmt:
            def column(c: Expr) -> Stmt:
                j = n * index(self.panel) + c
                copy = loop(p.depth, lambda d: store(keys, [n, d, c], p.k(*batch, head, j, d)), name="d")
                known = int_value(p.keys)
                if known is not None and known % self.panel == 0:
                    return copy
                clear = loop(p.depth, lambda d: store(keys, [n, d, c], tirx.const(0, p.dtype)), name="d")
                return tirx.IfThenElse(j < as_index(p.keys), copy, clear)

            return loop(self.panel, column, name="column")

        return loop(self.panels, panel, name="panel")

    def _pack_values(self, values: Any, batch: list[Expr], head: Expr) -> Stmt:
        p = self.p

        def row(j: Expr) -> Stmt:
            return sequence(
                loop(p.width, lambda e: store(values, [j, e], p.v(*batch, head, j, e)), name="e"),
                loop(self.padded_width - p.width,
                     lambda e: store(values, [j, e + index(p.width)], tirx.const(0, p.dtype)), name="e"),
            )  # fmt: skip

        return loop(p.keys, row, name="key")

    def _queries(
        self, batch: list[Expr], head: Expr, block: Expr, blocks: Expr, keys: Any, scores: Any, value: Read
    ) -> Stmt:
        queries = as_index(self.p.queries)

        def tiles(height: int) -> Stmt:
            count = ceil_div(queries, height)
            share = ceil_div(queries, self.rows * 16) if int_value(blocks) != 1 else index(1)
            per_block = tirx.floordiv(count + share - index(1), share)
            begin = block * per_block

            def at(t: Expr) -> Stmt:
                start = minimum((begin + t) * index(height), queries - index(height))
                return bind(start, lambda first: self._tile(batch, head, first, height, keys, scores, value), "query")

            if int_value(blocks) == 1:
                return loop(count, at, name="tile")
            return loop(tirx.max(index(0), minimum(per_block, count - begin)), at, name="tile")

        if int_value(queries) is not None:
            return tiles(self.rows)
        return tirx.IfThenElse(queries >= index(self.rows), tiles(self.rows), tiles(1))

    def _tile(
        self, batch: list[Expr], head: Expr, first: Expr, height: int, keys: Any, scores: Any, value: Read
    ) -> Stmt:
        p = self.p
        tile = Tile(height, self.panel, self.lanes)
        scale = tirx.const(p.scale, p.dtype)

        def panel(n: Expr) -> Stmt:
            def finish(acc: list[Any]) -> Stmt:
                return each_vector(
                    tile, lambda r, c: store(scores, [index(r), n * index(self.panel) + c], load(acc[r], c) * scale)
                )

            return accumulate_tile(
                tile, p.dtype, p.depth,
                lambda r, d: p.q(*batch, head, first + r, d),
                lambda d, c: load(keys, n, d, c), finish,
            )  # fmt: skip

        def row(r: Expr) -> Stmt:
            return self._normalize(batch, head, first + r, r, scores)

        parts = [loop(self.panels, panel, name="panel"), loop(height, row, name="row")]
        width = min(self.panel, self.padded_width)
        for begin in range(0, self.padded_width, width):
            span = min(width, self.padded_width - begin)
            parts.append(self._weigh(batch, head, first, height, begin, span, scores, value))
        return sequence(*parts)

    def _weigh(
        self, batch: list[Expr], head: Expr, first: Expr, height: int, begin: int, span: int, scores: Any, value: Read
    ) -> Stmt:
        """Channels ``begin .. begin + span`` of the tile's result: probabilities times values."""
        return accumulate_tile(
            Tile(height, span, self.lanes),
            self.p.dtype,
            self.p.keys,
            lambda r, j: load(scores, r, j),
            lambda j, c: value(j, index(begin) + c),
            lambda acc: self._store(batch, head, first, height, begin, span, acc),
        )

    def _store(
        self, batch: list[Expr], head: Expr, first: Expr, height: int, begin: int, span: int, acc: list[Any]
    ) -> Stmt:
        """Write a finished tile; its last vector may be partly padding."""
        width = min(span, self.p.width - begin)
        whole = Tile(height, width // self.lanes * self.lanes, self.lanes)

        def put(r: int, c: Expr) -> Stmt:
            return self.p.out(*batch, head, first + index(r), index(begin) + c, value=load(acc[r], c))

        full = each_vector(whole, put) if whole.columns else None
        # The rest goes element by element: constant positions keep the accumulators in registers.
        rest = [put(r, index(c)) for r in range(height) for c in range(whole.columns, width)]
        return sequence(full, *rest)

    def _normalize(self, batch: list[Expr], head: Expr, query: Expr, r: Expr, scores: Any) -> Stmt:
        """Mask a row of scores and replace it by its softmax."""
        p, lanes = self.p, self.lanes
        keys, padded = as_index(p.keys), self.panels * index(self.panel)
        vectors_padded = self.panels * index(self.panel // lanes)

        def masked(j: Expr) -> Stmt:
            value = load(scores, r, j)
            if p.mask is not None:
                allowed = p.mask(*batch, head, query, j)
                value = tirx.Select(allowed, value, self.low) if p.mask_is_bool else value + allowed
            if p.causal:
                value = tirx.Select(j <= query, value, self.low)
            return store(scores, [r, j], value)

        full = floor_div(p.keys, lanes)
        parts: list[Stmt | None] = []
        if p.mask is not None or p.causal:
            parts.append(loop(full, lambda n: lanes_of(n * index(lanes), lanes, masked), name="vector"))
            parts.append(loop(keys - full * index(lanes), lambda j: masked(full * index(lanes) + j), name="element"))
        parts.append(loop(padded - keys, lambda j: store(scores, [r, keys + j], self.low), name="element"))

        def with_sums(acc: Any) -> Stmt:
            def largest(n: Expr) -> Stmt:
                def step(c: Expr) -> Stmt:
                    return store(acc, [c], larger(load(acc, c), load(scores, r, n * index(lanes) + c)))

                return lanes_of(index(0), lanes, step)

            def powers(shift: Expr) -> Stmt:
                def at(n: Expr) -> Stmt:
                    def raise_(c: Expr) -> Stmt:
                        difference = load(scores, r, n * index(lanes) + c) - shift
                        power = lower_call("tirx.exp", p.dtype, [difference])
                        return store(
                            scores, [r, n * index(lanes) + c], tirx.exp(difference) if power is None else power
                        )

                    def add(c: Expr) -> Stmt:
                        return store(acc, [c], load(acc, c) + load(scores, r, n * index(lanes) + c))

                    return sequence(lanes_of(index(0), lanes, raise_), lanes_of(index(0), lanes, add))

                return loop(vectors_padded, at, name="vector")

            def scale(factor: Expr) -> Stmt:
                def at(n: Expr) -> Stmt:
                    return lanes_of(
                        n * index(lanes), lanes, lambda j: store(scores, [r, j], load(scores, r, j) * factor)
                    )

                return loop(vectors_padded, at, name="vector")

            zero, one = tirx.const(0, p.dtype), tirx.const(1, p.dtype)
            return sequence(
                lanes_of(index(0), lanes, lambda c: store(acc, [c], self.low)),
                loop(vectors_padded, largest, name="vector"),
                self._fold(acc, larger),
                bind(tirx.Select(eq(load(acc, index(0)), self.low), zero, load(acc, index(0))), lambda shift: sequence(
                    lanes_of(index(0), lanes, lambda c: store(acc, [c], zero)),
                    powers(shift),
                    self._fold(acc, lambda a, b: a + b),
                    bind(tirx.Select(eq(load(acc, index(0)), zero), zero, one / load(acc, index(0))), scale, "factor"),
                ), "shift"),
            )  # fmt: skip

        parts.append(scratch([lanes], p.dtype, with_sums, "lane_sums"))
        return sequence(*parts)

    def _fold(self, acc: Any, combine: Callable[[Expr, Expr], Expr]) -> Stmt | None:
        """Combine the lanes of a vector into lane 0."""
        parts, size = [], self.lanes
        while size > 1:
            size //= 2
            parts.append(self._halve(acc, size, combine))
        return sequence(*parts) if parts else None

    def _halve(self, acc: Any, half: int, combine: Callable[[Expr, Expr], Expr]) -> Stmt:
        return lanes_of(index(0), half, lambda c: store(acc, [c], combine(load(acc, c), load(acc, c + index(half)))))
