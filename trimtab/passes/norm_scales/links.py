"""Where a positive scale per channel can move from the input of linear layers into what makes it, and change nothing.

The linear layers take it into the columns of their weights, and must be all that reads the value. What makes the
value takes the inverse: a norm into its gain and bias, another linear layer into the rows of its weight. Between that
one and the readers may be views, attention, whose result has the channels of its values, a product of elements and a
rectifier: all of them let a positive factor of a channel through.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from trimtab.ir import ops
from trimtab.ir.analysis.channels import Channels, readers
from trimtab.ir.core import Graph, Module, Use, Value
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op
from trimtab.ir.printer import print_op
from trimtab.ir.rewrite import Match
from trimtab.ir.rewrite.log import NearMiss, RuleLog
from trimtab.passes.folding import Site, producer

Norm: TypeAlias = ops.LayerNorm | ops.RmsNorm

_FINE = (DType.F32, DType.F64)


@dataclass(frozen=True)
class Reader:
    """A linear layer whose input has channels of a link.

    Attributes:
        op: it, with a weight ``[N, K]`` that nothing else reads.
        channels: int64 ``[K]``, the channel of the link that each of its inputs is.
    """

    op: ops.Linear
    channels: torch.Tensor


@dataclass(frozen=True)
class Link:
    """One place where scales can move.

    Attributes:
        at: the op that the log names: the norm, attention or op on elements, or the first of two linear layers.
        value: whose channels the layers read.
        lies: where the channels are in it.
        width: C, how many channels there are.
        readers: the linear layers, all that reads the value.
        norm: the norm that makes the value, or None.
        maker: the linear layer whose rows take the inverse scale where there is no norm.
        rows: int64 ``[C]``, the output of ``maker`` that each channel is; several may be the same one, as heads of
            queries share values.
    """

    at: Op
    value: Value
    lies: Channels
    width: int
    readers: tuple[Reader, ...]
    norm: Norm | None = None
    maker: ops.Linear | None = None
    rows: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def tied(self, numbers: torch.Tensor) -> torch.Tensor:
        """``numbers`` ``[C]``, not negative, with the largest of all channels that one output of the maker is."""
        if self.maker is None:
            return numbers
        largest = torch.zeros(int(self.rows.max()) + 1, dtype=numbers.dtype)
        largest.scatter_reduce_(0, self.rows, numbers, "amax")
        return largest[self.rows]

    def by_channel(self, data: torch.Tensor) -> torch.Tensor:
        """Data of ``value`` as ``[rows, C]``."""
        axes = self.lies.axes
        others = [axis for axis in range(data.dim()) if axis not in axes]
        table = data.permute(*others, *axes).reshape(-1, self.width)
        order = self.lies.numbers().reshape(-1)
        return table[:, torch.argsort(order)] if not torch.equal(order, torch.arange(self.width)) else table


def norm_links(module: Module, log: RuleLog) -> Iterator[Link]:
    """Norms over the last axis that only linear layers read. A norm that feeds others as well is a near miss in
    ``log``."""
    for graph, op in _ops(module):
        if isinstance(op, ops.LayerNorm | ops.RmsNorm):
            yield from _logged(_at_norm(module, graph, op), op, log)


def value_links(module: Module, log: RuleLog) -> Iterator[Link]:
    """Attentions between the projection of values and that of outputs. One with others around is a near miss."""
    for graph, op in _ops(module):
        if isinstance(op, ops.Attention):
            yield from _logged(_at_attention(module, graph, op), op, log)


def linear_links(module: Module, log: RuleLog) -> Iterator[Link]:
    """Linear layers behind another one with views, a product of elements or a rectifier between, or nothing at all.

    Most ops on elements are nothing of this kind, so only those that match are counted.
    """
    for graph, op in _ops(module):
        candidates: Sequence[Value] = ()
        if isinstance(op, ops.Linear):
            candidates = (op.result,)
        elif isinstance(op, ops.Relu | ops.LeakyRelu | ops.Mul):
            candidates = [v for v in op.operands if v.type == op.result.type and not v.is_weight]
        for value in candidates:
            found = _behind_linear(module, graph, op, value)
            if isinstance(found, Link):
                log.tried += 1
                log.matched += 1
                yield found
                break


def _ops(module: Module) -> Iterator[tuple[Graph, Op]]:
    for graph in module.all_graphs():
        for op in list(graph.ops):
            yield graph, op


def _logged(found: Link | str, op: Op, log: RuleLog) -> Iterator[Link]:
    log.tried += 1
    if isinstance(found, str):
        log.reject(NearMiss(1, 2, print_op(op), str(op.location or ""), found))
    else:
        log.matched += 1
        yield found


def _at_norm(module: Module, graph: Graph, norm: Norm) -> Link | str:
    width = norm.result.type.shape[-1]
    if norm.axes != 1 or not isinstance(width, int):
        return f"the norm is over the last {norm.axes} axes" if norm.axes != 1 else "its width is a symbol"
    problem = _unfit(module, norm.weight, norm.bias if isinstance(norm, ops.LayerNorm) else None)
    if problem:
        return problem
    lies = Channels.along(norm.result.type.rank - 1, norm.result)
    layers = _readers(module, norm.result, lies)
    return layers if isinstance(layers, str) else Link(norm, norm.result, lies, width, layers, norm=norm)


def _at_attention(module: Module, graph: Graph, attention: ops.Attention) -> Link | str:
    result, value = attention.result, attention.v
    heads, groups, size = result.type.shape[-3], value.type.shape[-3], value.type.shape[-1]
    if not (isinstance(heads, int) and isinstance(groups, int) and isinstance(size, int)):
        return "its heads are not of static number and size"
    leading = (0,) * (result.type.rank - 3)
    lies = Channels(result.type.shape, (*leading, size, 0, 1))
    layers = _readers(module, result, lies)
    if isinstance(layers, str):
        return layers
    made = producer(_match(module, graph, attention), value, (groups, 1, size), reader=attention)
    if isinstance(made, str) or not isinstance(made.op, ops.Linear):
        return made if isinstance(made, str) else f"its values are made by {made.op.name}"
    per_group = _rows(made, (groups, 1, size))
    rows = per_group.reshape(groups, size).repeat_interleave(heads // groups, 0).reshape(-1)
    return Link(attention, result, lies, heads * size, layers, maker=made.op, rows=rows)


def _behind_linear(module: Module, graph: Graph, op: Op, value: Value) -> Link | str:
    """The link at the result of ``op``, a linear layer or an op that scales as its operand ``value`` does."""
    result = op.result
    width = result.type.shape[-1] if result.type.rank else 0
    if not isinstance(width, int) or width < 1:
        return "its width is a symbol"
    lies = Channels.along(result.type.rank - 1, result)
    layers = _readers(module, result, lies)
    if isinstance(layers, str):
        return layers
    if isinstance(op, ops.Linear):
        return _unfit(module, op.weight, op.bias) or Link(
            op, result, lies, width, layers, maker=op, rows=torch.arange(width)
        )
    made = producer(_match(module, graph, op), value, (width,), reader=op)
    if isinstance(made, str) or not isinstance(made.op, ops.Linear):
        return made if isinstance(made, str) else f"its operand is made by {made.op.name}"
    return Link(op, result, lies, width, layers, maker=made.op, rows=_rows(made, (width,)))


def _readers(module: Module, value: Value, lies: Channels) -> tuple[Reader, ...] | str:
    """The linear layers that are all that reads ``value``, possibly moved; or, in words, why not."""
    found: list[Reader] = []
    for use, channels in readers(value, lies):
        op = use.user
        if not isinstance(op, ops.Linear) or use.index != 0:
            return f"it is also read by {_reader(use)}" if found else f"it is read by {_reader(use)}"
        if not set(channels.axes) <= {op.x.type.rank - 1}:
            return "a linear layer does not sum over the channels alone"
        problem = _unfit(module, op.weight, op.bias)
        if problem:
            return problem
        inputs = op.x.type.shape[-1]
        assert isinstance(inputs, int)  # the size of a weight
        found.append(Reader(op, channels.numbers().reshape(-1).expand(inputs).clone()))
    return tuple(found) or "no layer reads it"


def _unfit(module: Module, *values: Value | None) -> str:
    """Why one of ``values`` is no weight whose numbers may change; "" when all are, or are None."""
    for value in values:
        if value is None:
            continue
        if not value.is_weight:
            return "a weight is computed from others"
        if value.type.dtype not in _FINE:
            return f"the weight @{value.weight} is too coarse to be rounded once more: {value.type.dtype}"
        count = sum(1 for _ in module.readers(value.weight))
        if count > 1:
            return f"the weight @{value.weight} is shared by {count} readers"
    return ""


def _rows(made: Site, shape: tuple[int, ...]) -> torch.Tensor:
    """The outputs of the layer ``made`` that the elements of a constant of ``shape`` belong to, flat."""
    return made.channels.numbers().expand((1,) * (len(made.channels.shape) - len(shape)) + shape).reshape(-1)


def _match(module: Module, graph: Graph, op: Op) -> Match:
    """``op`` as a match, which the conditions of folding ask about its module."""
    return Match(module, graph, op.results, (op,), op.operands, {})


def _reader(use: Use) -> str:
    return "the graph's outputs" if isinstance(use.user, Graph) else use.user.name
