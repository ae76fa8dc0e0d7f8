"""Every model of the zoo through the PyTorch frontend: import, verify, print and parse, interpret."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from trimtab.frontend.torch_export import trace
from trimtab.ir import Module, interpret, parse_module, print_module
from zoo_models import ZooModel, zoo


def outputs_of(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        result = model(*inputs.values())
    if isinstance(result, dict):
        return list(result.values())
    return list(result) if isinstance(result, tuple) else [result]


def check_agreement(module: Module, model: torch.nn.Module, inputs: dict[str, torch.Tensor], tolerance: float) -> None:
    """Interpreted outputs equal eager ones, relative to the largest element."""
    expected = outputs_of(model, inputs)
    results = interpret(module, inputs)
    assert len(results) == len(expected)
    for result, reference in zip(results, expected, strict=True):
        assert result.shape == reference.shape
        assert result.dtype == reference.dtype
        error = (result.double() - reference.double()).abs().max()
        assert error <= tolerance * reference.double().abs().max()


def sizes(entry: ZooModel) -> Iterator[tuple[int, int]]:
    symbols = {name for axes in entry.dynamic_axes.values() for name in axes.values()}
    yield from ((1, 7), (3, 12)) if "sequence" in symbols else ((1, 12), (3, 12))


@pytest.mark.parametrize("entry", zoo(), ids=lambda entry: entry.name)
def test_static_import_agrees_in_both_precisions(entry: ZooModel) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        model = entry.build().to(dtype)
        inputs = entry.inputs(2, 12, dtype)
        module = trace(model, tuple(inputs.values()))
        check_agreement(module, model, inputs, tolerance)
        text = print_module(module)
        parsed = parse_module(text)
        assert print_module(parsed) == text
        assert parsed == module


@pytest.mark.parametrize("entry", zoo(), ids=lambda entry: entry.name)
def test_dynamic_import_holds_at_other_sizes(entry: ZooModel) -> None:
    model = entry.build()
    module = trace(model, tuple(entry.inputs(2, 12).values()), dynamic_shapes=entry.dynamic_shapes())
    assert [value.name for value in module.main.inputs] == list(entry.dynamic_axes)
    for value in module.main.inputs:
        named = {axis: str(value.type.shape[axis]) for axis in entry.dynamic_axes[value.name]}
        assert named == entry.dynamic_axes[value.name]
    for batch, length in sizes(entry):
        check_agreement(module, model, entry.inputs(batch, length), 1e-5)
    assert parse_module(print_module(module)) == module
