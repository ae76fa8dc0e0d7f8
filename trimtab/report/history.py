"""The modules of a run as compact tables: each state of each op is kept once, however many passes leave it alone.

An op has a number that it keeps from pass to pass, so that two modules can be compared exactly: ops are added, removed,
or changed (they read other values).  Identity comes from the ops themselves; only when a pass builds a module anew are
equal ops recognised by what they compute.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from trimtab.errors import Location
from trimtab.ir.attributes import print_attribute
from trimtab.ir.core import Graph, Module, Value
from trimtab.ir.dims import evaluate
from trimtab.ir.op import Op
from trimtab.ir.types import TensorType
from trimtab.passes.samples import smallest_sizes
from trimtab.report.blocks import sections


class Interned:
    """Numbers for things: equal things get the same number, from 0 in order of appearance."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}

    def __call__(self, thing: Any) -> int:
        return self._numbers.setdefault(thing, len(self._numbers))

    @property
    def things(self) -> list[Any]:
        return list(self._numbers)


class State(NamedTuple):
    """One op as it was in one or more snapshots. Texts are positions in the table of strings.

    Attributes:
        number: of the op: that of its first result; further results have the numbers that follow.
        mnemonic, made_by: texts; the rule that made the op is empty for an imported one.
        file, line, function: the source location; texts but for the line, which is 0 when unknown.
        macs: multiply-accumulates of one execution, with the symbols at their smallest sizes.
        attributes: position in the table of attributes.
        operand_names: a text for each operand: the name of its field, with an index in a field of many.
        operands: numbers of the values read.
        results: the name of each result and its type, alternately; texts.
    """

    number: int
    mnemonic: int
    made_by: int
    file: int
    line: int
    function: int
    macs: int
    attributes: int
    operand_names: tuple[int, ...]
    operands: tuple[int, ...]
    results: tuple[int, ...]

    @property
    def meaning(self) -> tuple[Any, ...]:
        """What the op computes; ops with the same meaning have the same results."""
        return self.mnemonic, self.attributes, self.operand_names, self.operands, self.results[1::2]


class _Fixed(NamedTuple):
    """The part of a state that an op has for life."""

    mnemonic: int
    made_by: int
    file: int
    line: int
    function: int
    macs: int
    attributes: int
    operand_names: tuple[int, ...]


@dataclass(frozen=True)
class _Known:
    """What is known of the ops and inputs of one module."""

    numbers: dict[Op, int] = field(default_factory=dict)
    fixed: dict[Op, _Fixed] = field(default_factory=dict)
    inputs: dict[Value, int] = field(default_factory=dict)


