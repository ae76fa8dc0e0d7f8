"""PyTorch modules with the operators of PT2E quantization: the integers of torch's reference implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401  defines torch.ops.quantized_decomposed

import trimtab
from trimtab.errors import ImportModelError
from trimtab.frontend.torch_export import trace
from trimtab.ir import interpret
from trimtab.ir.analysis import count_ops

quantized: Any = torch.ops.quantized_decomposed
TYPES = {torch.int8: (-128, 127), torch.uint8: (0, 255), torch.int16: (-32768, 32767), torch.int32: (-(2**31), 2**30)}


class Call(nn.Module):
    """One operator, its tensors as inputs."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.function(*tensors)


def assert_same_integers(function: Any, *tensors: Tensor) -> None:
    module = trace(Call(function).eval(), tensors)
    assert not any(op.name == "opaque" for op in module.walk())
    found, expected = interpret(module, tensors)[0], function(*tensors)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def near_ties(scale: float, seed: int) -> Tensor:
    """Numbers around ``(n + 1/2) * scale``, where dividing and multiplying by the inverse round differently."""
    generator = torch.Generator().manual_seed(seed)
    n = torch.randint(-140, 140, (40, 60), generator=generator) + 0.5
    exact = n.double() * scale
    return (exact * (1 + 6e-8 * torch.randint(-1, 2, exact.shape, generator=generator))).float()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("scale", [0.1, 0.0371, 1 / 127, 0.5])
def test_quantize_per_tensor(scale: float, dtype: torch.dtype) -> None:
    low, high = TYPES[dtype]
    for zero in (0, 3):
        x = near_ties(scale, seed=zero)
        assert_same_integers(lambda x, z=zero: quantized.quantize_per_tensor(x, scale, z, low, high, dtype), x)


def test_the_integers_are_not_those_of_a_division() -> None:
    """So the test above can fail."""
    x, scale = near_ties(0.1, seed=0), torch.tensor(0.1)
    divided = torch.round(x / scale).clamp(-128, 127).to(torch.int8)
    assert not torch.equal(quantized.quantize_per_tensor(x, 0.1, 0, -128, 127, torch.int8), divided)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_scale_and_zero_point_as_tensors(kind: torch.dtype) -> None:
    x, scale, zero = near_ties(0.1, seed=1), torch.tensor([0.1], dtype=kind), torch.tensor([4])
    module = trace(
        Call(lambda x, s, z: quantized.quantize_per_tensor(x, s, z, 0, 255, torch.uint8)).eval(), (x, scale, zero)
    )
    assert torch.equal(
        interpret(module, [x, scale, zero])[0], quantized.quantize_per_tensor(x, scale, zero, 0, 255, torch.uint8)
    )


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("axis", [0, 1])
def test_per_channel(axis: int, kind: torch.dtype) -> None:
    x = near_ties(0.1, seed=2)
    scales = 0.1 * torch.ones(x.shape[axis], dtype=kind)
    zeros = torch.arange(x.shape[axis]) % 5 - 2
    assert_same_integers(lambda x: quantized.quantize_per_channel(x, scales, zeros, axis, -127, 127, torch.int8), x)
    q = quantized.quantize_per_channel(x, scales, zeros, axis, -127, 127, torch.int8)
    for z in (zeros, None):
        assert_same_integers(
            lambda q, z=z: quantized.dequantize_per_channel(q, scales, z, axis, -127, 127, torch.int8), q
        )


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_per_token(kind: torch.dtype) -> None:
    """The zero point is added before the sum is rounded, so that it may have a fraction's effect on ties."""
    x = near_ties(0.1, seed=3)
    scales, zeros = 0.1 * torch.ones(x.shape[0], 1, dtype=kind), (torch.arange(x.shape[0]) % 3)[:, None]
    assert_same_integers(
        lambda x, s, z: quantized.quantize_per_token(x, s, z, -128, 127, torch.int8), x, scales, zeros
    )  # fmt: skip
    q = quantized.quantize_per_token(x, scales, zeros, -128, 127, torch.int8)
    assert_same_integers(
        lambda q, s, z: quantized.dequantize_per_token(q, s, z, -128, 127, torch.int8, torch.float32), q, scales, zeros
    )


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("out", [None, torch.float32, torch.bfloat16])
def test_dequantize_per_tensor(out: torch.dtype | None, dtype: torch.dtype) -> None:
    """Large 32-bit integers are rounded to the type of the result before the zero point is subtracted."""
    low, high = TYPES[dtype]
    q = torch.randint(low, high, (40, 60), generator=torch.Generator().manual_seed(4)).to(dtype)
    assert_same_integers(
        lambda q: quantized.dequantize_per_tensor(q, 0.0371, 3, low, high, dtype, out_dtype=out), q
    )  # fmt: skip


