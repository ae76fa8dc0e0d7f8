"""Products whose first factor is too large for the second-level cache: rows or depth are covered part by part.

With all rows at once, A leaves the cache while one panel of B passes, and comes back for the next.  A block of rows
stays while all panels pass.  Where rows are so long that few of them would stay, and each panel would be read for a few
tiles only, a part of the depth of all rows stays instead, at the price that the sums of a few panels go to memory and
back once per part.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any

from tvm import tirx

from trimtab.backends.tvm.codegen.expression import Expr, int_value
from trimtab.backends.tvm.codegen.loops import Stmt, ceil_div, index, load, loop, minimum, scratch, sequence
from trimtab.backends.tvm.codegen.tile_product import SHORT, without_casts
from trimtab.ir.dtypes import DType

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
    """Depth to take at a time so that the rows of A stay in the cache while panels pass; 0 for all at once."""
    parts, depth = _parts_of_cache(kernel), int_value(kernel.k.extent)
    if parts == 1 or depth is None or row_blocks(kernel) > 1:
        return 0
    return -(-depth // (parts * DEPTH_STEP)) * DEPTH_STEP


def _parts_of_cache(kernel: ContractionKernel) -> int:
    """Into how many parts A must be divided to leave half of the cache to the rest."""
    rows, depth = int_value(kernel.m.extent), int_value(kernel.k.extent)
    if kernel.products is None or kernel.a_rows is None or kernel.panels is None or kernel.c.batch:
        return 1
    if rows is None or depth is None or rows <= 2 * kernel.tile.rows:
        return 1
    room = kernel.machine.cache_bytes // 2 // (DType(SHORT[kernel.a_rows.dtype]).bits // 8)
    return -(-rows * depth // room)


def product_by_parts(kernel: ContractionKernel, step: int) -> Stmt:
    """A few panels per task; each ``step`` of the depth is added to the sums of all of them before the next one."""
    assert kernel.products is not None
    assert kernel.a_rows is not None
    products, a_rows, tile = kernel.products, kernel.a_rows, kernel.tile
    rows, depth = int(kernel.m.extent), int(kernel.k.extent)
    panels, tiles = -(-int(kernel.n.extent) // tile.columns), -(-rows // tile.rows)
    threads = kernel.machine.threads
    # Threads get equal numbers of tasks if that is possible.
    together = max(range(1, PANELS_TOGETHER + 1), key=lambda held: (-(-panels // held) % threads == 0, held))

    def start_of(t: Expr) -> Expr:
        return minimum(t * index(tile.rows), index(rows - tile.rows))

    def task(group: Expr) -> Stmt:
        first = group * index(together)
        held = minimum(index(together), index(panels) - first)

        def place(p: Expr, k: Expr) -> Any:
            return without_casts(kernel.b_at({}, kernel.k.at(k, True), (first + p) * index(tile.columns)))

        def with_sums(sums: Any) -> Stmt:
            def add(k: Expr, length: int, p: Expr) -> Stmt:
                last = tirx.EQ(p + index(1), held)
                wanted = place(tirx.Select(last, index(0), p + index(1)), tirx.Select(last, k + index(step), k))
                return loop(
                    tiles,
                    lambda t: products.call(
                        tile, a_rows.at({}, start_of(t), k), a_rows.stride, place(p, k),
                        load(sums, p, t, index(0), index(0)), index(length),
                        tirx.Cast("int32", k > index(0)), wanted, t,
                    ),
                    name="tile",
                )  # fmt: skip

            def write(p: Expr, t: Expr) -> Stmt:
                column = (first + p) * index(tile.columns)
                return kernel.store_tile(lambda r, c: load(sums, p, t, r, c), tile.rows, start_of(t), column, {})

            def part(k: Expr, length: int) -> Stmt:
                return loop(held, lambda p: add(k, length, p), name="panel")

            # Two loops rather than a length that depends on the part: LLVM then knows how often its loops run.
            parts = [loop(depth // step, lambda block: part(block * index(step), step), name="block")]
            if depth % step:
                parts.append(part(index(depth // step * step), depth % step))
            return sequence(
                products.around(tile, sequence(*parts)),
                loop(held, lambda p: loop(tiles, lambda t: write(p, t), name="tile"), name="panel"),
            )

        return scratch([together, tiles, tile.rows, tile.columns], kernel.dtype, with_sums, "sums")

    return loop(-(-panels // together), task, "parallel", "task")
