"""The model zoo is fit for finding mistakes: reproducible, well conditioned, and sensitive to its parameters."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from zoo_models import ZooModel, get, zoo

WITHOUT_EFFECT = re.compile(
    r"(k_proj|key|k_lin|\.k)\.bias$"  # softmax does not see a constant added to a row of scores
    r"|mask_token$|masked_spec_embed$"  # used in pre-training only
    r"|dpt\.layernorm\.|fusion_stage\.layers\.0\.residual_layer1\."  # unused by the architecture as published
)

every_model = pytest.mark.parametrize("entry", zoo(), ids=lambda entry: entry.name)


def _outputs(model: torch.nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(model(*inputs.values())) if isinstance(leaf, Tensor)]


@every_model
def test_build_and_inputs_are_reproducible(entry: ZooModel) -> None:
    torch.manual_seed(1)
    first = _outputs(entry.build(), entry.inputs(2, 8))
    torch.manual_seed(2)
    second = _outputs(entry.build(), entry.inputs(2, 8))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_model
@torch.no_grad()
def test_float32_and_float64_agree(entry: ZooModel) -> None:
    for batch, length in ((1, 12), (3, 7)):
        single = _outputs(entry.build(), entry.inputs(batch, length))
        double = _outputs(entry.build().double(), entry.inputs(batch, length, torch.float64))
        for a, b in zip(single, double, strict=True):
            assert b.is_floating_point()
            assert b.std() > 1e-3
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@every_model
def test_every_parameter_and_statistic_matters(entry: ZooModel) -> None:
    model = entry.build().double().requires_grad_(True)
    outputs = _outputs(model, entry.inputs(2, 12, torch.float64))
    torch.manual_seed(0)
    torch.stack([(output * torch.randn_like(output)).sum().double() for output in outputs]).sum().backward()
    effect = {
        name: 0.0 if parameter.grad is None else (parameter.grad * parameter).abs().max().item()
        for name, parameter in model.named_parameters()
    }
    largest = max(effect.values())
    dull = [name for name, size in effect.items() if size < 1e-6 * largest and not WITHOUT_EFFECT.search(name)]
    assert dull == []
    assert all(parameter.unique().numel() > 1 for parameter in model.parameters() if parameter.numel() > 1)
    statistics = [buffer for name, buffer in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
    assert all(buffer.unique().numel() > 1 for buffer in statistics)


@pytest.mark.parametrize("entry", [entry for entry in zoo() if entry.family == "text"], ids=lambda entry: entry.name)
@torch.no_grad()
def test_text_inputs_have_padding_that_the_mask_hides(entry: ZooModel) -> None:
    model, inputs = entry.build(), entry.inputs(3, 12)
    mask = inputs["attention_mask"]
    lengths = mask.sum(1)
    assert len(set(lengths.tolist())) > 1
    assert lengths.max() < 12
    other = torch.where(mask.bool(), inputs["input_ids"], 5)
    for a, b in zip(_outputs(model, inputs), _outputs(model, {**inputs, "input_ids": other}), strict=True):
        seen = mask.bool() if a.ndim == 3 else slice(None)
        torch.testing.assert_close(a[seen], b[seen])


def test_the_quick_zoo_covers_every_family() -> None:
    assert {entry.family for entry in zoo(quick=True)} == {entry.family for entry in zoo()}
    assert len(zoo(quick=True)) < len(zoo()) / 3


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(KeyError, match=r"'vit2'.*vit, deit"):
        get("vit2")
