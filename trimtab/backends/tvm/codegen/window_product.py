"""Products whose first factor lies in memory in pieces: convolutions with channels last.

An output pixel of a convolution reads a window of the image.  With channels last, each row of the window is contiguous,
and windows beside each other begin a fixed number of elements apart.  So a *line* of output pixels is, for each of the
window's rows, the product of strided rows with a part of the panel, and the tile adds these up: nothing is copied to
patches (docs/design/convolutions.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tvm import ir, tirx

from trimtab.backends.tvm.codegen.contraction import Axes, Contraction, Flattener, accesses_of, has_only_loads_as_users
from trimtab.backends.tvm.codegen.expression import Expr, as_index, int_value, rewrite, variables_of
from trimtab.backends.tvm.codegen.loops import (
    Stmt,
    bind,
    bind_all,
    ceil_div,
    divide,
    index,
    load,
    loop,
    minimum,
    scratch,
    sequence,
)
from trimtab.backends.tvm.codegen.register_tile import Tile
from trimtab.backends.tvm.codegen.row_tiles import RowTiles
from trimtab.backends.tvm.codegen.tile_product import row_stride, without_casts
from trimtab.backends.tvm.codegen.tile_turns import TileRun, in_turns

if TYPE_CHECKING:
    from collections.abc import Callable

    from trimtab.backends.tvm.codegen.gemm import ContractionKernel

_FEWEST_ROWS, _SHORTEST_PIECE = 4, 8
"""Shorter lines and pieces do not pay for the calls."""
_BLOCKS = 4
"""Blocks of lines per thread: enough that threads end together."""


@dataclass(frozen=True)
class Windows:
    """The first factor of a contraction as lines of strided rows, and each row as pieces.

    Attributes:
        factor: the factor as an expression of the axes.
        lines, pixels: the outer and the inner axes of the rows.
        pieces, inside: the outer and the inner axes of the depth.
        stride: elements from one row of a line to the next.
    """

    factor: Expr
    lines: Flattener
    pixels: Flattener
    pieces: Flattener
    inside: Flattener
    stride: Expr

    @property
    def rows(self) -> Expr:
        """Rows of a line."""
        return self.pixels.extent

    def at(self, batch: dict[Any, Expr], line: dict[Any, Expr], row: Expr, piece: Expr) -> Any:
        """The first element of a piece of a row."""
        place = {**batch, **line, **self.pixels.at(row, True), **self.pieces.at(piece, False)}
        return rewrite(self.factor, {**place, **self.inside.at(index(0), True)})


def find_windows(contraction: Contraction) -> Windows | None:
    """The windows that the first factor reads; None where it is computed, and where lines and pieces are short."""
    factor = without_casts(contraction.a)
    if not isinstance(factor, ir.TensorLoad) or not contraction.m or not contraction.k:
        return None
    if not has_only_loads_as_users(factor, [*contraction.m, *contraction.k]):
        return None
    lines, pixels = _split(contraction.m, factor)
    pieces, inside = _split(contraction.k, factor)
    rows = int_value(pixels.extent)
    if (rows is not None and rows < _FEWEST_ROWS) or (int_value(inside.extent) or 0) < _SHORTEST_PIECE:
        return None
    if int_value(pieces.extent) is None:
        return None
    fixed = {axis: index(0) for axis, _ in (*lines.axes, *pieces.axes)}
    stride = row_stride(lambda row, k: rewrite(factor, {**fixed, **pixels.at(row, True), **inside.at(k, True)}))
    if stride is None or variables_of(stride) & {axis for axis, _ in contraction.batch}:
        return None
    return Windows(factor, lines, pixels, pieces, inside, stride)


def _split(axes: Axes, factor: Expr) -> tuple[Flattener, Flattener]:
    """The outer axes, and as many inner ones as one index with a fixed step may address."""
    start = next(i for i in range(len(axes)) if Flattener(axes[i:]).is_linear(accesses_of(factor)))
    return Flattener(axes[:start]), Flattener(axes[start:])


def blocks_of_lines(kernel: ContractionKernel, panels: Expr) -> int:
    """Blocks of lines that all panels pass one after the other, where these stay in the cache; else 0.

    Where they do not, each panel passes as many lines as possible, so that it comes from memory once.
    """
    windows = kernel.windows
    assert windows is not None
    lines, across = int_value(windows.lines.extent), int_value(panels)
    if lines is None or across is None or kernel.c.batch or not kernel.direct or not kernel.products:
        return 0
    weights = int(kernel.k.extent) * across * kernel.tile.columns * 4
    return min(lines, _BLOCKS * kernel.machine.threads) if weights <= kernel.machine.cache_bytes // 2 else 0


def window_rows(
    kernel: ContractionKernel,
    first_column: Expr,
    block: Expr,
    blocks: int,
    batch: dict[Any, Expr],
    b: Callable[[Expr, Expr], Expr],
    spill: Any,
) -> Stmt:
    """One panel for a block of lines: for each tile of a line a call of the micro-kernel per piece, then the epilogue.

    Args:
        b: the element of the panel at (k, column).
        spill: buffer for a tile.
    """
    windows = kernel.windows
    assert windows is not None
    rows, height = int_value(windows.rows), kernel.tile.rows
    line = _Line(kernel, windows, first_column, batch, b, spill)
    if rows is not None:
        return line.each(min(height, rows), block, blocks)
    return tirx.IfThenElse(windows.rows >= height, line.each(height, block, blocks), line.each(1, block, blocks))


@dataclass(frozen=True)
class _Line:
    """What the lines of a panel have in common; see :func:`window_rows`."""

    kernel: ContractionKernel
    windows: Windows
    first_column: Expr
    batch: dict[Any, Expr]
    b: Callable[[Expr, Expr], Expr]
    spill: Any

    def each(self, height: int, block: Expr, blocks: int) -> Stmt:
        """All lines of a block, ``height`` rows at a time."""
        products, lines = self.kernel.products, as_index(self.windows.lines.extent)
        assert products is not None
        tile = replace(self.kernel.tile, rows=height)
        share = ceil_div(lines, blocks)
        begin = block * share
        count = tirx.max(minimum(begin + share, lines) - begin, index(0)) if blocks > 1 else lines
        if products.uses_tiles:
            return products.around(tile, self._turns(height, begin, count))

        def one(number: Expr) -> Stmt:
            def at(line: Expr) -> Stmt:
                return bind_all(
                    self.windows.lines.at(line, False), lambda place: self._tiles(tile, line, number, place)
                )

            return bind(begin + number, at, "line")

        return products.around(tile, loop(count, one, name="line"))

    def _turns(self, height: int, first_line: Expr, count: Expr) -> Stmt:
        """``count`` lines with tile registers: sums stay there from piece to piece."""
        windows, rows = self.windows, as_index(self.windows.rows)
        pieces, length = int(windows.pieces.extent), int(windows.inside.extent)
        across, width = ceil_div(rows, height), self.kernel.tile.columns

        def place(t: Expr) -> tuple[Expr, Expr]:
            """The line, and the first pixel in it."""
            line, tile = (t, index(0)) if int_value(across) == 1 else divide(t, across)
            return first_line + line, minimum(tile * index(height), rows - index(height))

        def start(t: Expr) -> Expr:
            line, pixel = place(t)
            return line * rows + pixel

        def at(t: Expr, start: Expr, k: Expr) -> Any:
            line, pixel = place(t)
            piece, _ = divide(k, index(length))
            return windows.at(self.batch, windows.lines.at(line, False), pixel, piece)

        following = self.b(index(pieces * length) if self.kernel.direct else index(0), index(0))
        return scratch([2, height, width], self.kernel.dtype, lambda sums: in_turns(self.kernel, TileRun(
            height, count * across, self.batch, self.first_column, start, at, windows.stride,
            sums=lambda t, row, column: load(sums, tirx.floormod(t, index(2)), row, column),
            depth=pieces * length, panel=lambda k: without_casts(self.b(k, index(0))),
            accumulate=tirx.const(0, "int32"), wanted=without_casts(following), part=lambda t: t, sharing=0,
            piece=length,
        )), "tiles")  # fmt: skip

    def _tiles(self, tile: Tile, line: Expr, number: Expr, place: dict[Any, Expr]) -> Stmt:
        rows, products = as_index(self.windows.rows), self.kernel.products
        tiles = ceil_div(rows, tile.rows)

        def one(t: Expr, start: Expr, height: int) -> Stmt:
            return sequence(
                self._product(replace(tile, rows=height), start, place, number * tiles + t),
                self.kernel.store_tile(
                    lambda r, c: load(self.spill, r, c), height, line * rows + start, self.first_column, self.batch
                ),
            )

        known = int_value(rows)
        if known is not None and products is not None:
            parts = RowTiles(known, tile.rows)
            return parts.each(index(0), index(parts.count), one)

        def at(t: Expr) -> Stmt:
            start = minimum(t * index(tile.rows), rows - index(tile.rows))
            return bind(start, lambda start: one(t, start, tile.rows), "row")

        return loop(tiles, at, name="tile")

    def _product(self, tile: Tile, start: Expr, place: dict[Any, Expr], number: Expr) -> Stmt:
        """Tile ``number`` of the panel: the sum over the pieces."""
        windows, products = self.windows, self.kernel.products
        assert products is not None
        pieces, length = windows.pieces.extent, windows.inside.extent
        following = without_casts(self.b(pieces * length if self.kernel.direct else index(0), index(0)))

        def add(piece: Expr) -> Stmt:
            return products.call(
                tile, windows.at(self.batch, place, start, piece), windows.stride,
                without_casts(self.b(piece * length, index(0))), load(self.spill, index(0), index(0)), length,
                tirx.Cast("int32", piece > index(0)), following, number * pieces + piece,
                size=pieces * length * index(tile.columns),
            )  # fmt: skip

        return loop(pieces, add, name="piece")
