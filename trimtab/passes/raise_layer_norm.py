"""Recognise layer norm in decomposed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from trimtab.ir import ops
from trimtab.ir.attributes import shortest_float
from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.rewrite import Attr, Match, Pattern, Rule, Scalar, Var, maybe, one_of, op
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.norm_patterns import (
    axes_problem,
    gain,
    mean,
    narrow_problem,
    over_root,
    parameter,
    parameter_problem,
)
from trimtab.passes.rewrite_pass import RewritePass


@dataclass(frozen=True)
class RaiseLayerNorm(RewritePass):
    """Make one layer_norm of means, a difference and a root, and take a weight and a bias into it.

    Ba et al., arXiv 1607.06450.  The variance is the mean square of the difference or, as Flax has it, the mean square
    less the squared mean; eps is added to it before the root is taken.
    """

    name: ClassVar[str] = "raise-layer-norm"
    contract: ClassVar[Contract] = Exact(rounding=True)

    def rules(self) -> Sequence[Rule]:
        return (Normalise(), LayerNormWeight(), LayerNormBias(), NarrowLayerNorm())


class Normalise(Rule):
    """``(x - mean) / sqrt(variance + eps)``, or multiplied out: ``x gain - mean gain`` and, as TensorFlow writes it,
    ``x gain + (bias - mean gain)``, where the gain may contain the weight."""

    name = "layer-norm"
    private = False  # who else reads the mean computes it by itself

    def pattern(self, x: Var, w: Var, b: Var, dims: Attr, eps: Scalar) -> Pattern:
        centre = mean(x, dims)
        centred = x - centre
        variance = one_of(mean(centred**2, dims), mean(x**2, dims) - centre**2)
        by = gain(variance, eps, w)
        expanded = x * by - centre * by
        return one_of(over_root(centred, variance, eps), centred * by, expanded, x * by + (b - centre * by))

    def check(self, m: Match) -> str | None:
        axes = len(m.dims)
        return axes_problem(m) or parameter_problem(m.w, m.x, axes) or parameter_problem(m.b, m.x, axes)

    def rewrite(self, m: Match, build: Builder) -> Value:
        axes = len(m.dims)
        w, b = parameter(build, m.w, axes), parameter(build, m.b, axes)
        return build(ops.LayerNorm(m.x, w, b, axes=axes, eps=shortest_float(m.eps)))


class LayerNormWeight(Rule):
    """``layer_norm(x) * weight``"""

    def pattern(self, x: Var, w: Var, axes: Attr, eps: Attr) -> Pattern:
        return op.layer_norm(x, axes=axes, eps=eps) * w

    def check(self, m: Match) -> str | None:
        return parameter_problem(m.w, m.x, m.axes)

    def rewrite(self, m: Match, build: Builder) -> Value:
        return build(ops.LayerNorm(m.x, parameter(build, m.w, m.axes), axes=m.axes, eps=m.eps))


class LayerNormBias(Rule):
    """``layer_norm(x, weight) + bias``"""

    def pattern(self, x: Var, w: Var, b: Var, axes: Attr, eps: Attr) -> Pattern:
        return op.layer_norm(x, maybe(w), axes=axes, eps=eps) + b

    def check(self, m: Match) -> str | None:
        return parameter_problem(m.b, m.x, m.axes)

    def rewrite(self, m: Match, build: Builder) -> Value:
        return build(ops.LayerNorm(m.x, m.w, parameter(build, m.b, m.axes), axes=m.axes, eps=m.eps))


class NarrowLayerNorm(Rule):
    """A layer norm of half precision between casts to float32 and back: the op itself computes in float32."""

    def pattern(self, x: Var, w: Var, b: Var, axes: Attr, eps: Attr) -> Pattern:
        wide = op.cast(x).bind("wide")
        return op.cast(op.layer_norm(wide, maybe(op.cast(w)), maybe(op.cast(b)), axes=axes, eps=eps))

    def check(self, m: Match) -> str | None:
        return narrow_problem(m) or parameter_problem(m.w, m.x, m.axes) or parameter_problem(m.b, m.x, m.axes)

    def rewrite(self, m: Match, build: Builder) -> Value:
        return build(ops.LayerNorm(m.x, m.w, m.b, axes=m.axes, eps=m.eps))
