"""What a model takes under a schedule of token reduction, estimated from the graph as it is, so that a schedule can be
searched for without rewriting the graph each time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.ir import ops
from trimtab.ir.core import Module
from trimtab.ir.dims import evaluate
from trimtab.passes.samples import smallest_sizes
from trimtab.passes.tokens.axis import Axis, follow
from trimtab.passes.tokens.schedules import Removals, remaining
from trimtab.passes.tokens.shortening import Plan
from trimtab.passes.tokens.stream import Stream


@dataclass(frozen=True)
class _Work:
    """Multiply-accumulates of an op, and behind how many places its rows and its keys are; -1 for no tokens."""

    macs: int
    rows: int
    keys: int = -1


class MacEstimate:
    """Multiply-accumulates under a schedule, without those of the reductions themselves.

    Args:
        module: the module, not reduced.
        stream: its tokens.
        plan: where the layers of ``numbers`` reduce.
        numbers: the layers that may reduce.
    """

    def __init__(self, module: Module, stream: Stream, plan: Plan, numbers: Sequence[int]) -> None:
        self._tokens = stream.tokens
        self._fixed = 0
        self._work: list[_Work] = []
        sizes = smallest_sizes(module.main)
        passed = {number: index + 1 for index, number in enumerate(numbers)}
        at = {value: passed[number] for value, (number, _) in plan.at.items()}
        queries = {op: passed[number] for op, (number, _) in plan.queries.items()}
        counts = stream.counting()
        reached = {value: (at[value], Axis(1)) for value in module.main.inputs if value in at}
        for op in module.main.ops:
            here = {index: reached[value] for index, value in enumerate(op.operands) if value in reached}
            macs = int(evaluate(op.macs(), sizes))
            if op in queries:
                before = here.get(1, (0, Axis(2)))
                here = {0: (queries[op], Axis(2)), 1: before, 2: before}
            effect = follow(op, {index: axis for index, (_, axis) in here.items()}, counts) if here else None
            if effect is None or isinstance(effect, str):
                self._fixed += macs
            else:
                rows = max(place for place, _ in here.values())
                keys = -1
                if isinstance(op, ops.Attention):
                    rows, keys = (here[index][0] if index in here else -1 for index in (0, 1))
                self._work.append(_Work(macs, rows, keys))
                for result, axis in zip(op.results, effect.results, strict=True):
                    if axis is not None:
                        reached[result] = (rows, axis)
            for result in op.results:
                if result in at:
                    reached[result] = (at[result], Axis(1))

    def __call__(self, removals: Removals) -> float:
        """The multiply-accumulates of one evaluation at the smallest sizes, for a number of each layer to remove."""
        left = [count / self._tokens for count in remaining(removals, self._tokens)]
        share = [*left, 1.0]  # -1, no tokens, is the last
        return self._fixed + sum(work.macs * share[work.rows] * share[work.keys] for work in self._work)
