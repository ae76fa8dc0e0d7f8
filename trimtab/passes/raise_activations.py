"""Recognise relu, hard sigmoid, hard swish, softplus, mish and elu in decomposed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.rewrite import Attr, Match, Pattern, Rule, Scalar, Var, one_of, op, product, scaled, shared
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.rewrite_pass import RewritePass


@dataclass(frozen=True)
class RaiseActivations(RewritePass):
    """Make one op of relu, clamp, hard sigmoid, hard swish, softplus, mish and elu in the forms that exporters write.

    GELU and SiLU have passes of their own.  The rules build on each other: a hard swish is found in an exporter's relu,
    a mish in what has become a softplus.
    """

    name: ClassVar[str] = "raise-activations"
    contract: ClassVar[Contract] = Exact(rounding=True)

    def rules(self) -> Sequence[Rule]:
        return (Relu(), ClampedRelu(), HardSigmoid(), HardSwish(), Softplus(), SoftplusOfMultiple(),
                SoftplusWithThreshold(), Mish(), Elu())  # fmt: skip


class _OfX(Rule):
    def check(self, m: Match) -> str | None:
        return None if m.x.type == m.root.type else f"x is broadcast from {m.x.type} to {m.root.type}"


class Relu(_OfX):
    """``max(x, 0)``"""

    def pattern(self, x: Var) -> Pattern:
        return one_of(op.maximum(x, 0), op.clamp(x, min=0, max=None))

    def rewrite(self, m: Match, build: Builder) -> Value:
        return build(ops.Relu(m.x))


class ClampedRelu(Rule):
    """``min(relu(x), c)``, for example relu6"""

    def pattern(self, x: Var, limit: Attr) -> Pattern:
        return op.clamp(op.relu(x), min=None, max=limit)

    def check(self, m: Match) -> str | None:
        return None if m.limit is not None and m.limit >= 0 else f"the upper bound is {m.limit}"

    def rewrite(self, m: Match, build: Builder) -> Value:
        return build(ops.Clamp(m.x, min=0.0, max=m.limit))


class HardSigmoid(_OfX):
    """``min(max(x + 3, 0), 6) / 6`` or ``min(max(x / 6 + 1 / 2, 0), 1)``"""

    def pattern(self, x: Var) -> Pattern:
        return one_of(op.clamp(x + 3, min=0, max=6) / 6, op.clamp(x / 6 + 0.5, min=0, max=1))

    def rewrite(self, m: Match, build: Builder) -> Value:
        return build(ops.HardSigmoid(m.x))


class HardSwish(_OfX):
    """``x hard_sigmoid(x)``, the division by 6 before or after the product"""

    def pattern(self, x: Var) -> Pattern:
        return one_of(product(x, op.clamp(x + 3, min=0, max=6), constant=1 / 6), x * op.hard_sigmoid(x))

    def rewrite(self, m: Match, build: Builder) -> Value:
        return build(ops.HardSwish(m.x))


class Softplus(Rule):
    """``log(1 + e^x)``"""

    def pattern(self, x: Var) -> Pattern:
        return one_of(op.log1p(op.exp(x)), op.log(1 + op.exp(x)))

    def rewrite(self, m: Match, build: Builder) -> Value:
        return build(ops.Softplus(m.x))


class SoftplusOfMultiple(Rule):
    """``softplus(beta x) / beta``"""

    def pattern(self, x: Var, beta: Scalar, threshold: Attr) -> Pattern:
        return op.softplus(shared(x * beta), beta=1.0, threshold=threshold) / beta

    def rewrite(self, m: Match, build: Builder) -> Value:
        return build(ops.Softplus(m.x, beta=m.beta, threshold=m.threshold))


class SoftplusWithThreshold(Rule):
    """``where(beta x > threshold, x, softplus(x))``"""

    def pattern(self, x: Var, multiple: Scalar, limit: Scalar, beta: Attr, threshold: Attr) -> Pattern:
        above = op.gt(scaled(x, by=multiple), limit)
        return op.where(above, x, op.softplus(x, beta=beta, threshold=threshold))

    def check(self, m: Match) -> str | None:
        if not math.isclose(m.multiple, m.beta, rel_tol=self.tolerance):
            return f"the limit is of {m.multiple:g} x, the softplus of {m.beta:g} x"
        return None if m.x.type == m.root.type else f"x is broadcast from {m.x.type} to {m.root.type}"

    def rewrite(self, m: Match, build: Builder) -> Value:
        return build(ops.Softplus(m.x, beta=m.beta, threshold=min(m.limit, m.threshold)))


class Mish(Rule):
    """``x tanh(softplus(x))``"""

    def pattern(self, x: Var) -> Pattern:
        return x * op.tanh(op.softplus(x, beta=1.0, threshold=20.0))

    def rewrite(self, m: Match, build: Builder) -> Value:
        return build(ops.Mish(m.x))


class Elu(_OfX):
    """``where(x > 0, x, alpha (e^(slope x) - 1))``"""

    def pattern(self, x: Var, alpha: Scalar, slope: Scalar) -> Pattern:
        steep = scaled(x, by=slope)
        return op.where(op.gt(x, 0), x, scaled(one_of(op.expm1(steep), op.exp(steep) - 1), by=alpha))

    def rewrite(self, m: Match, build: Builder) -> Value:
        return build(ops.Elu(m.x, alpha=m.alpha, input_scale=m.slope))
