"""Which products can be computed with integers: linear layers and convolutions with constant weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.ir import ops
from trimtab.ir.core import Graph, Module, Value
from trimtab.ir.dims import product
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op
from trimtab.ir.printer import print_op
from trimtab.ir.rewrite import NearMiss
from trimtab.ir.rewrite.log import RuleLog

if TYPE_CHECKING:
    import torch

MOST_DEPTH = 65_793
"""Sums of this many products of a u8 and an i8 fit in 32 bits."""
_MOVES = (ops.Reshape, ops.Permute, ops.Expand, ops.Slice, ops.Select, ops.Concat, ops.Cast)


@dataclass(frozen=True, eq=False)
class Site:
    """A layer whose product can be one of integers.

    Attributes:
        op: the layer, f32: a linear layer, or a 2-D convolution without groups.
        graph: the graph that it is in.
        x: its input when it was found; by the time it is rewritten, the layers before it may have been.
        is_edge: it reads an input of the module, or the module's output is made of its result, by moves alone.
    """

    op: ops.Linear | ops.Conv2d
    graph: Graph
    x: Value
    is_edge: bool

    @property
    def weight(self) -> str:
        """Id of the weight, [N, K], of a convolution [N, K, kh, kw]."""
        return self.op.weight.weight

    @property
    def is_convolution(self) -> bool:
        return isinstance(self.op, ops.Conv2d)

    @property
    def label(self) -> str:
        """What the layer is called in reports: its weight, and where it is in the user's code."""
        return f"{self.weight} ({self.op.location})" if self.op.location else self.weight

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The layer of other numbers, of any floating type, without its bias."""
        return self.op.reference(x, weight, None, **self.op.attributes)


def find_sites(module: Module, log: RuleLog) -> list[Site]:
    """The sites of ``module`` in order; other linear layers and convolutions go to ``log`` with the reason."""
    main = module.main
    sites = []
    for graph in module.all_graphs():
        for op in graph.ops:
            if not isinstance(op, ops.Linear | ops.Conv2d):
                continue
            log.tried += 1
            if reason := _refusal(op, graph is main):
                log.reject(NearMiss(1, 1, print_op(op), str(op.location or ""), reason))
            else:
                sites.append(Site(op, graph, op.x, _reads_input(op.x) or _makes_output(op.result)))
    return sites


def _refusal(op: ops.Linear | ops.Conv2d, in_main: bool) -> str:
    """Why a layer stays in float; "" when it need not."""
    if not in_main:
        return "it is inside a group or a repeated body: quantize comes before both"
    if not op.weight.is_weight:
        return "its weight is computed"
    if op.x.type.dtype is not DType.F32 or op.weight.type.dtype is not DType.F32:
        return f"it multiplies {op.x.type.dtype} by {op.weight.type.dtype}, not f32 by f32"
    if isinstance(op, ops.Conv2d) and op.groups != 1:
        return f"its channels are in {op.groups} groups, whose sums are too short to gain"
    depth = product(op.weight.type.shape[1:])
    if not isinstance(depth, int) or depth > MOST_DEPTH:
        return f"sums of {depth} products of bytes may not fit in 32 bits"
    return ""


def _sources(value: Value) -> Iterator[Value]:
    """What ``value`` is made of by moves."""
    maker = value.producer
    if not isinstance(maker, _MOVES):
        yield value
        return
    for operand in maker.operands:
        yield from _sources(operand)


def _reads_input(value: Value) -> bool:
    return any(source.producer is None and not source.is_weight for source in _sources(value))


def _makes_output(value: Value) -> bool:
    """Whether a user is the caller, perhaps behind moves and the addition of a bias."""
    return any(
        isinstance(use.user, Graph)
        or (isinstance(use.user, _MOVES) and any(map(_makes_output, use.user.results)))
        for use in value.uses
    )  # fmt: skip


def reads_of(value: Value) -> list[Op | Graph]:
    """Who reads a value, each once."""
    return list(dict.fromkeys(use.user for use in value.uses))
