"""Which register tiles there are for a product on an instruction set, and which are best.

A tile of ``rows`` x ``vectors`` keeps one accumulator per row and vector over the whole depth. During a step it also
needs the vectors of B, the part of one row of A, and what the product itself uses. All of it has to fit the register
file: an accumulator that goes to memory and back in every step costs more than the multiply-add.

Within that limit, more accumulators are better twice over. The multiply-add units stay busy only if there are as many
independent accumulators as they have multiply-adds in flight (latency times units). And the more of them share a load,
the less the loads, of which there are as many per cycle as multiply-adds, stand in the way.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.backends.tvm.microkernels.amx import TileProduct, row_tiles
from trimtab.backends.tvm.microkernels.isa import InstructionSet
from trimtab.backends.tvm.microkernels.products import Product, ScaledProduct

# Each row has a pointer, and x86-64 has sixteen general registers. With more rows than this the pointers go to memory.
_MOST_ROWS = 16
_MOST_VECTORS = 4
_MOST_SETS = 4


@dataclass(frozen=True)
class RegisterTile:
    """``rows`` by ``vectors`` registers of results; a vector has ``isa.lanes`` columns."""

    rows: int
    vectors: int


def registers_needed(product: Product | TileProduct, tile: RegisterTile, sets: int = 1) -> int:
    """Registers that the loop over the depth needs; tile registers for a tile product."""
    if isinstance(product, TileProduct):
        blocks = len(row_tiles(tile.rows))
        return blocks * tile.vectors + blocks + 1
    blocks = -(-tile.rows // product.rows_at_once)
    across = tile.vectors * product.rows_at_once
    # The scaled sums are accumulators of their own.
    kinds = sets + isinstance(product, ScaledProduct)
    # With one multiply-add per row, LLVM lets sums change registers from step to step.
    spare = 4 if across == 1 else 0
    return kinds * blocks * across + product.parts * (across + 1) + product.temporaries + spare


def fits(isa: InstructionSet, kind: str, tile: RegisterTile) -> bool:
    """Whether the tile leaves nothing in memory during the loop over the depth."""
    product = isa.products[kind]
    return tile.rows <= most_rows(product) and registers_needed(product, tile) <= isa.registers


def most_rows(product: Product | TileProduct) -> int:
    """Rows that no tile exceeds, however few its vectors."""
    return 32 if isinstance(product, TileProduct) else _MOST_ROWS


def tallest(isa: InstructionSet, kind: str, vectors: int) -> RegisterTile | None:
    """The tile of most rows for panels of ``vectors``. All smaller numbers of rows fit too, for the last rows."""
    heights = range(most_rows(isa.products[kind]), 0, -1)
    return next((tile for rows in heights if fits(isa, kind, tile := RegisterTile(rows, vectors))), None)


def preferred_tiles(isa: InstructionSet, kind: str) -> tuple[RegisterTile, ...]:
    """The tallest tile of each width that keeps the multiply-add units busy, with the fewest loads for its work first.

    A step loads ``rows`` parts of A and ``vectors`` of B for ``rows * vectors`` multiply-adds.
    """
    candidates = [tile for vectors in range(1, _MOST_VECTORS + 1) if (tile := tallest(isa, kind, vectors))]
    busy = [tile for tile in candidates if tile.rows * tile.vectors >= _chains(isa, kind)]
    return tuple(sorted(busy or candidates, key=lambda tile: _loads(isa.products[kind], tile)))


def good_heights(isa: InstructionSet, kind: str) -> tuple[RegisterTile, ...]:
    """The preferred tiles and those of at least three quarters of their rows, to choose from for a number of rows."""
    return tuple(
        RegisterTile(rows, tile.vectors)
        for tile in preferred_tiles(isa, kind)
        for rows in range(tile.rows, -(-3 * tile.rows // 4) - 1, -1)
    )


def _chains(isa: InstructionSet, kind: str) -> int:
    product = isa.products[kind]
    return (isinstance(product, Product) and product.chains) or isa.chains


def _loads(product: Product | TileProduct, tile: RegisterTile) -> float:
    """Loads per multiply-add."""
    parts_of_a = len(row_tiles(tile.rows)) if isinstance(product, TileProduct) else tile.rows
    return 1 / parts_of_a + 1 / tile.vectors


def accumulator_sets(isa: InstructionSet, kind: str, tile: RegisterTile) -> int:
    """Copies of the accumulators that take turns, so that a small tile has enough of them."""
    product = isa.products[kind]
    sets = 1
    if not isinstance(product, TileProduct):
        while (
            sets < _MOST_SETS
            and sets * tile.rows * tile.vectors < _chains(isa, kind)
            and registers_needed(product, tile, 2 * sets) <= isa.registers
        ):
            sets *= 2
    return sets
