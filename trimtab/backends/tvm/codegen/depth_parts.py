"""Products whose factors are too large for a cache: rows or depth are covered part by part.

With all rows at once, A leaves the second-level cache while one panel of B passes, and comes back for the next.  A
block of rows stays while all panels pass.  Where rows are so long that few of them would stay, and each panel would be
read for a few tiles only, a part of the depth of all rows stays instead, at the price that the sums of a few panels go
to memory and back once per part.

Tile registers multiply so fast that one of the factors must come from the first-level cache: that part of a panel which
a block of rows passes by before the next part is read.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from math import ceil
from typing import TYPE_CHECKING, Any

from tvm import tirx

from trimtab.backends.tvm.codegen.expression import Expr, int_value
from trimtab.backends.tvm.codegen.loops import Stmt, bind, ceil_div, index, load, loop, minimum, scratch, sequence
from trimtab.backends.tvm.codegen.row_tiles import RowTiles
from trimtab.backends.tvm.codegen.tile_product import without_casts
from trimtab.backends.tvm.codegen.tile_turns import TileRun, in_turns

if TYPE_CHECKING:
    from trimtab.backends.tvm.codegen.gemm import ContractionKernel

PANELS_TOGETHER = 4
"""Most panels whose sums are kept."""
DEPTH_STEP = 64
"""Parts of the depth are multiples of this, as the micro-kernels of narrow types want them."""
LEAST_ROWS = 64
"""Rows that a panel must be read for: with fewer, reading it from memory takes longer than multiplying by it."""
MANY_TASKS = 16
"""With so many tasks for each thread it does not matter that the number of threads does not divide them."""
TILE_PANEL_BYTES = 32 << 10
"""Most of a panel at a time for tile registers: what stays in the first-level cache beside the rows that pass."""


def row_blocks(kernel: ContractionKernel) -> int:
    """Blocks of rows to pass all panels by, one after the other; 1 where A stays in the cache or depth is divided."""
    parts, rows = _parts_of_cache(kernel), int_value(kernel.m.extent)
    if parts == 1 or rows is None or rows < parts * LEAST_ROWS:
        return 1
    panels, threads = ceil_div(kernel.n.extent, kernel.tile.columns), kernel.machine.threads
    known = int_value(panels)
    if known is None:
        return parts
    return next(n for n in count(parts) if n * known % threads == 0 or n * known >= MANY_TASKS * threads)


def depth_part(kernel: ContractionKernel) -> int:
    """Depth to take at a time so that what is read again stays in its cache; 0 for all at once."""
    rows, depth = int_value(kernel.m.extent), int_value(kernel.k.extent)
    if not _divides(kernel) or kernel.products is None or rows is None or depth is None:
        return 0
    parts = 1 if row_blocks(kernel) > 1 else _parts_of_cache(kernel)
    if kernel.products.uses_tiles:
        panel_bytes = depth * kernel.tile.columns * _element_bytes(kernel)
        parts = max(parts, -(-panel_bytes // TILE_PANEL_BYTES))
    return -(-depth // (parts * DEPTH_STEP)) * DEPTH_STEP if parts > 1 and depth > DEPTH_STEP else 0


def _parts_of_cache(kernel: ContractionKernel) -> int:
    """Into how many parts A must be divided to leave half of the cache to the rest."""
    rows, depth = int_value(kernel.m.extent), int_value(kernel.k.extent)
    if not _divides(kernel) or rows is None or depth is None:
        return 1
    return -(-rows * depth * _element_bytes(kernel) // (kernel.machine.cache_bytes // 2))


def _divides(kernel: ContractionKernel) -> bool:
    """Whether the product is of a form, and of so many rows, that dividing it can help."""
    rows = int_value(kernel.m.extent)
    simple = kernel.products is not None and kernel.a_rows is not None and kernel.panels is not None
    return simple and not kernel.c.batch and rows is not None and rows > 2 * kernel.tile.rows


def _element_bytes(kernel: ContractionKernel) -> int:
    assert kernel.a_rows is not None
    return kernel.machine.element_bytes(kernel.a_rows.dtype)


def panels_together(panels: int, threads: int, most: int) -> int:
    """How many panels a task takes: most of those numbers with which the thread of most panels has fewest.

    Threads get equal numbers of tasks, but the last task may have fewer panels: six panels are two tasks of four, of
    which one has two, and then one of two threads computes two thirds.
    """

    def busiest(held: int) -> int:
        tasks = ceil(panels / held)
        return min(panels, ceil(tasks / threads) * held)

    return min(range(1, min(most, panels) + 1), key=lambda held: (busiest(held), -held))


def product_by_parts(kernel: ContractionKernel, step: int) -> Stmt:
    """A few panels per task; each ``step`` of the depth is added to the sums of all of them before the next one."""
    assert kernel.products is not None
    assert kernel.a_rows is not None
    products, a_rows, tile = kernel.products, kernel.a_rows, kernel.tile
    rows, depth = int(kernel.m.extent), int(kernel.k.extent)
    row_tiles = kernel.row_tiles or RowTiles(rows, tile.rows, two_heights=not products.uses_tiles)
    panels, tiles = -(-int(kernel.n.extent) // tile.columns), row_tiles.count
    blocks, threads = row_blocks(kernel), kernel.machine.threads
    tiles_of_block = -(-tiles // blocks)
    # Only where the parts are there for the rows of A does it help to take several panels before the next part.
    most = 1 if blocks > 1 or _parts_of_cache(kernel) == 1 else PANELS_TOGETHER
    together = panels_together(panels, threads, most)
    groups, before_last = -(-panels // together), (depth - 1) // step

    def group_of_panels(block: Expr, group: Expr) -> Stmt:
        first, first_tile = group * index(together), block * index(tiles_of_block)
        held = minimum(index(together), index(panels) - first)
        left = index(tiles) - first_tile
        passing = tirx.max(minimum(index(tiles_of_block), left), index(0)) if blocks > 1 else index(tiles)

        def place(p: Expr, k: Expr) -> Any:
            return without_casts(kernel.b_at({}, kernel.k.at(k, True), (first + p) * index(tile.columns)))

        def with_sums(sums: Any) -> Stmt:
            def write(p: Expr, t: Expr, start: Expr, height: int) -> Stmt:
                column = (first + p) * index(tile.columns)
                return kernel.store_tile(lambda r, c: load(sums, p, t, r, c), height, start, column, {})

            def next_of(p: Expr, k: Expr, length: int) -> Any:
                """The panel to read after panel ``p``, whose part is at ``k``."""
                last = tirx.EQ(p + index(1), held)
                return place(tirx.Select(last, index(0), p + index(1)), tirx.Select(last, k + index(length), k))

            def part(k: Expr, length: int, is_last: bool) -> Stmt:
                def add(p: Expr, t: Expr, start: Expr, height: int) -> Stmt:
                    column = (first + p) * index(tile.columns)
                    claim = kernel.claim_tile(height, start, column, {}) if is_last else None
                    call = products.call(
                        replace(tile, rows=height), a_rows.at({}, start, k), a_rows.stride, place(p, k),
                        load(sums, p, t, index(0), index(0)), index(length),
                        tirx.Cast("int32", k > index(0)), next_of(p, k, length), t, sharing=tiles_of_block,
                    )  # fmt: skip
                    return sequence(claim, call, write(p, t, start, height) if is_last else None)

                def turns(p: Expr) -> Stmt:
                    return in_turns(kernel, TileRun(
                        tile.rows, passing, {}, (first + p) * index(tile.columns),
                        start=lambda t: minimum((first_tile + t) * index(tile.rows), index(rows - tile.rows)),
                        sums=lambda t, row, column: load(sums, p, t, row, column),
                        rows=lambda t, start, inside: a_rows.at({}, start, k + inside), stride=a_rows.stride,
                        depth=length, panel=lambda inside: place(p, k + inside),
                        accumulate=tirx.Cast("int32", k > index(0)), wanted=next_of(p, k, length), part=lambda t: t,
                        sharing=tiles_of_block,
                    ))  # fmt: skip

                def panel(p: Expr) -> Stmt:
                    if is_last and products.uses_tiles:
                        return turns(p)
                    return row_tiles.each(first_tile, passing, lambda t, start, height: add(p, t, start, height))

                return loop(held, panel, name="panel")

            # Two pieces rather than a length that depends on the part: LLVM then knows how often its loops run.
            earlier = loop(before_last, lambda block: part(block * index(step), step, False), name="part")
            last = part(index(before_last * step), depth - before_last * step, True)
            return products.around(tile, sequence(earlier, last))

        return scratch([together, tiles_of_block, tile.rows, tile.columns], kernel.dtype, with_sums, "sums")

    def task(flat: Expr) -> Stmt:
        if blocks == 1:
            return group_of_panels(index(0), flat)
        # All panels pass a block of rows before the next one.
        return bind(
            tirx.floordiv(flat, index(groups)),
            lambda block: group_of_panels(block, tirx.floormod(flat, index(groups))),
            "block",
        )

    return loop(blocks * groups, task, "parallel", "task")
