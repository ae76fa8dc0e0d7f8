"""Dead-code elimination."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trimtab.ir.core import Module
from trimtab.ir.dead_code import remove_dead_ops
from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.contracts import Contract, Exact


@dataclass(frozen=True)
class Dce(Pass):
    """Remove ops whose results nobody reads, and weights that no op reads.

    Ops have no side effects, so an unread op cannot be noticed. Regions are cleaned too. Inputs stay: they are the
    module's signature.
    """

    name: ClassVar[str] = "dce"
    contract: ClassVar[Contract] = Exact()

    def run(self, module: Module, ctx: Context) -> Changed:
        return remove_dead_ops(module) + module.drop_unused_weights() > 0
