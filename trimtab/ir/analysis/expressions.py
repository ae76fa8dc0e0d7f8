"""Whether two modules compute the same expressions, as around removal of dead code or grouping."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from trimtab.ir.core import Graph, Module
from trimtab.ir.equality import op_signature
from trimtab.ir.ops.region import Fused


def same_expressions(left: Module, right: Module) -> bool:
    """Whether the outputs of both modules are, op by op, the same expressions of inputs and weights.

    Then they are the same bits on every input, as far as ops are deterministic.  Values are numbered so that those with
    one number are one expression (J. Cocke and J. T. Schwartz, "Programming languages and their compilers", 1970);
    fused ops count as their bodies.  Weights are the same when their data has one source.  False does not say
    that results differ, and is the answer for modules with repeated bodies.
    """
    if left.main.output_names != right.main.output_names:
        return False
    numbers: dict[Hashable, int] = {}

    def of_module(module: Module) -> list[int]:
        inputs = [_number(numbers, ("input", place, v.type)) for place, v in enumerate(module.main.inputs)]
        return _outputs(module, module.main, inputs, numbers)

    return of_module(left) == of_module(right)


def _outputs(module: Module, graph: Graph, inputs: Sequence[int], numbers: dict[Hashable, int]) -> list[int]:
    """The numbers of the outputs of ``graph`` when its inputs have the numbers ``inputs``."""
    known = dict(zip(graph.inputs, inputs, strict=True))
    for value in graph.weights:
        weight = module.weights[value.weight]
        known[value] = _number(numbers, ("weight", weight.type, id(weight.source)))
    for op in graph.ops:
        operands = [known[value] for value in op.operands]
        if isinstance(op, Fused):
            made = _outputs(module, op.body, operands, numbers)
        else:
            # A body that is run several times is an expression of its own.
            key = (op_signature(op), tuple(operands), id(op) if op.regions else None)
            made = [_number(numbers, (key, place)) for place in range(len(op.results))]
        known.update(zip(op.results, made, strict=True))
    return [known[value] for value in graph.outputs]


def _number(numbers: dict[Hashable, int], key: Hashable) -> int:
    return numbers.setdefault(key, len(numbers))
