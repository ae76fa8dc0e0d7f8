"""Products of f32 with integers in groups that share a scale: weights of 4 and 8 bits.

Where instructions multiply bytes fast enough, the weights lie in the order that they read, and the first factor is
converted to digits of a byte before.  Elsewhere, for few rows, micro-kernels widen the weights in registers, once for
each tile of rows.  For many rows a panel is widened to f32 once, in scratch that fits a cache, and multiplied as any
other.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from trimtab.backends.tvm.codegen.contraction import Contraction
from trimtab.backends.tvm.codegen.digit_product import DigitProduct
from trimtab.backends.tvm.codegen.expression import Expr, constant_factor, int_value, rewrite
from trimtab.backends.tvm.codegen.gemm import ContractionKernel
from trimtab.backends.tvm.codegen.loops import Stmt, index, load
from trimtab.backends.tvm.codegen.machine import Machine
from trimtab.backends.tvm.codegen.register_tile import Tile, choose_tile
from trimtab.backends.tvm.codegen.scaled_panels import ScaledPanels, scaled_panels
from trimtab.backends.tvm.codegen.tile_product import TileProducts
from trimtab.backends.tvm.microkernels import InstructionSet, microkernel
from trimtab.backends.tvm.microkernels.llvm_text import LINE_BYTES
from trimtab.backends.tvm.microkernels.tiles import tallest

FEW_ROWS = 16
"""Up to so many rows weights are widened for each tile of rows, beyond that once for all of them, into scratch."""


def scaled_product(contraction: Contraction, machine: Machine) -> Stmt:
    """Loops for a contraction whose stage says that its second factor is integers and scales in panels."""
    panels = scaled_panels(contraction)
    many = _ManyRows(contraction, machine, panels)
    rows = many.m.extent
    if many.a_rows is None:
        return many.generate()
    if panels.by_quads:
        return DigitProduct(contraction, machine, panels).generate()
    isa = next((isa for isa in machine.instruction_sets if panels.kind in isa.products), None)
    if isa is None or panels.zeros is not None or constant_factor(rows) > FEW_ROWS:
        return many.generate()
    few = _FewRows(contraction, machine, panels, isa)
    if int_value(rows) is not None:
        return few.generate()
    return tirx.IfThenElse(rows <= index(FEW_ROWS), few.generate(), many.generate())


class _FewRows(ContractionKernel):
    """Reads the integers where they lie."""

    def __init__(self, contraction: Contraction, machine: Machine, panels: ScaledPanels, isa: InstructionSet) -> None:
        self.stored, self.isa = panels, isa
        super().__init__(contraction, machine)

    def _choose_tile(self) -> Tile:
        columns, lanes = self.stored.columns, self.isa.lanes
        highest = tallest(self.isa, self.stored.kind, columns // lanes)
        height, known = highest.rows if highest else 1, int_value(self.m.extent)
        # Tiles of nearly equal height, as they all convert the weights again.
        return Tile(height if known is None else -(-known // -(-known // height)), columns, lanes)

    def _reads_b_directly(self) -> bool:
        return True

    def _micro_kernels(self) -> TileProducts | None:
        return _ScaledProducts(self.isa, self.stored)

    def b_at(self, batch: dict[Any, Expr], k: dict[Any, Expr], n: Expr) -> Expr:
        """The byte that holds the integer."""
        return rewrite(self.stored.weight, {**k, **self.n.at(n, linear=True)})


class _ManyRows(ContractionKernel):
    """Widens a panel for all rows."""

    def __init__(self, contraction: Contraction, machine: Machine, panels: ScaledPanels) -> None:
        self.stored = panels
        super().__init__(contraction, machine)

    def _choose_tile(self) -> Tile:
        rows, columns = int_value(self.m.extent), int_value(self.n.extent)
        return choose_tile(self.machine, self.dtype, rows, columns, self.stored.columns)


class _ScaledProducts(TileProducts):
    """Micro-kernels for integers with scales."""

    def __init__(self, isa: InstructionSet, panels: ScaledPanels) -> None:
        super().__init__(isa, panels.kind)
        self.panels = panels

    def call(
        self, tile: Tile, a: Any, stride: Expr, b: Any, c: Any, depth: Expr, accumulate: Expr, wanted: Any, part: Expr,
        c_stride: Expr | None = None, sharing: int = 0, size: Expr | None = None,
    ) -> Stmt:  # fmt: skip
        kernel = microkernel(self.isa, self.kind, tile.rows, tile.columns, sharing)
        steps = int(depth) // kernel.prefetch_depth if kernel.prefetch_depth else 0
        ahead = part * index(steps * kernel.prefetch_lines * LINE_BYTES)
        scales = load(self.panels.scales, b.indices[0], index(0), index(0))
        return self.call_kernel(
            kernel, a, stride, b, c, index(tile.columns) if c_stride is None else c_stride, depth, accumulate,
            wanted, ahead, scales, index(self.panels.group),
        )  # fmt: skip
