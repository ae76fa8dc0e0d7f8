"""Values, ops, graphs and modules: the storage of the IR.

A :class:`Graph` is a list of :class:`Op` in static single assignment form.  A :class:`Value` is a graph input, the
result of an op, or a weight seen from a graph; it knows its uses, so rewriting is local.  Names are for people and
never identify anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from trimtab.errors import InternalError, UsageError
from trimtab.ir.dims import Symbol
from trimtab.ir.op_list import OpList
from trimtab.ir.types import TensorType
from trimtab.ir.weights import Weight

if TYPE_CHECKING:
    from trimtab.ir.op import Op

_serials = itertools.count()


class Use(NamedTuple):
    """One place that reads a value: operand ``index`` of an op, or output ``index`` of a graph."""

    user: Op | Graph
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody wants here


class Value:
    """A tensor in a graph.

    Attributes:
        type: element type and shape.
        producer: the op whose result this is; None for graph inputs and weights.
        index: position among the producer's results or the graph's inputs.
        name: a hint for people, may be empty.
        weight: id of the weight in the module's table when this value is a weight seen from a graph, else "".
    """

    __slots__ = ("_uses", "index", "name", "producer", "serial", "type", "weight")

    def __init__(
        self, type: TensorType, *, producer: Op | None = None, index: int = 0, name: str = "", weight: str = ""
    ) -> None:
        self.type = type
        self.producer = producer
        self.index = index
        self.name = name
        self.weight = weight
        self.serial = next(_serials)
        self._uses: dict[Use, None] = {}

    def __repr__(self) -> str:
        label = f"@{self.weight}" if self.weight else f"%{self.name or self.serial}"
        return f"{label}: {self.type}"

    @property
    def is_weight(self) -> bool:
        return bool(self.weight)

    @property
    def uses(self) -> tuple[Use, ...]:
        """Every place that reads this value, in the order the uses were made."""
        return tuple(self._uses)

    @property
    def users(self) -> tuple[Op, ...]:
        """The distinct ops that read this value."""
        return tuple(dict.fromkeys(use.user for use in self._uses if not isinstance(use.user, Graph)))

    @property
    def is_output(self) -> bool:
        """Whether a graph returns this value."""
        return any(isinstance(use.user, Graph) for use in self._uses)

    def replace_all_uses_with(self, other: Value) -> None:
        """Make every reader of this value read ``other`` instead."""
        if other is self:
            return
        for user, index in self.uses:
            user._set_read(index, other)
        if not other.name and not other.is_weight:
            other.name = self.name

    def _add_use(self, use: Use) -> None:
        self._uses[use] = None

    def _remove_use(self, use: Use) -> None:
        del self._uses[use]


class Graph:
    """Inputs, ops in execution order, and outputs.

    Attributes:
        name: ``main`` for a module's entry; empty for the region of an op.
        inputs: values given by the caller.
        ops: the ops, a list that may be edited while it is iterated.
        output_names: a name per output, part of the module's signature.
    """

    def __init__(self, name: str = "", inputs: Iterable[Value] = ()) -> None:
        self.name = name
        self.inputs: list[Value] = []
        self.ops = OpList(self)
        self.output_names: list[str] = []
        self._outputs: list[Value] = []
        self._weights: dict[str, Value] = {}
        for value in inputs:
            self.inputs.append(value)
            value.index = len(self.inputs) - 1

    def __repr__(self) -> str:
        return f"Graph({self.name!r}, {len(self.inputs)} inputs, {len(self.ops)} ops, {len(self._outputs)} outputs)"

    def add_input(self, type: TensorType, name: str = "") -> Value:
        """Append an input and return its value."""
        value = Value(type, index=len(self.inputs), name=name)
        self.inputs.append(value)
        return value

    @property
    def outputs(self) -> tuple[Value, ...]:
        return tuple(self._outputs)

    def set_outputs(self, values: Sequence[Value], names: Sequence[str] = ()) -> None:
        """Replace the outputs. ``names`` defaults to ``output``, or ``output.0``, ``output.1``, ..."""
        for index, value in enumerate(self._outputs):
            value._remove_use(Use(self, index))
        self._outputs = list(values)
        for index, value in enumerate(self._outputs):
            value._add_use(Use(self, index))
        if names and len(names) != len(values):
            raise UsageError("wrong number of output names", values={"names": list(names), "outputs": len(values)})
        self.output_names = list(names) or (
            ["output"] if len(values) == 1 else [f"output.{i}" for i in range(len(values))]
        )

    def weight(self, weight: Weight) -> Value:
        """The value that stands for ``weight`` in this graph; the same one at every call."""
        value = self._weights.get(weight.id)
        if value is None:
            value = self._weights[weight.id] = Value(weight.type, name=weight.id, weight=weight.id)
        return value

    @property
    def weights(self) -> tuple[Value, ...]:
        """The weights this graph reads, in order of first appearance. Unread ones are dropped."""
        return tuple(value for value in self._weights.values() if value._uses)

    def walk(self) -> Iterator[Op]:
        """Every op of this graph and, after each op, of its regions."""
        for op in self.ops:
            yield op
            for region in op.regions:
                yield from region.walk()

    def nested(self) -> Iterator[Graph]:
        """This graph and the regions inside it, at any depth."""
        yield self
        for op in self.ops.with_regions:
            for region in op.regions:
                yield from region.nested()

    def symbols(self) -> dict[str, Symbol]:
        """Symbols of the inputs' shapes by name, in order of appearance."""
        found = {s.name: s for value in self.inputs for s in sorted(value.type.symbols, key=lambda s: s.name)}
        return found

    def copy(self, rename_weights: Callable[[str], str] = lambda id: id) -> Graph:
        """A deep copy with fresh values and ops (weights are shared by id). See also :meth:`Module.copy`."""
        graph = Graph(self.name, (Value(v.type, name=v.name) for v in self.inputs))
        mapping = dict(zip(self.inputs, graph.inputs, strict=True))

        def resolve(value: Value) -> Value:
            if value.is_weight:
                id = rename_weights(value.weight)
                if id not in graph._weights:
                    graph._weights[id] = Value(value.type, name=id, weight=id)
                return graph._weights[id]
            return mapping[value]

        for op in self.ops:
            clone = op.clone([resolve(value) for value in op.operands], [r.copy(rename_weights) for r in op.regions])
            graph.ops.append(clone)
            for old, new in zip(op.results, clone.results, strict=True):
                new.name = old.name
                mapping[old] = new
        graph.set_outputs([resolve(value) for value in self._outputs], self.output_names)
        return graph

    def _set_read(self, index: int, value: Value) -> None:
        self._outputs[index]._remove_use(Use(self, index))
        self._outputs[index] = value
        value._add_use(Use(self, index))


