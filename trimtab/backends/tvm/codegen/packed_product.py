"""Products of the rows of one matrix with another one that the same kernel packs into panels first.

The packed matrix lies panel after panel, each ``[depth / group, columns, group]``; panels may be of different width.
The ``group`` neighbours are kept as one word, whose bits are stored in a buffer of the type of the sums: TVM's storage
planning wants one type in all buffers that are passed by address.  The tiles are computed by micro-kernels, and in
loops of TIR for the types that have none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import ir, tirx

from trimtab.backends.tvm.codegen.expression import Expr, as_index, int_value
from trimtab.backends.tvm.codegen.loops import (
    Stmt,
    ceil_div,
    floor_div,
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
from trimtab.backends.tvm.codegen.tile_product import TileProducts, row_stride, without_casts
from trimtab.backends.tvm.microkernels import preferred_tiles
from trimtab.backends.tvm.microkernels.amx import TileProduct

Element = Callable[[Expr, Expr], Expr]
"""The element of a matrix at (row, column)."""
_PAIR = 2


class PackedProduct:
    """Packs and multiplies for one kernel.

    Args:
        dtype: type of the sums.
        stored: type in which the factors lie in memory. Those of bfloat16 are multiplied as such where the processor
            can multiply pairs of them, else they are widened when they are copied.
        depth: length of the sums of rows that are read in place, None when it is not known.

    Attributes:
        narrow: whether the factors are bfloat16.
        group: neighbours along the depth in a word of a panel.
        step: depths are multiples of it.
        columns: of a whole panel.
        rows: the most rows of a tile.
    """

    def __init__(self, machine: Machine, dtype: str, stored: str, depth: int | None) -> None:
        self.dtype = dtype
        self.lanes = machine.lanes(dtype)
        is_float = dtype == "float32"
        isa = machine.instruction_set("bf16", depth, _PAIR) if is_float and stored == "bfloat16" else None
        self.narrow = isa is not None
        kind = "bf16" if self.narrow else "f32"
        if isa is None and is_float:
            isa = machine.instruction_set("f32", None)
        self.kernels = TileProducts(isa, kind) if isa is not None else None
        self.group = _PAIR if self.narrow else 1
        found = isa.products[kind] if isa is not None else None
        self.step = found.depth_step if found is not None else 1
        # Tile registers are set up for tiles of one shape.
        self._equal = isinstance(found, TileProduct)
        self.rows, vectors = machine.tiles[0]
        if isa is not None and self.narrow:
            tile = preferred_tiles(isa, kind)[0]
            self.rows, vectors = tile.rows, tile.vectors
        self.columns = vectors * self.lanes

    def panels(self, extent: Expr, equal: bool = False) -> list[tuple[Expr, Expr, int]]:
        """The panels that cover ``extent`` columns, as runs of (first column, number, columns of each).

        Args:
            equal: make the last one as wide as the others.
        """
        known = int_value(extent)
        if known is None or equal or self._equal:
            return [(index(0), ceil_div(extent, self.columns), self.columns)]
        whole, rest = divmod(known, self.columns)
        width = -(-rest // self.lanes) * self.lanes
        if width == self.columns:
            whole, width = whole + 1, 0
        runs = [(index(0), index(whole), self.columns), (index(whole * self.columns), index(1), width)]
        return [run for run in runs if int_value(run[1]) and run[2]]

    def round_row(self, sums: Any, factors: Any, r: Expr, count: Expr) -> Stmt:
        """The first ``count`` sums of a row, at most a vector more, as factors of another product."""
        assert self.kernels is not None
        return self.kernels.round(load(sums, r, index(0)), load(factors, r, index(0)), ceil_div(count, self.lanes))

    def in_place(self, element: Element) -> tuple[Element, Expr] | None:
        """The elements of a factor in memory and the number of them from row to row.

        None where they do not lie in rows of contiguous elements, in the type in which they are multiplied.
        """

        def in_memory(row: Expr, column: Expr) -> Expr:
            value = element(row, column)
            return without_casts(value) if self.narrow else value

        read = in_memory(index(0), index(0))
        if not isinstance(read, ir.TensorLoad) or str(read.source.dtype) != ("bfloat16" if self.narrow else self.dtype):
            return None
        stride = row_stride(in_memory)
        return (in_memory, stride) if stride is not None else None

    def word(self, element: Callable[[Expr], Expr], d: Expr) -> Expr:
        """The ``d``-th word along the depth of the elements, widened ones of bfloat16 when these are paired."""
        if not self.narrow:
            return element(d)
        even, odd = (tirx.reinterpret("uint32", element(d * index(_PAIR) + index(i))) for i in range(_PAIR))
        return tirx.reinterpret(self.dtype, (even >> tirx.const(16, "uint32")) | odd)

    def words_of(self, depth: Expr) -> Expr:
        """Words in a column of that depth, which is brought to a multiple of the step."""
        return ceil_div(depth, self.step) * index(self.step // self.group)

    def pack_transposed(
        self, packed: Any, rows: Expr, depth: Expr, element: Element, panels: list[tuple[Expr, Expr, int]]
    ) -> Stmt:
        """Copy a matrix of ``rows`` x ``depth`` so that its rows are the columns of ``panels``.

        What is past the last row repeats it.
        """
        words, last = floor_div(depth, self.group), as_index(rows) - index(1)
        place = self.in_place(element)
        stride = int_value(place[1]) if place is not None else None
        pitch = place[1] if place is not None and self.group == 1 else None
        if stride is not None and stride % self.group == 0:
            pitch = index(stride // self.group)
        by_blocks = pitch is not None and (int_value(words) or 0) >= self.lanes

        def block(first: Expr, columns: int, begin: Expr) -> Stmt:
            """``lanes`` columns from the row ``first`` on, of a panel that has their first words at ``begin``."""
            if self.kernels is not None and place is not None and by_blocks:
                return self.kernels.transpose(
                    place[0](minimum(first, last), index(0)), pitch, tirx.max(as_index(rows) - first, index(1)),
                    words, load(packed, begin), index(columns),
                )  # fmt: skip

            def column(c: Expr) -> Stmt:
                row = minimum(first + c, last)

                def copy(d: Expr) -> Stmt:
                    return store(
                        packed, [begin + d * index(columns) + c], self.word(lambda channel: element(row, channel), d)
                    )

                return loop(words, copy, name="d")

            return loop(self.lanes, column, name="column")

        def panel(first: Expr, columns: int) -> Stmt:
            begin = first * words
            return loop(
                columns // self.lanes,
                lambda b: block(first + b * index(self.lanes), columns, begin + b * index(self.lanes)),
                name="block",
            )

        def run(first: Expr, count: Expr, columns: int) -> Stmt:
            return loop(count, lambda n: panel(first + n * index(columns), columns), name="panel")

        return sequence(*(run(*one) for one in panels))

    def pack(self, packed: Any, depth: Expr, columns: int, element: Element) -> Stmt:
        """Copy a matrix of ``depth`` x ``columns`` into panels, with zeros past its end."""
        words, last = self.words_of(depth), as_index(depth) - index(1)
        whole_words = floor_div(depth, self.group)

        def row(d: Expr, first: int, width: int, read: Element) -> Stmt:
            begin = index(first) * words + d * index(width)
            inside = min(width, columns - first)
            whole = inside // self.lanes * self.lanes

            def copy(c: Expr) -> Stmt:
                return store(packed, [begin + c], self.word(lambda k: read(k, index(first) + c), d))

            def clear(c: Expr) -> Stmt:
                return store(packed, [begin + c], tirx.const(0, self.dtype))

            return sequence(
                loop(whole // self.lanes, lambda v: lanes_of(v * index(self.lanes), self.lanes, copy), name="vector"),
                loop(inside - whole, lambda c: copy(index(whole) + c), name="c"),
                loop(width - inside, lambda c: clear(index(inside) + c), name="c"),
            )

        def guarded(k: Expr, column: Expr) -> Expr:
            return tirx.Select(k <= last, element(minimum(k, last), column), tirx.const(0, self.dtype))

        def panel(first: int, width: int) -> Stmt:
            return sequence(
                loop(whole_words, lambda d: row(d, first, width, element), name="d"),
                loop(words - whole_words, lambda d: row(whole_words + d, first, width, guarded), name="d"),
            )

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
            begin: the word of ``packed`` at which the panel begins, or the part of it that the rows of A start from.
            depth: a multiple of the step.
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

    def around(self, rows: int, body: Stmt) -> Stmt:
        """``body``, which computes tiles of so many rows, with what the processor needs before and after."""
        return self.kernels.around(Tile(rows, self.columns, self.lanes), body) if self.kernels is not None else body

    def link(self, body: Stmt) -> Stmt:
        """``body`` with the code of what it calls."""
        return self.kernels.link(body) if self.kernels is not None else body
