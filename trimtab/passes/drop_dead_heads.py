"""Removal of what has no effect: dead attention heads, dead hidden units, and features that nobody reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Module, Value
from trimtab.ir.dims import Dim
from trimtab.ir.rewrite import Constant, Match, Pattern, Rule, Var, maybe, op
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.narrowing import Cut, Needs, narrowed, needs, reader_count, take, vanishes
from trimtab.passes.push_slices import PushSlices
from trimtab.passes.rewrite_pass import RewritePass

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DropDeadHeads(RewritePass):
    """Remove attention heads and hidden units that have no effect, and features that nobody reads.

    A head is dead when the columns of the output projection that read it are zero, as pruning leaves them, or when its
    values are; it goes from the queries, keys, values and both projections. Key heads that several query heads share go
    with the last of these. A hidden unit of an MLP is dead when its column of the second matrix is zero.
    """

    name: ClassVar[str] = "drop-dead-heads"
    contract: ClassVar[Contract] = Exact(rounding=True)
    grows_weights: ClassVar[bool] = True  # by the positions of slices that do not end in weights

    def rules(self) -> Sequence[Rule]:
        return (DeadHeads(), DeadUnits(), *PushSlices().rules())


class DeadHeads(Rule):
    """Heads of an attention that its output projection multiplies by zero, or whose values are zero."""

    def pattern(self, q: Var, k: Var, v: Var, mask: Var, w: Constant, b: Constant) -> Pattern:
        attended = op.attention(q, k, v, maybe(mask)).bind("attended")
        return op.linear(op.reshape(op.permute(attended, dims=(0, 2, 1, 3))).bind("merged"), w, maybe(b))

    def check(self, m: Match) -> str | None:
        batch, heads, queries, width = m.attended.type.shape
        if not isinstance(heads, int) or not isinstance(width, int) or m.merged.type.shape[-1] != heads * width:
            return f"the projection does not read the heads side by side: {m.merged.type}"
        if m.merged.type.shape[:-1] not in ((batch, queries), (batch * queries,)):
            return f"the projection does not read all heads of one position together: {m.merged.type}"
        if not m.w.is_weight or m.w.type.rank != 2 or reader_count(m.module, m.w) > 1:
            return "the weight of the projection is no matrix of its own"
        alive = _alive_heads(m, heads, width)
        if len(alive) == heads:
            return "every head has an effect"
        wanted = needs(m.attended.producer, 1, Cut.at(alive), m.module) if alive else None
        return wanted if isinstance(wanted, str) else None

    def rewrite(self, m: Match, build: Builder) -> Value:
        _, heads, _, width = m.attended.type.shape
        alive = _alive_heads(m, heads, width)
        if not alive:
            return _constant_rows(build, m.b, m.root)
        cut = Cut.at(alive)
        wanted = needs(m.attended.producer, 1, cut, m.module)
        columns = cut.repeated(width)
        assert isinstance(wanted, Needs)
        assert columns is not None
        turned = build(ops.Permute(narrowed(build, m.attended.producer, wanted), dims=(0, 2, 1, 3)))
        merged = build(ops.Reshape(turned, (*m.merged.type.shape[:-1], len(alive) * width)))
        return build(ops.Linear(merged, take(build, m.w, 1, columns), m.b))


class DeadUnits(Rule):
    """Hidden units, pointwise between two linears, that the second multiplies by zero."""

    def pattern(self, x: Var, w: Constant, b: Constant) -> Pattern:
        return op.linear(x, w, maybe(b))

    def check(self, m: Match) -> str | None:
        if not m.w.is_weight or m.w.type.rank != 2 or reader_count(m.module, m.w) > 1:
            return "its weight is no matrix of its own"
        # Reading the data takes longest, so it comes after a look at what a unit would be cut from.
        last, units = m.x.type.rank - 1, m.w.type.shape[1]
        reason = vanishes(m.x, last, Cut(0, 1), m.module)
        if reason is not None:
            return reason
        alive = _alive_units(m)
        if len(alive) == units:
            return "every unit has an effect"
        return vanishes(m.x, last, Cut.at(alive), m.module) if alive else None

    def rewrite(self, m: Match, build: Builder) -> Value:
        alive = _alive_units(m)
        if not alive:
            return _constant_rows(build, m.b, m.root)
        cut = Cut.at(alive)
        return build(ops.Linear(take(build, m.x, m.x.type.rank - 1, cut), take(build, m.w, 1, cut), m.b))


def _alive_heads(m: Match, heads: int, width: int) -> list[int]:
    """The heads to keep: those with an effect, and those that share a key head with one."""
    alive = (m.weight(m.w).tensor() != 0).any(0).reshape(heads, width).any(1)
    alive &= _heads_with_values(m.v, m.module, heads)
    shared = heads // int(m.k.type.shape[-3])
    kept = alive.reshape(-1, shared).any(1, keepdim=True).expand(-1, shared).reshape(-1)
    return [int(head) for head in kept.nonzero()]


def _heads_with_values(v: Value, module: Module, heads: int) -> torch.Tensor:
    """For each query head whether the projection that makes its values has any number but zero; bool ``[heads]``."""
    import torch

    unknown = torch.ones(heads, dtype=torch.bool)
    split = v.producer.x.producer if isinstance(v.producer, ops.Permute) and v.producer.dims == (0, 2, 1, 3) else None
    projection = split.x.producer if isinstance(split, ops.Reshape) else None
    if not isinstance(projection, ops.Linear):
        return unknown
    groups, width = int(v.type.shape[-3]), v.type.shape[-1]  # type: ignore[arg-type]  # divides the query heads
    parts = [value for value in (projection.weight, projection.bias) if value is not None]
    if not all(value.is_weight for value in parts) or projection.result.type.shape[-1] != groups * width:
        return unknown
    rows = torch.stack([(module.weights[p.weight].tensor().reshape(groups, -1) != 0).any(1) for p in parts]).any(0)
    return rows.repeat_interleave(heads // rows.numel())


def _alive_units(m: Match) -> list[int]:
    return [int(unit) for unit in (m.weight(m.w).tensor() != 0).any(0).nonzero()]


def _constant_rows(build: Builder, bias: Value | None, like: Value) -> Value:
    """What a linear gives for an input that has no effect."""
    shape: tuple[Dim, ...] = like.type.shape
    if bias is not None:
        return build(ops.Expand(bias, shape))
    return build(ops.Full(0.0, like.type.dtype, shape))
