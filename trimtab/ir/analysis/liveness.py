"""When the values of a graph are alive, and how many bytes that needs at least.

Positions count the ops of one graph: op i reads and writes at position i, inputs are there from -1, and outputs are
kept until ``len(ops)``.  Weights are not counted: they are always alive.  A reshape's result is the storage of its
operand under another type.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from trimtab.ir.core import Graph, Value
from trimtab.ir.dims import evaluate
from trimtab.ir.op import Op
from trimtab.ir.ops.region import Fused
from trimtab.ir.ops.shape import Reshape


@dataclass(frozen=True)
class LiveInterval:
    """One piece of storage, alive at all positions from ``start`` to ``end``, both included.

    Args:
        value: the value that first fills it; reshaped forms of it are the same storage.
        start: position of the op that writes it, -1 for an input of the graph.
        end: position of the last op that reads it; the number of ops when it is an output.
    """

    value: Value
    start: int
    end: int


class Liveness:
    """Live intervals of one graph, in the order in which they begin. Compute it anew after changing the graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.ops: tuple[Op, ...] = tuple(graph.ops)
        self._storage: dict[Value, Value] = {}
        spans: dict[Value, list[int]] = {value: [-1, -1] for value in graph.inputs}
        for position, op in enumerate(self.ops):
            for value in op.operands:
                self._extend(spans, value, position)
            for value in op.results:
                if isinstance(op, Reshape) and not op.x.is_weight:
                    self._storage[value] = self.storage(op.x)
                elif not (isinstance(op, Reshape) and op.x.is_weight):
                    spans[value] = [position, position]
        for value in graph.outputs:
            self._extend(spans, value, len(self.ops))
        self.intervals = tuple(LiveInterval(value, start, end) for value, (start, end) in spans.items())

    def storage(self, value: Value) -> Value:
        """The value whose storage holds ``value``: itself, or what it was reshaped from."""
        return self._storage.get(value, value)

    def live_at(self, position: int) -> tuple[Value, ...]:
        """Values whose storage is needed while op ``position`` runs: what it reads, what it writes, and what passes."""
        return tuple(i.value for i in self.intervals if i.start <= position <= i.end)

    def live_bytes(self, bindings: Mapping[str, int] | None = None) -> tuple[int, ...]:
        """Bytes alive while each op runs, with the symbols at ``bindings``.

        While an op with a region runs, the region's own peak counts too, but not the region's inputs and outputs: these
        stand for the operands and results of the op.  What a ``fused`` op computes on the way is never in memory.

        Raises:
            UsageError: a symbol has no value.
        """
        return self._profile(self.intervals, bindings)

    def _profile(self, intervals: Iterable[LiveInterval], bindings: Mapping[str, int] | None) -> tuple[int, ...]:
        changes = [0] * (len(self.ops) + 2)
        for interval in intervals:
            size = self._bytes(interval.value, bindings)
            changes[max(interval.start, 0)] += size
            changes[interval.end + 1] -= size
        sizes, alive = [], 0
        for position, op in enumerate(self.ops):
            alive += changes[position]
            inside = max((region._inner_peak(bindings) for region in self._regions.get(op, ())), default=0)
            sizes.append(alive + inside)
        return tuple(sizes)

    def peak_bytes(self, bindings: Mapping[str, int] | None = None) -> int:
        """The least memory in which the graph can run in its order without writing over an operand while reading it."""
        at_rest = sum(self._bytes(value, bindings) for value in self.graph.inputs)
        outputs = {self.storage(value) for value in self.graph.outputs if not value.is_weight}
        at_end = sum(self._bytes(value, bindings) for value in outputs)
        return max(at_rest, at_end, *self.live_bytes(bindings))

    def _inner_peak(self, bindings: Mapping[str, int] | None) -> int:
        """The peak of a region apart from its inputs and outputs."""
        border = set(self.graph.inputs) | {self.storage(value) for value in self.graph.outputs}
        inner = (interval for interval in self.intervals if interval.value not in border)
        return max(self._profile(inner, bindings), default=0)

    @cached_property
    def _regions(self) -> dict[Op, tuple[Liveness, ...]]:
        return {op: tuple(map(Liveness, op.regions)) for op in self.ops if op.regions and not isinstance(op, Fused)}

    def _extend(self, spans: dict[Value, list[int]], value: Value, position: int) -> None:
        if not value.is_weight and (storage := self.storage(value)) in spans:
            spans[storage][1] = max(spans[storage][1], position)

    def _bytes(self, value: Value, bindings: Mapping[str, int] | None) -> int:
        return int(evaluate(value.type.bytes, bindings or {}))
