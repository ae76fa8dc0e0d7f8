"""Packing of linear layers that read one input."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trimtab.ir.builder import Builder
from trimtab.ir.core import Graph, Module, Value
from trimtab.ir.ops import Linear, Slice
from trimtab.ir.printer import print_op
from trimtab.ir.rewrite import NearMiss, Rewrites
from trimtab.ir.types import TensorType
from trimtab.ir.weights import ComputedSource, Weight
from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.contracts import Contract, Exact

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PackLinears(Pass):
    """Make one linear of those that read the same x, and read slices of its result.

    Queries, keys and values of attention, and gate and up of a gated MLP, become one product. The rows of the weights
    are concatenated when their data is asked for; a bias that is absent becomes zeros if a sibling has one. A weight
    that something else reads too is left where it is.

    With ``max_width``, siblings are packed as long as their rows together are no more than that.
    """

    name: ClassVar[str] = "pack-linears"
    contract: ClassVar[Contract] = Exact(rounding=True)
    grows_weights: ClassVar[bool] = True  # by the zeros of a bias that was absent
    max_width: int | None = None

    def run(self, module: Module, ctx: Context) -> Changed:
        reads = Counter(v.weight for graph in module.all_graphs() for v in graph.weights for _ in v.uses)
        changed = False
        for graph in list(module.all_graphs()):
            for siblings in _siblings(graph):
                for pack in self._packs(siblings, reads, ctx.rewrites):
                    if not ctx.rewrites.permit(self.name, pack[0]):
                        return changed
                    _pack(module, graph, pack)
                    changed = True
        return changed

    def _packs(self, siblings: Sequence[Linear], reads: Counter[str], rewrites: Rewrites) -> list[list[Linear]]:
        """The siblings that may be packed, in order and in packs of two or more."""
        log = rewrites.of(self.name)
        log.tried += 1
        packs: list[list[Linear]] = [[]]
        for op in siblings:
            reason = _refusal(op, reads) or (self._too_wide([op]) if not packs[-1] else "")
            if reason:
                log.reject(NearMiss(1, len(siblings), print_op(op), str(op.location or ""), reason))
            elif packs[-1] and (reason := self._too_wide([*packs[-1], op])):
                log.reject(NearMiss(len(packs[-1]), len(siblings), print_op(op), str(op.location or ""), reason))
                packs.append([op])
            else:
                packs[-1].append(op)
        found = [pack for pack in packs if len(pack) > 1]
        log.matched += len(found)
        return found

    def _too_wide(self, pack: Sequence[Linear]) -> str:
        width = sum(_rows(op.weight.type) for op in pack)
        if self.max_width is None or width <= self.max_width:
            return ""
        return f"the weights would have {width} rows, more than max_width={self.max_width}"


def _siblings(graph: Graph) -> list[list[Linear]]:
    """The linears of ``graph`` that share their x with another one, by x, each group in order of execution."""
    readers: dict[Value, list[Linear]] = {}
    for op in graph.ops:
        if isinstance(op, Linear) and op.result.uses:
            readers.setdefault(op.x, []).append(op)
    return [group for group in readers.values() if len(group) > 1]


def _refusal(op: Linear, reads: Counter[str]) -> str:
    """Why ``op`` cannot be packed with any sibling; "" when it can."""
    if not op.weight.is_weight or op.weight.type.rank != 2:
        return "its weight is not a constant matrix"
    if reads[op.weight.weight] > 1:
        return f"its weight @{op.weight.weight} is read {reads[op.weight.weight]} times, and packing would copy it"
    if op.bias is not None and not (op.bias.is_weight and op.bias.type.rank == 1):
        return "its bias is not a constant vector"
    return ""


def _pack(module: Module, graph: Graph, pack: Sequence[Linear]) -> None:
    """Replace ``pack`` by one linear, at the place of the first, and a slice for each."""
    first = pack[0]
    weight = _concatenated(module, graph, f"{first.weight.weight}.packed", [op.weight for op in pack])
    bias = None
    if any(op.bias is not None for op in pack):
        wish = next(op.bias.weight for op in pack if op.bias is not None)
        bias = _concatenated(module, graph, f"{wish}.packed", [op.bias or _rows(op.weight.type) for op in pack])
    packed = Builder(module, graph, first, PackLinears.name)(Linear(first.x, weight, bias))
    start = 0
    for op in pack:
        stop = start + _rows(op.weight.type)
        part = Slice(packed, dim=packed.type.rank - 1, start=start, stop=stop)
        Builder(module, graph, op, PackLinears.name).replace(op, part)
        start = stop


def _concatenated(module: Module, graph: Graph, wish: str, parts: Sequence[Value | int]) -> Value:
    """A weight with the rows of all parts; a number stands for as many zeros."""
    pieces = [module.weights[part.weight] if isinstance(part, Value) else part for part in parts]
    weights = [piece for piece in pieces if isinstance(piece, Weight)]
    dtype, (_, *rest) = weights[0].type.dtype, weights[0].type.shape

    def join() -> torch.Tensor:
        import torch

        zeros = functools.partial(torch.zeros, dtype=dtype.to_torch())
        return torch.cat([piece.tensor() if isinstance(piece, Weight) else zeros(piece) for piece in pieces])

    rows = sum(_rows(piece.type) if isinstance(piece, Weight) else piece for piece in pieces)
    weight = Weight(
        module.fresh_weight_id(wish),
        TensorType(dtype, (rows, *rest)),
        ComputedSource(join),
        trainable=any(weight.trainable for weight in weights),
    )
    return graph.weight(module.add_weight(weight))


def _rows(type: TensorType) -> int:
    rows = type.shape[0]
    assert isinstance(rows, int)  # weights have static types: checked by the verifier
    return rows
