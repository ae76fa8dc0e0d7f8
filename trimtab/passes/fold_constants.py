"""Constant folding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from trimtab.errors import TrimtabError
from trimtab.ir import ops
from trimtab.ir.attributes import attribute_symbols
from trimtab.ir.builder import Builder
from trimtab.ir.core import Graph, Module, Value
from trimtab.ir.interpreter import evaluate_op
from trimtab.ir.op import Op
from trimtab.ir.weights import ComputedSource, TorchSource, Weight
from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.determinism import is_deterministic

if TYPE_CHECKING:
    import torch

_MOVES = (ops.Reshape, ops.Permute, ops.Expand, ops.Slice, ops.Select, ops.Tile, ops.Flip, ops.Roll)
_GENERATORS = (ops.Full, ops.Arange, ops.DimValue)
_ROUNDED_ONCE = (
    ops.Abs, ops.Add, ops.Cast, ops.Ceil, ops.Clamp, ops.Div, ops.Eq, ops.Floor, ops.Ge, ops.Gt, ops.Le, ops.LogicalAnd,
    ops.LogicalNot, ops.LogicalOr, ops.Lt, ops.Maximum, ops.Minimum, ops.Mul, ops.Ne, ops.Neg, ops.Relu, ops.Round,
    ops.Sqrt, ops.Sub, ops.Trunc, ops.Where,
)  # fmt: skip
"""Elementwise ops whose result is the correctly rounded one. Others, exp for one, differ in the last bit between a
scalar and a vector, so they are evaluated in their own shape."""
_EAGER_BYTES = 1 << 20
"""Results above this size are computed when asked for; constants made by an op are not evaluated above it."""


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace ops whose operands are all constants by their results.

    What is computed from numbers alone and is uniform becomes a ``full``, which takes no storage; other results
    become weights. A result may have any size if it replaces the weights it is computed from: nothing else reads them,
    and they are at least as large. It is then computed when its data is asked for. Any other result takes storage of
    its own, at most ``limit`` bytes. For all results computed from one weight that stays, this is the limit of their
    sum, so that shared weights are never duplicated. A matrix that is widened from another floating type, or
    dequantized, stays as it is stored.
    """

    name: ClassVar[str] = "fold-constants"
    contract: ClassVar[Contract] = Exact()
    grows_weights: ClassVar[bool] = True  # within the limit
    limit: int = 4096

    def run(self, module: Module, ctx: Context) -> Changed:
        changed = False
        copied: Counter[str] = Counter()
        for graph in list(module.all_graphs()):
            for op in graph.ops:
                if ctx.rewrites.exhausted:
                    return changed
                if len(op.results) != 1 or op.regions:
                    continue
                build = Builder(module, graph, before=op, made_by=self.name)
                value = _as_full(op, build) or self._as_weight(op, module, graph, copied)
                if value is not None and ctx.rewrites.permit(self.name, op):
                    op.result.replace_all_uses_with(value)
                    graph.ops.remove(op)
                    changed = True
        return changed

    def _as_weight(self, op: Op, module: Module, graph: Graph, copied: Counter[str]) -> Value | None:
        """A new weight with the result of ``op``. ``copied`` counts the bytes computed from each weight that stays."""
        if not op.operands or not all(map(_is_constant, op.operands)) or not _is_static(op) or not is_deterministic(op):
            return None
        if isinstance(op, (ops.Cast, ops.Dequantize)) and _widens_matrix(op):
            return None
        type, size = op.result.type, op.result.type.bytes
        sources = {value.weight: module.weights[value.weight] for value in op.operands if value.is_weight}
        staying = [id for id in sources if any(use.user is not op for use in module.readers(id))]
        freed = sum(weight.nbytes for id, weight in sources.items() if id not in staying)
        already = max((copied[id] for id in staying), default=0)
        if not isinstance(size, int) or (size > freed and already + size > self.limit):
            return None
        compute = _computation(op, sources)
        if size > _EAGER_BYTES and not _never_fails(op):
            return None
        try:
            source = ComputedSource(compute) if size > _EAGER_BYTES else TorchSource(compute().contiguous().clone())
        except TrimtabError:
            return None  # the data is missing, or the op refuses these values: for whoever runs the module to see
        if size > freed:
            copied.update(dict.fromkeys(staying, size))
        id = module.fresh_weight_id(f"{next(iter(sources))}.{op.name}" if sources else op.result.name or op.name)
        trainable = any(weight.trainable for weight in sources.values())
        return graph.weight(module.add_weight(Weight(id, type, source, trainable=trainable)))


def _as_full(op: Op, build: Builder) -> Value | None:
    """The ``full`` that gives the result of ``op`` when all its elements are one number, whatever the shape."""
    makers = [value.producer for value in op.operands]
    if isinstance(op, ops.DimValue) and isinstance(op.dim, int):
        number: Any = op.dim
    elif makers and all(isinstance(maker, ops.Full) for maker in makers) and isinstance(op, _ROUNDED_ONCE + _MOVES):
        scalars = [_scalar(maker) for maker in makers if isinstance(maker, ops.Full)]
        try:
            number = scalars[0].item() if isinstance(op, _MOVES) else evaluate_op(op, scalars)[0].item()
        except TrimtabError:
            return None
    else:
        return None
    return build(ops.Full(value=number, dtype=op.result.type.dtype, shape=op.result.type.shape))


def _scalar(maker: ops.Full) -> torch.Tensor:
    import torch

    return torch.full((), maker.value, dtype=maker.dtype.to_torch())


def _is_constant(value: Value) -> bool:
    if value.is_weight:
        return True
    maker, size = value.producer, value.type.bytes
    return isinstance(maker, _GENERATORS) and _is_static(maker) and isinstance(size, int) and size <= _EAGER_BYTES


def _widens_matrix(op: ops.Cast | ops.Dequantize) -> bool:
    """Whether a weight is stored in a narrow type on purpose, as cast-precision and quantization do; vectors are not
    worth it."""
    source = op.x.type
    stored = source.dtype.is_floating or isinstance(op, ops.Dequantize)
    return op.x.is_weight and source.rank > 1 and stored and source.dtype.bits < op.result.type.dtype.bits


def _is_static(op: Op) -> bool:
    return not any(map(attribute_symbols, op.attributes.values()))


def _never_fails(op: Op) -> bool:
    """Whether the op accepts all values of its operands' types, so that its evaluation may be put off."""
    always = (*_MOVES, ops.Concat, ops.Pad, ops.Quantize)
    return (op.elementwise and op.result.type.dtype.is_floating) or isinstance(op, always)


def _computation(op: Op, sources: Mapping[str, Weight]) -> Callable[[], torch.Tensor]:
    """A function that evaluates ``op``, and that outlives the op's removal from the graph."""
    alone = op.clone([Value(value.type) for value in op.operands])
    reads = [sources[v.weight].tensor if v.producer is None else partial(_generate, v.producer) for v in op.operands]
    return lambda: evaluate_op(alone, [read() for read in reads])[0]


def _generate(maker: Op) -> torch.Tensor:
    return evaluate_op(maker, ())[0]  # type: ignore[no-any-return]
