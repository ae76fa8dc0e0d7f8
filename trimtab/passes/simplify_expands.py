"""Clean-up of expands (broadcasts)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trimtab.ir.builder import Builder
from trimtab.ir.core import Module, Value
from trimtab.ir.op import Op
from trimtab.ir.ops import Expand, Matmul
from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.local_rewrite import rewrite_each


@dataclass(frozen=True)
class SimplifyExpands(Pass):
    """Let elementwise ops and matrix products read what was expanded, and expand their result if need be.

    They broadcast themselves. Less is computed, and nothing is repeated in memory: a mask that is the same for all
    queries stays one row, and a matrix that was repeated for a batched product can become the weight of a linear.
    """

    name: ClassVar[str] = "simplify-expands"
    contract: ClassVar[Contract] = Exact(rounding=True)

    def run(self, module: Module, ctx: Context) -> Changed:
        return rewrite_each(module, narrowed, self.name, ctx.rewrites)


def narrowed(op: Op, build: Builder) -> Value | None:
    """The result of ``op`` computed from its operands before they were expanded; None where that is not possible."""
    kept = 2 if isinstance(op, Matmul) else 0
    if not op.elementwise and not kept:
        return None
    sources = [_source(value, kept) for value in op.operands]
    if sources == list(op.operands):
        return None
    value = build(op.rebuilt(sources))
    return value if value.type == op.result.type else build(Expand(value, shape=op.result.type.shape))


def _source(value: Value, kept: int) -> Value:
    """What ``value`` was expanded from, unless the expansion is one of the last ``kept`` axes."""
    expand = value.producer
    if not isinstance(expand, Expand):
        return value
    narrow, wide = expand.x.type.shape, value.type.shape
    return expand.x if narrow[len(narrow) - kept :] == wide[len(wide) - kept :] else value
