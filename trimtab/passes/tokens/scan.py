"""Tokens of state-space models: recurrences over tokens that a model writes out step by step, and the same graph with
fewer steps.

A step reads row t of each value with a row for every token, and the state after step t - 1.  Fewer tokens are fewer
steps: the first K steps, over shorter values, are the recurrence over K tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from trimtab.errors import PassError
from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Graph, Module, Value
from trimtab.ir.dead_code import remove_dead_ops
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op
from trimtab.passes.tokens.axis import Axis, Tokens, follow
from trimtab.passes.tokens.class_attention import kept_tokens
from trimtab.passes.tokens.rows import joined, put, ranking, span, take


@dataclass(frozen=True)
class Row:
    """The value belongs to step t of a recurrence."""

    t: int


@dataclass(frozen=True)
class Longer:
    """Axis ``dim`` holds the rows of a causal convolution: one for each token, and more behind them."""

    dim: int


Where: TypeAlias = "Axis | Row | Longer"
"""Where tokens are in a value."""


@dataclass(frozen=True)
class Scan:
    """A recurrence ``h[t] = decay[t] * h[t - 1] + update[t]`` over tokens, step by step.

    Attributes:
        decay: what the state is multiplied by, with the axis of tokens at ``dim``.
        dim: of the axis.
        result: the results of all steps, joined.
        result_dim: its axis of tokens.
        residual: the tokens ``[B, N, C]`` that the block adds to.
        site: the sum, ``[B, N, C]``.
    """

    decay: Value
    dim: int
    result: Value
    result_dim: int
    residual: Value
    site: Value

    @property
    def tokens(self) -> int:
        """N."""
        size = self.site.type.shape[1]
        assert isinstance(size, int)
        return size


def find_scans(module: Module) -> tuple[Scan, ...]:
    """The recurrences of ``module.main`` whose results are added to a residual, in order.

    Raises:
        PassError: there is none.
    """
    graph = module.main
    found = [scan for op in graph.ops if (scan := _scan_of(graph, op)) is not None]
    if not found:
        raise PassError(
            "there is no recurrence over tokens",
            values={"ops": len(graph.ops)},
            rule="a step multiplies the state by row t of a value and adds row t of another, and the results of all "
            "steps are joined and added to a residual",
            fix="for models with attention use prune-tokens or merge-tokens",
        )
    return tuple(found)


def _scan_of(graph: Graph, concat: Op) -> Scan | None:
    """The recurrence whose steps ``concat`` joins."""
    if not isinstance(concat, ops.Concat) or len(concat.operands) < 2:
        return None
    if any(value.type.shape[concat.dim] != 1 for value in concat.operands):
        return None
    decay = _decay(concat.operands)
    residual = _residual(concat.result)
    if decay is None or residual is None:
        return None
    return Scan(decay.x, decay.dim, concat.result, concat.dim, *residual)


def _decay(results: Sequence[Value]) -> ops.Select | None:
    """The row of the decay that the second step reads: multiplied by what is itself made of a row."""
    rows = {value: row for value, row in _rows_behind(results[1]).items() if row.t == 1}
    first = _rows_behind(results[0])
    for value in rows:
        select = value.producer
        if not isinstance(select, ops.Select) or len(select.x.users) < len(results):
            continue
        for user in value.users:
            other = [operand for operand in user.operands if operand is not value]
            if isinstance(user, ops.Mul) and other and any(behind in first for behind in _rows_behind(other[0])):
                return select
    return None


def _rows_behind(value: Value) -> dict[Value, Row]:
    """The selected rows that ``value`` is computed from, without going through them."""
    found: dict[Value, Row] = {}
    waiting, seen = [value], set[Value]()
    while waiting:
        current = waiting.pop()
        op = current.producer
        if current in seen or op is None:
            continue
        seen.add(current)
        if isinstance(op, ops.Select) and isinstance(op.index, int) and _is_unrolled(op):
            found[current] = Row(op.index)
        else:
            waiting += op.operands
    return found


def _is_unrolled(select: ops.Select) -> bool:
    """Whether each row of what ``select`` reads is read by a select of its own."""
    size = select.x.type.shape[select.dim]
    indices = {user.index for user in select.x.users if isinstance(user, ops.Select) and user.dim == select.dim}
    return isinstance(size, int) and size > 1 and indices == set(range(size))


def _residual(result: Value) -> tuple[Value, Value] | None:
    """The residual that what follows from ``result`` is added to, and the sum."""
    value = result
    while True:
        users = [user for user in value.users if len(user.results) == 1]
        if len(users) != 1:
            return None
        (op,) = users
        if isinstance(op, ops.Add) and op.result.type.rank == 3:
            (other,) = [operand for operand in op.operands if operand is not value] or [value]
            if other.type == value.type and _comes_from(result, other):
                return other, op.result
        value = op.result


def _comes_from(value: Value, source: Value) -> bool:
    waiting, seen = [value], set[Value]()
    while waiting:
        current = waiting.pop()
        if current is source:
            return True
        if current not in seen and current.producer is not None:
            seen.add(current)
            waiting += current.producer.operands
    return False


def importance(build: Builder, result: Value, dim: int) -> Value:
    """How much each token matters, ``[B, N]``: the mean over channels of the positive part of the recurrence's results
    (Zhan et al., Exploring Token Pruning in Vision State Space Models, arXiv 2409.18962)."""
    others = tuple(axis for axis in range(1, result.type.rank) if axis != dim)
    return build(ops.Mean(build(ops.Relu(result)), dims=others))


@dataclass(frozen=True)
class _Moved:
    """What stands for a value of the original graph; None for a step that is left out."""

    value: Value | None
    where: Where
    epoch: int


class ScanShortening:
    """Rewrites a module so that blocks behind some recurrences run on fewer tokens.

    The tokens that are kept stay in their order.  Between two of them the state decays as often as tokens were left
    out, so that it is what it would be if those had added nothing (hidden state alignment of arXiv 2409.18962).  Behind
    the last block the tokens that were left out come back as they were when they were left out, for outputs with a row
    for each token.

    Args:
        module: rewritten in place.
        scans: its recurrences.
        keep: the share of tokens that each of ``after`` keeps.
        after: numbers of recurrences.
        made_by: name of the pass.
    """

    def __init__(self, module: Module, scans: Sequence[Scan], keep: float, after: Sequence[int], made_by: str) -> None:
        self._module, self._graph = module, module.main
        self._keep = keep
        self._made_by = made_by
        self._at = {scans[number].site: scans[number] for number in after}
        self._last = scans[-1].site
        self._decays = {scan.decay: scan.dim for scan in scans}
        self._tokens = scans[0].tokens
        self._moved: dict[Value, _Moved] = {}
        self._kept: list[tuple[Value, Value]] = []
        self._positions: Value | None = None
        self.counts: list[int] = []

    def run(self) -> None:
        """Raises:
        PassError: an op between two places does not treat tokens one by one.
        """
        listed = list(self._graph.ops)
        for op, after in zip(listed, [*listed[1:], None], strict=True):
            build = Builder(self._module, self._graph, before=op, made_by=self._made_by)
            self._visit(op, build)
            behind = Builder(self._module, self._graph, before=after, made_by=self._made_by)
            behind.location = op.location
            for result in op.results:
                if result in self._decays and result in self._moved:
                    self._align(result, behind)
                if result in self._at:
                    self._drop(self._at[result], behind)
                elif result is self._last and result in self._moved:
                    self._bring_back(result, behind)
        remove_dead_ops(self._module)
        self._module.drop_unused_weights()

    @property
    def _count(self) -> int:
        return self.counts[-1] if self.counts else self._tokens

    def _drop(self, scan: Scan, build: Builder) -> None:
        x = self._now(scan.site)
        scores = importance(build, self._now(scan.result), scan.result_dim)
        keep = kept_tokens(self._keep, self._count, 0)
        if keep == self._count:
            return
        best = span(build, ranking(build, scores), 0, keep)
        rows = build.add(ops.Sort(best, dim=1)).results[0]
        before = self._positions
        self._positions = rows if before is None else take(build, before, rows)
        self._kept.append((rows, x))
        self.counts.append(keep)
        self._moved[scan.site] = _Moved(take(build, x, rows), Axis(1), len(self._kept))

    def _now(self, value: Value) -> Value:
        moved = self._moved.get(value)
        return moved.value if moved is not None and moved.value is not None else value

    def _align(self, decay: Value, build: Builder) -> None:
        """Let the state decay once for every token since the one before."""
        moved = self._moved[decay]
        assert self._positions is not None
        assert moved.value is not None
        batch, count = self._positions.type.shape
        assert isinstance(count, int)
        start = build(ops.Full(-1, DType.I64, (batch, 1)))
        earlier = joined(build, start, span(build, self._positions, 0, count - 1))
        gaps = build(ops.Cast(build(ops.Sub(self._positions, earlier)), dtype=decay.type.dtype))
        dim = self._decays[decay]
        shape = [batch if axis == 0 else count if axis == dim else 1 for axis in range(decay.type.rank)]
        powers = build(ops.Pow(moved.value, build(ops.Reshape(gaps, shape=tuple(shape)))))
        self._moved[decay] = _Moved(powers, moved.where, moved.epoch)

    def _bring_back(self, value: Value, build: Builder) -> None:
        x = self._now(value)
        for rows, before in reversed(self._kept):
            x = put(build, before, rows, x)
        del self._moved[value]
        for user, index in value.uses:
            if not isinstance(user, Op) or user.graph is self._graph:
                user._set_read(index, x)

    def _visit(self, op: Op, build: Builder) -> None:
        here = {index: self._moved[value] for index, value in enumerate(op.operands) if value in self._moved}
        if not here:
            return
        epoch = max(moved.epoch for moved in here.values())
        found = self._effect(op, here)
        if isinstance(found, str):
            raise PassError(
                "tokens cannot be pruned",
                values={"op": op.name, "because": found},
                rule="an op between two places needs all tokens",
                location=op.location,
            )
        where, changes, sides = found
        step_left_out = isinstance(op, ops.Select) and isinstance(where, Row) and where.t >= self._count
        if step_left_out or (not isinstance(op, ops.Concat) and any(moved.value is None for moved in here.values())):
            self._moved.update({result: _Moved(None, where, epoch) for result in op.results})
            return
        operands = [self._operand(value, here.get(index), sides.get(index), epoch, build)
                    for index, value in enumerate(op.operands)]  # fmt: skip
        present = [value for value in operands if value is not None]
        new = ops.Concat(tuple(present), dim=op.dim) if isinstance(op, ops.Concat) else op.rebuilt(present, **changes)
        new.location, new.made_by = op.location, self._made_by
        self._graph.ops.insert_before(op, new)
        for old, result in zip(op.results, new.results, strict=True):
            result.name = old.name
            self._moved[old] = _Moved(result, where, epoch)

    def _operand(
        self, value: Value, moved: _Moved | None, side: Axis | None, epoch: int, build: Builder
    ) -> Value | None:
        """What stands for an operand after ``epoch`` reductions."""
        if moved is None and side is None:
            return value
        found, start, axis = (value, 0, side) if moved is None else (moved.value, moved.epoch, moved.where)
        if start == epoch or found is None or not isinstance(axis, Axis):
            return found
        for rows, _ in self._kept[start:epoch]:
            index = build(ops.Reshape(rows, shape=tuple(
                rows.type.shape[0] if dim == 0 else rows.type.shape[1] if dim == axis.dim else 1
                for dim in range(found.type.rank)
            )))  # fmt: skip
            shape = (rows.type.shape[0], *found.type.shape[1:])
            wide = build(ops.Expand(found, shape=shape)) if shape != found.type.shape else found
            picked = (*shape[: axis.dim], rows.type.shape[1], *shape[axis.dim + 1 :])
            found = build(ops.Gather(wide, build(ops.Expand(index, shape=picked)), dim=axis.dim))
        return found

    def _effect(
        self, op: Op, here: Mapping[int, _Moved]
    ) -> tuple[Where, Mapping[str, object], Mapping[int, Axis]] | str:
        """Where tokens are in the result, attributes that change, and operands that are behind; or a refusal."""
        axes = {index: moved.where for index, moved in here.items() if isinstance(moved.where, Axis)}
        steps = [moved.where for moved in here.values() if isinstance(moved.where, Row)]
        longer = [moved.where for moved in here.values() if isinstance(moved.where, Longer)]
        match op:
            case ops.Select(dim=dim, index=int(index)) if axes and axes[0].dim == dim and _is_unrolled(op):
                return Row(index), {}, {}
            case ops.Concat(dim=dim) if len(steps) == len(op.operands) == self._tokens:
                in_order = all(step == Row(number) for number, step in enumerate(steps))
                return (Axis(dim), {}, {}) if in_order else "concat joins steps in another order"
            case ops.Conv1d(stride=(1,)) if axes and axes[0].dim == 2:
                reach = (op.weight.type.shape[2] - 1) * op.dilation[0]
                return (Longer(2), {}, {}) if op.padding == (reach,) else "conv1d looks at later tokens"
            case ops.Slice(dim=dim, start=0, stop=self._tokens, step=1) if longer and longer[0].dim == dim:
                return Axis(dim), {"stop": self._count}, {}
        if longer:
            return f"{op.name} reads a convolution whose last rows are not cut off"
        if steps:
            if axes:
                return f"{op.name} combines a step with all tokens"
            return Row(max(step.t for step in steps)), {}, {}
        tokens = Tokens(self._tokens, self._count, 0, lambda _: True)
        effect = follow(op, axes, tokens)
        if isinstance(effect, str):
            return effect
        if None in effect.results:
            return f"{op.name} does not keep a row for each token"
        where = effect.results[0]  # the parts of a split all have it at one axis
        assert where is not None
        return where, effect.changes, effect.sides
