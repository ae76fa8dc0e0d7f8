"""Loops for a contraction: packed panels, a register tile, and the epilogue applied to the tile.

The shape of the code (B panels of ``nt`` columns, tiles of ``mt`` rows held in registers over the whole depth) is the
inner part of the Goto algorithm (K. Goto and R. van de Geijn, "Anatomy of high-performance matrix multiplication",
2008).  Rows that the tile does not divide are covered by tiles of two heights, or by a last tile that ends at the last
row and overlaps the one before it, so the inner loop has no predicates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tvm import ir, tirx
from tvm.sym import Analyzer, detect_linear_equation

from trimtab.backends.tvm.codegen.contraction import (
    Contraction,
    Flattener,
    accesses_of,
    has_only_loads_as_users,
)
from trimtab.backends.tvm.codegen.depth_parts import depth_part, product_by_parts, row_blocks
from trimtab.backends.tvm.codegen.epilogue import result_place, store_result
from trimtab.backends.tvm.codegen.expression import (
    Expr,
    as_index,
    constant_factor,
    int_value,
    product,
    rewrite,
    variables_of,
)
from trimtab.backends.tvm.codegen.loops import (
    Stmt,
    bind,
    bind_all,
    ceil_div,
    flat_offset,
    index,
    load,
    loop,
    minimum,
    nothing,
    scratch,
    sequence,
    store,
    vectors,
    zero,
)
from trimtab.backends.tvm.codegen.machine import Machine
from trimtab.backends.tvm.codegen.register_tile import (
    Tile,
    accumulate_tile,
    choose_tile,
    each_vector,
    nearly_equal_height,
)
from trimtab.backends.tvm.codegen.row_tiles import RowTiles, in_two_heights
from trimtab.backends.tvm.codegen.tile_product import (
    TileProducts,
    product_kind,
    strided_rows,
    without_casts,
)
from trimtab.backends.tvm.codegen.tile_turns import TileRun, in_turns
from trimtab.backends.tvm.codegen.vector_math import lower_call
from trimtab.backends.tvm.codegen.window_product import blocks_of_lines, find_windows, window_rows
from trimtab.backends.tvm.microkernels import InstructionSet
from trimtab.backends.tvm.microkernels.llvm_text import LINE_BYTES
from trimtab.backends.tvm.microkernels.tiles import tallest

FIRST = tirx.const(0, "int32")
"""A micro-kernel's argument: overwrite what was there."""


@dataclass(frozen=True)
class PackedPanels:
    """How a packed factor lies in memory: columns of a panel, and consecutive k that are interleaved."""

    columns: int
    group: int


