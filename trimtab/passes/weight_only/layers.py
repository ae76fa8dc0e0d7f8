"""Which linear layers can have their weights quantized, and the order in which they depend on each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass

from trimtab.errors import ParseError
from trimtab.ir import ops
from trimtab.ir.core import Graph, Module, Use, Value
from trimtab.ir.dtypes import DType
from trimtab.ir.printer import print_op
from trimtab.ir.rewrite import NearMiss
from trimtab.ir.rewrite.log import RuleLog
from trimtab.ir.weights import Weight


@dataclass(frozen=True)
class Layer:
    """A weight f32 ``[N, K]`` and the linear layers that read it, one or more.

    Attributes:
        tied: whether embeddings read it too; nothing else does.
    """

    weight: Weight
    linears: tuple[ops.Linear, ...]
    tied: bool = False

    @property
    def inputs(self) -> tuple[Value, ...]:
        """The different values that the linear layers multiply the weight with."""
        return tuple(dict.fromkeys(linear.x for linear in self.linears))


def find_layers(
    module: Module, log: RuleLog, unfit: Callable[[Weight], str], *, with_tied: bool = False
) -> list[Layer]:
    """The layers whose weights can be replaced, in order of execution.

    Args:
        module: the module, regions included.
        log: is told why a linear layer is left out.
        unfit: why a weight cannot be represented as it is wanted; "" when it can.
        with_tied: also layers whose weight is the table of an embedding.
    """
    grouped = {inner for op in module.walk() if isinstance(op, ops.Fused) for inner in op.body.ops}
    found: dict[str, list[ops.Linear]] = defaultdict(list)
    reasons: dict[str, str] = {}
    for op in module.walk():
        if not isinstance(op, ops.Linear):
            continue
        log.tried += 1
        reason = "it is in a group: groups are formed last" if op in grouped else _no_weight(op)
        if not reason:
            id = op.weight.weight
            if id not in reasons:
                reasons[id] = _other_reader(module, id, grouped, with_tied) or _no_data(module.weights[id])
                reasons[id] = reasons[id] or unfit(module.weights[id])
            reason = reasons[id]
        if reason:
            log.reject(NearMiss(1, 1, print_op(op), str(op.location or ""), reason))
        else:
            found[op.weight.weight].append(op)
    return [
        Layer(module.weights[id], tuple(linears), tied=any(_is_embedding(use) for use in module.readers(id)))
        for id, linears in found.items()
    ]


def levels(module: Module, layers: Iterable[Layer]) -> list[list[Layer]]:
    """``layers`` in groups, in order of execution: the inputs of a group depend on no layer of the same group.

    A layer whose weight is read several times counts where it is read first.
    """
    layers = list(layers)
    depths = _Depths({linear for layer in layers for linear in layer.linears})
    for graph in module.graphs.values():
        depths.graph(graph)
    found: dict[int, list[Layer]] = defaultdict(list)
    for layer in layers:
        found[min(map(depths.of, layer.inputs))].append(layer)
    return [found[depth] for depth in sorted(found)]


class _Depths:
    """The number of linear layers on the longest way to each value."""

    def __init__(self, linears: set[ops.Linear]) -> None:
        self._linears = linears
        self._known: dict[Value, int] = {}

    def of(self, value: Value) -> int:
        return self._known.get(value, 0)

    def graph(self, graph: Graph) -> None:
        for op in graph.ops:
            depth = max(map(self.of, op.operands), default=0) + (op in self._linears)
            for region in op.regions:
                self._known |= {inner: self.of(outer) for outer, inner in zip(op.operands, region.inputs, strict=True)}
                self.graph(region)
                depth = max(depth, *map(self.of, region.outputs))
            self._known |= dict.fromkeys(op.results, depth)


def _no_weight(op: ops.Linear) -> str:
    if not op.weight.is_weight:
        in_a_stack = op.weight.producer is None
        return "its weight is a slice of a stack, or an input" if in_a_stack else "its weight is computed"
    if op.weight.type.dtype is not DType.F32 or op.x.type.dtype is not DType.F32:
        return f"it multiplies {op.x.type.dtype} with {op.weight.type.dtype}, not f32 with f32"
    return ""


def _is_embedding(use: Use) -> bool:
    return isinstance(use.user, ops.Embedding) and use.user.operands[use.index] is use.user.table


def _other_reader(module: Module, id: str, grouped: Container[object], with_tied: bool) -> str:
    """What reads a weight otherwise than as the weight of a linear layer, which a rewrite would not serve."""
    for use in module.readers(id):
        user = use.user
        if isinstance(user, Graph):
            return f"@{id} is also an output"
        if with_tied and _is_embedding(use) and user not in grouped:
            continue
        if not isinstance(user, ops.Linear) or user.operands.index(user.weight) != use.index or user in grouped:
            kind = "a group" if user in grouped else user.name
            return f"@{id} is also read by {kind}, and a second copy would grow the weights"
    return ""


def _no_data(weight: Weight) -> str:
    try:
        data = weight.tensor()
    except ParseError:
        return f"@{weight.id} has no data to look at"
    return "" if bool(data.isfinite().all()) else f"@{weight.id} has elements that are NaN or infinite"
