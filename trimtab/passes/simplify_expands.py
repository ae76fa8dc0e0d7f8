"""Clean-up of expands (broadcasts)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trimtab.ir.builder import Builder
from trimtab.ir.core import Module, Value
from trimtab.ir.op import Op
from trimtab.ir.ops import Expand
from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.local_rewrite import rewrite_each


@dataclass(frozen=True)
class SimplifyExpands(Pass):
    """Let elementwise ops read what was expanded, which they broadcast themselves, and expand their result if need be.

    Less is computed, and nothing is repeated in memory. A mask that is the same for all queries stays one row.
    """

    name: ClassVar[str] = "simplify-expands"
    contract: ClassVar[Contract] = Exact(rounding=True)

    def run(self, module: Module, ctx: Context) -> Changed:
        return rewrite_each(module, narrowed, self.name, ctx.rewrites)


def narrowed(op: Op, build: Builder) -> Value | None:
    """The result of an elementwise op computed from its operands before they were expanded; None if none was."""
    sources = [value.producer.x if isinstance(value.producer, Expand) else value for value in op.operands]
    if not op.elementwise or sources == list(op.operands):
        return None
    value = build(op.rebuilt(sources))
    return value if value.type == op.result.type else build(Expand(value, shape=op.result.type.shape))
