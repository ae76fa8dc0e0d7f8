"""What a module is made of: ops by kind, multiply-accumulates, parameters, bytes. Data for ``trimtab inspect``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trimtab.errors import UsageError

if TYPE_CHECKING:
    from trimtab.ir import Module


def summarize(module: Module, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Signature, ops, work and memory of a module.

    Args:
        module: the module.
        sizes: sizes of symbols by name, for the counts that depend on them; those not given are the smallest allowed.

    Raises:
        UsageError: a size for something that is no symbol.
    """
    from trimtab.ir.dims import evaluate

    symbols = module.symbols()
    for name in sizes:
        if name not in symbols:
            raise UsageError(
                "there is no such size",
                values={"name": name, "sizes": ", ".join(symbols) or "none: every size of this model is fixed"},
                fix="name one of these" if symbols else "leave --size out",
            )
    bound = {name: sizes.get(name, symbol.min) for name, symbol in symbols.items()}
    ops: Counter[str] = Counter()
    macs: Counter[str] = Counter()
    for op, times in _executions(module):
        ops[op.name] += 1
        macs[op.name] += times * int(evaluate(op.macs(), bound))
    main = module.main
    return {
        "inputs": [f"{value.name}: {value.type}" for value in main.inputs],
        "outputs": [f"{name}: {value.type}" for name, value in zip(main.output_names, main.outputs, strict=True)],
        "symbols": [f"{symbol.name}: {symbol.range_text}" for symbol in symbols.values()],
        "sizes": bound,
        "ops": [{"op": name, "count": count, "macs": macs[name]} for name, count in ops.most_common()],
        "op_count": sum(ops.values()),
        "macs": sum(macs.values()),
        "weights": len(module.weights),
        "parameters": sum(int(evaluate(weight.type.elements, {})) for weight in module.weights.values()),
        "weight_bytes": module.weight_bytes,
        "activation_peak_bytes": _activation_peak(module, bound),
    }


def _executions(module: Module) -> Any:
    """Every op of the module with the number of times one evaluation runs it."""
    from trimtab.ir.ops import Repeat

    def walk(graph: Any, times: int) -> Any:
        for op in graph.ops:
            yield op, times
            for region in op.regions:
                yield from walk(region, times * (op.n if isinstance(op, Repeat) else 1))

    return walk(module.main, 1)


def _activation_peak(module: Module, sizes: Mapping[str, int]) -> int:
    """Bytes of the values alive at the same time, at most: inputs, outputs and intermediates, each in a buffer of its
    own; a region's peak counts while its op runs."""
    from trimtab.ir.dims import evaluate

    def size(value: Any) -> int:
        return int(evaluate(value.type.bytes, sizes))

    def peak(graph: Any) -> int:
        last = {value: op for op in graph.ops for value in op.operands if not value.is_weight}
        kept = set(graph.outputs)
        alive = sum(map(size, graph.inputs))
        highest = alive
        for op in graph.ops:
            alive += sum(map(size, op.results))
            highest = max(highest, alive + max(map(peak, op.regions), default=0))
            done = {value for value in op.operands if last.get(value) is op}
            done |= {value for value in op.results if not value.uses}
            alive -= sum(size(value) for value in done - kept)
        return highest

    return peak(module.main)
