"""Models exported by torch.onnx.export agree with eager PyTorch and hold the whole ops that torch.export gives."""

from __future__ import annotations

import logging
from collections import Counter

import pytest
import torch

import trimtab
from trimtab.frontend.onnx import from_onnx
from trimtab.ir import interpret, verify
from trimtab.passes.optimize import optimize
from zoo_models import get

WHOLE = ("attention", "layer_norm", "rms_norm", "gelu", "silu", "linear")


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", ["deit", "bert", "llama"])
def test_dynamo_export(name, tmp_path):
    entry = get(name)
    net = entry.build()
    program = torch.onnx.export(
        net, tuple(entry.inputs(2, 12).values()), dynamo=True, dynamic_shapes=entry.dynamic_shapes(), verbose=False
    )
    program.save(tmp_path / "net.onnx")
    module = from_onnx(tmp_path / "net.onnx")
    verify(module)
    for batch, length in ((2, 12), (3, 7)):
        inputs = entry.inputs(batch, length)
        with torch.no_grad():
            expected = net(*inputs.values())
        for wanted, found in zip(_tensors(expected), interpret(module, list(inputs.values())), strict=True):
            assert (wanted - found).abs().max() <= 1e-5 * wanted.abs().max()
    other = trimtab.trace(net, tuple(entry.inputs(2, 12).values()), dynamic_shapes=entry.dynamic_shapes())
    module, other = (optimize(m, "raise", check="never").module for m in (module, other))
    by_onnx, by_torch = (Counter(op.name for op in m.walk()) for m in (module, other))
    assert all(by_onnx[op] >= by_torch[op] for op in WHOLE)
    # Unique weights: the exporter stores transposed copies, never more bytes than the module's parameters.
    assert module.weight_bytes <= 1.05 * sum(p.nbytes for p in net.parameters()) + 4096


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("opset", [14, 18])
def test_torchscript_export(opset, tmp_path):
    """The older exporter decomposes layer norm, GELU and attention into elementary operators."""
    entry = get("bert")
    net, inputs = entry.build(), entry.inputs(2, 12)
    torch.onnx.export(net, tuple(inputs.values()), tmp_path / "net.onnx", dynamo=False, opset_version=opset,
                      input_names=list(inputs), dynamic_axes=entry.dynamic_axes)  # fmt: skip
    module = from_onnx(tmp_path / "net.onnx")
    verify(module)
    module = optimize(module, "raise", check="never").module
    counts = Counter(op.name for op in module.walk())
    assert (counts["attention"], counts["layer_norm"], counts["gelu"]) == (2, 5, 2)
    inputs = entry.inputs(3, 9)
    with torch.no_grad():
        expected = net(*inputs.values())
    for wanted, found in zip(_tensors(expected), interpret(module, list(inputs.values())), strict=True):
        assert (wanted - found).abs().max() <= 1e-5 * wanted.abs().max()


def _tensors(output) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    return list(output.values()) if isinstance(output, dict) else list(output)
