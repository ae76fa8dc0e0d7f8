"""Small modules for tests of passes: read from text, rewritten, compared with reviewed text and with each other."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from trimtab.ir import Module, Symbol, TensorType, interpret, parse_module, print_module
from trimtab.ir.weights import TorchSource
from trimtab.passes.manager import PassManager
from trimtab.passes.report import PassRow

Golden = Callable[[str, str], None]


def read(text: str, **weights: torch.Tensor) -> Module:
    """A module from its text. Weights not given hold random numbers that depend on their id alone."""

    def source(id: str, type: TensorType) -> TorchSource:
        if id in weights:
            return TorchSource(weights[id])
        generator = torch.Generator().manual_seed(zlib.crc32(id.encode()))
        return TorchSource(torch.randn(type.bind({}).shape, generator=generator))

    return parse_module("trimtab.ir 1\n" + text, source)


def rewritten(module: Module, passes: str) -> tuple[Module, list[PassRow]]:
    """``module`` after ``passes``, which the manager verifies and checks against their contracts."""
    result, report = PassManager(passes).run(module)
    return result, report.rows


def check_case(golden: Golden, name: str, passes: str, module: Module) -> Module:
    """Run ``passes`` and compare what comes out with tests/golden/passes/``name``.

    With it go the numbers of applications or, when nothing changed, the reasons why not.
    """
    result, rows = rewritten(module, passes)
    before, after = (print_module(m, hashes=False).split("\n", 1)[1] for m in (module, result))
    rules = [rule for row in rows for rule in row.rules]
    if any(row.changed for row in rows):
        changed = "changed"
        notes = [f"// {rule['rule']}: {rule['applied']}\n" for rule in rules if rule["applied"]]
    else:
        changed = "unchanged"
        notes = [f"// {rule['rule']}: {reason}\n" for rule in rules for reason in sorted(rule["rejected"])]
    golden(f"passes/{name}.txt", f"// before {passes}\n{before}\n// after: {changed}\n{after}" + "".join(notes))
    return result


def assert_same_results(
    before: Module, after: Module, *sizes: int | Mapping[str, int], tolerance: float = 1e-9
) -> None:
    """Evaluate both modules in float64 on random inputs and compare every output, relative to its largest element.

    ``sizes`` are values of the symbols; a number stands for all symbols, each as near to it as its range allows.
    """
    generator = torch.Generator().manual_seed(5)
    for size in sizes or (7,):
        bindings = {s.name: _nearest(s, size) for s in before.symbols().values()} if isinstance(size, int) else size
        inputs = [_random(value.type.bind(bindings), generator) for value in before.main.inputs]
        old, new = (interpret(module, inputs, precision=torch.float64) for module in (before, after))
        for expected, result in zip(old, new, strict=True):
            assert result.dtype == expected.dtype
            largest = float(expected.double().nan_to_num(posinf=0, neginf=0).abs().max()) if expected.numel() else 0.0
            atol = tolerance * max(largest, 1.0)
            torch.testing.assert_close(result, expected, rtol=tolerance, atol=atol, equal_nan=True)


def _nearest(symbol: Symbol, size: int) -> int:
    return max(symbol.min, size if symbol.max is None else min(size, symbol.max))


def _random(type: TensorType, generator: torch.Generator) -> torch.Tensor:
    shape: Any = type.shape
    if type.dtype.is_floating:
        return torch.randn(shape, generator=generator).to(type.dtype.to_torch())
    return torch.randint(0, 2, shape, generator=generator).to(type.dtype.to_torch())
