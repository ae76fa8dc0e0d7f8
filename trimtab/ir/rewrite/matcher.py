"""The matcher: finds values for the variables of a pattern by depth-first search with backtracking.

It starts from one op, the root, and follows operands; only the further outputs of a pattern are found by following
readers.  The search remembers how far it got, so that a failure comes with its reason.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.errors import InternalError
from trimtab.ir.attributes import print_attribute
from trimtab.ir.core import Graph, Module, Value
from trimtab.ir.op import Op
from trimtab.ir.ops import Add, Div, Mul, Neg, Sub
from trimtab.ir.printer import print_op, value_in_words
from trimtab.ir.rewrite.constants import close, is_constant, same, scalar
from trimtab.ir.rewrite.match import Match
from trimtab.ir.rewrite.patterns import (
    Attr,
    Constant,
    Maybe,
    Number,
    OneOf,
    OpPattern,
    Pattern,
    PlusConstant,
    Product,
    Repeated,
    Scalar,
    Scaled,
    TimesConstant,
    Variable,
)
from trimtab.ir.rewrite.placement import insertion_point

MAX_FACTORS = 6
MAX_CANDIDATES = 64
"""Complete matches at one root whose condition is asked, before the search gives up."""

Check = Callable[[Match], "str | None"]


@dataclass(frozen=True)
class Failure:
    """How far a search got.

    Attributes:
        matched: ops matched when the search got deepest.
        complete: whether the whole pattern matched and a condition failed.
        reason: what did not fit there.
        op: the op that did not fit, None when it was a graph input or a weight.
    """

    matched: int
    complete: bool
    reason: str
    op: Op | None = None


class Matcher:
    """Searches for one pattern in one module.

    Args:
        outputs: the patterns of the outputs, the root first.
        names: what a match has a name for; None stands for what a pattern leaves out.
        module: where constants are looked up.
        tolerance: relative tolerance of constants.
        private: whether inner values may be read inside the match only.
        check: the rule's condition.
    """

    def __init__(
        self,
        outputs: Sequence[Pattern],
        names: Sequence[str],
        module: Module,
        tolerance: float,
        private: bool,
        check: Check,
    ) -> None:
        self._outputs = outputs
        self._names = names
        self._module = module
        self._tolerance = tolerance
        self._private = private
        self._check = check
        self._bound: dict[str, Any] = {}
        self._nodes: dict[int, Value] = {}
        self._ops: list[Op] = []
        self._leaves: list[Value] = []
        self._shared: list[Value] = []
        self._deepest: tuple[int, bool, Callable[[], str], Op | None] = (-1, False, lambda: "", None)

    def at(self, root: Value, graph: Graph) -> Match | Failure:
        """The first match whose root is ``root``, or how far the search got."""
        for _ in itertools.islice(self._all_outputs(root), MAX_CANDIDATES):
            match = self._complete(graph, root)
            if match is not None:
                return match
        matched, complete, reason, op = self._deepest
        return Failure(max(matched, 0), complete, reason(), op)

    def _complete(self, graph: Graph, root: Value) -> Match | None:
        """The match in its present state, when it is private and its condition holds."""
        outputs = tuple(self._nodes[id(pattern)] for pattern in self._outputs)
        ops, leaves = tuple(dict.fromkeys(self._ops)), tuple(dict.fromkeys(self._leaves))
        reason = self._intruder(outputs) if self._private else None
        if reason is None and len(outputs) > 1 and insertion_point(outputs, ops, leaves) is None:
            reason = "no place in the graph has all inputs of the match before it and all readers after it"
        match = Match(self._module, graph, outputs, ops, leaves, {**dict.fromkeys(self._names), **self._bound})
        reason = reason or self._check(match)
        if reason is None:
            return match
        text = reason
        self._fail(lambda: text, root.producer, complete=True)
        return None

    def _intruder(self, outputs: tuple[Value, ...]) -> str | None:
        inside = set(self._ops)
        for op in inside:
            for value in op.results:
                if value in outputs or value in self._shared:
                    continue
                for use in value.uses:
                    if use.user not in inside:
                        reader = "the graph's outputs" if isinstance(use.user, Graph) else use.user.name
                        return f"an inner value, the result of {op.name}, is also read by {reader}"
        return None

    # -- outputs ------------------------------------------------------------------------------------------------

    def _all_outputs(self, root: Value) -> Iterator[None]:
        for _ in self._match(self._outputs[0], root):
            yield from self._further_outputs(1)

    def _further_outputs(self, index: int) -> Iterator[None]:
        if index == len(self._outputs):
            yield
            return
        pattern = self._outputs[index]
        if id(pattern) in self._nodes:
            yield from self._further_outputs(index + 1)
            return
        tried = False
        for value in self._by_readers(pattern):
            if value.producer in self._ops:
                continue
            tried = True
            for _ in self._match(pattern, value):
                yield from self._further_outputs(index + 1)
        if not tried:
            self._fail(lambda: f"no other {pattern} reads the same values", None)

    def _by_readers(self, pattern: Pattern) -> Iterator[Value]:
        """Values that may match ``pattern``, found by following the readers of what is bound already."""
        roots = pattern.roots()
        seen = set()
        for child in pattern.children():
            start = self._nodes.get(id(child))
            for value in [start] if start is not None else self._by_readers(child):
                for reader in value.users:
                    if reader not in seen and (roots is None or type(reader) in roots):
                        seen.add(reader)
                        result = pattern.result if isinstance(pattern, OpPattern) else 0
                        yield from reader.results if result is None else (reader.results[result],)

    # -- one pattern --------------------------------------------------------------------------------------------

    def _match(self, pattern: Pattern, value: Value) -> Iterator[None]:
        """Yield once for each way in which ``value`` matches; what is bound is taken back afterwards."""
        known = self._nodes.get(id(pattern))
        if known is not None:
            if same(known, value):
                yield
            else:
                self._fail(
                    lambda: f"{value_in_words(value)} is not the value that {pattern} was before", value.producer
                )
            return
        if pattern.is_shared:
            self._shared.append(value)
        self._nodes[id(pattern)] = value
        try:
            if pattern.bound_name:
                for _ in self._bind(pattern.bound_name, value, value):
                    yield from self._one(pattern, value)
            else:
                yield from self._one(pattern, value)
        finally:
            del self._nodes[id(pattern)]
            if pattern.is_shared:
                self._shared.pop()

    def _one(self, pattern: Pattern, value: Value) -> Iterator[None]:
        if isinstance(pattern, Variable):
            yield from self._variable(pattern, value)
        elif isinstance(pattern, OpPattern):
            yield from self._op(pattern, value)
        elif isinstance(pattern, Number):
            yield from self._number(pattern, scalar(self._module, value), value)
        elif isinstance(pattern, OneOf):
            alternatives = pattern.fitting(value)
            if not alternatives:
                self._fail(lambda: f"{value_in_words(value)} is not {pattern}", value.producer)
            for alternative in alternatives:
                yield from self._match(alternative, value)
        elif isinstance(pattern, TimesConstant):
            yield from self._times_constant(pattern, value)
        elif isinstance(pattern, PlusConstant):
            yield from self._plus_constant(pattern, value)
        elif isinstance(pattern, Product):
            yield from self._product(pattern, value)
        elif isinstance(pattern, Scaled):
            yield from self._scaled(pattern, value)
        elif isinstance(pattern, Maybe):
            yield from self._match(pattern.inner, value)
        else:
            raise InternalError("a pattern stands where it cannot", values={"pattern": type(pattern).__name__})

    def _variable(self, pattern: Variable, value: Value) -> Iterator[None]:
        if isinstance(pattern, Scalar):
            yield from self._number(pattern, scalar(self._module, value), value)
            return
        if isinstance(pattern, Constant) and not is_constant(value):
            self._fail(lambda: f"{value_in_words(value)} is not {pattern}", value.producer)
            return
        self._leaves.append(value)
        try:
            yield from self._bind(pattern.name, value, value)
        finally:
            self._leaves.pop()

    def _number(self, pattern: Number | Scalar, found: float | None, value: Value) -> Iterator[None]:
        dtype = value.type.dtype
        if found is None:
            self._fail(lambda: f"{value_in_words(value)} is not {pattern}", value.producer)
        elif isinstance(pattern, Scalar):
            yield from self._bind(pattern.name, found, value)
        elif close(found, pattern.value, dtype, self._tolerance):
            yield
        else:
            self._fail(lambda: f"the constant is {found:.9g}, not {pattern.value:.9g}", value.producer)

    def _bind(self, name: str, held: Any, value: Value | None) -> Iterator[None]:
        """Let variable ``name`` hold ``held``, unless it holds something else."""
        if name not in self._bound:
            self._bound[name] = held
            try:
                yield
            finally:
                del self._bound[name]
            return
        other = self._bound[name]
        if isinstance(held, Value) and isinstance(other, Value):
            agree = same(held, other)
        elif isinstance(held, float) and isinstance(other, float) and value is not None:
            agree = close(held, other, value.type.dtype, self._tolerance)
        else:
            agree = held == other
        if agree:
            yield
        else:
            culprit = value.producer if value is not None else None
            self._fail(lambda: f"{name} would have two values, {_show(other)} and {_show(held)}", culprit)

    # -- ops ----------------------------------------------------------------------------------------------------

    def _op(self, pattern: OpPattern, value: Value) -> Iterator[None]:
        found = value.producer
        if type(found) is not pattern.cls or pattern.result not in (None, value.index):
            self._fail(lambda: f"{value_in_words(value)} is not a result of {pattern.cls.name}", found)
            return
        self._ops.append(found)
        try:
            for _ in self._attributes(list(pattern.attributes.items()), found):
                yield from self._operands(pattern, found)
        finally:
            self._ops.pop()

    def _attributes(self, wanted: list[tuple[str, Any]], found: Op) -> Iterator[None]:
        if not wanted:
            yield
            return
        (name, ask), *rest = wanted
        held = found.attributes[name]
        if isinstance(ask, Attr):
            for _ in self._bind(ask.name, held, None):
                yield from self._attributes(rest, found)
            return
        if callable(ask):
            agree = bool(ask(held))
        else:
            agree = held == _counted_from_the_front(name, ask, found)
        if agree:
            yield from self._attributes(rest, found)
        else:
            wanted_text = "" if callable(ask) else f", not {print_attribute(ask)}"
            self._fail(lambda: f"{found.name} has {name}={print_attribute(held)}{wanted_text}", found)

    def _operands(self, pattern: OpPattern, found: Op) -> Iterator[None]:
        pairs: list[tuple[Any, Any]] = []
        for asked, (field, held) in zip(pattern.operands, found.arguments(), strict=True):
            if field.kind == "many":
                values = held if isinstance(held, tuple) else ()
                if isinstance(asked, Repeated):
                    pairs.append((asked, values))
                elif isinstance(asked, tuple) and len(asked) == len(values):
                    pairs += zip(asked, values, strict=True)
                else:
                    self._fail(lambda: f"{found.name} has another number of operands", found)
                    return
            elif asked is None:
                if held is not None:
                    self._fail(lambda name=field.name: f"{found.name} has an operand {name}", found)  # type: ignore[misc]
                    return
            elif held is None:
                if not isinstance(asked, Maybe):
                    self._fail(lambda name=field.name: f"{found.name} has no operand {name}", found)  # type: ignore[misc]
                    return
            else:
                pairs.append((asked, held))
        yield from self._pairs(pairs)
        if found.commutative and len(pairs) == 2 and pairs[0][1] is not pairs[1][1]:
            (left, x), (right, y) = pairs
            yield from self._pairs([(left, y), (right, x)])

    def _pairs(self, pairs: Sequence[tuple[Pattern, Any]]) -> Iterator[None]:
        if not pairs:
            yield
            return
        (pattern, value), *rest = pairs
        search = self._repeated(pattern, value) if isinstance(pattern, Repeated) else self._match(pattern, value)
        for _ in search:
            yield from self._pairs(rest)

    def _repeated(self, pattern: Repeated, values: Sequence[Value]) -> Iterator[None]:
        """Each value matches by itself; what the matches bind anew becomes lists."""
        outside = self._bound
        collected: dict[str, list[Any]] = {}
        marks = len(self._ops), len(self._leaves)
        ops: list[Op] = []
        leaves: list[Value] = []
        for value in values:
            self._bound = dict(outside)
            for _ in self._match(pattern.inner, value):
                for name in self._bound.keys() - outside.keys():
                    collected.setdefault(name, []).append(self._bound[name])
                ops += self._ops[marks[0] :]
                leaves += self._leaves[marks[1] :]
                break
            else:
                self._bound = outside
                return
        self._bound = {**outside, **collected}
        self._ops += ops
        self._leaves += leaves
        try:
            yield
        finally:
            self._bound = outside
            del self._ops[marks[0] :], self._leaves[marks[1] :]

    # -- constants ----------------------------------------------------------------------------------------------

    def _times_constant(self, pattern: TimesConstant, value: Value) -> Iterator[None]:
        found = value.producer
        splits = self._constant_factor(value)
        if found is None or not splits:
            self._fail(lambda: f"{value_in_words(value)} is not {pattern}", found)
            return
        for x, factor in splits:
            self._ops.append(found)
            try:
                asked = 1 / factor if pattern.inverse else factor
                for _ in self._number(pattern.constant, asked, value):
                    yield from self._match(pattern.x, x)
            finally:
                self._ops.pop()

    def _constant_factor(self, value: Value) -> list[tuple[Value, float]]:
        """The ways to read ``value`` as a value of its own shape times a constant."""
        op = value.producer
        ways: list[tuple[Value, float]] = []
        if isinstance(op, Mul):
            for x, y in ((op.x, op.y), (op.y, op.x)):
                factor = scalar(self._module, y)
                if factor is not None and factor != 0 and x.type == value.type:
                    ways.append((x, factor))
        elif isinstance(op, Div) and op.rounding == "none" and op.x.type == value.type:
            divisor = scalar(self._module, op.y)
            if divisor:
                ways.append((op.x, 1 / divisor))
        return ways

    def _plus_constant(self, pattern: PlusConstant, value: Value) -> Iterator[None]:
        op = value.producer
        ways: list[tuple[Value, float]] = []
        if isinstance(op, Add | Sub):
            orders = ((op.x, op.y), (op.y, op.x)) if isinstance(op, Add) else ((op.x, op.y),)
            for x, y in orders:
                term = scalar(self._module, y)
                if term is not None and x.type == value.type:
                    ways.append((x, term if isinstance(op, Add) else -term))
        if op is None or not ways:
            self._fail(lambda: f"{value_in_words(value)} is not {pattern}", op)
            return
        for x, term in ways:
            self._ops.append(op)
            try:
                for _ in self._number(pattern.constant, term, value):
                    yield from self._match(pattern.x, x)
            finally:
                self._ops.pop()

    def _product(self, pattern: Product, value: Value) -> Iterator[None]:
        factors, constant, ops = self._factors(value)
        if len(factors) != len(pattern.factors):
            self._fail(
                lambda: f"{value_in_words(value)} has {len(factors)} factors, not {len(pattern.factors)}",
                value.producer,
            )
            return
        marks = len(self._ops)
        self._ops += ops
        try:
            for _ in self._number(pattern.constant, constant, value):
                for order in itertools.permutations(factors):
                    yield from self._pairs(list(zip(pattern.factors, order, strict=True)))
        finally:
            del self._ops[marks:]

    def _factors(self, value: Value) -> tuple[list[Value], float, list[Op]]:
        """``value`` as a product: its factors, the constant, and the ops in between, which nothing else reads."""
        constant = 1.0
        factors: list[Value] = []
        ops: list[Op] = []
        waiting = [value]
        while waiting:
            current = waiting.pop()
            op, number = current.producer, scalar(self._module, current)
            inside = (current is value or len(current.uses) == 1) and len(factors) < MAX_FACTORS
            if number is not None:
                constant *= number
            elif isinstance(op, Mul) and inside:
                ops.append(op)
                waiting += (op.y, op.x)
            elif isinstance(op, Neg) and inside:
                ops.append(op)
                constant = -constant
                waiting.append(op.x)
            elif isinstance(op, Div) and inside and op.rounding == "none" and (c := scalar(self._module, op.y)):
                ops.append(op)
                constant /= c
                waiting.append(op.x)
            else:
                factors.append(current)
        return factors, constant, ops

    def _scaled(self, pattern: Scaled, value: Value) -> Iterator[None]:
        """Take off as many constant factors as there are; then fewer."""
        steps: list[tuple[Value, float, Op | None]] = [(value, 1.0, None)]
        while True:
            current, factor, _ = steps[-1]
            inside = current is value or len(current.uses) == 1 or not self._private
            ways = self._constant_factor(current) if inside else []
            if not ways:
                break
            x, more = ways[0]
            steps.append((x, factor * more, current.producer))
        for count in range(len(steps) - 1, -1, -1):
            x, factor, _ = steps[count]
            marks = len(self._ops)
            self._ops += [op for _, _, op in steps[1 : count + 1] if op is not None]
            try:
                for _ in self._bind(pattern.by.name, factor, value):
                    yield from self._match(pattern.x, x)
            finally:
                del self._ops[marks:]

    # -- failures -----------------------------------------------------------------------------------------------

    def _fail(self, reason: Callable[[], str], op: Op | None, *, complete: bool = False) -> None:
        """Keep the reason when the search has not got as far before."""
        depth = len(self._ops)
        if not self._deepest[1] and (complete or depth > self._deepest[0]):
            self._deepest = (depth, complete, reason, op)


def _counted_from_the_front(name: str, asked: Any, op: Op) -> Any:
    """``dim=-1`` and ``dims=(-1,)`` of a pattern, as the axes of the op's operand."""
    if name not in ("dim", "dims") or not op.operands:
        return asked
    rank = op.operands[0].type.rank
    if isinstance(asked, int):
        return asked + rank if asked < 0 else asked
    return tuple(axis + rank if axis < 0 else axis for axis in asked)


def _show(held: Any) -> str:
    if isinstance(held, Value):
        return print_op(held.producer) if held.producer is not None else repr(held)
    return f"{held:.9g}" if isinstance(held, float) else print_attribute(held)
