"""Loops for reductions over sliding windows: depthwise convolutions and pooling.

With channels innermost, a tile is several neighbouring results of a row for a few vectors of channels, all of them
accumulators in registers, so that an element that was loaded serves every window that covers it.  With columns
innermost, it is a few vectors of neighbouring results.  Taps outside of the tensor are left out: for columns when the
code is generated, which gives the tiles at the borders code of their own, for rows by the bounds of the loop over the
rows of a window.  So there are no tests inside, and nothing is padded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm import tirx
from tvm.sym import Analyzer, detect_linear_equation

from trimtab.backends.tvm.codegen.contraction import Axes, Flattener
from trimtab.backends.tvm.codegen.elements import UNROLL
from trimtab.backends.tvm.codegen.epilogue import store_result
from trimtab.backends.tvm.codegen.expression import Expr, as_index, int_value, loads_of, rewrite, variables_of
from trimtab.backends.tvm.codegen.loops import (
    Stmt,
    bind,
    bind_all,
    blocks,
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
        channel, channels: the innermost axis and its extent; where that is the axis of the columns, 1 for the extent.
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
    if guarded is None or len(guarded[1]) != 2:
        return None
    value, places = guarded
    axes = list(zip(stage.axes, stage.extents, strict=True))
    rows, columns = (_sliding(place, size, axes, stage.reduce_axes) for place, size in places)
    channel, channels = stage.axes[-1], int_value(stage.extents[-1])
    if rows is None or columns is None or channels is None or channel.same_as(rows.axis):
        return None
    if rows.tap is columns.tap or None in (int_value(columns.extent), int_value(columns.size)):
        return None
    if factor is not None:
        value = tirx.Mul(value, factor)
    is_plane = channel.same_as(columns.axis)
    widths = set() if is_plane else {_panel_width(access, channel) for access in loads_of(value)} - {0}
    if None in widths or len(widths) > 1:
        return None
    outer = [pair for pair in axes[:-1] if pair[0] not in (rows.axis, columns.axis)]
    panel = next(iter(widths)) or 0 if widths else 0
    channels = 1 if is_plane else channels
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
    steps = [step for term in found if (step := int_value(term)) is not None]
    length = int_value(tap[0][1])
    if len(steps) != 3 or length is None or min(steps[:2]) < 1:
        return None
    stride, dilation, offset = steps
    return Sliding(*own[0], tap[0][0], length, stride, dilation, offset, size)


def _panel_width(access: Any, channel: Any) -> int | None:
    """0 where an access is contiguous along the channels, the panels' width where they are in panels, else None."""
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


def window_kernel(window: Window, machine: Machine) -> WindowKernel:
    """The kernel for the axis that lies innermost."""
    is_plane = window.channel.same_as(window.columns.axis)
    return PlaneKernel(window, machine) if is_plane else WindowKernel(window, machine)


