"""An ordered, doubly linked list of ops: constant-time insertion and removal, and safe to edit while iterating."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from trimtab.errors import InternalError

if TYPE_CHECKING:
    from trimtab.ir.core import Graph
    from trimtab.ir.op import Op

_GAP = 1 << 64
"""Distance of the order numbers of neighbours: dozens of ops fit between two before a renumbering."""


class OpList:
    """The ops of a graph in execution order.

    Iteration follows the links live: an op inserted after the current one is visited, an op removed is not, and
    removing the current op is allowed.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._first: Op | None = None
        self._last: Op | None = None
        self._length = 0
        self._with_regions: set[Op] = set()

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Op]:
        op = self._first
        while op is not None:
            yield op
            op = op._next
            # A removed op keeps its links, so the walk goes on from where it stood.
            while op is not None and op.graph is not self._graph:
                op = op._next

    def __contains__(self, op: object) -> bool:
        return getattr(op, "graph", None) is self._graph

    def __reversed__(self) -> Iterator[Op]:
        op = self._last
        while op is not None:
            yield op
            op = op._previous
            while op is not None and op.graph is not self._graph:
                op = op._previous

    @property
    def first(self) -> Op | None:
        return self._first

    @property
    def last(self) -> Op | None:
        return self._last

    @property
    def with_regions(self) -> list[Op]:
        """The ops that have regions, in order. Found without a walk over all ops."""
        return sorted(self._with_regions, key=lambda op: op._order)

    def append(self, op: Op) -> Op:
        """Put ``op`` at the end."""
        return self._link(op, self._last, None)

    def insert_before(self, anchor: Op, op: Op) -> Op:
        self._owned(anchor)
        return self._link(op, anchor._previous, anchor)

    def insert_after(self, anchor: Op, op: Op) -> Op:
        self._owned(anchor)
        return self._link(op, anchor, anchor._next)

    def unlink(self, op: Op) -> None:
        """Take ``op`` out of the list without touching its operands; it may be inserted again."""
        self._owned(op)
        if op._previous is None:
            self._first = op._next
        else:
            op._previous._next = op._next
        if op._next is None:
            self._last = op._previous
        else:
            op._next._previous = op._previous
        op.graph = None
        self._length -= 1
        self._with_regions.discard(op)

    def remove(self, op: Op) -> None:
        """Remove ``op`` for good: its results must be unused; its operands lose these uses."""
        for result in op.results:
            if result.uses:
                raise InternalError(
                    "an op was removed while its result is still read",
                    values={"op": op.name, "result": result, "uses": len(result.uses)},
                    rule="replace all uses of an op's results before removing it",
                )
        self.unlink(op)
        op._drop_reads()

    def _link(self, op: Op, previous: Op | None, following: Op | None) -> Op:
        if op.graph is not None:
            raise InternalError("an op was inserted twice", values={"op": op.name}, fix="unlink it first")
        op._previous, op._next, op.graph = previous, following, self._graph
        op._order = self._order_between(previous, following)
        if previous is None:
            self._first = op
        else:
            previous._next = op
        if following is None:
            self._last = op
        else:
            following._previous = op
        self._length += 1
        if op.regions:
            self._with_regions.add(op)
        return op

    def _order_between(self, previous: Op | None, following: Op | None) -> int:
        """A number between those of two neighbours. When none is left, all ops are numbered anew."""
        if previous is None:
            return following._order - _GAP if following is not None else 0
        if following is None:
            return previous._order + _GAP
        if following._order - previous._order < 2:
            for index, op in enumerate(self):
                op._order = index * _GAP
        return (previous._order + following._order) // 2

    def _owned(self, op: Op) -> None:
        if op.graph is not self._graph:
            raise InternalError("an op is not in this graph", values={"op": op.name, "graph": self._graph.name})
