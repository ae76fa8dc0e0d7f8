"""Recognise SiLU in decomposed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.rewrite import Match, Pattern, Rule, Var, op
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.rewrite_pass import RewritePass


@dataclass(frozen=True)
class RaiseSilu(RewritePass):
    """Make one silu of a value times its sigmoid."""

    name: ClassVar[str] = "raise-silu"
    contract: ClassVar[Contract] = Exact(rounding=True)

    def rules(self) -> Sequence[Rule]:
        return (Silu(),)


class Silu(Rule):
    """``x sigmoid(x)``"""

    private = False

    def pattern(self, x: Var) -> Pattern:
        return x * op.sigmoid(x)

    def rewrite(self, m: Match, build: Builder) -> Value:
        return build(ops.Silu(m.x))
