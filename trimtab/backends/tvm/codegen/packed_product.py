"""Products of the rows of one matrix with another one that the same kernel packs into panels first.

The packed matrix lies panel after panel, each ``[depth, columns]``; panels may be of different width.  The tiles are
computed by micro-kernels, and in loops of TIR for the types that have none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import ir, tirx

from trimtab.backends.tvm.codegen.expression import Expr, as_index, int_value
from trimtab.backends.tvm.codegen.loops import (
    Stmt,
    ceil_div,
    index,
    lanes_of,
    load,
    loop,
    minimum,
    sequence,
    store,
)
from trimtab.backends.tvm.codegen.machine import Machine
from trimtab.backends.tvm.codegen.register_tile import Tile, accumulate_tile, each_vector
from trimtab.backends.tvm.codegen.tile_product import TileProducts, row_stride

Element = Callable[[Expr, Expr], Expr]
"""The element of a matrix at (row, column)."""


class PackedProduct:
    """Packs and multiplies for one kernel.

    Args:
        dtype: type of the sums.

    Attributes:
        stored: type of both factors in memory.
        columns: of a whole panel.
        rows: the most rows of a tile.
    """

    def __init__(self, machine: Machine, dtype: str) -> None:
        self.dtype = self.stored = dtype
        self.lanes = machine.lanes(dtype)
        isa = machine.instruction_set("f32", None) if dtype == "float32" else None
        self.kernels = TileProducts(isa, "f32") if isa is not None else None
        self.rows, vectors = machine.tiles[0]
        self.columns = vectors * self.lanes

    def panels(self, extent: Expr, equal: bool = False) -> list[tuple[Expr, Expr, int]]:
        """The panels that cover ``extent`` columns, as runs of (first column, number, columns of each).

        Args:
            equal: make the last one as wide as the others.
        """
        known = int_value(extent)
        if known is None or equal:
            return [(index(0), ceil_div(extent, self.columns), self.columns)]
        whole, rest = divmod(known, self.columns)
        width = -(-rest // self.lanes) * self.lanes
        if width == self.columns:
            whole, width = whole + 1, 0
        runs = [(index(0), index(whole), self.columns), (index(whole * self.columns), index(1), width)]
        return [run for run in runs if int_value(run[1]) and run[2]]

    def stride_in_place(self, element: Element) -> Expr | None:
        """Elements from row to row where a tile can read the rows of a matrix in place, else None."""
        read = element(index(0), index(0))
        if not isinstance(read, ir.TensorLoad) or str(read.source.dtype) != self.stored:
            return None
        return row_stride(element)

    def pack_transposed(
        self, packed: Any, rows: Expr, depth: Expr, element: Element, panels: list[tuple[Expr, Expr, int]]
    ) -> Stmt:
        """Copy a matrix of ``rows`` x ``depth`` so that its rows are the columns of ``panels``.

        What is past the last row repeats it.
        """
        stride = self.stride_in_place(element)
        last = as_index(rows) - index(1)
        by_blocks = stride is not None and (int_value(depth) or 0) >= self.lanes

        def block(first: Expr, columns: int, begin: Expr) -> Stmt:
            """``lanes`` columns from the row ``first`` on, of a panel that has their first elements at ``begin``."""
            start = minimum(first, last)
            if self.kernels is not None and by_blocks:
                return self.kernels.transpose(
                    element(start, index(0)), stride, tirx.max(as_index(rows) - first, index(1)), as_index(depth),
                    load(packed, begin), index(columns)
                )  # fmt: skip

            def column(c: Expr) -> Stmt:
                row = minimum(first + c, last)
                return loop(depth, lambda d: store(packed, [begin + d * index(columns) + c], element(row, d)), name="d")

            return loop(self.lanes, column, name="column")

        def panel(first: Expr, columns: int) -> Stmt:
            begin = first * as_index(depth)
            blocks = columns // self.lanes
            return loop(
                blocks,
                lambda b: block(first + b * index(self.lanes), columns, begin + b * index(self.lanes)),
                name="block",
            )

        def run(first: Expr, count: Expr, columns: int) -> Stmt:
            return loop(count, lambda n: panel(first + n * index(columns), columns), name="panel")

        return sequence(*(run(*one) for one in panels))

    def pack(self, packed: Any, depth: Expr, columns: int, element: Element) -> Stmt:
        """Copy a matrix of ``depth`` x ``columns`` into panels, with zeros past the last column."""

        def row(d: Expr, first: int, width: int) -> Stmt:
            begin = index(first) * as_index(depth) + d * index(width)
            inside = min(width, columns - first)
            whole = inside // self.lanes * self.lanes

            def copy(c: Expr) -> Stmt:
                return store(packed, [begin + c], element(d, index(first) + c))

            def clear(c: Expr) -> Stmt:
                return store(packed, [begin + c], tirx.const(0, self.stored))

            return sequence(
                loop(whole // self.lanes, lambda v: lanes_of(v * index(self.lanes), self.lanes, copy), name="vector"),
                loop(inside - whole, lambda c: copy(index(whole) + c), name="c"),
                loop(width - inside, lambda c: clear(index(inside) + c), name="c"),
            )

        def panel(first: int, width: int) -> Stmt:
            return loop(depth, lambda d: row(d, first, width), name="d")

        return sequence(*(panel(*one) for one in self.known_panels(columns)))

    def known_panels(self, columns: int) -> list[tuple[int, int]]:
        """First column and width of every panel of a matrix with a known number of columns."""
        return [
            (int(first) + n * width, width)
            for first, count, width in self.panels(index(columns))
            for n in range(int(count))
        ]

    def multiply(
        self, tile: tuple[int, int], a: Element, stride: Expr, packed: Any, begin: Expr, depth: Expr,
        c: Any, at: list[Expr], pitch: Expr, accumulate: Expr,
    ) -> Stmt:  # fmt: skip
        """A tile of the product: overwrite it in ``c``, or add to it where ``accumulate`` is 1.

        Args:
            tile: its rows and columns.
            a: rows that lie ``stride`` elements apart in memory, their columns contiguous.
            begin: where the panel, or the part of it from which the rows of A start, begins in ``packed``.
            at: the place of the tile's first element in ``c``, ``pitch`` elements from row to row.
        """
        rows, columns = tile
        shape = Tile(rows, columns, self.lanes)
        if self.kernels is not None:
            panel = load(packed, begin)
            return self.kernels.call(
                shape, a(index(0), index(0)), stride, panel, load(c, *at), depth, accumulate, panel, index(0), pitch
            )

        def finish(sums: list[Any]) -> Stmt:
            def put(r: int, column: Expr) -> Stmt:
                place = [*at[:-2], at[-2] + index(r), at[-1] + column]
                adds = tirx.NE(accumulate, tirx.const(0, "int32"))
                before = tirx.Select(adds, load(c, *place), tirx.const(0, self.dtype))
                return store(c, place, before + load(sums[r], column))

            return each_vector(shape, put)

        return accumulate_tile(
            shape, self.dtype, depth, a, lambda k, column: load(packed, begin + k * index(columns) + column), finish
        )

    def link(self, body: Stmt) -> Stmt:
        """``body`` with the code of what it calls."""
        return self.kernels.link(body) if self.kernels is not None else body
