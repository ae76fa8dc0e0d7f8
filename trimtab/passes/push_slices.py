"""Computing only what is read: slices are moved in front of the ops that make what they slice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Graph, Module, Value
from trimtab.ir.dims import Dim, evaluate, symbols_of
from trimtab.ir.op import Op
from trimtab.ir.rewrite import Constant, Match, Pattern, Rule, Var, maybe, one_of, op, shared
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.fusion_model import typical_sizes
from trimtab.passes.narrowing import Cut, Needs, narrowed, needs, reader_count, take, vanishes
from trimtab.passes.rewrite_pass import RewritePass

MAX_PLACES = 4096
"""Constant indices of ``index_select`` that are looked at."""


@dataclass(frozen=True)
class PushSlices(RewritePass):
    """Compute only the positions that are read: move slices in front of what makes the sliced value.

    A classifier that reads the class token alone needs queries, projection and MLP of the last block for one token
    instead of all, about 7 % of the multiply-accumulates of ViT-B; a result of a linear of which some features are read
    needs these rows of the weight. A slice moves when nobody reads the rest, and the work saved is more than the copies
    added. Keys and values stay whole. The parts of a split become slices.
    """

    name: ClassVar[str] = "push-slices"
    contract: ClassVar[Contract] = Exact(rounding=True)
    grows_weights: ClassVar[bool] = True  # by the positions of slices that are not evenly spaced

    def rules(self) -> Sequence[Rule]:
        return (SplitPart(), UnreadPositions(), MovedParts(), RowsOfPackedLinear())


class SplitPart(Rule):
    """A part of a split, which is a slice."""

    private = False

    def pattern(self, x: Var) -> Pattern:
        return op.split(x)[...]

    def rewrite(self, m: Match, build: Builder) -> Value:
        split = m.root.producer
        assert isinstance(split, ops.Split)
        start: Dim = 0
        for size in split.sizes[: m.root.index]:
            start = start + size
        return build(ops.Slice(m.x, split.dim, start, start + split.sizes[m.root.index]))


def _slice_of(x: Pattern, indices: Constant) -> Pattern:
    return one_of(op.slice(x), op.select(x), op.index_select(x, indices))


class UnreadPositions(Rule):
    """Slices of a result that nothing else reads: of one part of it, or of parts that leave out its ends."""

    def pattern(self, x: Var, indices: Constant) -> Pattern:
        return _slice_of(x, indices)

    def check(self, m: Match) -> str | None:
        found = _part_read(m)
        if isinstance(found, str):
            return found
        wanted = _worthwhile(m.x, *found, m.module)
        return wanted if isinstance(wanted, str) else None

    def rewrite(self, m: Match, build: Builder) -> Value:
        found = _part_read(m)
        assert not isinstance(found, str)
        axis, cut = found
        part = _compute(build, m.x, axis, cut)
        values = {reader: _piece(build, part, cut, reader) for reader in m.x.users}
        root = _root(m)
        for reader, value in values.items():
            if reader is not root:
                reader.result.replace_all_uses_with(value)
                m.graph.ops.remove(reader)
        return values[root]


class MovedParts(Rule):
    """Slices that together take all of a value which is only moved: each part is moved by itself.

    So slices get in front of the permute and the reshape with which some models unpack q, k and v.
    """

    def pattern(self, x: Var, indices: Constant) -> Pattern:
        return _slice_of(shared(one_of(op.permute(x), op.reshape(x))).bind("moved"), indices)

    def check(self, m: Match) -> str | None:
        readers = _slices_of(m.moved, m)
        if isinstance(readers, str):
            return readers
        for axis, cut in readers.values():
            wanted = needs(m.moved.producer, axis, cut, m.module)
            reason = wanted if isinstance(wanted, str) else _becomes_a_gather(m.moved, cut, wanted, m.module)
            if reason is not None:
                return reason
        return None

    def rewrite(self, m: Match, build: Builder) -> Value:
        root = _root(m)
        axis, cut = _taken(root, m.module)
        return _piece(build, _compute(build, m.moved, axis, cut), cut, root)


class RowsOfPackedLinear(Rule):
    """Some rows of some features of a linear of which the other features are read for all rows.

    The queries of the class token, where the model packs q, k and v: the linear is unpacked.
    """

    def pattern(self, x: Var, w: Constant, b: Constant, indices: Constant) -> Pattern:
        linear = shared(op.linear(x, w, maybe(b)))
        return _slice_of(op.slice(linear.bind("packed"), step=1).bind("features"), indices)

    def check(self, m: Match) -> str | None:
        last = m.packed.type.rank - 1
        features, (axis, rows) = m.features.producer, _taken(_root(m), m.module)
        if m.w.type.rank != 2 or features.dim != last or axis == last:
            return "it does not take rows of features"
        if (count := max(reader_count(m.module, value) for value in (m.w, m.b) if value is not None)) > 1:
            return f"the weights of the linear are read {count} times"
        others = _other_features(m)
        if isinstance(others, str):
            return others
        wanted = _worthwhile(m.packed, axis, rows, m.module)
        return wanted if isinstance(wanted, str) else None

    def rewrite(self, m: Match, build: Builder) -> Value:
        others, root, linear = _other_features(m), _root(m), m.packed.producer
        assert not isinstance(others, str)
        axis, cut = _taken(root, m.module)
        features = Cut(m.features.producer.start, m.features.producer.stop)
        rows = build(_with_features(build, linear, take(build, m.x, axis, cut), features))
        kept = sorted(place for places in others.values() for place in places)
        rest = build.replace(linear, _with_features(build, linear, m.x, Cut.at(kept)))
        for reader, places in others.items():
            if len(places) == len(kept):
                reader.result.replace_all_uses_with(rest.result)
                m.graph.ops.remove(reader)
            else:
                start = kept.index(places[0])
                build.replace(reader, ops.Slice(rest.result, reader.attributes["dim"], start, start + len(places)))
        return _piece(build, rows, cut, root)


def _other_features(m: Match) -> dict[Op, Sequence[int]] | str:
    """The slices of the packed linear beside the one of the match, with the features that they take."""
    readers = _slices_of(m.packed, m, m.packed.type.rank - 1)
    if isinstance(readers, str):
        return readers
    found: dict[Op, Sequence[int]] = {}
    for reader, (_, cut) in readers.items():
        if not isinstance(reader, ops.Slice) or reader.step != 1 or not cut.positions:
            return "the slices of its features have steps or depend on symbols"
        found[reader] = cut.positions
    every = [place for places in found.values() for place in places]
    if len(set(every)) < len(every):
        return "the slices of its features overlap"
    del found[m.features.producer]
    return found or "nothing else reads the linear"


def _with_features(build: Builder, linear: ops.Linear, x: Value, features: Cut) -> ops.Linear:
    bias = linear.bias and take(build, linear.bias, 0, features)
    return ops.Linear(x, take(build, linear.weight, 0, features), bias)


# -- what is read ------------------------------------------------------------------------------------------------


def _root(m: Match) -> Op:
    assert m.root.producer is not None
    return m.root.producer


def _slices_of(x: Value, m: Match, axis: int | None = None) -> dict[Op, tuple[int, Cut]] | str:
    """The readers of ``x`` with what they take, if all are slices along ``axis``, by default that of the root."""
    axis = _root(m).attributes["dim"] if axis is None else axis
    found = {}
    for use in x.uses:
        cut = _taken_at(use.user, axis, m.module)
        if cut is None:
            reader = "the graph's outputs" if isinstance(use.user, Graph) else use.user.name
            return f"what it slices is also read by {reader}"
        assert isinstance(use.user, Op)
        found[use.user] = (axis, cut)
    return found


def _part_read(m: Match) -> tuple[int, Cut] | str:
    """The axis and the part of x that its readers need together, or why that is not a part."""
    readers, root = _slices_of(m.x, m), _root(m)
    if isinstance(readers, str):
        return readers
    if any(reader is not root and reader.is_before(root) for reader in readers):
        return "an earlier slice of the same value comes first"
    (axis, first), *others = readers.values()
    if all(cut == first for _, cut in others):
        return axis, first
    positions = [cut.positions for _, cut in readers.values()]
    if not all(positions):
        return "slices that differ depend on symbols"
    return axis, Cut(min(min(p) for p in positions if p), max(max(p) for p in positions if p) + 1)


def _taken(reader: Op, module: Module) -> tuple[int, Cut]:
    """The axis and the part that a slice takes, which is known to be one."""
    axis: int = reader.attributes["dim"]
    cut = _taken_at(reader, axis, module)
    assert cut is not None
    return axis, cut


def _taken_at(reader: Op | Graph, axis: int, module: Module) -> Cut | None:
    """The part that a slice, a select, or an index_select with a few constant indices takes along ``axis``.

    None for other readers, and where the positions are not known.
    """
    match reader:
        case ops.Slice() if reader.dim == axis:
            return Cut(reader.start, reader.stop, reader.step)
        case ops.Select() if reader.dim == axis:
            return Cut(reader.index, reader.index + 1)
        case ops.IndexSelect() if reader.dim == axis and reader.indices.is_weight:
            return _constant_places(reader, module)
    return None


def _constant_places(reader: ops.IndexSelect, module: Module) -> Cut | None:
    count, size = reader.indices.type.elements, reader.x.type.shape[reader.dim]
    if reader.indices.type.rank > 1 or not isinstance(count, int) or not isinstance(size, int):
        return None
    if not 0 < count <= MAX_PLACES:
        return None
    places = [int(place) for place in module.weights[reader.indices.weight].tensor().reshape(-1)]
    return Cut.at([place % size for place in places]) if all(-size <= place < size for place in places) else None


def _compute(build: Builder, x: Value, axis: int, cut: Cut) -> Value:
    """The part of ``x``, computed by itself."""
    assert x.producer is not None
    wanted = needs(x.producer, axis, cut, build.module)
    assert isinstance(wanted, Needs)
    return narrowed(build, x.producer, wanted)


def _piece(build: Builder, part: Value, cut: Cut, reader: Op) -> Value:
    """What ``reader`` takes, out of the part ``cut`` of the value that it reads."""
    (axis, own), shape = _taken(reader, build.module), reader.result.type.shape
    if own != cut:
        assert isinstance(cut.start, int)
        part = take(build, part, axis, own.shifted(-cut.start))
    return part if part.type.shape == shape else build(ops.Reshape(part, shape=shape))


# -- whether it pays ---------------------------------------------------------------------------------------------


def _becomes_a_gather(x: Value, cut: Cut, wanted: Needs, module: Module) -> str | None:
    """Why ``wanted`` should not take the place of ``cut`` of ``x``: places without a pattern are taken one by one."""
    assert x.producer is not None
    for value, part in zip(x.producer.operands, wanted.parts, strict=True):
        if part is not None and part[1].places and not cut.places and vanishes(value, *part, module) is not None:
            return "the slice would not be one any more under the other shape"
    return None


def _worthwhile(x: Value, axis: int, cut: Cut, module: Module) -> Needs | str:
    """What the producer of ``x`` needs for a part of it; or why the part should not be computed by itself."""
    producer = x.producer
    if producer is None:
        return "there is nothing in front of it to compute less of"
    if cut.size == x.type.shape[axis]:
        return "the slices take everything between them"
    wanted = needs(producer, axis, cut, module)
    reason = wanted if isinstance(wanted, str) else _becomes_a_gather(x, cut, wanted, module)
    if reason is not None:
        return reason
    assert isinstance(wanted, Needs)
    values = (*producer.operands, x)
    sizes = typical_sizes(symbols_of(cut.size).union(*(value.type.symbols for value in values)))

    def number(dim: Dim) -> int:
        return int(evaluate(dim, sizes))

    def elements(value: Value, part: tuple[int, Cut]) -> float:
        return number(value.type.elements) * number(part[1].size) / max(number(value.type.shape[part[0]]), 1)

    # Elements read and written, and products: what is saved of the producer, and what slices in front of it copy.
    kept = number(cut.size) / max(number(x.type.shape[axis]), 1)
    touched = sum(number(value.type.elements) for value in values if not value.is_weight)
    computed = number(producer.macs()) + (0 if isinstance(producer, ops.Reshape) else touched)
    parts = [
        (value, part)
        for value, part in zip(producer.operands, wanted.parts, strict=True)
        if part is not None and not value.is_weight
    ]
    copied = sum(elements(value, part) for value, part in parts)
    if 2 * (copied - elements(x, (axis, cut))) <= computed * (1 - kept):
        return wanted
    if all(vanishes(value, *part, module) is None for value, part in parts):
        return wanted
    return f"slices of all that {producer.name} reads would cost more than it computes in vain"
