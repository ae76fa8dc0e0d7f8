"""Products whose first factor is too large for the second-level cache: the depth is covered part by part.

With the whole depth at once, the rows of A leave the cache while one panel of B passes, and come back for the next.  A
part of them stays, at the price that the sums of a few panels go to memory and back once per part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tvm import tirx

from trimtab.backends.tvm.codegen.expression import Expr, int_value
from trimtab.backends.tvm.codegen.loops import Stmt, index, load, loop, minimum, scratch, sequence
from trimtab.backends.tvm.codegen.tile_product import SHORT, without_casts
from trimtab.ir.dtypes import DType

if TYPE_CHECKING:
    from trimtab.backends.tvm.codegen.gemm import ContractionKernel

PANELS_TOGETHER = 4
"""Most panels whose sums are kept."""
DEPTH_STEP = 64
"""Parts of the depth are multiples of this, as the micro-kernels of narrow types want them."""


def depth_part(kernel: ContractionKernel) -> int:
    """Depth to take at a time so that the rows of A stay in the cache while panels pass; 0 for all at once."""
    rows, depth = int_value(kernel.m.extent), int_value(kernel.k.extent)
    if kernel.products is None or kernel.a_rows is None or kernel.panels is None or kernel.c.batch:
        return 0
    if rows is None or depth is None:
        return 0
    room = kernel.machine.cache_bytes // 2 // (DType(SHORT[kernel.a_rows.dtype]).bits // 8)
    if rows <= 2 * kernel.tile.rows or rows * depth <= room:
        return 0
    count = -(-rows * depth // room)
    return -(-depth // (count * DEPTH_STEP)) * DEPTH_STEP


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
