"""Clean-up of permutes (transposes)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trimtab.ir.builder import Builder
from trimtab.ir.core import Module, Value
from trimtab.ir.op import Op
from trimtab.ir.ops import Permute, Reshape
from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.local_rewrite import rewrite_each


@dataclass(frozen=True)
class SimplifyPermutes(Pass):
    """Make permute(permute(x)) one permute, remove those that move nothing, and make those that only move axes of
    size 1 a reshape, which costs nothing.

    A permute of a weight is a constant: ``fold-constants`` folds it.
    """

    name: ClassVar[str] = "simplify-permutes"
    contract: ClassVar[Contract] = Exact()

    def run(self, module: Module, ctx: Context) -> Changed:
        return rewrite_each(module, _simplify, self.name, ctx.rewrites)


def _simplify(op: Op, build: Builder) -> Value | None:
    if not isinstance(op, Permute):
        return None
    source, dims = op.x, op.dims
    while isinstance(source.producer, Permute):
        inner = source.producer
        source, dims = inner.x, tuple(inner.dims[dim] for dim in dims)
    if dims == tuple(range(len(dims))):
        return source
    moved = [dim for dim in dims if source.type.shape[dim] != 1]
    if moved == sorted(moved):
        return build(Reshape(source, shape=op.result.type.shape))
    return build(Permute(source, dims=dims)) if source is not op.x else None
