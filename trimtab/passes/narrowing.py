"""Computing part of a result: which parts of its operands an op needs for the part of its result along one axis.

Most ops work on each position of most axes by itself.  What they need is declared here, per class of op; a class that
is not declared, or an axis along which elements are mixed, needs everything, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Module, Value
from trimtab.ir.dims import Dim, bounds, mod, product
from trimtab.ir.op import Op
from trimtab.ir.weights import ComputedSource, Weight

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Cut:
    """Positions along an axis that is kept: ``start, start + step, ...`` below ``stop``, or those listed as ``places``.

    :meth:`at` makes one of places; evenly spaced ones become a range.
    """

    start: Dim
    stop: Dim
    step: int = 1
    places: tuple[int, ...] = ()

    @staticmethod
    def at(places: Sequence[int]) -> Cut:
        """The cut of one or more places, in their order."""
        first, step = places[0], (places[1] - places[0] if len(places) > 1 else 1)
        if step > 0 and list(places) == list(range(first, places[-1] + 1, step)):
            return Cut(first, places[-1] + 1, step)
        return Cut(min(places), max(places) + 1, 1, tuple(places))

    @property
    def size(self) -> Dim:
        """How many positions there are."""
        if self.places:
            return len(self.places)
        return (self.stop - self.start + self.step - 1) // self.step

    @property
    def positions(self) -> Sequence[int] | None:
        """All positions, None when they depend on symbols."""
        if self.places:
            return self.places
        if isinstance(self.start, int) and isinstance(self.stop, int):
            return range(self.start, self.stop, self.step)
        return None

    def shifted(self, by: Dim) -> Cut:
        """The same positions counted from ``-by``."""
        if not self.places:
            return Cut(self.start + by, self.stop + by, self.step)
        assert isinstance(by, int)
        return Cut.at([place + by for place in self.places])

    def repeated(self, times: Dim) -> Cut | None:
        """The cut of an axis that is ``times`` as long, of which each position has become that many consecutive ones.
        None when it depends on symbols and cannot be written down."""
        if self.step == 1 and not self.places:
            return Cut(self.start * times, self.stop * times)
        if self.positions is None or not isinstance(times, int) or times < 1:
            return None
        return Cut.at([place * times + i for place in self.positions for i in range(times)])

    def merged(self, times: Dim) -> Cut | None:
        """The inverse of :meth:`repeated`, None when the positions are no such groups."""
        if self.step == 1 and not self.places and mod(self.start, times) == 0 and mod(self.stop, times) == 0:
            return Cut(self.start // times, self.stop // times)
        if self.positions is None or not isinstance(times, int) or times < 1:
            return None
        groups = Cut.at([place // times for place in self.positions[::times]]) if self.positions else None
        again = groups.repeated(times) if groups is not None else None
        return groups if again is not None and again.positions == self.positions else None


def take(build: Builder, value: Value, axis: int, cut: Cut) -> Value:
    """The part of ``value`` along ``axis``.

    Of a weight that has one reader, the op which is being narrowed, this is a new weight; its data is computed when
    asked for.
    """
    if value.is_weight and cut.positions is not None and reader_count(build.module, value) == 1:
        return _part_of_weight(build, value, axis, cut)
    if not cut.places:
        return build(ops.Slice(value, dim=axis, start=cut.start, stop=cut.stop, step=cut.step))
    return build(ops.IndexSelect(value, build.weight("places", _indices(cut.places)), dim=axis))


def reader_count(module: Module, weight: Value) -> int:
    """How many operands, in all graphs, are this weight."""
    return sum(1 for _ in module.readers(weight.weight))


def _part_of_weight(build: Builder, value: Value, axis: int, cut: Cut) -> Value:
    module = build.module
    whole, size = module.weights[value.weight], cut.size
    places = cut.positions
    assert places is not None
    shape = (*whole.type.shape[:axis], size, *whole.type.shape[axis + 1 :])
    source = ComputedSource(lambda: whole.tensor().index_select(axis, _indices(places)))
    id = module.fresh_weight_id(f"{whole.id}.part")
    part = module.add_weight(Weight(id, whole.type.with_shape(*shape), source, trainable=whole.trainable))
    return build.graph.weight(part)


def _indices(places: Sequence[int]) -> torch.Tensor:
    import torch

    return torch.tensor(list(places), dtype=torch.int64)


@dataclass(frozen=True)
class Needs:
    """What an op needs for a part of its result.

    Attributes:
        parts: for each operand the axis and the cut, None for all of it.
        attributes: attributes of the op that change.
        only: the number of an operand whose part is the result, so that no op is needed.
    """

    parts: Sequence[tuple[int, Cut] | None]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    only: int | None = None


def needs(op: Op, axis: int, cut: Cut, module: Module) -> Needs | str:
    """What ``op``, which has one result, needs for the part of it along ``axis``; or why it needs everything."""
    rule = _RULES.get(type(op)) or (_pointwise if op.elementwise else None)
    if rule is None or len(op.results) != 1:
        return f"{op.name} is not known to compute a part of its result by itself"
    return rule(_Question(op, axis, cut, module))


def vanishes(value: Value, axis: int, cut: Cut, module: Module) -> str | None:
    """None when a slice of ``value`` ends in parts of weights, so that nothing is sliced at run time; or why not."""
    if value.is_weight:
        return None
    if value.producer is None:
        return f"%{value.name} is an input"
    if len(value.uses) > 1:
        return f"the result of {value.producer.name} is read {len(value.uses)} times"
    found = needs(value.producer, axis, cut, module)
    if isinstance(found, str):
        return found
    parts = zip(value.producer.operands, found.parts, strict=True)
    reasons = (vanishes(operand, *part, module) for operand, part in parts if part is not None)
    return next((reason for reason in reasons if reason is not None), None)


def narrowed(build: Builder, op: Op, found: Needs) -> Value:
    """Build ``op`` on the parts that it needs."""
    if found.only is not None:
        part = found.parts[found.only]
        value = op.operands[found.only]
        return take(build, value, *part) if part is not None else value
    operands = [
        value if part is None else take(build, value, *part)
        for value, part in zip(op.operands, found.parts, strict=True)
    ]
    return build(op.rebuilt(operands, **found.attributes), op.result.name)


# -- the ops -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Question:
    op: Any
    axis: int
    cut: Cut
    module: Module

    @property
    def from_end(self) -> int:
        """How many axes there are from the cut one to the last."""
        return int(self.op.result.type.rank) - self.axis

    def first(self, axis: int, **attributes: Any) -> Needs:
        """The same cut of the first operand along ``axis``, and all of the others."""
        return Needs([(axis, self.cut), *[None] * (len(self.op.operands) - 1)], attributes)

    def mixes(self) -> str:
        return f"{self.op.name} mixes the elements along axis {self.axis}"

    def resized(self) -> tuple[Dim, ...]:
        """The shape of the result with the cut axis as long as the cut."""
        shape = self.op.result.type.shape
        return (*shape[: self.axis], self.cut.size, *shape[self.axis + 1 :])

    def broadcast(self, value: Value, from_end: int | None = None) -> tuple[int, Cut] | None:
        """The part of an operand that is aligned with the result at the last axis and broadcast to it."""
        axis = value.type.rank - (self.from_end if from_end is None else from_end)
        if axis < 0 or (value.type.shape[axis] == 1 and self.op.result.type.shape[self.axis] != 1):
            return None
        return axis, self.cut


_RuleFunction: TypeAlias = Callable[[_Question], "Needs | str"]
_RULES: dict[type[Op], _RuleFunction] = {}


def _narrows(*classes: type[Op]) -> Callable[[_RuleFunction], _RuleFunction]:
    def register(function: _RuleFunction) -> _RuleFunction:
        _RULES.update(dict.fromkeys(classes, function))
        return function

    return register


def _pointwise(q: _Question) -> Needs | str:
    return Needs([q.broadcast(value) for value in q.op.operands])


@_narrows(ops.RotaryEmbedding)
def _rotary(q: _Question) -> Needs | str:
    return q.mixes() if q.from_end == 1 else _pointwise(q)


@_narrows(ops.LayerNorm, ops.RmsNorm)
def _norm(q: _Question) -> Needs | str:
    return q.first(q.axis) if q.from_end > q.op.axes else q.mixes()


@_narrows(ops.GroupNorm, ops.BatchNorm)
def _channel_norm(q: _Question) -> Needs | str:
    inner = isinstance(q.op, ops.BatchNorm) and q.axis > 1
    return q.first(q.axis) if q.axis == 0 or inner else q.mixes()


@_narrows(ops.Softmax, ops.LogSoftmax, ops.Cumsum)
def _along_axis(q: _Question) -> Needs | str:
    return q.mixes() if q.axis == q.op.dim else q.first(q.axis)


@_narrows(ops.Flip, ops.Roll)
def _along_axes(q: _Question) -> Needs | str:
    return q.mixes() if q.axis in q.op.dims else q.first(q.axis)


@_narrows(ops.Pad)
def _pad(q: _Question) -> Needs | str:
    return q.mixes() if q.op.before[q.axis] or q.op.after[q.axis] else q.first(q.axis)


@_narrows(ops.Sum, ops.Mean, ops.Prod, ops.Amax, ops.Amin, ops.Any, ops.All)
def _reduction(q: _Question) -> Needs | str:
    if q.op.keepdim:
        return q.mixes() if q.axis in q.op.dims else q.first(q.axis)
    return q.first([axis for axis in range(q.op.x.type.rank) if axis not in q.op.dims][q.axis])


@_narrows(ops.Permute)
def _permute(q: _Question) -> Needs | str:
    return q.first(q.op.dims[q.axis])


@_narrows(ops.Full)
def _full(q: _Question) -> Needs | str:
    return Needs([], {"shape": q.resized()})


@_narrows(ops.Expand)
def _expand(q: _Question) -> Needs | str:
    return Needs([q.broadcast(q.op.x)], {"shape": q.resized()})


@_narrows(ops.Reshape)
def _reshape(q: _Question) -> Needs | str:
    own, shape, axis = q.op.x.type.shape, q.op.shape, q.axis
    if 0 in own:
        return "it has no elements"
    before = product(shape[:axis])
    # The axis of x before which there are as many elements, and not one of size 1 that could be any.
    place = next((i for i in range(len(own)) if product(own[:i]) == before and (own[i] != 1 or shape[axis] == 1)), None)
    if place is None:
        return q.mixes()
    if own[place] == shape[axis]:
        return q.first(place, shape=q.resized())
    cut = None
    if mod(own[place], shape[axis]) == 0:
        cut = q.cut.repeated(own[place] // shape[axis])
    elif mod(shape[axis], own[place]) == 0:
        cut = q.cut.merged(shape[axis] // own[place])
    return q.mixes() if cut is None else Needs([(place, cut)], {"shape": q.resized()})


@_narrows(ops.Slice)
def _slice(q: _Question) -> Needs | str:
    if q.axis != q.op.dim:
        return "it is a slice along another axis"
    start, step, positions = q.op.start, q.op.step, q.cut.positions
    if step == 1 and (isinstance(start, int) or not q.cut.places):
        return Needs([(q.axis, q.cut.shifted(start))], only=0)
    if isinstance(start, int) and positions:
        return Needs([(q.axis, Cut.at([start + place * step for place in positions]))], only=0)
    return "it is a slice whose positions depend on symbols"


@_narrows(ops.Concat)
def _concat(q: _Question) -> Needs | str:
    if q.axis != q.op.dim:
        return Needs([(q.axis, q.cut)] * len(q.op.values))
    start: Dim = 0
    for number, value in enumerate(q.op.values):
        size = value.type.shape[q.axis]
        if bounds(q.cut.start - start)[0] >= 0 and bounds(start + size - q.cut.stop)[0] >= 0:
            if q.cut.places and not isinstance(start, int):
                return "the positions lie behind a part of unknown size"
            parts: list[tuple[int, Cut] | None] = [None] * len(q.op.values)
            own = q.cut.shifted(-start)
            parts[number] = None if own == Cut(0, size) else (q.axis, own)
            return Needs(parts, only=number)
        start = start + size
    return "the positions lie in several parts of a concat"


@_narrows(ops.Embedding)
def _embedding(q: _Question) -> Needs | str:
    return q.mixes() if q.from_end == 1 else Needs([None, (q.axis, q.cut)])


@_narrows(ops.Linear)
def _linear(q: _Question) -> Needs | str:
    weight, bias = q.op.weight, q.op.bias
    if weight.type.rank == 1 or q.from_end > 1:
        return q.first(q.axis)  # one output has no axis of its own
    if not weight.is_weight or (bias is not None and not bias.is_weight):
        return "the rows of a computed matrix would be copied"
    if q.cut.positions is None:
        return "the rows to keep depend on symbols"
    for value in (weight, bias):
        if value is not None and (count := reader_count(q.module, value)) > 1:
            return f"the weight @{value.weight} is read {count} times"
    return Needs([None, (0, q.cut)] if bias is None else [None, (0, q.cut), (0, q.cut)])


@_narrows(ops.Matmul)
def _matmul(q: _Question) -> Needs | str:
    x, y = q.op.x, q.op.y
    rows, columns = int(x.type.rank > 1), int(y.type.rank > 1)
    if q.from_end == 1 and columns:
        return Needs([None, (y.type.rank - 1, q.cut)])
    if q.from_end == 1 + columns and rows:
        return Needs([(x.type.rank - 2, q.cut), None])
    batch = q.from_end - rows - columns
    return Needs([_batch_part(q, x, batch + 2), _batch_part(q, y, batch + 2)])


def _batch_part(q: _Question, value: Value, from_end: int) -> tuple[int, Cut] | None:
    return q.broadcast(value, from_end) if value.type.rank > 2 else None


@_narrows(ops.Attention)
def _attention(q: _Question) -> Needs | str:
    op, cut = q.op, q.cut
    last = {value: value.type.rank - 1 for value in (op.q, op.k, op.v)}
    mask = [] if op.mask is None else [q.broadcast(op.mask)]
    if q.from_end == 1:
        return Needs([None, None, (last[op.v], cut), *[None] * len(mask)])
    if q.from_end == 2:
        queries = [(last[op.q] - 1, cut), None, None, *mask]
        if not op.causal or (cut.start == 0 and cut.step == 1 and not cut.places):
            return Needs(queries)
        if bounds(cut.start - op.k.type.shape[-2])[0] >= -1:
            return Needs(queries, {"causal": False})  # the last queries see all keys
        return "causal attention counts its queries from the first"
    shared = cut
    if q.from_end == 3 and op.q.type.shape[-3] != op.k.type.shape[-3]:
        groups = cut.merged(op.q.type.shape[-3] // op.k.type.shape[-3])
        if groups is None:
            return "the query heads that read one key head stay together"
        shared = groups
    keys = [part and (part[0], shared) for part in map(q.broadcast, (op.k, op.v))]
    return Needs([q.broadcast(op.q), *keys, *mask])
