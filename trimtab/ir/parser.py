"""Reads the text form of a module, the inverse of :mod:`trimtab.ir.printer`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from trimtab.errors import Location, ParseError, TrimtabError, UsageError
from trimtab.ir.core import Graph, Module, Value
from trimtab.ir.dims import Dim, Symbol, parse_dim
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op, op_class
from trimtab.ir.printer import BARE_NAME, FORMAT_LINE
from trimtab.ir.types import TensorType
from trimtab.ir.weights import TensorSource, Weight

_SPACE = re.compile(r"(?:\s|//[^\n]*)*")
_WORD = re.compile(r"[A-Za-z_][\w.]*")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_INTEGER = re.compile(r"-?\d+")
_NUMBER = re.compile(r"-?(?:\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+)")
_HASH = re.compile(r"[0-9a-f]{64}(?![0-9a-f])")
_DTYPES = {dtype.value: dtype for dtype in DType}
_CONSTANTS: Mapping[str, Any] = {
    "true": True, "false": False, "none": None, "inf": math.inf, "-inf": -math.inf, "nan": math.nan,
}  # fmt: skip
_MAX_DEPTH = 64
_MAX_DIGITS = 40


class _MissingData:
    """The source of a weight whose text was read without its data file."""

    def __init__(self, id: str) -> None:
        self._id = id

    def tensor(self) -> Any:
        raise ParseError("a weight has no data", values={"weight": self._id},
                         rule="the text form names weights but does not hold them",
                         fix="read the module with trimtab.read, next to its .safetensors file")  # fmt: skip


def parse_module(
    text: str, sources: Callable[[str, TensorType], TensorSource] | None = None, *, file: str = ""
) -> Module:
    """Build a module from its text.

    Args:
        text: what :func:`~trimtab.ir.printer.print_module` printed.
        sources: gives the data of a weight by id and type; without it the weights have types and hashes only.
        file: name used in error messages.

    Raises:
        ParseError: the text does not follow the grammar; the message has the line and column.
    """
    return _Parser(text, file, sources or (lambda id, type: _MissingData(id))).module()


class _Parser:
    def __init__(self, text: str, file: str, sources: Callable[[str, TensorType], TensorSource]) -> None:
        self._text = text
        self._file = file
        self._at = 0
        self._token = 0
        self._sources = sources
        self._symbols: dict[str, Symbol] = {}
        self._weights: dict[str, Weight] = {}
        self._depth = 0

    # -- grammar ------------------------------------------------------------------------------------------------

    def module(self) -> Module:
        word, version = FORMAT_LINE.split()
        if not self._accept_word(word):
            self._fail("not the text form of a module", f"the first line is `{FORMAT_LINE}`")
        if (found := self._integer()) != int(version):
            self._reject("the text has another version", values={"found": found, "known": version},
                       fix="use the version of Trimtab that wrote it, or write it again")  # fmt: skip
        if self._accept_word("symbols"):
            self._list(self._symbol_declaration)
        while self._accept_word("weight"):
            self._weight_declaration()
        module = Module(weights=self._weights.values())
        del module.graphs["main"]
        while self._accept_word("graph"):
            name = self._name()
            if name in module.graphs:
                self._reject("a graph is defined twice", values={"graph": name})
            module.graphs[name] = self._graph(name)
        self._skip()
        if self._at < len(self._text):
            self._fail("unexpected text after the last graph")
        if "main" not in module.graphs:
            self._fail("the module has no graph main")
        return module

    def _symbol_declaration(self) -> None:
        name = self._word()
        self._expect("=")
        low = self._integer()
        self._expect("..")
        high = self._integer() if _INTEGER.match(self._text, self._at) else None
        if name in self._symbols:
            self._reject("a symbol is declared twice", values={"symbol": name})
        try:
            self._symbols[name] = Symbol(name, low, high)
        except UsageError as error:
            self._fail(error.what, error.rule, values=error.values)

    def _weight_declaration(self) -> None:
        self._expect("@")
        id = self._name()
        self._expect(":")
        type = self._type()
        if not type.is_static:
            self._fail("a weight has a symbolic shape", values={"weight": id, "type": type})
        trainable = self._accept_word("trainable")
        sha256 = self._match(_HASH, "a hash") if self._accept("sha256=") else ""
        if id in self._weights:
            self._reject("a weight is declared twice", values={"weight": id})
        self._weights[id] = Weight(id, type, self._sources(id, type), trainable=trainable, sha256=sha256)

    def _graph(self, name: str) -> Graph:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            self._fail("regions are nested too deeply", values={"limit": _MAX_DEPTH})
        graph = Graph(name)
        scope: dict[str, Value] = {}
        self._expect("(")
        self._list(lambda: self._graph_input(graph, scope), end=")")
        self._expect("{")
        while not self._accept_word("return"):
            self._op(graph, scope)
        names: list[str] = []
        values: list[Value] = []

        def returned() -> None:
            names.append(self._name())
            self._expect("=")
            values.append(self._value(graph, scope))

        self._list(returned, end="}")
        graph.set_outputs(values, names)
        self._depth -= 1
        return graph

    def _graph_input(self, graph: Graph, scope: dict[str, Value]) -> None:
        self._expect("%")
        name, hint = self._value_name()
        self._expect(":")
        if name in scope:
            self._fail("an input is declared twice", values={"input": name})
        scope[name] = graph.add_input(self._type(), hint)

    def _op(self, graph: Graph, scope: dict[str, Value]) -> None:
        start = self._at
        results: list[tuple[str, str]] = []

        def result() -> None:
            self._expect("%")
            results.append(self._value_name())

        self._list(result)
        self._expect("=")
        mnemonic = self._word()
        cls = op_class(mnemonic)
        if cls is None:
            self._reject("unknown op", values={"op": mnemonic}, fix="see the IR reference for the ops there are")
        groups = self._operands(cls, graph, scope)
        attributes: dict[str, Any] = {}

        def attribute() -> None:
            name = self._word()
            self._expect("=")
            if name in attributes:
                self._reject("an attribute is given twice", values={"attribute": name})
            attributes[name] = self._attribute()

        if cls.region_fields and self._peek("graph"):
            self._fail("the types of the results come before a region")
        if self._accept("{"):
            self._list(attribute, end="}")
        self._expect(":")
        types: list[TensorType] = []
        self._list(lambda: types.append(self._type()))
        location = self._location()
        regions: list[Graph] = []
        while len(regions) < len(cls.region_fields):
            self._expect("graph")
            regions.append(self._graph(""))
        if len(types) != len(results):
            self._fail("an op has a type for each result", values={"results": len(results), "types": len(types)})
        try:
            op = cls.from_parts(groups, attributes, regions, types)
        except TrimtabError as error:
            self._at = start
            self._fail(error.what, error.rule, values=error.values)
        op.location = location
        graph.ops.append(op)
        for (name, hint), value in zip(results, op.results, strict=True):
            if name in scope:
                self._fail("a value is defined twice", values={"value": f"%{name}"})
            value.name = hint
            scope[name] = value

    def _operands(self, cls: type[Op], graph: Graph, scope: dict[str, Value]) -> dict[str, Any]:
        groups: dict[str, Any] = {}
        fields = iter(cls.operand_fields)

        def operand() -> None:
            field = next(fields, None)
            if field is None:
                self._fail(f"too many operands for {cls.name}")
            if self._accept("["):
                many: list[Value] = []
                self._list(lambda: many.append(self._value(graph, scope)), end="]")
                groups[field.name] = tuple(many)
            elif self._accept_word("none"):
                groups[field.name] = None
            else:
                groups[field.name] = self._value(graph, scope)

        self._expect("(")
        self._list(operand, end=")")
        return groups

    def _value(self, graph: Graph, scope: dict[str, Value]) -> Value:
        if self._accept("@"):
            id = self._name()
            if id not in self._weights:
                self._reject("an undeclared weight is used", values={"weight": f"@{id}"})
            return graph.weight(self._weights[id])
        self._expect("%")
        name = self._name()
        if name not in scope:
            self._reject("a value is used before it is defined", values={"value": f"%{name}"})
        return scope[name]

    def _type(self) -> TensorType:
        word = self._word()
        if word not in _DTYPES:
            self._reject("unknown element type", values={"dtype": word, "known": " ".join(_DTYPES)})
        dims: list[Dim] = []
        self._expect("[")
        self._list(lambda: dims.append(self._dim()), end="]")
        return TensorType(_DTYPES[word], tuple(dims))

    def _dim(self) -> Dim:
        text = self._raw()
        try:
            return parse_dim(text, self._symbols)
        except ParseError as error:
            self._reject(error.what, error.rule, values=error.values, fix=error.fix)

    def _attribute(self, depth: int = 0) -> Any:
        self._skip()
        if depth > _MAX_DEPTH:
            self._fail("lists are nested too deeply", values={"limit": _MAX_DEPTH})
        if self._accept("["):
            items: list[Any] = []
            self._list(lambda: items.append(self._attribute(depth + 1)), end="]")
            return tuple(items)
        if self._text.startswith('"', self._at):
            return self._string()
        start = self._at
        text = self._raw()
        if text in _CONSTANTS:
            return _CONSTANTS[text]
        if text in _DTYPES:
            return _DTYPES[text]
        if _INTEGER.fullmatch(text):
            return self._to_int(text)
        if _NUMBER.fullmatch(text):
            return float(text)
        self._at = start
        return self._dim()

    def _location(self) -> Location | None:
        if not self._accept_word("loc"):
            return None
        file = self._string()
        self._expect(":")
        line = self._integer()
        self._skip()
        function = self._string() if self._text.startswith('"', self._at) else ""
        return Location(file, line, function)

    # -- tokens -------------------------------------------------------------------------------------------------

    def _skip(self) -> None:
        match = _SPACE.match(self._text, self._at)
        self._at = match.end() if match else self._at

    def _peek(self, text: str) -> bool:
        self._skip()
        return self._text.startswith(text, self._at)

    def _accept(self, text: str) -> bool:
        if self._peek(text):
            self._at += len(text)
            return True
        return False

    def _accept_word(self, word: str) -> bool:
        self._skip()
        match = _WORD.match(self._text, self._at)
        if match and match.group() == word:
            self._at = match.end()
            return True
        return False

    def _expect(self, text: str) -> None:
        if not self._accept(text):
            self._fail(f"expected `{text}`")

    def _match(self, pattern: re.Pattern[str], what: str) -> str:
        self._skip()
        match = pattern.match(self._text, self._at)
        if match is None:
            self._fail(f"expected {what}")
        self._token = self._at
        self._at = match.end()
        return match.group()

    def _word(self) -> str:
        return self._match(_WORD, "a word")

    def _integer(self) -> int:
        return self._to_int(self._match(_INTEGER, "an integer"))

    def _to_int(self, digits: str) -> int:
        if len(digits) > _MAX_DIGITS:
            self._reject("an integer is too long", values={"digits": len(digits), "limit": _MAX_DIGITS})
        return int(digits)

    def _string(self) -> str:
        text = self._match(_STRING, "a string")
        try:
            value = json.loads(text)
        except ValueError as error:
            self._reject("cannot read a string", str(error))
        return str(value)

    def _value_name(self) -> tuple[str, str]:
        """A value's name in its scope, and the hint it gives: none for a bare number."""
        bare = not self._text.startswith('"', self._at)
        name = self._name()
        return name, "" if bare and name.isdigit() else name

    def _name(self) -> str:
        self._skip()
        if self._text.startswith('"', self._at):
            return self._string()
        # A bare name may hold ":" inside but the ":" of a following type is not part of it.
        name = self._match(BARE_NAME, "a name")
        if name.endswith(":"):
            name = name[:-1]
            self._at -= 1
        return name

    def _raw(self) -> str:
        """The text up to the comma or closing bracket that ends a dimension or attribute."""
        self._skip()
        self._token = start = self._at
        depth = 0
        while self._at < len(self._text):
            char = self._text[self._at]
            if depth == 0 and char in ",]})\n":
                break
            depth += (char == "(") - (char == ")")
            self._at += 1
        if start == self._at:
            self._fail("expected a value")
        return self._text[start : self._at].strip()

    def _list(self, item: Callable[[], None], end: str = "") -> None:
        """Comma-separated items; with ``end``, possibly none of them, and the closing text is consumed."""
        if end and self._accept(end):
            return
        item()
        while self._accept(","):
            item()
        if end:
            self._expect(end)

    def _reject(self, what: str, rule: str = "", *, values: Mapping[str, Any] | None = None, fix: str = "") -> NoReturn:
        """Fail at the token just read rather than behind it."""
        self._at = self._token
        self._fail(what, rule, values=values, fix=fix)

    def _fail(self, what: str, rule: str = "", *, values: Mapping[str, Any] | None = None, fix: str = "") -> NoReturn:
        line = self._text.count("\n", 0, self._at) + 1
        column = self._at - self._text.rfind("\n", 0, self._at)
        near = self._text[self._at : self._at + 40].split("\n")[0]
        place = f"{self._file or 'text'}, line {line}, column {column}, near `{near}`"
        raise ParseError(what, values=values, rule=rule, fix=fix, where=place)
