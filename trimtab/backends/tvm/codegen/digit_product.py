"""Products of f32 with weights of 4 and 8 bits by instructions that multiply bytes.

The rows of the first factor are converted to digits of a byte (:mod:`trimtab.backends.tvm.microkernels.fixed_point`)
before the panels are passed.
"""

from __future__ import annotations

from typing import Any

from tvm import ir, tirx

from trimtab.backends.tvm.codegen.contraction import Contraction
from trimtab.backends.tvm.codegen.expression import Expr, constant_factor, int_value
from trimtab.backends.tvm.codegen.gemm import ContractionKernel
from trimtab.backends.tvm.codegen.loops import (
    Stmt,
    bind,
    ceil_div,
    index,
    load,
    loop,
    minimum,
    scratch,
    sequence,
)
from trimtab.backends.tvm.codegen.machine import Machine
from trimtab.backends.tvm.codegen.register_tile import Tile
from trimtab.backends.tvm.codegen.scaled_panels import ScaledPanels
from trimtab.backends.tvm.codegen.tile_product import pointer_to
from trimtab.backends.tvm.microkernels import fixed_point_conversion, fixed_point_kernel
from trimtab.backends.tvm.microkernels.fixed_point import DIGITS, SUM_WORDS, has_fixed_point, most_fixed_point_rows

_WORD = 4


class DigitProduct(ContractionKernel):
    """Generates the loops. The rows of the first factor must be contiguous, and the weights lie by quads."""

    def __init__(self, contraction: Contraction, machine: Machine, panels: ScaledPanels) -> None:
        self.stored = panels
        self.isa = next(isa for isa in machine.instruction_sets if has_fixed_point(isa))
        self.code: dict[str, str] = {}
        super().__init__(contraction, machine)

    def _choose_tile(self) -> Tile:
        columns, lanes, known = self.stored.columns, self.isa.lanes, int_value(self.m.extent)
        most = most_fixed_point_rows(columns // lanes)
        return Tile(most if known is None else -(-known // -(-known // most)), columns, lanes)

    def generate(self) -> Stmt:
        """Conversion of all rows, then all panels of weights in parallel."""
        rows, depth = self.m.extent, int(self.k.extent)
        groups = depth // self.stored.group
        # All buffers that are passed by address are of one type, as TVM's storage planning wants it.
        sizes = {"digits": DIGITS * depth // _WORD, "sums": SUM_WORDS * groups}
        batch = {axis: index(0) for axis, _ in self.c.batch}
        panels = ceil_div(self.n.extent, self.tile.columns)

        def with_rows(digits: Any, sums: Any) -> Stmt:
            def convert(row: Expr) -> Stmt:
                assert self.a_rows is not None
                name, self.code[name] = self._conversion()
                return tirx.Evaluate(tirx.call_extern(
                    "int32", name, pointer_to(self.a_rows.at(batch, row, index(0)), "r"),
                    pointer_to(load(digits, row, index(0)), "w"), pointer_to(load(sums, row, index(0)), "w"),
                    index(groups), index(self.stored.group),
                ))  # fmt: skip

            known = int_value(rows)
            few = known is not None and known * depth < self.machine.serial_work
            blocks = self._row_blocks(index(1), panels)

            def task(flat: Expr) -> Stmt:
                panel, block = tirx.floordiv(flat, index(blocks)), tirx.floormod(flat, index(blocks))
                return bind(panel, lambda p: self._tiles(p, block, blocks, digits, sums, batch), "panel")

            return sequence(
                loop(rows, convert, "serial" if few else "parallel", "row"),
                loop(panels * index(blocks), task, "parallel", "task"),
            )

        body = scratch([rows, sizes["digits"]], self.dtype, lambda digits: scratch(
            [rows, sizes["sums"]], self.dtype, lambda sums: with_rows(digits, sums), "sums"), "digits")  # fmt: skip
        for text in self.code.values():
            body = tirx.AttrStmt(index(0), "pragma_import_llvm", ir.StringImm(text), body)
        return body

    def _conversion(self) -> tuple[str, str]:
        return fixed_point_conversion(self.isa)

    def _tiles(self, panel: Expr, block: Expr, blocks: int, digits: Any, sums: Any, batch: dict[Any, Expr]) -> Stmt:
        """All rows, or a block of them, by one panel."""
        rows, height = self.m.extent, self.tile.rows

        def cover(height: int, spill: Any) -> Stmt:
            count = ceil_div(rows, height)
            share = ceil_div(count, blocks)
            first = block * share if blocks > 1 else index(0)
            held = tirx.max(minimum(share, count - first), index(0)) if blocks > 1 else count

            def tile(t: Expr) -> Stmt:
                start = minimum((first + t) * index(height), rows - index(height))
                return bind(start, lambda s: self._tile(height, s, panel, digits, sums, spill, batch), "row")

            return loop(held, tile, name="tile")

        def body(spill: Any) -> Stmt:
            if int_value(rows) is not None or constant_factor(rows) >= height:
                return cover(height, spill)
            return tirx.IfThenElse(rows >= index(height), cover(height, spill), cover(1, spill))

        return scratch([height, self.tile.columns], self.dtype, body, "tile")

    def _tile(
        self, height: int, start: Expr, panel: Expr, digits: Any, sums: Any, spill: Any, batch: dict[Any, Expr]
    ) -> Stmt:
        stored, depth = self.stored, int(self.k.extent)
        name, text = fixed_point_kernel(
            self.isa, stored.kind.partition("*")[2], height, self.tile.columns, stored.zero_kind
        )
        self.code[name] = text
        at = [panel, index(0), index(0)]
        scales = pointer_to(load(stored.scales, *at), "r")
        weight = load(stored.weight.source, *at, index(0))
        row_bytes = [int(buffer.shape[1]) * _WORD for buffer in (digits, sums)]
        call = tirx.Evaluate(tirx.call_extern(
            "int32", name, pointer_to(load(digits, start, index(0)), "r"), index(row_bytes[0]),
            pointer_to(load(sums, start, index(0)), "r"), index(row_bytes[1]), pointer_to(weight, "r"),
            pointer_to(load(spill, index(0), index(0)), "rw"), index(self.tile.columns),
            index(depth // stored.group), index(stored.group), scales,
            scales if stored.zeros is None else pointer_to(load(stored.zeros, *at), "r"),
        ))  # fmt: skip
        first_column = panel * index(self.tile.columns)
        write = self.store_tile(lambda r, c: load(spill, r, c), height, start, first_column, batch)
        return sequence(call, write)
