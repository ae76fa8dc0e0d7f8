"""Loops for reductions over sliding windows, depthwise convolutions and pooling, of tensors whose channels lie innermost.

A tile is several neighbouring results of a row for a few vectors of channels, all of them accumulators in registers, so
that an element that was loaded serves every window that covers it.  Taps outside of the tensor are left out: for
columns when the code is generated, which gives the tiles at the borders code of their own, for rows by the bounds of
the loop over the rows of a window.  So there are no tests inside, and nothing is padded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm import ir, tirx
from tvm.sym import Analyzer, detect_linear_equation

from trimtab.backends.tvm.codegen.contraction import Axes, Flattener
from trimtab.backends.tvm.codegen.epilogue import store_result
from trimtab.backends.tvm.codegen.expression import Expr, as_index, dtype_of, int_value, loads_of, rewrite, variables_of
from trimtab.backends.tvm.codegen.loops import (
    Stmt,
    bind,
    bind_all,
    floor_div,
    index,
    lanes_of,
    load,
    loop,
    minimum,
    scratch,
    sequence,
    store,
)
from trimtab.backends.tvm.codegen.machine import Machine
from trimtab.backends.tvm.codegen.program import Stage
from trimtab.backends.tvm.codegen.rows import combine
from trimtab.backends.tvm.codegen.vector_math import lower_call

_WIDEST_TILE = 16
"""Neighbouring results of a row in a tile: more would save few loads."""
_LONGEST_CODE = 1024
"""Vector operations in the loop over the rows of a window."""


@dataclass(frozen=True)
class Sliding:
    """A spatial axis: the window of result i covers the elements ``i * stride + t * dilation + offset``, t < taps.

    Attributes:
        axis, extent: of the result.
        tap, taps: the reduction axis and its extent.
        size: of what the windows cover.
    """

    axis: Any
    extent: Expr
    tap: Any
    taps: int
    stride: int
    dilation: int
    offset: int
    size: Expr


@dataclass
class Window:
    """A reduction over windows found in a stage.

    Attributes:
        stage: the reduction.
        outer: axes other than those below.
        rows, columns: the spatial axes; all about the columns is known.
        channel, channels: the innermost axis and its extent.
        panel: channels in a panel of the weights; 0 without such.
        value: the operand, for places inside of the tensor.
        output, places: as in :class:`~trimtab.backends.tvm.codegen.contraction.Contraction`.
    """

    stage: Stage
    outer: Axes
    rows: Sliding
    columns: Sliding
    channel: Any
    channels: int
    panel: int
    value: Expr
    output: Stage | None = None
    places: list[Any] = field(default_factory=list)


def find_window(stage: Stage) -> Window | None:
    """The windows that a stage reduces, or None."""
    if not stage.is_reduction or len(stage.axes) < 3 or len(stage.reduce_axes) != 2:
        return None
    read, factor = (stage.value.a, stage.value.b) if isinstance(stage.value, tirx.Mul) else (stage.value, None)
    guarded = _without_guard(read, stage.init)
    if guarded is None:
        return None
    value, bounds = guarded
    axes = list(zip(stage.axes, stage.extents, strict=True))
    sliding = [_sliding(place, size, axes, stage.reduce_axes) for place, size in bounds]
    if len(sliding) != 2 or None in sliding or len({s.tap for s in sliding if s}) != 2:
        return None
    rows, columns = sliding
    channel, channels = stage.axes[-1], int_value(stage.extents[-1])
    known = None not in (channels, int_value(columns.extent), int_value(columns.size))
    if channel in (rows.axis, columns.axis) or not known:
        return None
    if factor is not None:
        value = tirx.Mul(value, factor)
    widths = {_panel_width(load, channel) for load in loads_of(value)} - {0}
    if None in widths or len(widths) > 1:
        return None
    outer = [(axis, extent) for axis, extent in axes[:-1] if axis not in (rows.axis, columns.axis)]
    panel = widths.pop() if widths else 0
    return Window(stage, outer, rows, columns, channel, channels, panel, value, places=stage.axes)


def _without_guard(expr: Expr, init: Expr) -> tuple[Expr, list[tuple[Expr, Expr]]] | None:
    """What a guarded read gives inside of the tensor, and each guarded place with the extent it must stay below.

    None where outside of the tensor it gives anything but what the reduction starts from, which changes nothing.
    """
    places: dict[Any, Expr] = {}
    bounds: list[tuple[Expr, Expr]] = []
    while isinstance(expr, tirx.Let):
        clamped = expr.value  # max(0, min(place, extent - 1))
        if not (isinstance(clamped, tirx.Max) and isinstance(clamped.b, tirx.Min) and int_value(clamped.a) == 0):
            return None
        places[expr.var] = clamped.b.a
        bounds.append((clamped.b.a, Analyzer().simplify(clamped.b.b + index(1))))
        expr = expr.body
    if not isinstance(expr, tirx.Select) or _conjuncts(expr.condition) != 2 * len(bounds):
        return None
    if getattr(expr.false_value, "value", None) != getattr(init, "value", math.nan):
        return None
    return rewrite(expr.true_value, places), bounds


def _conjuncts(condition: Expr) -> int:
    return _conjuncts(condition.a) + _conjuncts(condition.b) if isinstance(condition, tirx.And) else 1


def _sliding(place: Expr, size: Expr, axes: Axes, taps: Axes) -> Sliding | None:
    """How a place moves with one axis of the result and one of the window, or None where it is not so."""
    used = variables_of(place)
    own = [pair for pair in axes if pair[0] in used]
    tap = [pair for pair in taps if pair[0] in used]
    if len(own) != 1 or len(tap) != 1:
        return None
    found = list(detect_linear_equation(Analyzer().simplify(place), [own[0][0], tap[0][0]]))
    steps, length = [int_value(step) for step in found], int_value(tap[0][1])
    if len(steps) != 3 or None in steps or length is None or min(steps[:2]) < 1:
        return None
    return Sliding(*own[0], tap[0][0], length, *steps, size)


def _panel_width(access: Any, channel: Any) -> int | None:
    """0 where an access is contiguous along the channels, the panel's width where it is in panels of them, else None."""
    *others, last = access.indices
    if last.same_as(channel):
        return None if channel in variables_of(*others) else 0
    if isinstance(last, tirx.FloorMod) and last.a.same_as(channel):
        return int_value(last.b)
    return None


