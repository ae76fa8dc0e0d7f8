"""The text form of a module; :mod:`trimtab.ir.parser` is its inverse.

::

    trimtab.ir 1
    symbols batch=1..64
    weight @fc.weight: f32[10, 64] trainable sha256=5f16...

    graph main(%x: f32[batch, 64]) {
      %0 = linear(%x, @fc.weight) : f32[batch, 10] loc "model.py":12 "forward"
      %y = softmax(%0) {dim=1} : f32[batch, 10]
      return probabilities=%y
    }

Attributes that hold their default are left out. Weights appear by id, type and content hash, never as data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

from trimtab.errors import Location
from trimtab.ir.attributes import print_attribute
from trimtab.ir.core import Graph, Module, Value
from trimtab.ir.dims import Symbol
from trimtab.ir.op import Op
from trimtab.ir.weights import Weight

FORMAT_LINE = "trimtab.ir 1"
BARE_NAME = re.compile(r"[A-Za-z_0-9$.][\w$./:-]*")


def print_module(module: Module, *, locations: bool = True, hashes: bool = True) -> str:
    """The text of ``module``. ``hashes`` reads all weights once; without them the text is for people only."""
    lines = [FORMAT_LINE]
    symbols: dict[str, Symbol] = {}
    for graph in module.graphs.values():
        symbols |= graph.symbols()
    if symbols:
        lines.append("symbols " + ", ".join(f"{s.name}={s.range_text}" for s in symbols.values()))
    lines += [_weight_line(weight, hashes) for weight in module.weights.values()]
    for name, graph in module.graphs.items():
        lines.append("")
        lines.extend(_graph_lines(graph, f"graph {quote_name(name)}", _Names(graph), locations))
    return "\n".join(lines) + "\n"


def print_graph(graph: Graph, *, locations: bool = False) -> str:
    """The text of one graph, for people."""
    return "\n".join(_graph_lines(graph, f"graph {graph.name}".rstrip(), _Names(graph), locations)) + "\n"


def print_op(op: Op) -> str:
    """One line about an op, for people: names may not be unique. Regions are left out."""
    return _op_head(
        op, lambda value: ("@" if value.is_weight else "%") + (value.weight or value.name or str(value.serial))
    )


def describe_op(op: Op) -> str:
    """One line about an op as it stands in the text of its graph, so that the two can be compared."""
    return _op_head(op, _Names(op.graph)) if op.graph is not None and op in op.graph.ops else print_op(op)


def describe_value(graph: Graph, value: Value) -> str:
    """A value and its type, with the name it has in the text of ``graph``."""
    return f"{_Names(graph)(value)}: {value.type}"


def value_in_words(value: Value) -> str:
    """What a value is, in a sentence: ``the weight @w``, ``the input %x`` or ``a softmax``."""
    if value.is_weight:
        return f"the weight @{value.weight}"
    if value.producer is None:
        return f"the input %{value.name}"
    return f"{'an' if value.producer.name[0] in 'aeiou' else 'a'} {value.producer.name}"


def quote_name(name: str) -> str:
    """A name as it stands after ``%`` or ``@``: bare when it can be, else as a JSON string.

    Bare numbers stand for values without a name, and a final colon would read as the start of a type.
    """
    bare = BARE_NAME.fullmatch(name) and not name.isdigit() and not name.endswith(":")
    return name if bare else json.dumps(name)


class _Names:
    """Gives every value of a graph a unique printable name; regions are scopes of their own."""

    def __init__(self, graph: Graph) -> None:
        self._names: dict[Value, str] = {}
        self._taken: set[str] = set()
        self._counter = 0
        self._suffixes: dict[str, int] = {}
        for value in graph.inputs:
            self._assign(value)
        for op in graph.ops:
            for value in op.results:
                self._assign(value)

    def __call__(self, value: Value) -> str:
        if value.is_weight:
            return "@" + quote_name(value.weight)
        return "%" + (self._names.get(value) or (quote_name(value.name) if value.name else "<undefined>"))

    def _assign(self, value: Value) -> None:
        name = value.name
        if not name:
            while str(self._counter) in self._taken:
                self._counter += 1
            name = text = str(self._counter)
        else:
            while name in self._taken:
                suffix = self._suffixes[value.name] = self._suffixes.get(value.name, 0) + 1
                name = f"{value.name}_{suffix}"
            text = quote_name(name)
        self._taken.add(name)
        self._names[value] = text


def _weight_line(weight: Weight, hashes: bool) -> str:
    line = f"weight @{quote_name(weight.id)}: {weight.type}"
    if weight.trainable:
        line += " trainable"
    return f"{line} sha256={weight.sha256}" if hashes else line


def _graph_lines(graph: Graph, head: str, names: Callable[[Value], str], locations: bool) -> Iterator[str]:
    inputs = ", ".join(f"{names(value)}: {value.type}" for value in graph.inputs)
    yield f"{head}({inputs}) {{"
    for op in graph.ops:
        line = "  " + _op_head(op, names)
        if locations and op.location is not None:
            line += " " + _location_text(op.location)
        if not op.regions:
            yield line
            continue
        for index, region in enumerate(op.regions):
            first, *rest = _graph_lines(region, "graph ", _Names(region), locations)
            yield (line + " " if index == 0 else "  ") + first
            yield from ("  " + inner for inner in rest)
    returned = [f"{quote_name(n)}={names(v)}" for n, v in zip(graph.output_names, graph.outputs, strict=True)]
    yield f"  return {', '.join(returned)}".rstrip()
    yield "}"


def _op_head(op: Op, names: Callable[[Value], str]) -> str:
    results = ", ".join(map(names, op.results))
    arguments = []
    for _, held in op.arguments():
        if held is None:
            arguments.append("none")
        elif isinstance(held, tuple):
            arguments.append(f"[{', '.join(map(names, held))}]")
        else:
            arguments.append(names(held))
    while arguments and arguments[-1] == "none":
        arguments.pop()
    shown = {
        name: value
        for name, value in op.attributes.items()
        if (field := op.attribute_fields[name]).is_required or print_attribute(value) != print_attribute(field.default)
    }
    attributes = ", ".join(f"{name}={print_attribute(value)}" for name, value in shown.items())
    types = ", ".join(str(value.type) for value in op.results)
    return (
        f"{results} = {op.name}({', '.join(arguments)})" + (f" {{{attributes}}}" if attributes else "") + f" : {types}"
    )


def _location_text(location: Location) -> str:
    text = f"loc {json.dumps(location.file)}:{location.line}"
    return f"{text} {json.dumps(location.function)}" if location.function else text
