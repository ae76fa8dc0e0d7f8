"""Rows covered by register tiles of two heights, so that no row is computed twice.

A number of rows that the height of a tile does not divide takes as many tiles as if it were rounded up, but the last
ones are a row lower: 145 rows are 20 tiles of 6 and 5 of 5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx

from trimtab.backends.tvm.codegen.expression import Expr
from trimtab.backends.tvm.codegen.loops import Stmt, bind, index, loop, minimum, sequence
from trimtab.backends.tvm.codegen.tile_product import TileProducts
from trimtab.backends.tvm.microkernels.tiles import tallest


@dataclass(frozen=True)
class RowTiles:
    """``rows`` as tiles of ``height`` rows.

    Where the last ones would have to be more than a row lower, they have that height too and begin so early that they
    end at the last row.  So they do without ``two_heights``, as tile registers want it: their height is configured once
    for all.
    """

    rows: int
    height: int
    two_heights: bool = True

    @property
    def count(self) -> int:
        """All tiles."""
        return -(-self.rows // self.height)

    @property
    def lower(self) -> int:
        """How many of the last tiles are a row lower."""
        missing = self.count * self.height - self.rows
        possible = self.two_heights and missing <= self.count and self.height > 1 and self.rows > self.height
        return missing if possible else 0

    @property
    def repeats_rows(self) -> bool:
        """Whether some rows are computed twice."""
        return self.count * self.height - self.lower > self.rows

    def each(self, first: Expr, held: Expr, body: Callable[[Expr, Expr, int], Stmt]) -> Stmt:
        """``body(t, start, height)`` for ``held`` tiles from tile number ``first`` on.

        ``t`` counts from 0, and ``start`` is the tile's first row.
        """
        tall, height, last = index(self.count - self.lower), index(self.height), index(self.rows - self.height)
        if not self.lower:

            def any_tile(t: Expr) -> Stmt:
                return bind(minimum((first + t) * height, last), lambda start: body(t, start, self.height), "row")

            return loop(held, any_tile, name="tile")

        def low_tile(t: Expr) -> Stmt:
            return bind((first + t) * (height - index(1)) + tall, lambda start: body(t, start, self.height - 1), "row")

        def high_tile(t: Expr) -> Stmt:
            return bind((first + t) * height, lambda start: body(t, start, self.height), "row")

        before = tirx.max(minimum(tall - first, held), index(0))
        return sequence(
            loop(before, high_tile, name="tile"),
            loop(tirx.max(held - before, index(0)), lambda t: low_tile(before + t), name="tile"),
        )


def in_two_heights(products: TileProducts | None, rows: int | None, columns: int) -> RowTiles | None:
    """The highest tiles of micro-kernels, of which some are a row lower, where these cover ``rows`` exactly."""
    if products is None or products.uses_tiles or rows is None:
        return None
    highest = tallest(products.isa, products.kind, columns // products.isa.lanes)
    if highest is None or rows <= highest.rows:
        return None
    found = RowTiles(rows, highest.rows)
    return None if found.repeats_rows else found