class ContractionKernel:
    """Generates the loop nest of one contraction and its epilogue."""

    def __init__(self, contraction: Contraction, machine: Machine) -> None:
        self.c = contraction
        self.machine = machine
        self.dtype = str(contraction.stage.buffer.dtype)
        self.m, self.n, self.k = Flattener(contraction.m), Flattener(contraction.n), Flattener(contraction.k)
        out_accesses = self._output_accesses()
        self.a_rows = strided_rows(contraction, self.m, self.k)
        self.windows = find_windows(contraction) if self.a_rows is None else None
        self.m_linear_out = self.m.is_linear(out_accesses) and self._free(contraction.m)
        self.m_linear = (
            self.m_linear_out
            and self.m.is_linear(accesses_of(contraction.a))
            and has_only_loads_as_users(contraction.a, contraction.m)
        )
        self.n_linear_out = self.n.is_linear(out_accesses) and self._free(contraction.n)
        self.k_linear_a = self.k.is_linear(accesses_of(contraction.a)) and has_only_loads_as_users(
            contraction.a, contraction.k
        )
        self.panels = self._packed_panels()
        self.tile = self._choose_tile()
        self.direct = self._reads_b_directly()
        self.products = self._micro_kernels()
        covers = self.a_rows is not None and not self.windows
        self.row_tiles = in_two_heights(self.products, int_value(self.m.extent), self.tile.columns) if covers else None
        if self.row_tiles is not None:
            self.tile = replace(self.tile, rows=self.row_tiles.height)

    def _choose_tile(self) -> Tile:
        rows = self.windows.rows if self.windows else self.m.extent
        columns = self.n.extent
        if self.panels is None or self.panels.group == 1:
            width = None if self.panels is None else self.panels.columns
            in_lines = self.windows is not None
            return choose_tile(self.machine, self.dtype, int_value(rows), int_value(columns), width, in_lines)
        isa = self._instruction_set(packs_b=False)
        lanes = self.machine.lanes(self.dtype)
        highest = tallest(isa, self._kind(packs_b=False), self.panels.columns // isa.lanes) if isa else None
        known = int_value(rows)
        height = highest.rows if highest else 1
        return Tile(height if known is None else nearly_equal_height(known, height), self.panels.columns, lanes)

    def _kind(self, packs_b: bool) -> str:
        """The kind of data that micro-kernels would multiply; B is packed to panels of the working type, or lies so."""
        return product_kind(self.c, packs_b) if self.a_rows or self.windows else ""

    def _instruction_set(self, packs_b: bool) -> InstructionSet | None:
        group = 1 if packs_b or self.panels is None else self.panels.group
        depth = self.windows.inside.extent if self.windows else self.k.extent
        return self.machine.instruction_set(self._kind(packs_b), int_value(depth), group)

    def _micro_kernels(self) -> TileProducts | None:
        """The micro-kernels, where the factors are of the form that they need."""
        isa = self._instruction_set(packs_b=not self.direct)
        grouped = self.panels is not None and self.panels.group > 1
        if isa is None or (self.direct and not grouped and self._b_coefficients()[1] != self.tile.columns):
            return None
        return TileProducts(isa, self._kind(packs_b=not self.direct))

    def generate(self) -> Stmt:
        """The whole kernel, parallel over batch, column panels and (when those are few) row blocks."""
        columns, rows = self.n.extent, self.m.extent
        panels = ceil_div(columns, self.tile.columns)
        batch = product([extent for _, extent in self.c.batch])
        in_cache = blocks_of_lines(self, panels) if self.windows else row_blocks(self)
        blocks = in_cache if in_cache > 1 else self._row_blocks(batch, panels)
        batch_axes = Flattener(self.c.batch)
        if step := depth_part(self):
            return self._link(product_by_parts(self, step))

        def task(flat: Expr) -> Stmt:
            if in_cache > 1:
                # All panels pass a block of rows before the next one; such products have no batch.
                block = tirx.floordiv(flat, panels)
                return bind(block, lambda b: self._panel(tirx.floormod(flat, panels), b, blocks, {}), "block")
            block = tirx.floormod(flat, index(blocks)) if blocks > 1 else index(0)
            rest = tirx.floordiv(flat, index(blocks)) if blocks > 1 else flat
            single = int_value(batch) == 1
            panel = rest if single else tirx.floormod(rest, panels)
            outer = index(0) if single else tirx.floordiv(rest, panels)
            if int_value(panels) == 1:
                panel, outer = index(0), rest
            return bind(
                panel,
                lambda p: self._with_batch(batch_axes, outer, lambda values: self._panel(p, block, blocks, values)),
                "panel",
            )

        total = batch * panels * blocks
        work = [int_value(e) for e in (batch, columns, rows, self.k.extent)]
        known = [value for value in work if value is not None]
        small = len(known) == len(work) and math.prod(known) < self.machine.serial_work
        body = loop(total, task, "serial" if small else "parallel", "task")
        return self._link(body)

    def _link(self, body: Stmt) -> Stmt:
        return self.products.link(body) if self.products else body

    def _with_batch(self, axes: Flattener, flat: Expr, body: Callable[[dict[Any, Expr]], Stmt]) -> Stmt:
        values = axes.at(flat, linear=False)
        return bind_all(values, body, "batch")

    def _row_blocks(self, batch: Expr, panels: Expr) -> int:
        known = [value for e in (batch, panels, self.m.extent) if (value := int_value(e)) is not None]
        if len(known) != 3:
            return 1
        tasks, rows, threads = known[0] * known[1], known[2], self.machine.threads
        if tasks >= 3 * threads or tasks % threads == 0:
            return 1
        return max(1, min(-(-3 * threads // tasks), rows // (2 * self.tile.rows)))

    def _panel(self, panel: Expr, block: Expr, blocks: int, batch: dict[Any, Expr]) -> Stmt:
        first_column = panel * index(self.tile.columns)
        if self.direct:

            def read(k: Expr, column: Expr) -> Expr:
                return self.b_at(batch, self.k.at(k, linear=True), first_column + column)

            return self._rows(first_column, block, blocks, batch, read)
        depth = self.k.extent

        def packed(buffer: Any) -> Stmt:
            return sequence(
                self._pack(buffer, first_column, batch),
                self._rows(first_column, block, blocks, batch, lambda k, column: load(buffer, k, column)),
            )

        return scratch([depth, self.tile.columns], self.dtype, packed, "panel_b")

    def _pack(self, buffer: Any, first_column: Expr, batch: dict[Any, Expr]) -> Stmt:
        """Copy a panel of B, with its columns contiguous and zeros past the last column."""
        wide = [(axis, extent) for axis, extent in self.c.k]
        n_known = int_value(self.n.extent)
        exact = n_known is not None and n_known % self.tile.columns == 0

        def at_depth(position: int, values: dict[Any, Expr], flat: Expr) -> Stmt:
            if position < len(wide):
                axis, extent = wide[position]
                return loop(
                    extent, lambda v: at_depth(position + 1, {**values, axis: v}, flat * as_index(extent) + v), name="k"
                )

            def element(column: Expr) -> Stmt:
                n = first_column + column
                value = self.b_at(batch, values, n)
                if not exact:
                    value = tirx.if_then_else(n < self.n.extent, value, zero(self.dtype))
                return store(buffer, [flat, column], value)

            return loop(self.tile.columns, element, "serial", name="column")

        if self._b_is_transposed() and len(wide) == 1:
            axis, extent = wide[0]

            def column_of(column: Expr) -> Stmt:
                n = first_column + column

                def copy(k: Expr) -> Stmt:
                    return store(buffer, [k, column], self.b_at(batch, {axis: k}, n))

                body = loop(extent, copy, name="k")
                if exact:
                    return body
                clear = loop(extent, lambda k: store(buffer, [k, column], zero(self.dtype)), name="k")
                return tirx.IfThenElse(n < self.n.extent, body, clear)

            return loop(self.tile.columns, column_of, name="column")
        return at_depth(0, {}, index(0))

    def _rows(
        self, first_column: Expr, block: Expr, blocks: int, batch: dict[Any, Expr], b: Callable[[Expr, Expr], Expr]
    ) -> Stmt:
        rows, height = self.m.extent, self.tile.rows

        def tiles_per_panel(height: int) -> int:
            known = int_value(rows) if self.direct else None
            if known is None:
                return int(self.direct and height < self.tile.rows)
            return -(-known // (height * blocks))

        def tile_of(height: int, spill: Any) -> Callable[[Expr, Expr], Stmt]:
            tile = Tile(height, self.tile.columns, self.tile.lanes)

            def one(start: Expr, number: Expr) -> Stmt:
                def a(row: Expr, k: Expr) -> Expr:
                    place = {**batch, **self.m.at(start + row, self.m_linear), **self.k.at(k, self.k_linear_a)}
                    return rewrite(self.c.a, place, call=lower_call)

                def finish(acc: list[Any]) -> Stmt:
                    return sequence(each_vector(tile, lambda r, c: store(spill, [index(r), c], load(acc[r], c))), write)

                write = self.store_tile(lambda r, c: load(spill, r, c), height, start, first_column, batch)
                if self.products is None or self.a_rows is None:
                    return accumulate_tile(tile, self.dtype, self.k.extent, a, b, finish)
                panel, depth = without_casts(b(index(0), index(0))), self.k.extent
                # Panels of a packed matrix follow each other; past the end of another one lies nothing of use.
                following = without_casts(b(depth if self.direct else index(0), index(0)))
                return sequence(
                    self.claim_tile(height, start, first_column, batch),
                    self.products.call(
                        tile, self.a_rows.at(batch, start, index(0)), self.a_rows.stride, panel,
                        load(spill, index(0), index(0)), depth, FIRST, following, number,
                        sharing=tiles_per_panel(height),
                    ),
                    write,
                )  # fmt: skip

            return one

        def tiles(height: int, spill: Any) -> Stmt:
            covered = cover(height, spill)
            tile = replace(self.tile, rows=height)
            return self.products.around(tile, covered) if self.products else covered

        def tiles_of_both(parts: RowTiles, spill: Any) -> Stmt:
            share = -(-parts.count // blocks)
            begin = block * index(share) if blocks > 1 else index(0)
            held = tirx.max(minimum(index(share), index(parts.count) - begin), index(0))
            return parts.each(begin, held, lambda t, start, height: tile_of(height, spill)(start, t))

        def turns_of(height: int) -> Callable[[Expr, Expr], Stmt] | None:
            """Computes (from, number of) tiles where these are of tile registers."""
            depth = int_value(self.k.extent)
            if self.products is None or not self.products.uses_tiles or self.a_rows is None or depth is None:
                return None
            a_rows = self.a_rows

            def several(first: Expr, held: Expr, sums: Any) -> Stmt:
                following = without_casts(b(index(depth) if self.direct else index(0), index(0)))
                return in_turns(self, TileRun(
                    height, held, batch, first_column,
                    start=lambda t: minimum((first + t) * index(height), rows - index(height)),
                    sums=lambda t, row, column: load(sums, tirx.floormod(t, index(2)), row, column),
                    rows=lambda t, start, k: a_rows.at(batch, start, k), stride=a_rows.stride, depth=depth,
                    panel=lambda k: without_casts(b(k, index(0))), accumulate=FIRST,
                    wanted=following, part=lambda t: first + t, sharing=tiles_per_panel(height),
                ))  # fmt: skip

            shape = [2, height, self.tile.columns]
            return lambda first, held: scratch(shape, self.dtype, lambda sums: several(first, held, sums), "tiles")

        def cover(height: int, spill: Any) -> Stmt:
            def one_by_one(first: Expr, held: Expr) -> Stmt:
                one = tile_of(height, spill)

                def at(t: Expr) -> Stmt:
                    return bind(minimum((first + t) * height, rows - height), lambda start: one(start, t), "row")

                return loop(held, at, name="tile") if int_value(rows) != height else one(index(0), index(0))

            several = turns_of(height) or one_by_one
            count = ceil_div(rows, height)
            if blocks == 1:
                return several(index(0), count)
            share = ceil_div(count, blocks)
            begin = block * share
            return several(begin, tirx.max(minimum(begin + share, count) - begin, index(0)))

        def body(spill: Any) -> Stmt:
            if self.windows and self.products:
                return window_rows(self, first_column, block, blocks, batch, b, spill)
            if self.row_tiles is not None:
                return tiles_of_both(self.row_tiles, spill)
            known = int_value(rows)
            if known is not None:
                return tiles(min(height, known), spill)
            # With fewer rows than a tile, at most two lower ones, so that a panel comes from memory once.
            lower = [1 << n for n in range(height.bit_length()) if 1 << n < height] if self.products else [1]
            least = constant_factor(rows)

            def at_most(height: int) -> Stmt:
                # Never fewer rows: TVM's analyser fails on a branch that only a size of 0 could reach.
                if least >= height or height == 1:
                    return tiles(height, spill)
                below = max(h for h in lower if h < height)
                return tirx.IfThenElse(rows >= height, tiles(height, spill), at_most(below))

            return at_most(height)

        if turns_of(height) is not None:
            return body(None)  # they have sums of their own
        return scratch([height, self.tile.columns], self.dtype, body, "tile")

    def store_tile(
        self,
        sums: Callable[[Expr, Expr], Expr],
        rows: Expr | int,
        start: Expr,
        first_column: Expr,
        batch: dict[Any, Expr],
    ) -> Stmt:
        """Apply the epilogue to a finished tile and write it, cutting the columns past the end.

        The tile goes through the first-level cache on its way: that costs a few cycles per tile, and the epilogue is
        generated once instead of once per register.
        """

        def row(r: Expr) -> Stmt:
            def element(column: Expr) -> Stmt:
                place = self.n.at(first_column + column, self.n_linear_out)
                axes = {**batch, **self.m.at(start + r, self.m_linear_out), **place}
                return store_result(self.c, axes, sums(r, column))

            whole = vectors(self.tile.columns, self._lanes_at_once, element)
            known = int_value(self.n.extent)
            if known is not None and known % self.tile.columns == 0:
                return whole
            rest: Expr = index(known % self.tile.columns) if known is not None else self.n.extent - first_column
            cut = vectors(rest, self.tile.lanes, element)
            if known is not None and known < self.tile.columns:
                return cut
            return tirx.IfThenElse(first_column + index(self.tile.columns) <= self.n.extent, whole, cut)

        return loop(rows, row, name="row")

    def claim_tile(self, rows: Expr | int, start: Expr, first_column: Expr, batch: dict[Any, Expr]) -> Stmt:
        """Ask for the lines to which rows of a tile will be written, where rows do not begin with a line.

        Such a line is written in parts, and each part waits for the line; whole lines are written without.
        """
        assert self.products is not None
        products, out = self.products, (self.c.output or self.c.stage).buffer
        lanes = LINE_BYTES // self.machine.element_bytes(str(out.dtype))
        columns = int_value(self.n.extent)
        if columns is None or columns % lanes == 0:
            return nothing()

        def row(r: Expr) -> Stmt:
            def line(number: Expr) -> Stmt:
                place = self.n.at(first_column + number * index(lanes), self.n_linear_out)
                axes = {**batch, **self.m.at(start + r, self.m_linear_out), **place}
                return products.claim(tirx.BufferLoad(*result_place(self.c, axes)))

            return loop(-(-self.tile.columns // lanes) + 1, line, name="line")

        return loop(rows, row, name="row")

    @property
    def _lanes_at_once(self) -> int:
        """Lanes of the epilogue's vectors: two registers' where they fit the tile.

        A processor looks at some hundred instructions at a time, as many as a GELU has, each waiting for the one
        before: two of them in turns take 0.85 of the time of one after the other.
        """
        two = 2 * self.tile.lanes
        return two if self.tile.columns % two == 0 else self.tile.lanes

    def _output_accesses(self) -> list[tuple[Any, Any]]:
        c, out = self.c.stage, self.c.output
        if out is None:
            return [(c.buffer, c.axes)]
        back = dict(zip(self.c.places, c.axes, strict=True))
        value = rewrite(out.value, back)
        return [(out.buffer, [back[axis] for axis in out.axes]), *accesses_of(value)]

    def _free(self, axes: list[tuple[Any, Expr]]) -> bool:
        """Whether the output's axes only index buffers, so that an out-of-range inner axis is harmless."""
        out = self.c.output
        if out is None:
            return True
        forward = dict(zip(self.c.stage.axes, self.c.places, strict=True))
        return has_only_loads_as_users(out.value, [(forward[axis], extent) for axis, extent in axes])

    def b_at(self, batch: dict[Any, Expr], k: dict[Any, Expr], n: Expr) -> Expr:
        return rewrite(self.c.b, {**batch, **k, **self.n.at(n, self._n_linear_b())}, call=lower_call)

    def _n_linear_b(self) -> bool:
        if not hasattr(self, "_n_linear_b_cached"):
            self._n_linear_b_cached = self.n.is_linear(accesses_of(self.c.b)) and has_only_loads_as_users(
                self.c.b, self.c.n
            )
        return self._n_linear_b_cached

    def _packed_panels(self) -> PackedPanels | None:
        """Whether B is stored as ``[panels, depth, columns]`` or ``[panels, depth / group, columns, group]``."""
        b = without_casts(self.c.b)
        if not isinstance(b, ir.TensorLoad) or len(self.c.n) != 1 or len(b.source.shape) < 3:
            return None
        if not isinstance(b.indices[-1], tirx.FloorMod):
            return None
        sizes = [int_value(extent) or 0 for extent in b.source.shape]
        if variables_of(b.indices[-1]) & {axis for axis, _ in self.c.n}:
            return PackedPanels(sizes[-1], 1)
        return PackedPanels(sizes[-2], sizes[-1])

    def _b_coefficients(self) -> tuple[int | None, int | None]:
        """Steps of B's position along a column and along k inside a panel; None where not constant or not linear."""
        b = without_casts(self.c.b)
        if not isinstance(b, ir.TensorLoad) or not self.k.is_linear(accesses_of(b)):
            return None, None
        analyzer = Analyzer()
        panel, column, depth = tirx.Var("p", "int64"), tirx.Var("c", "int64"), tirx.Var("k", "int64")
        analyzer.bind(column, ir.Range(0, self.tile.columns))
        analyzer.bind(panel, ir.Range(0, 1 << 30))
        n = panel * index(self.tile.columns) + column
        values = {**self.n.at(n, self._n_linear_b()), **self.k.at(depth, True)}
        indices = [analyzer.simplify(rewrite(i, values)) for i in b.indices]
        position = analyzer.simplify(flat_offset(b.source.shape, indices))
        found = list(detect_linear_equation(position, [column, depth]))
        if len(found) != 3:
            return None, None
        return int_value(analyzer.simplify(found[0])), int_value(analyzer.simplify(found[1]))

    def _reads_b_directly(self) -> bool:
        if self.panels is not None and self.panels.group > 1:
            return self._instruction_set(packs_b=False) is not None
        step, depth_step = self._b_coefficients()
        if step != 1 or (isinstance(self.c.b, tirx.Cast) and self._instruction_set(packs_b=False) is None):
            return False
        if self.panels is not None:
            return True
        n_known, rows = int_value(self.n.extent), int_value(self.m.extent)
        if n_known is None or n_known % self.tile.columns:
            return False
        few_rows = rows is not None and rows <= 2 * self.tile.rows
        narrow = n_known <= self.tile.columns * 2
        return few_rows or narrow or depth_step == self.tile.columns

    def _b_is_transposed(self) -> bool:
        step, depth_step = self._b_coefficients()
        return depth_step == 1 and step != 1
