"""Rewriting a graph so that there are fewer tokens from some places on.

One walk over the ops in execution order.  Every value that has a row for each token is replaced by one with fewer rows,
at the *epoch*, the number of reductions so far, that its operands have reached.  An operand that is behind, such as a
mask that does not pass through the places, is taken through the reductions that it missed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from trimtab.errors import PassError
from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Module, Value
from trimtab.ir.dead_code import remove_dead_ops
from trimtab.ir.dims import product
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op
from trimtab.passes.tokens.axis import Axis, Effect, follow
from trimtab.passes.tokens.rows import span
from trimtab.passes.tokens.steps import Step
from trimtab.passes.tokens.stream import Layer, Stream


@dataclass(frozen=True)
class Place:
    """Where a reduction is to be made, and what is known there. Shapes: N are the tokens that are left here.

    Attributes:
        build: puts ops right behind the place.
        number: of the layer.
        depth: how many layers there are.
        layer: the layer, in the original graph.
        x: the tokens ``[B, N, C]``.
        protected: how many leading tokens must stay in front.
        sizes: ``[B, N, 1]``, how many tokens each stands for, 0 for padding; None where all stand for themselves.
        key_mask: ``[B, 1, 1, N]``, what attention masks these tokens with as keys, floating or bool; None for nothing.
        padded: whether the model masks keys itself, so that some tokens may be padding.
        present: what stands for a value of the original graph here.
    """

    build: Builder
    number: int
    depth: int
    layer: Layer
    x: Value
    protected: int
    sizes: Value | None
    key_mask: Value | None
    padded: bool
    present: Callable[[Value], Value]

    @property
    def tokens(self) -> int:
        """N."""
        size = self.x.type.shape[1]
        assert isinstance(size, int)
        return size

    @property
    def q(self) -> Value:
        """The queries ``[B, H, N, D]`` of the layer's attention, at its site or for a reduction of its queries."""
        return self.present(self.layer.q)

    @property
    def k(self) -> Value:
        """The keys ``[B, H, N, D]``, likewise."""
        return self.present(self.layer.k)

    @property
    def v(self) -> Value:
        """The values ``[B, H, N, D]``, likewise."""
        return self.present(self.layer.v)


Reduce = Callable[[Place], Step | None]
"""Makes a reduction at a place, or none."""

Watch = Callable[[Place, Step], None]
"""Told about each reduction that was made, with ops still to be put at its place."""


@dataclass(frozen=True)
class Plan:
    """What to do where, by value of the original graph.

    Attributes:
        at: reductions of tokens, at the residual or the site of a layer.
        queries: reductions inside of an attention, by the attention: of its queries and of the residual.
        unmerge: ops and outputs that need all tokens get them back.
        whole: ops that get all tokens back although they could do with fewer, so that rows come back before them
            instead of at the first op behind them that needs them all.
    """

    at: Mapping[Value, tuple[int, Reduce]]
    queries: Mapping[Op, tuple[int, Reduce]]
    unmerge: bool = False
    whole: frozenset[Op] = frozenset()


@dataclass(frozen=True)
class _Moved:
    """What stands for a value of the original graph: a value whose axis has gone through ``epoch`` reductions."""

    value: Value
    axis: Axis
    epoch: int


def shorten(module: Module, stream: Stream, plan: Plan, made_by: str, watch: Watch | None = None) -> list[Step]:
    """Rewrite ``module.main`` by ``plan``, in place, and say which reductions were made, in order.

    Raises:
        PassError: an op or output needs all tokens, and the plan does not give them back.
    """
    return _Shortening(module, stream, plan, made_by, watch).run()


