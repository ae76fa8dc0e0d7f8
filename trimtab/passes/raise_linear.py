"""Raising of matrix products with a weight to ``linear``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trimtab.ir.builder import Builder
from trimtab.ir.core import Module, Value
from trimtab.ir.op import Op
from trimtab.ir.ops import Add, Linear, Matmul, Permute
from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.local_rewrite import rewrite_each


@dataclass(frozen=True)
class RaiseLinear(Pass):
    """Write a matrix product with a weight as linear, and take a bias that is added afterwards into it.

    ``x @ W^T`` reads W directly; ``x @ W`` reads a permute of W, which ``fold-constants`` makes a weight. The results
    may be rounded differently, because the bias joins the sum.
    """

    name: ClassVar[str] = "raise-linear"
    contract: ClassVar[Contract] = Exact(rounding=True)

    def run(self, module: Module, ctx: Context) -> Changed:
        raised = rewrite_each(module, _raise_product, self.name, ctx.rewrites)
        return rewrite_each(module, _absorb_bias, self.name, ctx.rewrites) or raised


def _raise_product(op: Op, build: Builder) -> Value | None:
    if not isinstance(op, Matmul) or op.x.type.rank < 2 or op.y.type.rank != 2:
        return None
    transposed = op.y.producer
    if isinstance(transposed, Permute) and transposed.dims == (1, 0) and transposed.x.is_weight:
        return build(Linear(op.x, transposed.x))
    if op.y.is_weight and len(op.y.uses) == 1:
        # Constant folding transposes the weight; of a shared weight that would make a second copy.
        return build(Linear(op.x, build(Permute(op.y, dims=(1, 0)))))
    return None


def _absorb_bias(op: Op, build: Builder) -> Value | None:
    if not isinstance(op, Add):
        return None
    for product, bias in ((op.x, op.y), (op.y, op.x)):
        linear = product.producer
        if (
            isinstance(linear, Linear)
            and linear.bias is None
            and len(product.uses) == 1
            and bias.is_weight
            and linear.weight.type.rank == 2
            and bias.type.shape == linear.weight.type.shape[:1]
            and linear.result.type == op.result.type
        ):
            return build(Linear(linear.x, linear.weight, bias))
    return None
