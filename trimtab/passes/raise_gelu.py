"""Recognise GELU and its approximations in decomposed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.rewrite import Match, Pattern, Rule, Var, one_of, op, product
from trimtab.passes.contracts import Close, Contract
from trimtab.passes.rewrite_pass import RewritePass

_CUBIC = 0.044715
_SLOPE = math.sqrt(2 / math.pi)


@dataclass(frozen=True)
class RaiseGelu(RewritePass):
    """Make one gelu of its erf, tanh or sigmoid form.

    Hendrycks and Gimpel, arXiv 1606.08415.  Factors may come in any order and grouping, the cube as a power or as a
    product.  An approximation becomes the op of this approximation, never the exact function.

    Attributes:
        tolerance: how far, relatively, the constants may be from the definition's; 1e-3 takes 1.414 for the square
            root of 2.  The result moves by at most 0.3 times that, and the contract bounds it all the same.
    """

    name: ClassVar[str] = "raise-gelu"
    contract: ClassVar[Contract] = Close(rtol=1e-4, atol=1e-6)
    tolerance: float = 1e-5

    def rules(self) -> Sequence[Rule]:
        return (GeluErf(self.tolerance), GeluTanh(self.tolerance), GeluSigmoid(self.tolerance))


@dataclass(frozen=True)
class _Gelu(Rule):
    tolerance: float = 1e-5
    private = False

    def check(self, m: Match) -> str | None:
        return None if m.x.type == m.root.type else f"a factor broadcasts x from {m.x.type} to {m.root.type}"


class GeluErf(_Gelu):
    """``0.5 x (1 + erf(x / sqrt 2))``"""

    def pattern(self, x: Var) -> Pattern:
        return product(x, 1 + op.erf(x / math.sqrt(2)), constant=0.5)

    def rewrite(self, m: Match, build: Builder) -> Value:
        return build(ops.Gelu(m.x))


class GeluTanh(_Gelu):
    """``0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))``, the polynomial expanded or with x factored out."""

    def pattern(self, x: Var) -> Pattern:
        factored = product(x, 1 + _power(x, 2, _CUBIC), constant=_SLOPE)
        expanded = x * _SLOPE + _power(x, 3, _SLOPE * _CUBIC)
        usual = product(x + _power(x, 3, _CUBIC), constant=_SLOPE)
        return product(x, 1 + op.tanh(one_of(usual, factored, expanded)), constant=0.5)

    def rewrite(self, m: Match, build: Builder) -> Value:
        return build(ops.Gelu(m.x, approximate="tanh"))


class GeluSigmoid(_Gelu):
    """``x sigmoid(1.702 x)``"""

    def pattern(self, x: Var) -> Pattern:
        return x * op.sigmoid(x * 1.702)

    def rewrite(self, m: Match, build: Builder) -> Value:
        return build(ops.Gelu(m.x, approximate="sigmoid"))


def _power(x: Pattern, degree: int, constant: float) -> Pattern:
    """``constant x^degree``, degree 2 or 3, multiplied out in any order or with powers in it."""
    spelled = [product(*[x] * degree, constant=constant), product(x**degree, constant=constant)]
    return one_of(*spelled, product(x, x**2, constant=constant)) if degree == 3 else one_of(*spelled)
