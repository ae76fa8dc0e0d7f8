"""Fusion grouping: which ops share a kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from trimtab.ir.core import Graph, Module
from trimtab.ir.fused import fuse
from trimtab.ir.op import Op
from trimtab.ir.ops import Fused
from trimtab.ir.rewrite.log import NearMiss
from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.fusion_model import CONTRACTIONS, CostModel, Kernel, can_join, typical_sizes


@dataclass(frozen=True)
class GroupFusions(Pass):
    """Put ops that one kernel can compute in fused ops, where the cost model says that this saves time.

    A linear layer, matrix product or convolution takes the pointwise ops behind it; a norm, softmax or reduction those
    around it, with both results of a skip connection in front of a norm; pointwise ops and moves join in chains. No
    group has two contractions, and none repeats work. Runs last: other passes look for ops, not for groups.

    ``max_ops`` and ``max_row_bytes`` bound a group by registers and by cache; the other options are the machine of the
    cost model in docs/design/fusion-groups.md.
    """

    name: ClassVar[str] = "group-fusions"
    contract: ClassVar[Contract] = Exact()
    max_ops: int = 24
    max_row_bytes: int = 65536
    launch_us: float = 2.0
    gigabytes_per_second: float = 20.0
    giga_operations_per_second: float = 40.0
    parallel_tasks: int = 16

    def run(self, module: Module, ctx: Context) -> Changed:
        bodies = {op.body for op in module.walk() if isinstance(op, Fused)}
        kinds: Counter[str] = Counter()
        for graph in [graph for graph in module.all_graphs() if graph not in bodies]:
            # A group that was made may have given way to another one.
            while made := _Grouping(self, module, graph, ctx).fuse():
                kinds.update(op.kind for op in made)
        if kinds:
            ctx.note(f"{kinds.total()} groups: " + ", ".join(f"{n} {kind}" for kind, n in kinds.most_common()))
        return bool(kinds)


@dataclass(frozen=True, eq=False)
class _Group:
    """Ops in order of execution, the one of them at whose place their kernel stands, and what that costs."""

    ops: tuple[Op, ...]
    anchor: Op
    seconds: float


class _Grouping:
    """One walk along a graph, in which each op may join the groups of what it reads.

    All groups, those of one op included, are ordered by their anchors, and each reads from groups before it only. So
    no group can depend on itself through others.
    """

    def __init__(self, options: GroupFusions, module: Module, graph: Graph, ctx: Context) -> None:
        self._options = options
        self._model = CostModel(
            options.launch_us,
            options.gigabytes_per_second,
            options.giga_operations_per_second,
            options.parallel_tasks,
            typical_sizes(module.symbols().values()),
        )
        self._module = module
        self._rewrites = ctx.rewrites
        self._log = ctx.rewrites.of(options.name)
        self._place = {op: position for position, op in enumerate(graph.ops)}
        self._groups = {
            op: _Group((op,), op, self._model.seconds(Kernel((op,))) if can_join(op) else 0.0) for op in graph.ops
        }

    def fuse(self) -> list[Fused]:
        """Form the groups, and make a fused op of each that has several ops."""
        # First the values that then need not be stored at all, then those that are stored but not read back.
        for may_keep in (False, True):
            for op in self._place:
                if can_join(op) and not isinstance(op, CONTRACTIONS):
                    self._grow(op, may_keep)
        groups = [group for op, group in self._groups.items() if group.anchor is op and len(group.ops) > 1]
        made = [fuse(self._module, group.ops, group.anchor) for group in groups]
        for op in made:
            op.made_by = self._options.name
        return made

    def _grow(self, op: Op, may_keep: bool) -> None:
        """Let the group of ``op`` join those that it reads from, where most is saved first."""
        while True:
            own = self._groups[op]
            producers = [value.producer for _, value in Kernel(own.ops).outside if value.producer is not None]
            groups = dict.fromkeys(self._groups[producer] for producer in producers if can_join(producer))
            offers = [
                (group.seconds + own.seconds - merged.seconds, merged)
                for group in groups
                if (merged := self._try(group, own, may_keep)) is not None
            ]
            if not offers or not self._rewrites.permit(self._options.name, op):
                return
            _, merged = max(offers, key=lambda offer: round(offer[0], 12))  # the first of equal ones
            self._groups.update(dict.fromkeys(merged.ops, merged))

    def _try(self, first: _Group, second: _Group, may_keep: bool) -> _Group | None:
        """One group of two, of which the second reads from the first, where that is possible and saves time.

        Unless ``may_keep``, results of the first group must not be read elsewhere.
        """
        kernel = Kernel(tuple(sorted((*first.ops, *second.ops), key=self._place.__getitem__)))
        if not may_keep and any(value.producer in first.ops for value in kernel.kept):
            return None
        self._log.tried += 1
        anchor = self._anchor(kernel, (kernel.ops[-1], first.anchor, second.anchor))
        seconds = 0.0
        reason = self._refusal(kernel)
        if not reason and anchor is None:
            reason = "something between the ops would have to run before and after them"
        if not reason:
            seconds = self._model.seconds(kernel)
            reason = "it would take longer" if seconds >= first.seconds + second.seconds else ""
        if reason or anchor is None:
            self._note(reason, first, second)
            return None
        self._log.matched += 1
        return _Group(kernel.ops, anchor, seconds)

    def _note(self, reason: str, first: _Group, second: _Group) -> None:
        """Count a refusal in the log, with the first place as its example."""
        if reason in self._log.rejected:
            self._log.rejected[reason] += 1
        else:
            op, size = second.ops[-1], len(first.ops) + len(second.ops)
            self._log.reject(NearMiss(len(first.ops), size, repr(op), str(op.location or ""), reason))

    def _refusal(self, kernel: Kernel) -> str:
        if len(kernel.ops) > self._options.max_ops:
            return "the group has max_ops ops"
        reason = kernel.refusal()
        if not reason and self._model.row_bytes(kernel) > self._options.max_row_bytes:
            return "a row has more than max_row_bytes bytes"
        return reason

    def _anchor(self, kernel: Kernel, wishes: Sequence[Op]) -> Op | None:
        """The first op of ``wishes`` that stands behind all that the kernel reads and before all that read from it."""
        producers = [value.producer for _, value in kernel.outside if value.producer is not None]
        readers = [user for value in kernel.kept for user in value.users if user not in kernel.members]
        first = max(map(self._position, producers), default=-1)
        last = min(map(self._position, readers), default=len(self._place))
        return next((op for op in wishes if first < self._place[op] < last), None)

    def _position(self, op: Op) -> int:
        """Where the group of an op stands."""
        return self._place[self._groups[op].anchor]