class Module:
    """Graphs by name (``main`` is the entry) and the table of weights they share.

    ``m1 == m2`` compares structure: types, ops, attributes, weight ids and contents, input and output names, but not
    the names of inner values nor source locations.
    """

    def __init__(self, main: Graph | None = None, weights: Iterable[Weight] = ()) -> None:
        self.graphs: dict[str, Graph] = {"main": main if main is not None else Graph("main")}
        self.weights: dict[str, Weight] = {}
        for weight in weights:
            self.add_weight(weight)

    def __repr__(self) -> str:
        ops = sum(1 for graph in self.graphs.values() for _ in graph.walk())
        return f"Module({ops} ops, {len(self.weights)} weights, {self.weight_bytes} weight bytes)"

    def __str__(self) -> str:
        from trimtab.ir.printer import print_module

        return print_module(self)

    def __eq__(self, other: object) -> bool:
        from trimtab.ir.equality import modules_equal

        return isinstance(other, Module) and modules_equal(self, other)

    __hash__ = object.__hash__

    @property
    def main(self) -> Graph:
        return self.graphs["main"]

    def walk(self) -> Iterator[Op]:
        """Every op of every graph, regions included."""
        for graph in self.graphs.values():
            yield from graph.walk()

    def all_graphs(self) -> Iterator[Graph]:
        """Every graph, regions included."""
        for graph in self.graphs.values():
            yield from graph.nested()

    def readers(self, weight: str) -> Iterator[Use]:
        """Every place, in any graph, that reads the weight with this id."""
        for graph in self.all_graphs():
            value = graph._weights.get(weight)
            if value is not None:
                yield from value.uses

    def add_weight(self, weight: Weight) -> Weight:
        """Put ``weight`` in the table. Its id must be free; see :meth:`fresh_weight_id`."""
        if weight.id in self.weights:
            raise InternalError(
                "a weight id is used twice", values={"id": weight.id}, fix="take the id from Module.fresh_weight_id"
            )
        self.weights[weight.id] = weight
        return weight

    def fresh_weight_id(self, wish: str) -> str:
        """``wish`` if it is free in the table, else ``wish.1``, ``wish.2``, ..."""
        if wish not in self.weights:
            return wish
        return next(id for n in itertools.count(1) if (id := f"{wish}.{n}") not in self.weights)

    def drop_unused_weights(self) -> int:
        """Remove weights that no graph reads. Returns how many."""
        used = {value.weight for graph in self.all_graphs() for value in graph.weights}
        unused = [id for id in self.weights if id not in used]
        for id in unused:
            del self.weights[id]
        return len(unused)

    @property
    def weight_bytes(self) -> int:
        """Unique weight bytes: each table entry counted once."""
        return sum(weight.nbytes for weight in self.weights.values())

    def symbols(self) -> dict[str, Symbol]:
        """Symbols of the entry graph by name."""
        return self.main.symbols()

    def copy(self) -> Module:
        """A module with its own graphs and table; the weights' data is shared."""
        module = Module(self.main.copy(), self.weights.values())
        for name, graph in self.graphs.items():
            if name != "main":
                module.graphs[name] = graph.copy()
        return module

    def assign(self, other: Module) -> None:
        """Become ``other``: take over its graphs and weights. Used to roll back or replace a module in place."""
        self.graphs = other.graphs
        self.weights = other.weights
