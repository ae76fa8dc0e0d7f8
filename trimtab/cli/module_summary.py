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
    from trimtab.ir.analysis import Liveness, count_ops, module_cost

    symbols = module.symbols()
    for name in sizes:
        if name not in symbols:
            raise UsageError(
                "there is no such size",
                values={"name": name, "sizes": ", ".join(symbols) or "none: every size of this model is fixed"},
                fix="name one of these" if symbols else "leave --size out",
            )
    bound = {name: sizes.get(name, symbol.min) for name, symbol in symbols.items()}
    cost = module_cost(module).bind(bound)
    macs: Counter[str] = Counter()
    for row in cost.ops:
        macs[row.op.name] += _number(row.macs)
    ops = count_ops(module)
    main = module.main
    return {
        "inputs": [f"{value.name}: {value.type}" for value in main.inputs],
        "outputs": [f"{name}: {value.type}" for name, value in zip(main.output_names, main.outputs, strict=True)],
        "symbols": [f"{symbol.name}: {symbol.range_text}" for symbol in symbols.values()],
        "sizes": bound,
        "ops": [{"op": name, "count": count, "macs": macs[name]} for name, count in ops.most_common()],
        "op_count": ops.total(),
        "macs": _number(cost.macs),
        "weights": len(module.weights),
        "parameters": cost.parameters,
        "weight_bytes": module.weight_bytes,
        "activation_peak_bytes": Liveness(main).peak_bytes(bound),
    }


def _number(count: Any) -> int:
    return int(count)
