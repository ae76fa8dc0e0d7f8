"""Tiles of tile registers in turns: while one is multiplied, the one before it is written.

Multiplying tile registers keeps one unit of the processor busy and nearly no other, and an epilogue keeps the others
busy.  One after the other, an epilogue with GELU takes longer than the product.  So the depth of a tile is taken in
pieces, and a few rows of the tile before are written after each of them: the instructions of both lie so close together
that the processor works on them at the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from trimtab.backends.tvm.codegen.expression import Expr
from trimtab.backends.tvm.codegen.loops import Stmt, index, loop, minimum, sequence
from trimtab.backends.tvm.codegen.register_tile import Tile
from trimtab.backends.tvm.codegen.tile_product import TileProducts


@dataclass(frozen=True)
class TileWork:
    """What a tile multiplies.

    Attributes:
        a, b: the elements at the beginnings of the rows and of the panel, at a place of the depth.
        c: the element at the beginning of the sums.
        wanted, part: what to ask for meanwhile, as for :meth:`TileProducts.call`.
    """

    a: Callable[[Expr], Any]
    b: Callable[[Expr], Any]
    c: Any
    wanted: Any
    part: Expr


def in_turns(
    products: TileProducts, tile: Tile, stride: Expr, depth: int, held: Expr, accumulate: Expr,
    work: Callable[[Expr], TileWork], write: Callable[[Expr, Expr, Expr], Stmt], sharing: int = 0,
) -> Stmt:  # fmt: skip
    """Multiply and write ``held`` tiles.

    Args:
        stride: elements from one row of A to the next.
        depth: of the products, a multiple of the kernel's step.
        accumulate: 1 to add to the sums that are there, 0 to overwrite them.
        work: of a tile, by its number.
        write: (number of a tile, first row, number of rows) writes a part of the tile.
        sharing: how many tiles have the same panel, 0 when that is not known.
    """
    kernel = products.kernel(tile, sharing)
    steps = depth // kernel.depth_step
    together = -(-steps // tile.rows)
    pieces = -(-steps // together)
    rows = -(-tile.rows // pieces)
    length = together * kernel.depth_step
    c_stride, asked = index(tile.columns), products.asked_for(kernel, index(depth))
    size = index(depth * tile.columns)

    def turn(t: Expr) -> Stmt:
        one = work(minimum(t, held - 1))
        ahead = tirx.max(minimum(one.part * asked, size - asked), index(0))

        def when_multiplied(statement: Stmt) -> Stmt:
            return tirx.IfThenElse(t < held, statement, None)

        def piece(number: Expr) -> Stmt:
            k, row = number * index(length), number * index(rows)
            left = index(length) if depth % length == 0 else minimum(index(length), index(depth) - k)
            multiplied = products.steps(
                kernel, one.a(k), stride, one.b(k), left, one.wanted, ahead + products.asked_for(kernel, k)
            )
            held_rows = tirx.max(minimum(index(rows), index(tile.rows) - row), index(0))
            written = write(t - index(1), row, held_rows)
            return sequence(when_multiplied(multiplied), tirx.IfThenElse(t > index(0), written, None))

        return sequence(
            when_multiplied(products.begin(kernel, one.c, c_stride, accumulate)),
            loop(pieces, piece, name="piece"),
            when_multiplied(products.end(kernel, one.c, c_stride)),
        )

    return loop(held + index(1), turn, name="turn")
