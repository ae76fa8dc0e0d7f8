"""The base of passes that are nothing but rewrite rules."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.ir.core import Module
from trimtab.ir.rewrite import Rule, apply_rules
from trimtab.passes.base import Changed, Context, Pass


@dataclass(frozen=True)
class RewritePass(Pass):
    """A pass that applies :meth:`rules` until none of them matches. Weights that nothing reads any more go."""

    @abstractmethod
    def rules(self) -> Sequence[Rule]:
        """The rules; where several match at one op, the first wins."""

    def run(self, module: Module, ctx: Context) -> Changed:
        changed = apply_rules(module, self.rules(), ctx.rewrites) > 0
        if changed:
            module.drop_unused_weights()
        return changed