class Encoder(nn.Module):
    """A layer as PT2E's convert leaves it: u8 activations per tensor, i8 weights per output channel, float biases."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(6)
        for name, shape in {"conv": (24, 3, 4, 4), "up": (40, 24), "down": (24, 40)}.items():
            weight = torch.randn(shape, generator=generator)
            scale = weight.flatten(1).abs().amax(1) / 127
            self.register_buffer(f"{name}_scale", scale)
            self.register_buffer(f"{name}_zero", torch.zeros(shape[0], dtype=torch.int64))
            per_row = scale.reshape(-1, *[1] * (len(shape) - 1))
            self.register_buffer(name, (weight / per_row).round().clamp(-127, 127).to(torch.int8))
            self.register_buffer(f"{name}_bias", 0.1 * torch.randn(shape[0], generator=generator))

    def weight(self, name: str) -> Tensor:
        data, scale, zero = (getattr(self, f"{name}{part}") for part in ("", "_scale", "_zero"))
        return quantized.dequantize_per_channel(data, scale, zero, 0, -127, 127, torch.int8)

    def rounded(self, x: Tensor, scale: float, zero: int) -> tuple[Tensor, Tensor]:
        q = quantized.quantize_per_tensor(x, scale, zero, 0, 255, torch.uint8)
        return q, quantized.dequantize_per_tensor(q, scale, zero, 0, 255, torch.uint8)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        first, x = self.rounded(image, 0.031, 127)
        patches = torch.conv2d(x, self.weight("conv"), self.conv_bias, stride=4).flatten(2).transpose(1, 2)
        second, x = self.rounded(patches, 0.41, 120)
        hidden = torch.nn.functional.gelu(torch.nn.functional.linear(x, self.weight("up"), self.up_bias))
        third, x = self.rounded(hidden, 0.53, 3)
        return torch.nn.functional.linear(x, self.weight("down"), self.down_bias), first, second, third


def test_a_quantized_layer_keeps_its_integers() -> None:
    model = Encoder().eval()
    image = torch.randn(2, 3, 12, 20, generator=torch.Generator().manual_seed(7))
    result = trimtab.optimize(trace(model, (image,)), "cleanup,fuse").module
    counts = count_ops(result)
    assert counts["conv_integer"] == 1
    assert counts["linear_integer"] == 2
    assert not {"linear", "conv2d", "opaque"} & set(counts)
    for seed in range(3):
        image = torch.randn(2, 3, 12, 20, generator=torch.Generator().manual_seed(seed))
        expected, found = model(image), interpret(result, [image])
        for ours, theirs in zip(found[1:], expected[1:], strict=True):
            gap = (ours.int() - theirs.int()).abs()
            # Sums of floats, which torch rounds and integers do not need to, decide the integers of few ties.
            assert gap.max() <= 1
            assert gap.count_nonzero() <= 2e-3 * gap.numel()
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0.02 * float(expected[0].abs().max()))


def test_an_unknown_type_is_refused() -> None:
    def function(x: Tensor) -> Tensor:
        return quantized.quantize_per_tensor(x, 0.1, 0, -448, 448, torch.float8_e4m3fn)

    with pytest.raises(ImportModelError, match="float8"):
        trace(Call(function).eval(), (torch.zeros(3),))
