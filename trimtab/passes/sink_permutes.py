"""Permutes where they move the fewest bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Module, Value
from trimtab.ir.dims import evaluate
from trimtab.ir.op import Op
from trimtab.ir.rewrite.constants import is_constant
from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.fusion_model import typical_sizes
from trimtab.passes.local_rewrite import rewrite_each
from trimtab.passes.permute_regions import Carriers, reduced_before, turn_where_better


@dataclass(frozen=True)
class SinkPermutes(Pass):
    """Move permutes through ops that compute on any order of axes, where fewer bytes are permuted in the end.

    Between permutes, elementwise ops, softmax, linear layers, and norms and reductions of other axes can compute on the
    value before a permute as well as on the one behind it. For each order of axes, the ops that should are found by a
    minimum cut, in which an edge costs the bytes that would be permuted on it. Permutes that meet their inverse there,
    or a constant, disappear; whatever the sizes, the bytes that are permuted do not grow.

    A reduction reads the value before a permute, and a product of two transposes becomes the transpose of the product.
    """

    name: ClassVar[str] = "sink-permutes"
    contract: ClassVar[Contract] = Exact(rounding=True)

    def run(self, module: Module, ctx: Context) -> Changed:
        changed, bytes = False, _permuted_bytes(module)
        # Each round leaves fewer bytes to permute, and may bring other permutes together. Regions of different orders
        # of axes can undo each other's work, so the first round that leaves no fewer is the last.
        while self._round(module, ctx):
            before, bytes, changed = bytes, _permuted_bytes(module), True
            if bytes >= before:
                break
        return changed

    def _round(self, module: Module, ctx: Context) -> bool:
        changed = rewrite_each(module, _read_before_permutes, self.name, ctx.rewrites)
        for graph in list(module.all_graphs()):
            for dims in dict.fromkeys(op.dims for op in graph.ops if isinstance(op, ops.Permute)):
                permutes = [op for op in graph.ops if isinstance(op, ops.Permute) and op.dims == dims]
                readers = [reader for op in permutes for reader in op.result.users]
                changed |= turn_where_better(module, graph, dims, readers, Carriers(), ctx, self.name)
        return changed


def _permuted_bytes(module: Module) -> float:
    """Bytes that the permutes of a module move, at typical sizes."""
    moved = [op.result.type for op in module.walk() if isinstance(op, ops.Permute)]
    sizes = typical_sizes({symbol for type in moved for symbol in type.symbols})
    return float(sum(evaluate(type.bytes, sizes) for type in moved))


def _read_before_permutes(op: Op, build: Builder) -> Value | None:
    if isinstance(op, ops.Matmul):
        return _transposed_product(op, build)
    return reduced_before(op, build)


def _transposed_product(op: ops.Matmul, build: Builder) -> Value | None:
    """``x^T y^T`` as ``(y x)^T``, where nothing else reads the transposes."""
    turned = list(_transposes(op))
    if len(turned) != 2 or any(len(value.uses) != 1 for value in op.operands):
        return None
    product = build(ops.Matmul(turned[1].x, turned[0].x))
    rank = product.type.rank
    return build(ops.Permute(product, dims=(*range(rank - 2), rank - 1, rank - 2)))


def _transposes(op: ops.Matmul) -> Iterator[ops.Permute]:
    """The operands of a product that are matrix transposes of something that is not constant."""
    for value in op.operands:
        found, rank = value.producer, value.type.rank
        swapped = (*range(rank - 2), rank - 1, rank - 2)
        if isinstance(found, ops.Permute) and found.dims == swapped and not is_constant(found.x):
            yield found
