"""The driver: offers ops to rules until none applies any more.

Every op is looked at once, in execution order; after an application only what changed is looked at again: the new ops,
their readers, and what lost a reader.  The cost is therefore proportional to the number of ops and applications.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from trimtab.errors import InternalError, PassError
from trimtab.ir.builder import Builder
from trimtab.ir.core import Graph, Module, Value
from trimtab.ir.op import Op
from trimtab.ir.printer import describe_op, print_op
from trimtab.ir.rewrite.log import NearMiss, Rewrites
from trimtab.ir.rewrite.match import Match
from trimtab.ir.rewrite.matcher import Failure
from trimtab.ir.rewrite.placement import insertion_point
from trimtab.ir.rewrite.rule import CompiledRule, Rule, compile_rule

APPLICATIONS_PER_OP = 8
"""A rule that applies more often than this times the number of ops, plus 64, is taken to loop."""
_FEW_READERS = 8


def apply_rules(module: Module, rules: Sequence[Rule], rewrites: Rewrites | None = None) -> int:
    """Rewrite ``module`` in place with ``rules`` until none of them matches. Returns the number of applications.

    Where several rules match at one op, the first of the sequence wins.  New ops get the name of their rule and the
    source location of the root.

    Raises:
        PassError: rules undo each other's work or their own; the message names them. Or a rule built a value of
            another type than the one it replaces.
    """
    rewrites = rewrites if rewrites is not None else Rewrites()
    compiled = [compile_rule(rule) for rule in rules]
    return sum(_Worklist(module, graph, compiled, rewrites).run() for graph in list(module.all_graphs()))


class _Worklist:
    """The ops of one graph that are still to be offered to the rules."""

    def __init__(self, module: Module, graph: Graph, rules: Sequence[CompiledRule], rewrites: Rewrites) -> None:
        self._module = module
        self._graph = graph
        self._rules = rules
        self._rewrites = rewrites
        self._by_root: dict[type[Op], list[CompiledRule]] = {}
        self._queue = deque(graph.ops)
        self._queued = set(self._queue)
        self._allowed = 64 + APPLICATIONS_PER_OP * len(graph.ops)
        self._counts: Counter[str] = Counter()

    def run(self) -> int:
        while self._queue:
            op = self._queue.popleft()
            self._queued.discard(op)
            for compiled in self._rules_for(type(op)):
                if op.graph is not self._graph:
                    break
                if any(self._try(compiled, op, value) for value in op.results):
                    break
        return self._counts.total()

    def _rules_for(self, cls: type[Op]) -> list[CompiledRule]:
        found = self._by_root.get(cls)
        if found is None:
            found = [rule for rule in self._rules if rule.roots is None or cls in rule.roots]
            self._by_root[cls] = found
        return found

    def _try(self, compiled: CompiledRule, op: Op, root: Value) -> bool:
        """Apply a rule at one value, if it matches there."""
        if not root.uses:
            return False
        log = self._rewrites.of(compiled.rule.name)
        log.tried += 1
        found = compiled.match(self._module, self._graph, root)
        if isinstance(found, Failure):
            if found.complete or (found.matched >= 2 and 2 * found.matched >= compiled.size):
                log.reject(NearMiss(found.matched, compiled.size, print_op(op), str(op.location or ""), found.reason))
            return False
        log.matched += 1
        if not self._rewrites.permit(compiled.rule.name, op):
            return False
        self._counts[compiled.rule.name] += 1
        if self._counts[compiled.rule.name] > self._allowed:
            raise self._loop(compiled.rule.name, op)
        self._apply(compiled, found)
        return True

    def _apply(self, compiled: CompiledRule, match: Match) -> None:
        rule = compiled.rule
        place = insertion_point(match.outputs, match.ops, match.leaves)
        if place is None:
            raise InternalError("a match that cannot be placed was accepted", values={"rule": rule.name})
        location = next((op.location for op in match.ops if op.location is not None), None)
        build = _TrackingBuilder(self._module, self._graph, place, rule.name)
        build.location = location
        built = rule.rewrite(match, build)
        values = built if isinstance(built, tuple) else (built,)
        for op in reversed(build.made):
            # Before what comes later in the graph: a pattern with its root there is to see the final form.
            self._queue.appendleft(op)
            self._queued.add(op)
        if [value.type for value in values] != [value.type for value in match.outputs]:
            raise PassError(
                f"the rule {rule.name} built values of other types than it replaces",
                values={"replaced": match.outputs, "built": values},
                rule="a rewrite keeps the type of every output",
                fix="let the rule's check refuse this case, or build a conversion",
                where=f"op {describe_op(match.ops[0])}" if match.ops else "",
                location=location,
            )
        for old, new in zip(match.outputs, values, strict=True):
            old.replace_all_uses_with(new)
            for reader in new.users:
                self._add(reader)
        self._remove_dead([*build.made, *match.ops])
        for leaf in match.leaves:
            if len(leaf.uses) <= _FEW_READERS:
                for reader in leaf.users:
                    self._add(reader)

    def _remove_dead(self, candidates: list[Op]) -> None:
        """Remove those of ``candidates`` that nothing reads, and what only they read."""
        waiting = list(candidates)
        while waiting:
            op = waiting.pop()
            if op.graph is not self._graph or any(value.uses for value in op.results):
                continue
            operands = op.operands
            self._graph.ops.remove(op)
            for value in operands:
                if value.producer is None:
                    continue
                if not value.uses:
                    waiting.append(value.producer)
                elif len(value.uses) <= _FEW_READERS:
                    self._add(value.producer)
                    for reader in value.users:
                        self._add(reader)

    def _add(self, op: Op) -> None:
        if op not in self._queued and op.graph is self._graph:
            self._queued.add(op)
            self._queue.append(op)

    def _loop(self, name: str, op: Op) -> PassError:
        involved = [other for other, count in self._counts.items() if 4 * count > self._allowed]
        return PassError(
            f"the rule {name} loops",
            values={"applications": self._counts[name], "ops": len(self._graph.ops), "rules": ", ".join(involved)},
            rule="rules apply until none matches, so no rule may build what it, or another one, matches again",
            fix="make the pattern or the check of one of these rules refuse what the rules build",
            where=f"op {describe_op(op)}",
            location=op.location,
        )


class _TrackingBuilder(Builder):
    """Inserts ops at a fixed place and keeps a list of them."""

    def __init__(self, module: Module, graph: Graph, before: Op, rule: str) -> None:
        super().__init__(module, graph, before=before, made_by=rule)
        self.made: list[Op] = []

    def add(self, op: Op, name: str = "") -> Op:
        self.made.append(op)
        return super().add(op, name)

    def replace(self, old: Op, new: Op) -> Op:
        self.made.append(new)
        return super().replace(old, new)