class _Shortening:
    def __init__(self, module: Module, stream: Stream, plan: Plan, made_by: str, watch: Watch | None) -> None:
        self._module = module
        self._graph = module.main
        self._stream = stream
        self._plan = plan
        self._made_by = made_by
        self._watch = watch
        self._steps: list[Step] = []
        self._moved: dict[Value, _Moved] = {}
        self._sizes: Value | None = None
        self._rows: Value = stream.layers[0].residual
        """The residual: its batch axis is that of all tokens."""

    def run(self) -> list[Step]:
        listed = list(self._graph.ops)
        followers: list[Op | None] = [*listed[1:], None]
        for value in self._graph.inputs:
            if listed and value in self._plan.at:
                self._reduce_at(value, self._builder(listed[0]))
        for op, after in zip(listed, followers, strict=True):
            self._visit(op, self._builder(op))
            for result in op.results:
                if result in self._plan.at:
                    build = self._builder(after)
                    build.location = op.location
                    self._reduce_at(result, build)
        self._outputs()
        remove_dead_ops(self._module)
        self._module.drop_unused_weights()
        return self._steps

    def _builder(self, before: Op | None) -> Builder:
        return Builder(self._module, self._graph, before=before, made_by=self._made_by)

    # -- reductions ---------------------------------------------------------------------------------------------

    def _reduce_at(self, value: Value, build: Builder) -> None:
        number, reduce = self._plan.at[value]
        now = self._now(value, Axis(1), build)
        place = self._place(number, build, now.value)
        step = reduce(place)
        if step is not None:
            self._made(place, step)
            self._moved[value] = _Moved(step.shorten(build, now.value), Axis(1), len(self._steps))

    def _made(self, place: Place, step: Step) -> None:
        self._steps.append(step)
        self._sizes = step.sizes
        if self._watch is not None:
            self._watch(place, step)

    def _place(self, number: int, build: Builder, x: Value) -> Place:
        layer = self._stream.layers[number]
        mask = layer.attention.mask
        padded = mask is not None and self._is_key_mask(mask)
        if not self._steps and padded and self._sizes is None:
            assert mask is not None
            self._sizes = self._key_weights(mask, build)
        key_mask = self._steps[-1].key_mask if self._steps else mask if padded else None
        protected = self._stream.protected
        depth = len(self._stream.layers)
        return Place(build, number, depth, layer, x, protected, self._sizes, key_mask, padded, self._present)

    def _present(self, value: Value) -> Value:
        return self._moved[value].value if value in self._moved else value

    def _key_weights(self, mask: Value, build: Builder) -> Value:
        """``[B, N, 1]``: how much each key counts by the model's own mask, 1 for a token and 0 for padding."""
        dtype = self._rows.type.dtype
        weights = build(ops.Cast(mask, dtype=dtype)) if mask.type.dtype is DType.BOOL else build(ops.Exp(mask))
        shape = (mask.type.shape[0], self._stream.tokens, 1)
        rows = build(ops.Reshape(weights, shape=shape))
        return build(ops.Expand(rows, shape=(self._rows.type.shape[0], *shape[1:])))

    def _is_key_mask(self, mask: Value) -> bool:
        """Whether ``mask`` says for each key, alike for all heads and queries, whether it counts."""
        shape = mask.type.shape
        return len(shape) == 4 and shape[1] == shape[2] == 1 and shape[3] == self._stream.tokens

    def _key_mask(self, attention: ops.Attention, epoch: int, build: Builder) -> Value | None:
        """What ``attention`` masks the keys that are left after ``epoch`` reductions with."""
        mask = attention.mask
        if epoch == 0:
            return mask
        step = self._steps[epoch - 1]
        if mask is None or self._is_key_mask(mask):
            return step.key_mask
        side = _Moved(mask, Axis(mask.type.rank - 1), 0)
        own = self._lifted(side, epoch, build, attention.q.type.rank, side=True).value
        if step.key_mask is None:
            return own
        return _both(build, own, step.key_mask)

    # -- the walk -----------------------------------------------------------------------------------------------

    def _now(self, value: Value, axis: Axis, build: Builder) -> _Moved:
        """What stands for tokens ``value``, after all reductions."""
        moved = self._moved.get(value, _Moved(value, axis, 0))
        return self._lifted(moved, len(self._steps), build, value.type.rank)

    def _visit(self, op: Op, build: Builder) -> None:
        here = {index: self._moved[value] for index, value in enumerate(op.operands) if value in self._moved}
        if isinstance(op, ops.Attention) and op in self._plan.queries:
            here = self._reduce_queries(op, here, build)
        if not here:
            return
        if op in self._plan.whole:
            self._give_back(op, here, "it is to read all tokens", build)
            return
        epoch = _reached(op, here)
        counts = self._stream.counting(self._count(epoch))
        effect = follow(op, {index: moved.axis for index, moved in here.items()}, counts)
        if isinstance(effect, str):
            self._give_back(op, here, effect, build)
            return
        if isinstance(op, ops.Attention):
            new = self._attention(op, here, build)
        else:
            operands = list(op.operands)
            for index, moved in here.items():
                operands[index] = self._lifted(moved, epoch, build, op.operands[index].type.rank).value
            for index, axis in effect.sides.items():
                rank = max(result.type.rank for result in op.results)
                side = _Moved(op.operands[index], axis, 0)
                operands[index] = self._lifted(side, epoch, build, rank if op.elementwise else 0, side=True).value
            if effect.averages and self._sizes_at(epoch) is not None:
                self._replace(op, effect, [self._average(op, here[0], epoch, build)], epoch)
                return
            new = op.rebuilt(operands, **effect.changes)
        build.graph.ops.insert_before(op, new)
        self._replace(op, effect, list(new.results), epoch)

    def _replace(self, op: Op, effect: Effect, results: list[Value], epoch: int) -> None:
        for old, new, axis in zip(op.results, results, effect.results, strict=True):
            if axis is None:
                old.replace_all_uses_with(new)
            else:
                new.name = old.name
                self._moved[old] = _Moved(new, axis, epoch)

    def _reduce_queries(self, op: ops.Attention, here: dict[int, _Moved], build: Builder) -> dict[int, _Moved]:
        number, reduce = self._plan.queries[op]
        layer = self._stream.layers[number]
        residual = self._now(layer.residual, Axis(1), build)
        place = self._place(number, build, residual.value)
        step = reduce(place)
        if step is None:
            return here
        queries = here.get(0, _Moved(op.q, Axis(2), 0))
        self._made(place, step)
        return {**here, 0: self._lifted(queries, len(self._steps), build, 4),
                **{index: here.get(index, _Moved(op.operands[index], Axis(2), 0)) for index in (1, 2)}}  # fmt: skip

    def _attention(self, op: ops.Attention, here: Mapping[int, _Moved], build: Builder) -> Op:
        """``op`` with what is left of queries and keys; keys may be a reduction behind the queries."""
        epoch = max((moved.epoch for index, moved in here.items() if index in (1, 2)), default=0)
        q = here[0].value if 0 in here else op.q
        k, v = (
            self._lifted(here[index], epoch, build, 0).value if index in here else op.operands[index]
            for index in (1, 2)
        )
        mask = self._key_mask(op, epoch, build)
        if mask is not None and mask.type.dtype.is_floating and mask.type.dtype is not q.type.dtype:
            mask = build(ops.Cast(mask, dtype=q.type.dtype))
        new = ops.Attention(q, k, v, mask, scale=op.scale, causal=op.causal)
        new.location, new.made_by = op.location, self._made_by
        return new

    def _average(self, op: Op, moved: _Moved, epoch: int, build: Builder) -> Value:
        """A mean or sum over tokens in which each counts as often as it stands for original ones."""
        assert isinstance(op, ops.Sum | ops.Mean)
        sizes = self._sizes_at(epoch)
        assert sizes is not None
        x = self._lifted(moved, epoch, build, op.x.type.rank).value
        rank, dim, first = x.type.rank, moved.axis.dim, moved.axis.first
        batch, count = sizes.type.shape[:2]
        weights = build(ops.Cast(span(build, sizes, first), dtype=x.type.dtype))
        shape = [1] * rank
        weights = build(ops.Reshape(weights, shape=(batch, *shape[1:dim], count - first, *shape[dim + 1 :])))
        with build.at(op.location):
            total = build(ops.Sum(build(ops.Mul(x, weights)), dims=(dim,), keepdim=op.keepdim))
            if isinstance(op, ops.Sum):
                return total
            return build(ops.Div(total, build(ops.Sum(weights, dims=(dim,), keepdim=op.keepdim))))

    def _count(self, epoch: int) -> int:
        return self._steps[epoch - 1].count if epoch else self._stream.tokens

    def _sizes_at(self, epoch: int) -> Value | None:
        return self._steps[epoch - 1].sizes if epoch else None

    # -- operands that are behind, and rows that come back ------------------------------------------------------

    def _lifted(self, moved: _Moved, epoch: int, build: Builder, rank: int, side: bool = False) -> _Moved:
        """``moved`` after the reductions up to ``epoch``; with at least ``rank`` axes, as broadcasting adds them.

        ``side`` is for what belongs to tokens without being computed from them.
        """
        if moved.epoch == epoch:
            return moved
        wide = moved.value
        missing = max(0, rank - wide.type.rank)
        if missing:
            wide = build(ops.Reshape(wide, shape=(*(1,) * missing, *wide.type.shape)))
        axis = Axis(moved.axis.dim + missing, moved.axis.first)
        rows = _Rows(build, wide, axis, self._rows.type.shape[0])
        value = rows.canonical
        for number in range(moved.epoch, epoch):
            step = self._steps[number]
            value = step.shorten_side(build, value) if side else step.shorten(build, value)
        return _Moved(rows.back(value), axis, epoch)

    def _restored(self, moved: _Moved, build: Builder) -> Value:
        rows = _Rows(build, moved.value, moved.axis, self._rows.type.shape[0])
        value = rows.canonical
        for step in reversed(self._steps[: moved.epoch]):
            value = step.restore(build, value)
        return rows.back(value)

    def _give_back(self, op: Op, here: Mapping[int, _Moved], reason: str, build: Builder) -> None:
        if not self._plan.unmerge:
            raise PassError(
                "tokens cannot be reduced",
                values={"op": op.name, "because": reason},
                rule="an op behind the place needs all tokens",
                location=op.location,
            )
        for index, moved in here.items():
            op.set_operand(index, self._restored(moved, build))

    def _outputs(self) -> None:
        build = self._builder(None)
        values = list(self._graph.outputs)
        for index, value in enumerate(values):
            moved = self._moved.get(value)
            if moved is not None:
                values[index] = self._restored(moved, build)
        self._graph.set_outputs(values, self._graph.output_names)


