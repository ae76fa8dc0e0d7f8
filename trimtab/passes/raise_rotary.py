"""Recognise rotary position embedding in decomposed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.dims import Dim
from trimtab.ir.rewrite import Attr, Match, Pattern, Rule, Var, one_of, op
from trimtab.ir.types import TensorType
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.rewrite_pass import RewritePass


@dataclass(frozen=True)
class RaiseRotary(RewritePass):
    """Make one rotary_embedding of its slices, negation, concatenation and products.

    Su et al., arXiv 2104.09864.  Pairs are the halves of the channels (Llama, GPT-NeoX) or neighbours (GPT-J); tables
    have an entry a channel or an entry a pair.  Channels that are cut off before and joined again after it (partial
    rotary) become part of the op.
    """

    name: ClassVar[str] = "raise-rotary"
    contract: ClassVar[Contract] = Exact()

    def rules(self) -> Sequence[Rule]:
        return (RotaryHalves(), RotaryHalvesByPair(), RotaryNeighbours(), RotaryNeighboursByPair(), PartialRotary())


class _Rotary(Rule):
    """What the four forms have in common. ``a`` and ``b`` are the first and the second channel of each pair of x."""

    interleaved = False
    by_pair = False

    def check(self, m: Match) -> str | None:
        whole = _whole(m)
        # Tables of an entry a channel are aligned with x as it is, those of an entry a pair with the parts.
        if m.a.type != m.b.type or (m.x.type.elements != whole.elements if self.by_pair else m.x.type != whole):
            return f"{m.a.type} and {m.b.type} are not the first and second channels of all pairs of {m.x.type}"
        if m.root.type.elements != whole.elements:
            return f"the result is {m.root.type}, but x is {m.x.type}"
        if self.by_pair and any(_doubled(table)[-1:] != list(whole.shape[-1:]) for table in (m.cos, m.sin)):
            return f"the tables {m.cos.type} and {m.sin.type} have not one entry a pair"
        return ops.RotaryEmbedding.refusal(whole, self._width_of(m.cos), self._width_of(m.sin)) or None

    def rewrite(self, m: Match, build: Builder) -> Value:
        x = _reshaped(m.x, _whole(m), build)
        cos, sin = (self._by_channel(table, build) for table in (m.cos, m.sin))
        turned = build(ops.RotaryEmbedding(x, cos, sin, interleaved=self.interleaved))
        return _reshaped(turned, m.root.type, build)

    def _width_of(self, table: Value) -> TensorType:
        return table.type.with_shape(*_doubled(table)) if self.by_pair else table.type

    def _by_channel(self, table: Value, build: Builder) -> Value:
        """The table with an entry a channel."""
        if not self.by_pair:
            return table
        rank = table.type.rank
        if not self.interleaved:
            return build(ops.Concat((table, table), dim=rank - 1))
        apart = build(ops.Reshape(table, shape=(*table.type.shape, 1)))
        return build(ops.Reshape(build(ops.Concat((apart, apart), dim=rank)), shape=tuple(_doubled(table))))


class RotaryHalves(_Rotary):
    """``x cos + [-b, a] sin`` where x is ``[a, b]``"""

    def pattern(self, x: Var, cos: Var, sin: Var) -> Pattern:
        a, b = _parts(x)
        return x * cos + op.concat([-b, a], dim=-1) * sin


class RotaryHalvesByPair(_Rotary):
    """``[a cos - b sin, b cos + a sin]`` where x is ``[a, b]``"""

    by_pair = True

    def pattern(self, x: Var, cos: Var, sin: Var) -> Pattern:
        a, b = _parts(x)
        return op.concat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class _Interleaved(_Rotary):
    interleaved = True

    def check(self, m: Match) -> str | None:
        if m.pairs.type.shape[-1] != 2:
            return f"the parts are joined as {m.pairs.type}, not in pairs along a last axis of size 2"
        return super().check(m)


class RotaryNeighbours(_Interleaved):
    """``x cos + [-b0, a0, -b1, a1, ...] sin`` where x is ``[a0, b0, a1, b1, ...]``"""

    def pattern(self, x: Var, cos: Var, sin: Var) -> Pattern:
        a, b = _neighbours(x)
        return x * cos + _woven(-b, a) * sin


class RotaryNeighboursByPair(_Interleaved):
    """``[a0 cos0 - b0 sin0, b0 cos0 + a0 sin0, ...]`` where x is ``[a0, b0, a1, b1, ...]``"""

    by_pair = True

    def pattern(self, x: Var, cos: Var, sin: Var) -> Pattern:
        a, b = _neighbours(x)
        return _woven(a * cos - b * sin, b * cos + a * sin)


class PartialRotary(Rule):
    """``[rotary_embedding(a), b]`` where x is ``[a, b]``"""

    def pattern(self, x: Var, cos: Var, sin: Var, interleaved: Attr) -> Pattern:
        a, b = _parts(x)
        return op.concat([op.rotary_embedding(a, cos, sin, interleaved=interleaved), b], dim=-1)

    def check(self, m: Match) -> str | None:
        if m.root.type != m.x.type:
            return f"{m.a.type} and {m.b.type} are not all of {m.x.type}"
        return None

    def rewrite(self, m: Match, build: Builder) -> Value:
        return build(ops.RotaryEmbedding(m.x, m.cos, m.sin, interleaved=m.interleaved))


def _whole(m: Match) -> TensorType:
    """The type in which x is cut. Clean-up may have joined the reshape before or behind the rotation with others."""
    whole: TensorType = m.x.type.with_shape(*_doubled(m.a))
    return whole


def _reshaped(x: Value, type: TensorType, build: Builder) -> Value:
    return x if x.type == type else build(ops.Reshape(x, shape=type.shape))


def _doubled(value: Value) -> list[Dim]:
    """The shape of a value with twice the channels."""
    return [*value.type.shape[:-1], value.type.shape[-1] * 2] if value.type.rank else []


def _parts(x: Pattern) -> tuple[Pattern, Pattern]:
    """x cut in two along its last axis: a, then b."""
    middle = Attr("middle")
    a, b = op.slice(x, dim=-1, start=0, stop=middle, step=1), op.slice(x, dim=-1, start=middle, step=1)
    cut = [op.split(x, dim=-1, sizes=lambda sizes: len(sizes) == 2)[place] for place in (0, 1)]
    return one_of(a, cut[0]).bind("a"), one_of(b, cut[1]).bind("b")


def _neighbours(x: Pattern) -> tuple[Pattern, Pattern]:
    """The even channels of x, a, and the odd ones, b."""
    a, b = (op.slice(x, dim=-1, start=start, step=2) for start in (0, 1))
    pairs = [op.select(op.reshape(x), dim=-1, index=index) for index in (0, 1)]
    return one_of(a, pairs[0]).bind("a"), one_of(b, pairs[1]).bind("b")


def _woven(a: Pattern, b: Pattern) -> Pattern:
    """``[a0, b0, a1, b1, ...]``, as stacking a and b behind the last axis and flattening makes it."""
    return op.reshape(op.concat([op.reshape(a), op.reshape(b)], dim=-1).bind("pairs"))
