"""Register tiles: which one suits a product, and loops of TIR that accumulate one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trimtab.backends.tvm.codegen.expression import Expr
from trimtab.backends.tvm.codegen.loops import Stmt, index, load, loop, scratch, sequence, store, zero
from trimtab.backends.tvm.codegen.machine import Machine

NOTICEABLE = 0.04
"""Share of the work that a tile must save to be taken before a preferred one, which loads less per multiply-add."""


@dataclass(frozen=True)
class Tile:
    """Register tile: ``rows`` by ``columns`` accumulators, ``columns`` a multiple of ``lanes``."""

    rows: int
    columns: int
    lanes: int


def choose_tile(
    machine: Machine,
    dtype: str,
    m: int | None,
    n: int | None,
    fixed_columns: int | None = None,
    in_lines: bool = False,
) -> Tile:
    """The tile with the least padded work for ``m`` rows and ``n`` columns, as far as they are known.

    Args:
        fixed_columns: set by a packed operand.
        in_lines: m rows are one line of many, which tiles of nearly equal height cover, and threads share the panels.
    """
    lanes = machine.lanes(dtype)
    best: tuple[float, Tile] | None = None
    for height, vectors_wide in machine.tiles:
        width = vectors_wide * lanes
        if fixed_columns is not None and width != fixed_columns:
            continue
        height = min(height, m) if m is not None else height
        row_cost = -(-m // height) * height / m if m else 1.0
        panels = -(-n // width) if n else 0
        if in_lines and m:
            height, row_cost = nearly_equal_height(m, height), 1.0
            panels = -(-panels // machine.threads) * machine.threads
        column_cost = panels * width / n if n else 1.0
        # Few accumulators leave the multiply units waiting for each other.
        busy = max(1.0, machine.chains / (height * vectors_wide))
        cost = row_cost * column_cost * busy
        if best is None or cost < best[0] - NOTICEABLE:
            best = (cost, Tile(height, width, lanes))
    if best is None:
        height = min(machine.tiles[0][0], m) if m is not None else machine.tiles[0][0]
        width = fixed_columns if fixed_columns is not None else machine.tiles[0][1] * lanes
        return Tile(height, width, min(lanes, width))
    return best[1]


def nearly_equal_height(rows: int, most: int) -> int:
    """The height of the highest of the fewest tiles of at most ``most`` rows, where some are a row lower."""
    return -(-rows // -(-rows // most))


def accumulate_tile(
    tile: Tile,
    dtype: str,
    depth: Expr,
    a: Callable[[Expr, Expr], Expr],
    b: Callable[[Expr, Expr], Expr],
    finish: Callable[[list[Any]], Stmt],
) -> Stmt:
    """``tile.rows x tile.columns`` accumulators summed over ``depth``, then ``finish(accumulators)``.

    Args:
        a: factor at (row of the tile, k).
        b: factor at (k, column of the tile).
        finish: what to do with the sums, one buffer ``[columns]`` per row. It must address them through
            :func:`each_vector`, so that every position is a constant and they stay in registers.
    """

    def with_rows(rows: list[Any]) -> Stmt:
        if len(rows) < tile.rows:
            # One buffer per row, because TVM keeps only small buffers on the stack and LLVM turns only those into
            # registers.
            return scratch([tile.columns], dtype, lambda row: with_rows([*rows, row]), "acc")

        def multiply(k: Expr) -> Stmt:
            return each_vector(tile, lambda r, c: store(rows[r], [c], load(rows[r], c) + a(index(r), k) * b(k, c)))

        return sequence(
            each_vector(tile, lambda r, c: store(rows[r], [c], zero(dtype))),
            loop(depth, multiply, name="k"),
            finish(rows),
        )

    return with_rows([])


def each_vector(tile: Tile, body: Callable[[int, Expr], Stmt]) -> Stmt:
    """``body(row, column)`` for the whole tile as unrolled vector operations."""
    lanes = tile.lanes

    def row(r: int) -> Stmt:
        def vector(v: Expr) -> Stmt:
            return loop(lanes, lambda lane: body(r, v * index(lanes) + lane), "vectorized", "lane")

        return loop(tile.columns // lanes, vector, "unrolled", "v")

    return sequence(*(row(r) for r in range(tile.rows)))
