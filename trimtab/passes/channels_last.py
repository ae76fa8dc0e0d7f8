"""Convolutions with channels last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Module, Value
from trimtab.ir.dead_code import remove_dead_ops
from trimtab.ir.dims import Dim
from trimtab.ir.op import Op
from trimtab.ir.weights import ComputedSource, Weight
from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.fold_constants import FoldConstants
from trimtab.passes.local_rewrite import rewrite_each
from trimtab.passes.permute_regions import Carriers, reduced_before, turn_where_better, turned_attributes

_LAST_TO_SECOND = (0, 3, 1, 2)
"""The permute of ``[B, H, W, C]`` to ``[B, C, H, W]``."""
_CONVOLUTIONS = (ops.Conv2d, ops.ConvInteger)
_POOLING = (ops.MaxPool2d, ops.AvgPool2d, ops.AdaptiveAvgPool2d)
_MACS_PER_BYTE = 8
"""Multiply-accumulates of a convolution for which channels last save the time in which a byte is permuted."""


@dataclass(frozen=True)
class ChannelsLast(Pass):
    """Compute 2-D convolutions and pooling with channels last, ``[B, H, W, C]``, and what is between them.

    The products of a convolution then sum over neighbours in memory, and its result is rows that a product makes.
    Permutes are left at the borders of a region, and those that were in it go; which ops it has is a minimum cut
    between the bytes that would be permuted and the time that convolutions save. Convolutions of one pixel become
    linear layers.
    """

    name: ClassVar[str] = "channels-last"
    contract: ClassVar[Contract] = Exact(rounding=True)
    grows_weights: ClassVar[bool] = True  # by permuted constants, within the limit of fold-constants

    def run(self, module: Module, ctx: Context) -> Changed:
        kernels = {op.body for op in module.walk() if isinstance(op, ops.Fused)}
        changed = False
        for graph in [graph for graph in module.all_graphs() if graph not in kernels]:
            starts = [op for op in graph.ops if isinstance(op, _CONVOLUTIONS)]
            changed |= turn_where_better(
                module, graph, _LAST_TO_SECOND, starts, Carriers(_turned, _gain), ctx, self.name
            )
        if changed:
            FoldConstants().run(module, ctx)
            rewrite_each(module, reduced_before, self.name, ctx.rewrites)
        changed |= rewrite_each(module, _as_linear, self.name, ctx.rewrites)
        if changed:
            remove_dead_ops(module)
            module.drop_unused_weights()
        return changed


def _turned(op: Op, dims: tuple[int, ...]) -> dict[str, Any] | None:
    if isinstance(op, (*_CONVOLUTIONS, *_POOLING)):
        return None if op.attributes["channels_last"] else {"channels_last": True}
    return turned_attributes(op, dims)


def _gain(op: Op) -> Dim:
    return op.macs() // _MACS_PER_BYTE if isinstance(op, _CONVOLUTIONS) else 0


def _as_linear(op: Op, build: Builder) -> Value | None:
    """A convolution of one pixel at a time as a linear layer."""
    if not isinstance(op, _CONVOLUTIONS) or not op.channels_last or op.groups != 1:
        return None
    if (*op.weight.type.shape[2:], *op.stride) != (1, 1, 1, 1) or any(op.padding):
        return None
    if isinstance(op, ops.ConvInteger):
        return build(ops.LinearInteger(op.x, _matrix(op.weight, build))) if op.zero is None else None
    return build(ops.Linear(op.x, _matrix(op.weight, build), op.bias))


def _matrix(value: Value, build: Builder) -> Value:
    """A weight ``[O, C, 1, 1]`` as ``[O, C]``: another weight, if nothing else reads this one."""
    type = value.type.with_shape(*value.type.shape[:2])
    if not value.is_weight or sum(1 for _ in build.module.readers(value.weight)) > 1:
        return build(ops.Reshape(value, shape=type.shape))
    weight = build.module.weights[value.weight]
    source = ComputedSource(lambda: weight.tensor().flatten(1))
    id = build.module.fresh_weight_id(f"{weight.id}.matrix")
    return build.graph.weight(build.module.add_weight(Weight(id, type, source, trainable=weight.trainable)))
