"""Work and traffic of a module: multiply-accumulates, parameters, and bytes, per op and in all.

Counts are dimensions: they hold for every value of the symbols and become numbers with ``bind``.  Bytes are those that
an op by itself reads and writes, as if every value went through memory; only what a ``fused`` op keeps inside does not.
Of a table from which an op picks rows, the rows count that it picks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from trimtab.ir.analysis.statistics import executions
from trimtab.ir.core import Module, Value
from trimtab.ir.dims import Dim, dim_max, dim_min, evaluate
from trimtab.ir.op import Op
from trimtab.ir.ops.indexing import Embedding, Gather, Index, IndexSelect
from trimtab.ir.ops.region import Fused
from trimtab.ir.ops.shape import Select, Slice
from trimtab.ir.types import TensorType


@dataclass(frozen=True)
class OpCost:
    """What one op costs in one evaluation of the module.

    Args:
        op: the op.
        times: how often it runs; the other counts are for all of these runs together.
        macs: multiply-accumulate operations (see :meth:`~trimtab.ir.op.Op.macs`).
        parameters: elements of the weights it reads, each weight counted once.
        bytes_read: bytes that it reads of its operands, weights included; a weight is read again in every run.
        bytes_written: bytes of its results.
    """

    op: Op
    times: int
    macs: Dim
    parameters: int
    bytes_read: Dim
    bytes_written: Dim

    def bind(self, bindings: Mapping[str, int]) -> OpCost:
        """The counts with the symbols at these values."""
        return replace(
            self,
            macs=evaluate(self.macs, bindings),
            bytes_read=evaluate(self.bytes_read, bindings),
            bytes_written=evaluate(self.bytes_written, bindings),
        )


@dataclass(frozen=True)
class ModuleCost:
    """The costs of all ops of ``main``, regions included, in order of execution.

    Args:
        ops: one row per op.  An op with a region moves no bytes itself: the ops of its region do.  With ``fused`` it is
            the other way round: it reads its operands and the weights of its body, and writes its results.
        parameters: elements of the weights that the module reads, each weight counted once.
        weight_bytes: bytes of these weights in storage, each counted once.
    """

    ops: tuple[OpCost, ...]
    parameters: int
    weight_bytes: int

    @property
    def macs(self) -> Dim:
        """Multiply-accumulates of one evaluation."""
        return _total([row.macs for row in self.ops])

    @property
    def bytes_read(self) -> Dim:
        return _total([row.bytes_read for row in self.ops])

    @property
    def bytes_written(self) -> Dim:
        return _total([row.bytes_written for row in self.ops])

    def bind(self, bindings: Mapping[str, int]) -> ModuleCost:
        """The costs with the symbols at these values; every count is then an int.

        Raises:
            UsageError: a symbol has no value.
        """
        return replace(self, ops=tuple(row.bind(bindings) for row in self.ops))


def module_cost(module: Module) -> ModuleCost:
    """The cost of one evaluation of ``module.main``. The module should verify."""
    rows = []
    used: dict[str, None] = {}
    kernels = {inner for op in module.main.walk() if isinstance(op, Fused) for inner in op.body.ops}
    for op, times in executions(module.main):
        weights = {value.weight: value.type for value in op.operands if value.is_weight}
        used.update(dict.fromkeys(weights))
        rows.append(
            OpCost(
                op,
                times,
                macs=op.macs() * times,
                parameters=sum(int(type.elements) for type in weights.values() if isinstance(type.elements, int)),
                bytes_read=_total(_bytes_from_memory(op) if op not in kernels else []) * times,
                bytes_written=_total(_bytes_to_memory(op) if op not in kernels else []) * times,
            )
        )
    used.update(dict.fromkeys(value.weight for value in module.main.outputs if value.is_weight))
    table = [module.weights[id] for id in used]
    elements = [weight.type.elements for weight in table]
    return ModuleCost(
        tuple(rows),
        parameters=sum(count for count in elements if isinstance(count, int)),
        weight_bytes=sum(weight.nbytes for weight in table),
    )


def bytes_read(op: Op, field: int, type: TensorType) -> Dim:
    """Bytes that ``op`` reads of its declared operand number ``field``, which is stored as ``type``.

    Ops that pick elements of their first operand read no more of it than they give.
    """
    if field == 0 and isinstance(op, _PICKING):
        return dim_min(type.bytes, type.with_shape(*op.results[0].type.shape).bytes)
    return type.bytes


_PICKING = (Embedding, Gather, Index, IndexSelect, Select, Slice)


def _bytes_from_memory(op: Op) -> list[Dim]:
    """Bytes of each value that ``op`` reads from memory."""
    if isinstance(op, Fused):
        inside = {value: _most_read(value, op.body.ops) for value in (*op.body.inputs, *op.body.weights)}
        return list(inside.values())
    return [] if op.regions else [_most_read(value, [op]) for value in dict.fromkeys(op.operands)]


def _most_read(value: Value, readers: Iterable[Op]) -> Dim:
    """Bytes of ``value`` that some of ``readers`` read."""
    counts: list[Dim] = []
    for op in readers:
        for number, (_, held) in enumerate(op.arguments()):
            if held is value or (isinstance(held, tuple) and value in held):
                counts.append(bytes_read(op, number, value.type))
    return dim_max(*counts) if counts else 0


def _bytes_to_memory(op: Op) -> list[Dim]:
    return [] if op.regions and not isinstance(op, Fused) else [value.type.bytes for value in op.results]


def _total(dims: list[Dim]) -> Dim:
    total: Dim = 0
    for dim in dims:
        total = total + dim
    return total
