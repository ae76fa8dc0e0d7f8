"""Recognise group norm and instance norm in decomposed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from trimtab.ir import ops
from trimtab.ir.attributes import shortest_float
from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.dims import mod
from trimtab.ir.rewrite import Attr, Constant, Match, Pattern, Rule, Scalar, Var, maybe, one_of, op
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.norm_patterns import gain, mean
from trimtab.passes.rewrite_pass import RewritePass


@dataclass(frozen=True)
class RaiseGroupNorm(RewritePass):
    """Make one group_norm of a norm over groups of channels, and take a scale and a shift of each channel into it.

    Wu and He, arXiv 1803.08494.  Producers reshape the channels to groups and normalise with what they have: the ops
    of a layer norm, which ``raise-layer-norm`` has made one op before, or an instance norm.
    """

    name: ClassVar[str] = "raise-group-norm"
    contract: ClassVar[Contract] = Exact(rounding=True)

    def rules(self) -> Sequence[Rule]:
        return (MultipliedOut(), GroupsOfChannels(), GroupNormWeight(), GroupNormBias())


class MultipliedOut(Rule):
    """``x gain + (bias - mean gain)`` with one mean and one gain for each group, as torch decomposes group norm"""

    private = False

    def pattern(self, x: Var, w: Constant, b: Constant, dims: Attr, eps: Scalar) -> Pattern:
        groups = op.reshape(x).bind("groups")
        centre = mean(groups, dims)
        by = gain(mean((groups - centre) ** 2, dims), eps, w)
        negative = -centre * by
        shift = one_of(negative + b, negative)
        return x * op.reshape(by) + op.reshape(shift)

    def check(self, m: Match) -> str | None:
        shape = m.groups.type.shape
        if m.dims != tuple(range(2, len(shape))) or shape[0] != m.x.type.shape[0]:
            return f"the mean is over the axes {m.dims} of {m.groups.type}, not over the channels of a group"
        for value in (m.w, m.b):
            if value is not None and value.type.elements != m.x.type.shape[1]:
                return f"{value.type} has not one element for each channel of {m.x.type}"
        return None if m.root.type == m.x.type else f"x is broadcast from {m.x.type} to {m.root.type}"

    def rewrite(self, m: Match, build: Builder) -> Value:
        w, b = (_by_channel(value, build) for value in (m.w, m.b))
        groups = m.groups.type.shape[1]
        return build(ops.GroupNorm(m.x, w, b, groups=groups, eps=shortest_float(m.eps)))


class GroupsOfChannels(Rule):
    """A norm without parameters over all axes but batch and groups, between two reshapes"""

    def pattern(self, x: Var, ones: Constant, zeros: Constant, axes: Attr, eps: Attr) -> Pattern:
        groups = op.reshape(x).bind("groups")
        instance = op.group_norm(groups, maybe(ones), maybe(zeros), eps=eps)
        return op.reshape(one_of(op.layer_norm(groups, axes=axes, eps=eps), instance).bind("normed"))

    def check(self, m: Match) -> str | None:
        shape, target = m.groups.type.shape, m.root.type.shape
        norm = m.normed.producer
        if isinstance(norm, ops.GroupNorm) and norm.groups != shape[1]:
            return f"the norm has {norm.groups} groups of its own in {m.groups.type}"
        if isinstance(norm, ops.LayerNorm) and len(shape) - m.axes != 2:
            return f"the norm is over the last {m.axes} axes of {m.groups.type}, not over all but two"
        if len(target) < 3 or shape[0] != target[0] or not isinstance(shape[1], int) or mod(target[1], shape[1]) != 0:
            return f"the groups of {m.groups.type} are not groups of the channels of {m.root.type}"
        if target[1] == shape[1] and isinstance(norm, ops.LayerNorm):
            return "each group is one row: this is a layer norm"
        if not _filled(m, m.ones, 1.0) or not _filled(m, m.zeros, 0.0):
            return "the norm has parameters for groups, not for channels"
        return None

    def rewrite(self, m: Match, build: Builder) -> Value:
        same = m.x.type == m.root.type
        x = m.x if same else build(ops.Reshape(m.x, shape=m.root.type.shape))
        return build(ops.GroupNorm(x, groups=m.groups.type.shape[1], eps=m.eps))


class _OfChannels(Rule):
    """Base of the rules that take a constant of each channel into a group norm."""

    def check(self, m: Match) -> str | None:
        channels, rank = m.x.type.shape[1], m.x.type.rank
        shape = (1,) * (rank - m.c.type.rank) + m.c.type.shape
        if shape == (1, channels, *(1,) * (rank - 2)):
            return None
        return f"{m.c.type} is not one number for each channel of {m.x.type}"

    def rewrite(self, m: Match, build: Builder) -> Value:
        c = _by_channel(m.c, build)
        assert c is not None
        w, b = self.changed(build, m.w, m.b, c)
        return build(ops.GroupNorm(m.x, w, b, groups=m.groups, eps=m.eps))

    def changed(self, build: Builder, w: Value | None, b: Value | None, c: Value) -> tuple[Value | None, Value | None]:
        """The parameters with ``c`` in them."""
        raise NotImplementedError


class GroupNormWeight(_OfChannels):
    """``group_norm(x) * weight``"""

    def pattern(self, x: Var, w: Var, b: Var, c: Constant, groups: Attr, eps: Attr) -> Pattern:
        return op.group_norm(x, maybe(w), maybe(b), groups=groups, eps=eps) * c

    def changed(self, build: Builder, w: Value | None, b: Value | None, c: Value) -> tuple[Value | None, Value | None]:
        return c if w is None else build(ops.Mul(w, c)), None if b is None else build(ops.Mul(b, c))


class GroupNormBias(_OfChannels):
    """``group_norm(x) + bias``"""

    def pattern(self, x: Var, w: Var, b: Var, c: Constant, groups: Attr, eps: Attr) -> Pattern:
        return op.group_norm(x, maybe(w), maybe(b), groups=groups, eps=eps) + c

    def changed(self, build: Builder, w: Value | None, b: Value | None, c: Value) -> tuple[Value | None, Value | None]:
        return w, c if b is None else build(ops.Add(b, c))


def _by_channel(value: Value | None, build: Builder) -> Value | None:
    """``value`` as a vector."""
    if value is None or value.type.rank == 1:
        return value
    return build(ops.Reshape(value, shape=(value.type.elements,)))


def _filled(m: Match, value: Value | None, number: float) -> bool:
    """Whether a constant holds this number everywhere."""
    if value is None or not value.is_weight:
        return value is None or m.scalar(value) == number
    return bool((m.weight(value).tensor() == number).all())