class WindowKernel:
    """Generates the loops of one reduction over windows with channels innermost, and of its epilogue."""

    def __init__(self, window: Window, machine: Machine) -> None:
        self.w = window
        self.machine = machine
        self.dtype = str(window.stage.buffer.dtype)
        self.row, self.size = _known(window.columns.extent), _known(window.columns.size)
        accumulators = max(rows * vectors for rows, vectors in machine.tiles)
        tiles = -(-self.row // min(accumulators, _WIDEST_TILE))
        self.width = -(-self.row // tiles)
        self.blocks = self._blocks(-(-machine.chains // self.width), max(1, accumulators // self.width))

    @property
    def is_short(self) -> bool:
        """Whether the code has a reasonable length."""
        return self.width * self.w.columns.taps * self.blocks[0].vectors <= _LONGEST_CODE

    def _blocks(self, least: int, most: int) -> list[_Block]:
        """The channels in groups of ``least`` to ``most`` full vectors, and the rest in fewer and in narrower ones."""
        lanes = self.machine.lanes(self.dtype)
        if self.w.panel:
            lanes = min(lanes, self.w.panel)
        count = self.w.channels // lanes
        sizes = range(min(least, most), most + 1) if count > most else [max(count, 1)]
        vectors = min(sizes, key=lambda size: (count % size, size))
        blocks, start = [], 0
        for many, width in [(vectors, lanes), *((1, lanes >> n) for n in range(lanes.bit_length()))]:
            count = (self.w.channels - start) // (many * width)
            if count:
                blocks.append(_Block(start, count, many, width))
            start += count * many * width
        return blocks

    def generate(self) -> Stmt:
        """The whole kernel, parallel over the outer axes, bands of rows, and parts of the channels.

        A band has at least as many rows as a window where that is possible: the next one reads those at its end again.
        """
        w = self.w
        outer = Flattener(w.outer)
        height, wanted = int_value(w.rows.extent), 3 * self.machine.threads
        images = int_value(outer.extent) or 1
        bands = min(-(-wanted // images), max(1, height // w.rows.taps) if height is not None else wanted)
        parts = min(-(-wanted // (images * bands)), self.blocks[0].count)

        def task(flat: Expr) -> Stmt:
            part, rest = tirx.floormod(flat, index(parts)), tirx.floordiv(flat, index(parts))
            band, image = tirx.floormod(rest, index(bands)), tirx.floordiv(rest, index(bands))
            rows, share = _part(band, bands, as_index(w.rows.extent)), outer.at(image, linear=False)
            return bind_all(share, lambda at: self._channels(at, part, parts, rows), "at")

        known = [int_value(extent) for extent in (outer.extent, w.rows.extent)]
        work = math.prod([extent or 1 for extent in known]) * self.row * w.channels * w.rows.taps * w.columns.taps
        kind = "serial" if None not in known and work < self.machine.serial_work else "parallel"
        return loop(outer.extent * index(bands * parts), task, kind, "task")

    def _channels(self, at: dict[Any, Expr], part: Expr, parts: int, rows: tuple[Expr, Expr]) -> Stmt:
        """One task: the groups of channels of a part, one after the other for the rows of a band."""

        def groups(block: _Block) -> Stmt:
            begin, end = _part(part, parts, index(block.count))
            size = index(block.vectors * block.lanes)

            def group(n: Expr) -> Stmt:
                return bind(
                    index(block.start) + (begin + n) * size, lambda c: self._band(block, c, rows, at), "channel"
                )

            return loop(end - begin, group, name="group")

        return sequence(*map(groups, self.blocks))

    def _band(self, block: _Block, channel: Expr, rows: tuple[Expr, Expr], at: dict[Any, Expr]) -> Stmt:
        first, end = rows

        def with_tile(tile: Any) -> Stmt:
            def row(n: Expr) -> Stmt:
                return bind(first + n, lambda y: self._row(block, {**at, self.w.rows.axis: y}, channel, tile), "row")

            return loop(end - first, row, name="row")

        return scratch([self.width, block.vectors * block.lanes], self.dtype, with_tile, "tile")

    def _row(self, block: _Block, at: dict[Any, Expr], channel: Expr, tile: Any) -> Stmt:
        """A row of results. The last tile ends at the last one and may overlap the tile before it."""
        starts = [*range(0, self.row - self.width, self.width), self.row - self.width]
        taps = [self._taps(start) for start in starts]
        whole = max(taps, key=len)
        inner = [n for n, start in enumerate(starts) if taps[n] == whole and start == n * self.width]

        def tile_at(start: Expr, inside: Sequence[tuple[int, int]]) -> Stmt:
            return self._tile(block, at, start, channel, inside, tile)

        def alone(numbers: Iterable[int]) -> list[Stmt]:
            return [tile_at(index(starts[n]), taps[n]) for n in numbers]

        first, end = (inner[0], inner[-1] + 1) if inner else (0, 0)
        middle = loop(end - first, lambda n: tile_at((n + index(first)) * index(self.width), whole), name="x")
        return sequence(*alone(range(first)), middle, *alone(range(end, len(starts))))

    def _taps(self, start: int) -> list[tuple[int, int]]:
        """(result of the tile, tap) for all taps inside of the tensor, in the order of the elements that they read."""
        c = self.w.columns

        def place(pair: tuple[int, int]) -> int:
            return (start + pair[0]) * c.stride + pair[1] * c.dilation + c.offset

        pairs = itertools.product(range(self.width), range(c.taps))
        return sorted((pair for pair in pairs if 0 <= place(pair) < self.size), key=place)

    def _tile(
        self,
        block: _Block,
        at: dict[Any, Expr],
        start: Expr,
        channel: Expr,
        inside: Sequence[tuple[int, int]],
        tile: Any,
    ) -> Stmt:
        """Neighbouring results from the column ``start`` on: sums in registers, then the epilogue."""
        w, lanes = self.w, block.lanes
        combiner, initial = w.stage.combine, w.stage.init

        def each(body: Callable[[Expr], Stmt]) -> Stmt:
            """``body(n)`` for the channels of a group."""
            return sequence(*(lanes_of(index(v * lanes), lanes, body) for v in range(block.vectors)))

        def with_sums(sums: list[Any]) -> Stmt:
            if len(sums) < self.width:
                # A buffer per result: TVM keeps only small ones on the stack, and LLVM turns only those into registers.
                return scratch([block.vectors * lanes], self.dtype, lambda sum: with_sums([*sums, sum]), "sum")

            def step(tap: Expr, p: int, t: int) -> Stmt:
                place = {**at, w.columns.axis: start + index(p), w.rows.tap: tap, w.columns.tap: index(t)}

                def add(n: Expr) -> Stmt:
                    operand = rewrite(w.value, {**place, w.channel: channel + n}, call=lower_call)
                    return store(sums[p], [n], combine(combiner, load(sums[p], n), operand))

                return each(add)

            return sequence(
                *(each(lambda n, sum=sum: store(sum, [n], initial)) for sum in sums),  # type: ignore[misc]
                self._window_rows(at[w.rows.axis], lambda tap: sequence(*(step(tap, p, t) for p, t in inside))),
                *(each(lambda n, p=p: store(tile, [index(p), n], load(sums[p], n))) for p in range(self.width)),  # type: ignore[misc]
            )

        def finish(p: Expr) -> Stmt:
            place = {**at, w.columns.axis: start + p}
            return each(lambda n: store_result(w, {**place, w.channel: channel + n}, load(tile, p, n)))

        return sequence(with_sums([]), loop(self.width, finish, name="result"))

    def _window_rows(self, y: Expr, body: Callable[[Expr], Stmt]) -> Stmt:
        """``body(tap)`` for the rows of a window that lie in the tensor."""
        r = self.w.rows
        height, size = int_value(r.extent), int_value(r.size)
        known = height is not None and size is not None
        if known and 0 <= r.offset < size - (height - 1) * r.stride - (r.taps - 1) * r.dilation:  # type: ignore[operator]
            return loop(r.taps, body, name="tap")
        top = y * index(r.stride) + index(r.offset)
        step = index(r.dilation)
        low = tirx.max(index(0), tirx.floordiv(step - index(1) - top, step))
        high = minimum(index(r.taps), tirx.floordiv(as_index(r.size) - top + step - index(1), step))
        return bind(low, lambda first: loop(
            tirx.max(high - first, index(0)), lambda n: body(first + n), name="tap"), "first")  # fmt: skip


def _part(number: Expr, parts: int, extent: Expr) -> tuple[Expr, Expr]:
    """Begin and end of a part of ``range(extent)``; the lengths of all parts differ by at most one."""
    if parts == 1:
        return index(0), extent
    return tirx.floordiv(number * extent, index(parts)), tirx.floordiv((number + index(1)) * extent, index(parts))


def _known(extent: Expr) -> int:
    value = int_value(extent)
    assert value is not None
    return value


class PlaneKernel(WindowKernel):
    """The same with columns innermost: vectors of neighbouring results, and those at the borders one by one."""

    def __init__(self, window: Window, machine: Machine) -> None:
        super().__init__(window, machine)
        self.width, self.blocks = 1, [_Block(0, 1, UNROLL, machine.lanes(self.dtype))]

    @property
    def is_short(self) -> bool:
        taps = self.w.columns.taps
        borders = sum(len(self._taps(start)) < taps for start in range(self.row))
        return (borders + UNROLL) * taps <= _LONGEST_CODE

    def _row(self, block: _Block, at: dict[Any, Expr], channel: Expr, tile: Any) -> Stmt:
        taps = [self._taps(start) for start in range(self.row)]
        inner = [start for start, inside in enumerate(taps) if len(inside) == self.w.columns.taps]
        first, end = (inner[0], inner[-1] + 1) if inner else (0, 0)

        def results(start: Expr, count: int, inside: Sequence[tuple[int, int]]) -> Stmt:
            lanes = min(count, block.lanes)
            # The axis of the columns is also the one along which vectors run.
            return self._tile(_Block(0, 1, count // lanes, lanes), at, start, start, inside, tile)

        def alone(starts: Iterable[int]) -> list[Stmt]:
            return [results(index(start), 1, taps[start]) for start in starts]

        whole = blocks(end - first, block.vectors * block.lanes,
                       lambda start, count: results(index(first) + start, count, taps[first]))  # fmt: skip
        return sequence(*alone(range(first)), whole, *alone(range(end, self.row)))
