"""Tiles of tile registers in turns: while one is multiplied, the one before it is written.

Multiplying tile registers keeps one unit of the processor busy and few others, and an epilogue keeps the others busy.
One after the other, an epilogue with GELU takes longer than the product.  So the depth of a tile is taken in pieces,
and a few rows of the tile before are written after each of them: the instructions of both lie so close together that
the processor works on them at the same time (docs/design/matrix-products.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvm import tirx

from trimtab.backends.tvm.codegen.expression import Expr
from trimtab.backends.tvm.codegen.loops import Stmt, bind, index, loop, minimum, sequence
from trimtab.backends.tvm.codegen.register_tile import Tile

if TYPE_CHECKING:
    from trimtab.backends.tvm.codegen.gemm import ContractionKernel


@dataclass(frozen=True)
class TileRun:
    """Tiles of the same height that pass a panel.

    Attributes:
        height: rows of a tile.
        held: how many tiles.
        batch: values of the batch axes.
        first_column: of the panel.
        start: the first row of a tile among those of the result, by its number.
        rows: the element at the beginning of a tile's rows of A, by its number, its start and a place of the depth.
        stride: elements from one of these rows to the next.
        sums: the element of the sums at (number of the tile, row, column); those of one tile and of the next are apart.
        depth: to multiply, a multiple of the kernel's step.
        panel: the element at the beginning of the panel, at a place of the depth.
        accumulate: 1 to add to the sums that are there, 0 to overwrite them.
        wanted: the element at the beginning of what will be read after the panel.
        part: which part of that a tile asks for, by its number.
        sharing: how many tiles have the same panel, 0 when that is not known.
        piece: what of the depth to take at a time; 0 for what suits the number of rows.
    """

    height: int
    held: Expr
    batch: dict[Any, Expr]
    first_column: Expr
    start: Callable[[Expr], Expr]
    rows: Callable[[Expr, Expr, Expr], Any]
    stride: Expr
    sums: Callable[[Expr, Expr, Expr], Any]
    depth: int
    panel: Callable[[Expr], Any]
    accumulate: Expr
    wanted: Any
    part: Callable[[Expr], Expr]
    sharing: int
    piece: int = 0


def in_turns(kernel: ContractionKernel, run: TileRun) -> Stmt:
    """Multiply and write the tiles of ``run``."""
    products = kernel.products
    assert products is not None
    width = kernel.tile.columns
    code = products.kernel(Tile(run.height, width, kernel.tile.lanes), run.sharing)
    steps = run.depth // code.depth_step
    together = run.piece // code.depth_step if run.piece else -(-steps // run.height)
    pieces = -(-steps // together)
    rows = -(-run.height // pieces)
    length = together * code.depth_step
    asked, size = products.asked_for(code, index(run.depth)), index(run.depth * width)

    def multiply(t: Expr, start: Expr, k: Expr) -> Stmt:
        left = index(length) if run.depth % length == 0 else minimum(index(length), index(run.depth) - k)
        ahead = tirx.max(minimum(run.part(t) * asked, size - asked), index(0)) + products.asked_for(code, k)
        return products.steps(code, run.rows(t, start, k), run.stride, run.panel(k), left, run.wanted, ahead)

    def write(t: Expr, start: Expr, row: Expr, count: Expr) -> Stmt:
        return kernel.store_tile(
            lambda r, c: run.sums(t, row + r, c), count, start + row, run.first_column, run.batch
        )  # fmt: skip

    def turn(t: Expr) -> Stmt:
        last = tirx.max(t - index(1), index(0))

        def with_starts(start: Expr, start_of_last: Expr) -> Stmt:
            def when_multiplied(statement: Stmt) -> Stmt:
                return tirx.IfThenElse(t < run.held, statement, None)

            def piece(number: Expr) -> Stmt:
                row = number * index(rows)
                count = tirx.max(minimum(index(rows), index(run.height) - row), index(0))
                claim = kernel.claim_tile(count, start + row, run.first_column, run.batch)
                multiplied = sequence(claim, multiply(t, start, number * index(length)))
                written = write(last, start_of_last, row, count)
                return sequence(when_multiplied(multiplied), tirx.IfThenElse(t > index(0), written, None))

            sums, stride = run.sums(t, index(0), index(0)), index(width)
            return sequence(
                when_multiplied(products.begin(code, sums, stride, run.accumulate)),
                loop(pieces, piece, name="piece"),
                when_multiplied(products.end(code, sums, stride)),
            )

        return bind(run.start(t), lambda start: bind(run.start(last), lambda s: with_starts(start, s), "last"), "row")

    return loop(run.held + index(1), turn, name="turn")
