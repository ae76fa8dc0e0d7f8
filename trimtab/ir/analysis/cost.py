"""Work and traffic of a module: multiply-accumulates, parameters, and bytes, per op and in all.

Counts are dimensions: they hold for every value of the symbols and become numbers with ``bind``.  Bytes are those that
an op by itself reads and writes, as if every value went through memory; only what a ``fused`` op keeps inside does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from trimtab.ir.analysis.statistics import executions
from trimtab.ir.core import Module, Value
from trimtab.ir.dims import Dim, evaluate
from trimtab.ir.op import Op
from trimtab.ir.ops.region import Fused


@dataclass(frozen=True)
class OpCost:
    """What one op costs in one evaluation of the module.

    Args:
        op: the op.
        times: how often it runs; the other counts are for all of these runs together.
        macs: multiply-accumulate operations (see :meth:`~trimtab.ir.op.Op.macs`).
        parameters: elements of the weights it reads, each weight counted once.
        bytes_read: bytes of its operands, weights included; a weight is read again in every run.
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
        borders = _memory_borders(op) if op not in kernels else ((), ())
        rows.append(
            OpCost(
                op,
                times,
                macs=op.macs() * times,
                parameters=sum(int(type.elements) for type in weights.values() if isinstance(type.elements, int)),
                bytes_read=_total([value.type.bytes for value in borders[0]]) * times,
                bytes_written=_total([value.type.bytes for value in borders[1]]) * times,
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


def _memory_borders(op: Op) -> tuple[Sequence[Value], Sequence[Value]]:
    """What ``op`` reads from memory and writes to it."""
    if isinstance(op, Fused):
        return (*op.operands, *op.body.weights), op.results
    return ((), ()) if op.regions else (op.operands, op.results)


def _total(dims: list[Dim]) -> Dim:
    total: Dim = 0
    for dim in dims:
        total = total + dim
    return total
