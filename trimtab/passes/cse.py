"""Common-subexpression elimination."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

from trimtab.ir.core import Graph, Module, Value
from trimtab.ir.equality import op_signature
from trimtab.ir.op import Op
from trimtab.ir.ops import Maximum, Minimum
from trimtab.ir.rewrite import Rewrites
from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.determinism import is_deterministic


@dataclass(frozen=True)
class Cse(Pass):
    """Compute once what is computed twice: ops of one class with the same operands and attributes become one.

    The operands of a commutative op may be exchanged. Ops with regions are left alone, but their bodies are treated,
    each for itself.
    """

    name: ClassVar[str] = "cse"
    contract: ClassVar[Contract] = Exact()

    def run(self, module: Module, ctx: Context) -> Changed:
        return sum([self._merge_equal_ops(graph, ctx.rewrites) for graph in list(module.all_graphs())]) > 0

    def _merge_equal_ops(self, graph: Graph, rewrites: Rewrites) -> int:
        merged = 0
        first: dict[Hashable, Op] = {}
        for op in graph.ops:
            if op.regions or not is_deterministic(op):
                continue
            earlier = first.setdefault(_key(op), op)
            if earlier is not op and rewrites.permit(self.name, op):
                for old, new in zip(op.results, earlier.results, strict=True):
                    old.replace_all_uses_with(new)
                graph.ops.remove(op)
                merged += 1
        return merged


def _key(op: Op) -> Hashable:
    operands = [_identity(value) for value in op.operands]
    # max(0.0, -0.0) and max(-0.0, 0.0) may differ in sign, so their order counts.
    if op.commutative and not isinstance(op, Maximum | Minimum):
        operands[:2] = sorted(operands[:2])
    return op_signature(op), tuple(operands)


def _identity(value: Value) -> tuple[str, int]:
    return (value.weight, 0) if value.is_weight else ("", value.serial)