@dataclass(frozen=True)
class _Block:
    """Consecutive groups of channels: ``count`` of ``vectors`` vectors of ``lanes``, from the channel ``start`` on."""

    start: int
    count: int
    vectors: int
    lanes: int


class WindowKernel:
    """Generates the loops of one reduction over windows and its epilogue."""

    def __init__(self, window: Window, machine: Machine) -> None:
        self.w = window
        self.machine = machine
        self.dtype = str(window.stage.buffer.dtype)
        width, accumulators = int(int_value(window.columns.extent) or 0), max(r * v for r, v in machine.tiles)
        tiles = -(-width // min(accumulators, _WIDEST_TILE))
        self.width = -(-width // tiles)
        self.blocks = self._blocks(max(1, min(-(-machine.chains // self.width), accumulators // self.width)))

    @property
    def is_short(self) -> bool:
        """Whether the code has a reasonable length."""
        return self.width * self.w.columns.taps * self.blocks[0].vectors <= _LONGEST_CODE

    def _blocks(self, vectors: int) -> list[_Block]:
        """The channels in groups of ``vectors`` full vectors, and the rest in fewer and in narrower ones."""
        lanes = min(self.machine.lanes(self.dtype), self.w.panel or math.inf)
        sizes = [(vectors, lanes), *((1, lanes >> n) for n in range(int(lanes).bit_length()))]
        blocks, start = [], 0
        for many, width in sizes:
            count = (self.w.channels - start) // (many * width)
            if count:
                blocks.append(_Block(start, count, many, int(width)))
            start += count * many * width
        return blocks

    def generate(self) -> Stmt:
        """The whole kernel, parallel over the outer axes, groups of channels and (when those are few) bands of rows."""
        w = self.w
        outer = Flattener(w.outer)
        groups = sum(block.count for block in self.blocks)
        tasks = groups * (int_value(outer.extent) or 1)
        threads, height = self.machine.threads, int_value(w.rows.extent)
        even = tasks >= 3 * threads or tasks % threads == 0
        bands = 1 if even or height is None else max(1, min(-(-3 * threads // tasks), height))

        def task(flat: Expr) -> Stmt:
            band, rest = (tirx.floormod(flat, index(bands)), tirx.floordiv(flat, index(bands))) if bands > 1 else (
                index(0), flat)  # fmt: skip
            group = tirx.floormod(rest, index(groups)) if groups > 1 else index(0)
            at = outer.at(floor_div(rest, groups), linear=False)
            return bind(group, lambda g: bind_all(at, lambda bound: self._groups(g, band, bands, bound), "outer"), "group")

        known = [int_value(e) for e in (outer.extent, w.rows.extent, w.columns.extent)]
        work = None if None in known else math.prod(known) * w.channels * w.rows.taps * w.columns.taps  # type: ignore[arg-type]
        kind = "serial" if work is not None and work < self.machine.serial_work else "parallel"
        return loop(outer.extent * index(groups * bands), task, kind, "task")

    def _groups(self, group: Expr, band: Expr, bands: int, at: dict[Any, Expr]) -> Stmt:
        """The group of channels with a number, whichever block it belongs to."""
        ends = list(itertools.accumulate(block.count for block in self.blocks))

        def one(position: int) -> Stmt:
            block, end = self.blocks[position], ends[position]
            size = index(block.vectors * block.lanes)
            channel = index(block.start) + (group - index(end - block.count)) * size
            body = bind(channel, lambda c: self._band(block, c, band, bands, at), "channel")
            return body if end == ends[-1] else tirx.IfThenElse(group < index(end), body, one(position + 1))

        return one(0)

    def _band(self, block: _Block, channel: Expr, band: Expr, bands: int, at: dict[Any, Expr]) -> Stmt:
        height = as_index(self.w.rows.extent)
        share = tirx.floordiv(height + index(bands - 1), index(bands))
        first = band * share

        def rows(tile: Any) -> Stmt:
            def row(i: Expr) -> Stmt:
                return bind(first + i, lambda y: self._row(block, channel, y, at, tile), "row")

            return loop(height if bands == 1 else tirx.max(minimum(share, height - first), index(0)), row, name="row")

        return scratch([self.width, block.vectors * block.lanes], self.dtype, rows, "tile")

    def _row(self, block: _Block, channel: Expr, y: Expr, at: dict[Any, Expr], tile: Any) -> Stmt:
        """A row of results. Tiles that overlap the one before them write the same results again."""
        w, width = self.w, self.width
        extent = int(int_value(w.columns.extent) or 0)
        starts = [*range(0, extent - width, width), extent - width]
        taps = [self._taps(start) for start in starts]
        whole = max(taps, key=len)

        def tile_at(start: Expr, inside: Sequence[tuple[int, int]]) -> Stmt:
            return self._tile(block, channel, y, start, inside, at, tile)

        parts: list[Stmt] = []
        for same, group in itertools.groupby(range(len(starts)), lambda n: taps[n] == whole and starts[n] == n * width):
            members = list(group)
            if not same:
                parts += [tile_at(index(starts[n]), taps[n]) for n in members]
            else:
                first = starts[members[0]]
                parts.append(loop(len(members), lambda n, f=first: tile_at(index(f) + n * index(width), whole), name="x"))
        return sequence(*parts)

    def _taps(self, start: int) -> list[tuple[int, int]]:
        """(result of the tile, tap) for all taps inside of the tensor, in the order of the elements that they read."""
        c, size = self.w.columns, int(int_value(self.w.columns.size) or 0)

        def place(pair: tuple[int, int]) -> int:
            return (start + pair[0]) * c.stride + pair[1] * c.dilation + c.offset

        pairs = itertools.product(range(self.width), range(c.taps))
        return sorted((pair for pair in pairs if 0 <= place(pair) < size), key=place)

    def _tile(
        self, block: _Block, channel: Expr, y: Expr, start: Expr, inside: Sequence[tuple[int, int]],
        at: dict[Any, Expr], tile: Any,
    ) -> Stmt:  # fmt: skip
        w, stage, lanes = self.w, self.w.stage, block.lanes

        def each(body: Any) -> Stmt:
            """``body(column)`` for the vectors of a group of channels."""
            return sequence(*(lanes_of(index(v * lanes), lanes, body) for v in range(block.vectors)))

        def with_sums(sums: list[Any]) -> Stmt:
            if len(sums) < self.width:
                # A buffer per result: TVM keeps only small ones on the stack, and LLVM turns only those into registers.
                return scratch([block.vectors * lanes], self.dtype, lambda sum: with_sums([*sums, sum]), "sum")

            def taps(tap: Expr) -> Stmt:
                def step(p: int, t: int) -> Stmt:
                    place = {**at, w.rows.axis: y, w.columns.axis: start + index(p), w.rows.tap: tap, w.columns.tap: index(t)}

                    def element(c: Expr) -> Stmt:
                        operand = rewrite(w.value, {**place, w.channel: channel + c}, call=lower_call)
                        return store(sums[p], [c], combine(stage.combine, load(sums[p], c), operand))

                    return each(element)

                return sequence(*(step(p, t) for p, t in inside))

            return sequence(
                *(each(lambda c, sum=sum: store(sum, [c], stage.init)) for sum in sums),
                self._window_rows(y, taps),
                *(each(lambda c, p=p: store(tile, [index(p), c], load(sums[p], c))) for p in range(self.width)),
            )

        def finish(p: Expr) -> Stmt:
            place = {**at, w.rows.axis: y, w.columns.axis: start + p}
            return each(lambda c: store_result(w, {**place, w.channel: channel + c}, load(tile, p, c)))

        return sequence(with_sums([]), loop(self.width, finish, name="result"))

    def _window_rows(self, y: Expr, body: Any) -> Stmt:
        """``body(tap)`` for the rows of a window that lie in the tensor."""
        r = self.w.rows
        height, size = int_value(r.extent), int_value(r.size)
        last = None if height is None else (height - 1) * r.stride + (r.taps - 1) * r.dilation + r.offset
        if r.offset >= 0 and size is not None and last is not None and last < size:
            return loop(r.taps, body, name="tap")
        top = y * index(r.stride) + index(r.offset)
        step = index(r.dilation)
        low = tirx.max(index(0), tirx.floordiv(index(r.dilation - 1) - top, step))
        high = minimum(index(r.taps), tirx.floordiv(as_index(r.size) - top + index(r.dilation - 1), step))

        def between(first: Expr) -> Stmt:
            return loop(tirx.max(high - first, index(0)), lambda i: body(first + i), name="tap")

        return bind(low, between, "first")
