"""Modules as torch networks: outputs, gradients, training, and the weights back."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from tiny_transformers import image_inputs, image_model, text_inputs, text_model
from torch import nn

import trimtab
from trimtab.backends.torch import Network
from trimtab.errors import InputError, UsageError
from trimtab.ir import Builder, DType, Module, TensorType, interpret, ops
from zoo_models import ZooModel, zoo


def _scalar(outputs: object) -> torch.Tensor:
    """One number that depends on every floating output."""
    if isinstance(outputs, torch.Tensor):
        outputs = (outputs,)
    elif isinstance(outputs, dict):
        outputs = outputs.values()
    total = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        if output.is_floating_point():
            weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape)
            total = total + (output.double() * weights).sum()
    return total


@pytest.mark.parametrize("entry", zoo(quick=True), ids=lambda entry: entry.name)
def test_gradients_are_those_of_the_original_model(entry: ZooModel) -> None:
    model = entry.build()
    module = trimtab.trace(model, tuple(entry.inputs().values()), dynamic_shapes=entry.dynamic_shapes())
    inputs = entry.inputs(3)
    _scalar(model(*inputs.values())).backward()
    network = trimtab.to_torch(module)
    _scalar(network(**inputs)).backward()
    _ignore_padding_rows(model, network)
    # Tied parameters have several names in the model and one in the module.
    wanted = dict(model.named_parameters(remove_duplicate=False))
    compared = 0
    for name, parameter in network.named_parameters():
        if not wanted[name].requires_grad:
            continue
        expected = wanted[name].grad
        if expected is None:
            assert parameter.grad is None or not parameter.grad.any()
            continue
        assert parameter.grad is not None, name
        assert (parameter.grad - expected).abs().max() <= 1e-4 * (1e-3 + expected.abs().max()), name
        compared += 1
    assert compared >= 0.9 * len(list(model.parameters()))


def _ignore_padding_rows(model: nn.Module, network: Network) -> None:
    """Torch keeps the padding row of an embedding from being trained, which modules of the IR do not record."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Embedding) and layer.padding_idx is not None:
            grad = network.get_parameter(f"{name}.weight").grad
            assert grad is not None
            grad[layer.padding_idx] = layer.weight.grad[layer.padding_idx]


@pytest.mark.parametrize("pipeline", ["cleanup,fuse", "cleanup,fuse,group-fusions"])
def test_outputs_are_those_of_the_interpreter(pipeline: str) -> None:
    for module, inputs in ((image_model(), image_inputs(3)), (text_model(), text_inputs(2, 7))):
        module = trimtab.optimize(module, pipeline).module
        network = trimtab.to_torch(module)
        expected = interpret(module, inputs)[0]
        # Not bit for bit: torch takes other kernels for other alignments.
        torch.testing.assert_close(network(*inputs), expected, rtol=1e-5, atol=1e-6)
        named = {value.name: x for value, x in zip(module.main.inputs, inputs, strict=True)}
        with torch.no_grad():
            torch.testing.assert_close(network(**named), expected, rtol=1e-5, atol=1e-6)
            exact = interpret(module, inputs, precision=torch.float64)[0]
            torch.testing.assert_close(network.double()(*inputs), exact, rtol=1e-12, atol=1e-12)


def test_constants_lie_where_the_parameters_do() -> None:
    network = trimtab.to_torch(text_model()).to("meta")
    output = network(*(x.to("meta") for x in text_inputs(2, 7)))
    assert output.device.type == "meta"
    assert output.shape[:2] == (2, 7)


def test_trained_weights_go_back_into_the_module_and_its_code(tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    module = trimtab.optimize(image_model(), "cleanup,fuse").module
    before = module.copy()
    network = trimtab.to_torch(module)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    (pixels,), classes = image_inputs(16), torch.arange(16) % 10
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(network(pixels), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert module == before  # training did not write the module's weights
    trimtab.update(module, network)
    with torch.no_grad():
        trained = network(pixels)
    updated = interpret(module, [pixels])[0]
    torch.testing.assert_close(updated, trained, rtol=1e-5, atol=1e-5)
    optimizer.step()
    assert torch.equal(interpret(module, [pixels])[0], updated)  # nor do later steps
    with trimtab.load(trimtab.compile(module).save(tmp_path / "trained.trim")) as session:
        assert torch.allclose(torch.from_numpy(session(pixels.numpy())), trained, rtol=1e-4, atol=1e-4)


def test_an_update_without_training_changes_nothing() -> None:
    module = image_model()
    sources = {id: weight.source for id, weight in module.weights.items()}
    trimtab.update(module, trimtab.to_torch(module))
    assert {id: weight.source for id, weight in module.weights.items()} == sources


def test_training_in_float64_is_rounded_to_the_type_of_the_weight() -> None:
    module = image_model()
    network = trimtab.to_torch(module).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 1e-3
    trimtab.update(module, network)
    for id, tensor in network.weights().items():
        assert module.weights[id].type.dtype.to_torch() is torch.float32
        assert torch.equal(module.weights[id].tensor(), tensor.float())


def test_networks_are_copied_and_saved_like_others() -> None:
    network = trimtab.to_torch(image_model())
    twin = copy.deepcopy(network)
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    file.seek(0)
    network.load_state_dict(torch.load(file))
    assert torch.equal(twin(*image_inputs(2)), network(*image_inputs(2)))


def test_ids_that_torch_refuses_as_names() -> None:
    build = Builder()
    x = build.input("x", TensorType(DType.F32, (4,)))
    for id in ("forward", "a", "a.b", "a.b.c", "a..c", ".", "training.weight"):
        x = build(ops.Add(x, build.weight(id, torch.randn(4), trainable=True)))
    buffer = build.weight("a.running", torch.arange(4.0))
    build.output(build(ops.Mul(x, buffer)))
    module = build.module
    network = trimtab.to_torch(module)
    assert len(list(network.parameters())) == 7
    assert len(list(network.buffers())) == 1
    given = torch.randn(4)
    assert torch.equal(network(given), interpret(module, [given])[0])
    assert list(network.weights()) == list(module.weights)


def _without_a_weight(module: Module) -> Module:
    other = module.copy()
    del other.weights[next(iter(other.weights))]
    return other


def test_what_cannot_be_updated_is_refused() -> None:
    module = image_model()
    network = trimtab.to_torch(module)
    with pytest.raises(UsageError, match=r"made by trimtab.to_torch.*Sequential"):
        trimtab.update(module, nn.Sequential(network))  # type: ignore[arg-type]
    other = _without_a_weight(module)
    with pytest.raises(UsageError, match=r"different weights.*differing=1"):
        trimtab.update(other, network)
    before = module.copy()
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(UsageError, match=r"not finite.*elements=1"):
        trimtab.update(module, network)
    assert module == before


def test_wrong_inputs_are_named() -> None:
    network = trimtab.to_torch(image_model())
    with pytest.raises(InputError, match="wrong rank or dtype"):
        network(torch.zeros(2, 3, 16))
    with pytest.raises(UsageError, match="both in order and by name"):
        network(torch.zeros(2, 3, 16, 16), pixels=torch.zeros(2, 3, 16, 16))
