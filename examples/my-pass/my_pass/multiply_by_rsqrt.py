"""A pattern pass: rules that are applied wherever they match."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.rewrite import Match, Pattern, Rule, Var, op
from trimtab.passes import Contract, Exact, RewritePass


class DivideBySqrt(Rule):
    """``x / sqrt(y)``"""

    def pattern(self, x: Var, y: Var) -> Pattern:
        return x / op.sqrt(y)

    def check(self, m: Match) -> str | None:
        return None if m.y.type.dtype.is_floating else f"y is {m.y.type.dtype}, and rsqrt takes floating types"

    def rewrite(self, m: Match, build: Builder) -> Value:
        return build(ops.Mul(m.x, build(ops.Rsqrt(m.y))))


@dataclass(frozen=True)
class MultiplyByRsqrt(RewritePass):
    """Multiply by the inverse root instead of dividing by the root."""

    name: ClassVar[str] = "multiply-by-rsqrt"
    contract: ClassVar[Contract] = Exact(rounding=True)

    def rules(self) -> Sequence[Rule]:
        return (DivideBySqrt(),)
