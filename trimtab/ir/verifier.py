"""The verifier: the rules of the IR as a list of functions, run before and after every pass.

Each rule's docstring is the rule. A rule yields a violation per breach; the first one is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from trimtab.errors import Location, VerificationError
from trimtab.ir.attributes import attribute_symbols
from trimtab.ir.core import Graph, Module, Use, Value
from trimtab.ir.dims import Symbol
from trimtab.ir.op import Op
from trimtab.ir.printer import describe_op, describe_value

Rule = Callable[[Module, Graph], Iterator[VerificationError]]


def verify(module: Module) -> None:
    """Check every rule on every graph of ``module``.

    Raises:
        VerificationError: names the op, the value, the rule and the user's source line.
    """
    symbols: dict[str, Symbol] = {}
    for name, graph in module.graphs.items():
        for symbol in graph.symbols().values():
            known = symbols.setdefault(symbol.name, symbol)
            if known != symbol:
                raise VerificationError(
                    "a symbol has two ranges",
                    values={"symbol": symbol.name, "ranges": f"{known.range_text} and {symbol.range_text}"},
                    rule="a symbol means one dimension in the whole module",
                    where=f"graph {name}",
                )
    for graph in module.all_graphs():
        for rule in RULES:
            for violation in rule(module, graph):
                raise violation


def values_are_defined_before_use(module: Module, graph: Graph) -> Iterator[VerificationError]:
    """an operand is an input, a weight, or the result of an earlier op of the same graph"""
    defined = set(graph.inputs)
    for op in graph.ops:
        for value in op.operands:
            if not value.is_weight and value not in defined:
                yield _violation(
                    values_are_defined_before_use, "a value is used before it is defined", graph, op, value
                )
        defined.update(op.results)
    for value in graph.outputs:
        if not value.is_weight and value not in defined:
            yield _violation(
                values_are_defined_before_use, "a graph returns a value it does not define", graph, None, value
            )


def uses_are_recorded(module: Module, graph: Graph) -> Iterator[VerificationError]:
    """a value lists exactly the operands and outputs that read it"""
    for op in graph.ops:
        if op.graph is not graph:
            yield _violation(uses_are_recorded, "an op does not know its graph", graph, op, None)
        for index, value in enumerate(op.operands):
            if Use(op, index) not in value._uses:
                yield _violation(uses_are_recorded, "a use is not recorded", graph, op, value)
        for index, result in enumerate(op.results):
            if result.producer is not op or result.index != index:
                yield _violation(uses_are_recorded, "a result does not know its op", graph, op, result)
            yield from _missing_uses(graph, op, result)
    for index, value in enumerate(graph.outputs):
        if Use(graph, index) not in value._uses:
            yield _violation(uses_are_recorded, "a use is not recorded", graph, None, value)
    for index, value in enumerate(graph.inputs):
        if value.producer is not None or value.index != index or value.is_weight:
            yield _violation(uses_are_recorded, "an input does not know its place", graph, None, value)
    for value in (*graph.inputs, *graph.weights):
        yield from _missing_uses(graph, None, value)


def _missing_uses(graph: Graph, op: Op | None, value: Value) -> Iterator[VerificationError]:
    for user, index in value.uses:
        reads = user.outputs if isinstance(user, Graph) else user.operands
        owner = user if isinstance(user, Graph) else user.graph
        if index >= len(reads) or reads[index] is not value or owner is not graph:
            yield _violation(uses_are_recorded, "a value lists a use that is not there", graph, op, value)


def sizes_are_not_negative(module: Module, graph: Graph) -> Iterator[VerificationError]:
    """a dimension that is a number is 0 or more"""
    owners = [(None, value) for value in graph.inputs] + [(op, value) for op in graph.ops for value in op.results]
    for op, value in owners:
        if any(isinstance(dim, int) and dim < 0 for dim in value.type.shape):
            yield _violation(sizes_are_not_negative, "a dimension is negative", graph, op, value)


def weights_are_in_the_table(module: Module, graph: Graph) -> Iterator[VerificationError]:
    """a weight seen from a graph has the type of its entry in the module's table, and belongs to this graph"""
    for op in graph.ops:
        for value in op.operands:
            if value.is_weight and graph._weights.get(value.weight) is not value:
                yield _violation(weights_are_in_the_table, "an op reads a weight of another graph", graph, op, value)
    for value in graph.outputs:
        if value.is_weight and graph._weights.get(value.weight) is not value:
            yield _violation(weights_are_in_the_table, "a graph returns a weight of another graph", graph, None, value)
    for value in graph.weights:
        weight = module.weights.get(value.weight)
        if weight is None or weight.type != value.type:
            yield _violation(weights_are_in_the_table, "a weight is missing or has another type", graph, None, value)
        elif not weight.type.is_static:
            yield _violation(weights_are_in_the_table, "a weight has a symbolic shape", graph, None, value)


