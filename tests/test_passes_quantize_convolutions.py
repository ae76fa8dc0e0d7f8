"""Quantization of convolutions: the integers against plain arithmetic, borders, and compiled code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trimtab
from trimtab.errors import TrimtabError
from trimtab.ir import Module, interpret, parse_module, verify
from trimtab.ir.rewrite.log import RuleLog
from trimtab.passes.quantization.sites import find_sites


class Residual(nn.Module):
    """Convolutions as in a residual network, behind an average over the places."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.inner = nn.Conv2d(channels, channels, 3, padding=1)
        self.narrow = nn.Conv2d(channels, channels // 2, 1)
        self.wide = nn.Conv2d(channels // 2, channels, (3, 1), padding=(2, 0), dilation=(2, 1))
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.head = nn.Linear(channels, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(image)))
        x = F.relu(self.inner(x)) + x
        x = F.gelu(self.wide(F.gelu(self.narrow(x)))) + x
        return self.head(self.depthwise(x).mean((2, 3)))


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative to the length of ``expected``."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def quantized(model: nn.Module, image: Tensor, options: str = "", behind: str = "cleanup,fuse") -> Module:
    module = trimtab.trace(model.eval(), (image,))
    return trimtab.optimize(module, f"{behind},quantize{options}", calibration=[(image,)]).module


def counts(module: Module) -> dict[str, int]:
    names = [op.name for op in module.walk()]
    return {name: names.count(name) for name in sorted(set(names)) if "conv" in name or "linear" in name}


@pytest.mark.parametrize("shift", [0.0, 0.7, -4.0])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_equals_plain_integer_arithmetic(shift: float, bias: bool) -> None:
    """With inputs of both signs the borders, which are zero, are the zero point in integers."""
    layer = nn.Conv2d(4, 9, (3, 2), stride=(2, 1), padding=(1, 2), bias=bias)
    x = torch.randn(2, 4, 7, 9) + shift
    result = quantized(layer, x, behind="cleanup")
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = torch.tensor((high - low) / 255).float()
    zero = min(max(round(-low / float(scale)), 0), 255)
    centred = ((x / scale).round() + zero).clamp(0, 255).double() - zero
    weight = layer.weight.detach().double()
    units = (weight.abs().flatten(1).amax(1) / 127).float().double()
    signed = (weight / units[:, None, None, None]).round()
    steps = units * scale.double()
    expected = F.conv2d(centred, signed, None, layer.stride, layer.padding) * steps[:, None, None]
    if layer.bias is not None:
        expected = expected + layer.bias.detach().double()[:, None, None]
    (found,) = interpret(result, [x])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=float(steps.max()))
    assert counts(result) == {"conv_integer": 1}


def test_a_network_keeps_its_results_and_its_depthwise_convolutions() -> None:
    torch.manual_seed(0)
    model, image = Residual(), torch.randn(2, 3, 33, 35)
    result = quantized(model, image)
    assert counts(result) == {"conv2d": 1, "conv_integer": 4, "linear_integer": 1}
    (found,) = interpret(result, [image])
    assert distance(found, model.eval()(image)) < 0.03
    log = RuleLog("quantize")
    assert len(find_sites(trimtab.trace(model, (image,)), log)) == 5
    assert ["16 groups" in reason for reason in log.rejected] == [True]


@pytest.mark.parametrize("target", ["x86-64-v2", "x86-64-v3", "native"])
def test_compiled_convolutions_have_the_interpreters_integers(target: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, image = Residual(32), torch.randn(1, 3, 33, 37)
    module = quantized(model, image)
    (expected,) = interpret(module, [image])
    found = trimtab.load(trimtab.compile(module, target=target, pipeline="cleanup").save(tmp_path / "m.trim"))(
        image.numpy()
    )
    assert distance(torch.as_tensor(found), expected) < 2e-3


def test_rows_leave_convolutions_in_float() -> None:
    result = quantized(Residual(), torch.randn(1, 3, 16, 16), "{inputs=row}")
    assert counts(result) == {"conv2d": 5, "linear_integer": 1}


def test_fewer_bits_and_max_drop_reach_convolutions() -> None:
    torch.manual_seed(2)
    model, image = Residual(), torch.randn(2, 3, 33, 35)
    exact = model.eval()(image)
    errors = [distance(interpret(quantized(model, image, f"{{bits={bits}}}"), [image])[0], exact) for bits in (8, 5, 3)]
    assert errors == sorted(errors)
    bounded = quantized(model, image, "{bits=3,max_drop=0.02}")
    assert distance(interpret(bounded, [image])[0], exact) <= 0.02


@pytest.mark.parametrize("more", ["border=300", "border=-1", "border=7"])
def test_a_border_is_checked(more: str) -> None:
    zero = ", %z" if more == "border=7" else ""  # a border where there is a zero point
    text = (
        "trimtab.ir 1\ngraph main(%x: u8[1, 4, 8, 8], %w: i8[4, 4, 3, 3], %z: u8[1]) {\n"
        f"  %y = conv_integer(%x, %w{zero}) {{stride=[1, 1], padding=[1, 1], dilation=[1, 1], {more}}}"
        " : i32[1, 4, 8, 8]\n  return y=%y\n}"
    )
    with pytest.raises(TrimtabError, match="border"):
        verify(parse_module(text))