class _Rows:
    """A value with an axis of tokens anywhere, as ``[B, N, C]`` floating with all tokens, and back."""

    def __init__(self, build: Builder, value: Value, axis: Axis, batch: object) -> None:
        self._build = build
        self._axis = axis
        self._bool = value.type.dtype is DType.BOOL
        if value.type.dtype.is_integer and not self._bool:
            raise PassError(
                "tokens cannot be reduced",
                values={"value": value.type},
                rule="integers for each token have no mean",
                location=value.producer.location if value.producer is not None else None,
            )
        if value.type.shape[0] not in (1, batch) or axis.dim == 0:
            raise PassError(
                "tokens cannot be reduced",
                values={"value": value.type, "batch": batch},
                rule="the first axis of a value with a row for each token is the batch, or has size 1",
                location=value.producer.location if value.producer is not None else None,
            )
        if self._bool:
            value = build(ops.Cast(value, dtype=DType.F32))
        rank = value.type.rank
        self._order = (0, axis.dim, *(dim for dim in range(1, rank) if dim != axis.dim))
        if self._order != tuple(range(rank)):
            value = build(ops.Permute(value, dims=self._order))
        self._rest = value.type.shape[2:]
        shape = (value.type.shape[0], value.type.shape[1], product(self._rest))
        if rank != 3:
            value = build(ops.Reshape(value, shape=shape))
        if shape[0] != batch:
            value = build(ops.Expand(value, shape=(batch, *shape[1:])))
        if axis.first:
            value = build(ops.Pad(value, before=(0, axis.first, 0), after=(0, 0, 0)))
        self.canonical = value

    def back(self, value: Value) -> Value:
        """``value`` ``[B, n, C]`` in the form of the original."""
        build = self._build
        value = span(build, value, self._axis.first)
        if len(self._rest) != 1:
            value = build(ops.Reshape(value, shape=(*value.type.shape[:2], *self._rest)))
        inverse = tuple(self._order.index(dim) for dim in range(len(self._order)))
        if inverse != tuple(range(len(inverse))):
            value = build(ops.Permute(value, dims=inverse))
        if self._bool:
            value = build(ops.Gt(value, build.scalar(0.0, DType.F32)))
        return value


def _reached(op: Op, here: Mapping[int, _Moved]) -> int:
    """How many reductions the results of ``op`` have gone through: those of its queries in an attention."""
    if isinstance(op, ops.Attention):
        return here[0].epoch if 0 in here else 0
    return max(moved.epoch for moved in here.values())


def _both(build: Builder, first: Value, second: Value) -> Value:
    """Two masks of attention scores, bool or floating, as one."""
    kinds = (first.type.dtype is DType.BOOL, second.type.dtype is DType.BOOL)
    if all(kinds):
        return build(ops.LogicalAnd(first, second))
    if not any(kinds):
        return build(ops.Add(first, second))
    allowed, added = (first, second) if kinds[0] else (second, first)
    return build(ops.Where(allowed, added, build.scalar(float("-inf"), added.type.dtype)))