class History:
    """Takes snapshots of a module while passes edit it.

    Results of ops, inputs of graphs and weights are numbered alike, so that a number says which value an op reads.
    """

    def __init__(self) -> None:
        self._next = 0
        self._module = _Known()  # of the module that was recorded last
        self._copy = self._module  # of the copy that a pass edits now
        self._weights: dict[str, tuple[int, str, int]] = {}
        self._type_texts: dict[int, tuple[TensorType, int]] = {}
        self._families: dict[str, str] = {}
        self._strings, self._attributes, self._states = Interned(), Interned(), Interned()
        self._kinds, self._graphs, self._snapshots = Interned(), Interned(), Interned()
        # Of the snapshot before, for modules that a pass builds anew.
        self._last_states: dict[int, State] = {}
        self._last_inputs: dict[str, tuple[int, ...]] = {}

    def follow(self, before: Module, after: Module) -> None:
        """Give the ops of ``after`` the numbers of those they are copies of.

        Args:
            before: the module that was recorded last.
            after: its copy, which no pass has edited yet.
        """
        known, pairs = self._module, list(zip(before.walk(), after.walk(), strict=True))
        graphs = zip(before.all_graphs(), after.all_graphs(), strict=True)
        self._copy = _Known(
            {new: known.numbers[old] for old, new in pairs},
            {new: known.fixed[old] for old, new in pairs},
            {new: known.inputs[old] for g, c in graphs for old, new in zip(g.inputs, c.inputs, strict=True)},
        )

    def take(self, module: Module, *, sound: bool = True) -> int:
        """Record ``module`` as it is now.

        Args:
            module: the module.
            sound: whether it verifies. The costs of ops that a pass left broken are not asked for.

        Returns:
            The position of the snapshot; modules in the same state share one.
        """
        bindings = smallest_sizes(module.main) if sound else None
        paths = [(path, graph) for name, graph in module.graphs.items() for path, graph in _regions(name, graph)]
        inputs = {path: self._number_inputs(path, graph) for path, graph in paths}
        self._number_ops(module, bindings)
        states: dict[int, State] = {}
        snapshot = self._snapshots(
            tuple(self._graph(module, graph, path, inputs[path], bindings, states) for path, graph in paths)
        )
        self._module, self._last_states, self._last_inputs = self._copy, states, inputs
        return snapshot

    def to_dict(self) -> dict[str, Any]:
        """The tables as plain data.

        - ``strings``: every text once; elsewhere a text is its position.
        - ``attributes``: lists of (name, value, whether it is the default), each list once.
        - ``states``: see :class:`State`; each state of each op once.
        - ``graphs``: each graph in each state once: ``path``, ``inputs`` (number, name, type), ``outputs`` (name,
          number), ``runs`` (the positions of its ops in ``states``, as a first position and a count, alternately) and
          ``sections`` (see :class:`~trimtab.report.blocks.Section`).
        - ``snapshots``: positions in ``graphs``.
        - ``weights``: number, id, type and bytes.
        - ``families``: of each mnemonic.
        """
        return {
            "strings": self._strings.things,
            "attributes": self._attributes.things,
            "states": self._states.things,
            "graphs": [
                dict(zip(("path", "inputs", "outputs", "runs", "sections"), graph, strict=True))
                for graph in self._graphs.things
            ],
            "snapshots": self._snapshots.things,
            "weights": [(number, id, type, size) for id, (number, type, size) in self._weights.items()],
            "families": self._families,
        }

    # -- numbers ------------------------------------------------------------------------------------------------

    def _fresh(self, count: int = 1) -> int:
        """The first of ``count`` consecutive numbers, at least one."""
        first, self._next = self._next, self._next + max(count, 1)
        return first

    def _number_inputs(self, path: str, graph: Graph) -> tuple[int, ...]:
        known = self._last_inputs.get(path, ())
        for index, value in enumerate(graph.inputs):
            if value not in self._copy.inputs:
                self._copy.inputs[value] = known[index] if index < len(known) else self._fresh()
        return tuple(self._copy.inputs[value] for value in graph.inputs)

    def _number_ops(self, module: Module, bindings: Mapping[str, int] | None) -> None:
        """Give ops that are new a number: that of a lost op with the same meaning, or a fresh one."""
        ops = list(module.walk())
        kept = {self._copy.numbers[op] for op in ops if op in self._copy.numbers}
        lost: dict[tuple[Any, ...], list[int]] = {}
        for number, state in self._last_states.items():
            if number not in kept:
                lost.setdefault(state.meaning, []).append(number)
        for op in ops:
            if op not in self._copy.numbers:
                same = lost and lost.get(self._state(module, op, -1, bindings).meaning)
                self._copy.numbers[op] = same.pop(0) if same else self._fresh(len(op.results))

    def _number(self, module: Module, value: Value) -> int:
        if value.is_weight:
            if value.weight not in self._weights:
                weight = module.weights.get(value.weight)
                size = weight.nbytes if weight is not None else 0
                self._weights[value.weight] = (self._fresh(), str(value.type), size)
            return self._weights[value.weight][0]
        if value.producer is None:
            if value not in self._copy.inputs:
                self._copy.inputs[value] = self._fresh()
            return self._copy.inputs[value]
        if value.producer not in self._copy.numbers:  # after a failure, an op that is in no graph may still be read
            self._copy.numbers[value.producer] = self._fresh(len(value.producer.results))
        return self._copy.numbers[value.producer] + value.index

    # -- tables -------------------------------------------------------------------------------------------------

    def _graph(
        self,
        module: Module,
        graph: Graph,
        path: str,
        inputs: tuple[int, ...],
        bindings: Mapping[str, int] | None,
        states: dict[int, State],
    ) -> int:
        positions: list[int] = []
        kinds: list[int] = []
        place: dict[Op, int] = {}
        last_reads: list[int] = []
        for index, op in enumerate(graph.ops):
            state = self._state(module, op, self._copy.numbers[op], bindings)
            states[state.number] = state
            positions.append(self._states(state))
            weights = tuple(self._type(value.type) for value in op.operands if value.is_weight)
            kinds.append(self._kinds((state.mnemonic, state.attributes, state.results[1::2], weights)))
            place[op] = index
            last_reads.append(index)
            for value in op.operands:
                if value.producer in place:
                    last_reads[place[value.producer]] = index
        for value in graph.outputs:
            if value.producer in place:
                last_reads[place[value.producer]] = len(kinds)
        return self._graphs(
            (
                path,
                tuple(
                    (number, self._strings(value.name), self._type(value.type))
                    for number, value in zip(inputs, graph.inputs, strict=True)
                ),
                tuple(
                    (self._strings(name), self._number(module, value))
                    for name, value in zip(graph.output_names, graph.outputs, strict=True)
                ),
                _runs(positions),
                tuple(sections(kinds, last_reads)),
            )
        )

    def _state(self, module: Module, op: Op, number: int, bindings: Mapping[str, int] | None) -> State:
        fixed = self._copy.fixed.get(op)
        if fixed is None:
            fixed = self._copy.fixed[op] = self._describe(op, bindings)
        results = [text for value in op.results for text in (self._strings(value.name), self._type(value.type))]
        operands = tuple(self._number(module, value) for value in op.operands)
        return State(number, *fixed, operands, tuple(results))

    def _describe(self, op: Op, bindings: Mapping[str, int] | None) -> _Fixed:
        self._families.setdefault(op.name, type(op).__module__.rpartition(".")[2])
        location = op.location or Location("")
        attributes = []
        for name, value in op.attributes.items():
            declared, text = op.attribute_fields[name], print_attribute(value)
            is_default = not declared.is_required and print_attribute(declared.default) == text
            attributes.append((name, text, is_default))
        names: list[int] = []
        for operand, held in op.arguments():
            if isinstance(held, tuple):
                names += [self._strings(f"{operand.name}[{index}]") for index in range(len(held))]
            elif held is not None:
                names.append(self._strings(operand.name))
        return _Fixed(
            self._strings(op.name),
            self._strings(op.made_by),
            self._strings(location.file),
            location.line,
            self._strings(location.function),
            int(evaluate(op.macs(), bindings)) if bindings is not None else 0,
            self._attributes(tuple(attributes)),
            tuple(names),
        )

    def _type(self, type: TensorType) -> int:
        # By identity: copies of a module share their types, and the text of a symbolic shape takes time.
        known = self._type_texts.get(id(type))
        if known is None:
            known = self._type_texts[id(type)] = (type, self._strings(str(type)))
        return known[1]


def _regions(path: str, graph: Graph) -> Iterator[tuple[str, Graph]]:
    """The graph and the regions of its ops, each with a path that is the same as long as nothing before it changes."""
    yield path, graph
    counts: Counter[str] = Counter()
    for op in graph.ops:
        for name, region in zip(op.region_fields, op.regions, strict=True):
            counts[op.name] += 1
            yield from _regions(f"{path} / {op.name} {counts[op.name]} {name}", region)


def _runs(positions: list[int]) -> tuple[int, ...]:
    """Consecutive positions as a first one and a count, alternately."""
    runs: list[int] = []
    for position in positions:
        if runs and position == runs[-2] + runs[-1]:
            runs[-1] += 1
        else:
            runs += [position, 1]
    return tuple(runs)