def types_are_what_the_reference_gives(module: Module, graph: Graph) -> Iterator[VerificationError]:
    """the stated types of results are those that the op's reference computes"""
    for op in graph.ops:
        try:
            inferred = op.infer()
        except VerificationError as error:
            yield VerificationError(
                error.what,
                values=error.values,
                rule=error.rule,
                fix=error.fix,
                where=_name_op(op),
                location=op.location,
            )
            continue
        stated = tuple(value.type for value in op.results)
        if inferred != stated:
            yield VerificationError(
                "an op states wrong result types",
                values={"stated": ", ".join(map(str, stated)), "inferred": ", ".join(map(str, inferred))},
                rule=str(types_are_what_the_reference_gives.__doc__),
                where=_name_op(op),
                location=op.location,
            )


def ops_accept_themselves(module: Module, graph: Graph) -> Iterator[VerificationError]:
    """an op's own checks hold"""
    for op in graph.ops:
        try:
            op.verify()
        except VerificationError as error:
            yield VerificationError(
                error.what,
                values=error.values,
                rule=error.rule,
                fix=error.fix,
                where=_name_op(op),
                location=error.location or op.location,
            )


def symbols_come_from_inputs(module: Module, graph: Graph) -> Iterator[VerificationError]:
    """every symbol in a type or attribute occurs in the shape of an input of the module"""
    known = {s.name: s for g in module.graphs.values() for s in g.symbols().values()}
    for op in graph.ops:
        used = frozenset().union(
            *(value.type.symbols for value in op.results), *map(attribute_symbols, op.attributes.values())
        )
        for symbol in used:
            bound = known.get(symbol.name)
            if bound is None:
                what = f"the symbol {symbol} is not bound by an input"
                yield _violation(symbols_come_from_inputs, what, graph, op, None)
            elif bound != symbol:
                what = f"the symbol {symbol} has the range {symbol.range_text} here and {bound.range_text} in an input"
                yield _violation(symbols_come_from_inputs, what, graph, op, None)


def names_of_the_signature_are_distinct(module: Module, graph: Graph) -> Iterator[VerificationError]:
    """inputs of a named graph have distinct, non-empty names, and so have its outputs"""
    if graph.name:
        for kind, names in (("input", [value.name for value in graph.inputs]), ("output", graph.output_names)):
            if len(set(names)) != len(names) or not all(names):
                yield VerificationError(
                    f"{kind} names are not distinct",
                    values={"names": names},
                    rule=str(names_of_the_signature_are_distinct.__doc__),
                    where=f"graph {graph.name}",
                )


RULES: tuple[Rule, ...] = (
    values_are_defined_before_use,
    uses_are_recorded,
    weights_are_in_the_table,
    sizes_are_not_negative,
    symbols_come_from_inputs,
    types_are_what_the_reference_gives,
    ops_accept_themselves,
    names_of_the_signature_are_distinct,
)


def _violation(rule: Rule, what: str, graph: Graph, op: Op | None, value: Value | None) -> VerificationError:
    location: Location | None = op.location if op is not None else None
    return VerificationError(
        what,
        values={"value": describe_value(graph, value)} if value is not None else {},
        rule=str(rule.__doc__),
        where=_name_op(op) if op is not None else f"graph {graph.name}" if graph.name else "a region",
        location=location,
    )


def _name_op(op: Op) -> str:
    return f"op {describe_op(op)}"
