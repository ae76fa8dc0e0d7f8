"""Recognise RMS norm in decomposed form."""

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
class RaiseRmsNorm(RewritePass):
    """Make one rms_norm of a mean square and a root, and take a weight into it.

    Zhang and Sennrich, arXiv 1910.07467.  What is centred first is a layer norm and left to ``raise-layer-norm``.
    """

    name: ClassVar[str] = "raise-rms-norm"
    contract: ClassVar[Contract] = Exact(rounding=True)

    def rules(self) -> Sequence[Rule]:
        return (Normalise(), RmsNormWeight(), NarrowRmsNorm())


class Normalise(Rule):
    """``x / sqrt(mean(x^2) + eps)``, or multiplied by the inverse root, which may contain the weight."""

    name = "rms-norm"
    private = False

    def pattern(self, x: Var, w: Var, dims: Attr, eps: Scalar) -> Pattern:
        square = mean(x**2, dims)
        return one_of(over_root(x, square, eps), x * gain(square, eps, w))

    def check(self, m: Match) -> str | None:
        if _is_centred(m.x, m.dims):
            return "x is the difference from its mean: this is a layer norm"
        return axes_problem(m) or parameter_problem(m.w, m.x, len(m.dims))

    def rewrite(self, m: Match, build: Builder) -> Value:
        axes = len(m.dims)
        return build(ops.RmsNorm(m.x, parameter(build, m.w, axes), axes=axes, eps=shortest_float(m.eps)))


class RmsNormWeight(Rule):
    """``rms_norm(x) * weight``"""

    def pattern(self, x: Var, w: Var, axes: Attr, eps: Attr) -> Pattern:
        return op.rms_norm(x, axes=axes, eps=eps) * w

    def check(self, m: Match) -> str | None:
        return parameter_problem(m.w, m.x, m.axes)

    def rewrite(self, m: Match, build: Builder) -> Value:
        return build(ops.RmsNorm(m.x, parameter(build, m.w, m.axes), axes=m.axes, eps=m.eps))


class NarrowRmsNorm(Rule):
    """An RMS norm of half precision between casts to float32 and back: the op itself computes in float32."""

    def pattern(self, x: Var, w: Var, axes: Attr, eps: Attr) -> Pattern:
        return op.cast(op.rms_norm(op.cast(x).bind("wide"), maybe(op.cast(w)), axes=axes, eps=eps))

    def check(self, m: Match) -> str | None:
        return narrow_problem(m) or parameter_problem(m.w, m.x, m.axes)

    def rewrite(self, m: Match, build: Builder) -> Value:
        return build(ops.RmsNorm(m.x, m.w, axes=m.axes, eps=m.eps))


def _is_centred(x: Value, dims: tuple[int, ...]) -> bool:
    difference = x.producer
    if not isinstance(difference, ops.Sub):
        return False
    mean = difference.y.producer
    return isinstance(mean, ops.Mean) and (mean.x, mean.dims) == (difference.x, dims)
