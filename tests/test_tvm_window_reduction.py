"""Depthwise convolutions with channels last, and pooling, over ragged sizes, types and targets, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.cpu_features import missing_features
from trimtab.ir import Builder, DType, Module, TensorType, Value, ops, symbol
from trimtab.ir.op import Op

pytest.importorskip("tvm", reason="the TVM backend is not installed")

from tvm_harness import Compiled

TOLERANCE = {DType.F32: 2e-6, DType.BF16: 1.2e-2}
"""Largest error over the largest result: rounding of the sums for f32, of the result for bf16."""

# Size [B, H, W, C] and window: kernel, stride, padding, dilation.
WINDOWS = {
    "one channel": ((2, 9, 11, 1), (3, 3), (1, 1), (1, 1), (1, 1)),
    "three channels": ((1, 8, 19, 3), (3, 3), (2, 2), (1, 1), (1, 1)),
    "fifteen channels": ((1, 10, 10, 15), (2, 3), (3, 3), (0, 1), (1, 1)),
    "a vector": ((1, 9, 25, 16), (7, 7), (1, 1), (3, 3), (1, 1)),
    "a vector and a channel": ((1, 6, 35, 17), (3, 3), (1, 2), (1, 1), (1, 1)),
    "several vectors": ((2, 14, 14, 96), (7, 7), (1, 1), (3, 3), (1, 1)),
    "a narrow image": ((2, 7, 7, 96), (7, 7), (1, 1), (3, 3), (1, 1)),
    "a row": ((1, 1, 50, 32), (1, 5), (1, 1), (0, 2), (1, 1)),
    "gaps": ((1, 12, 33, 20), (3, 3), (1, 1), (4, 4), (4, 4)),
    "gaps and strides": ((1, 17, 41, 8), (3, 2), (3, 2), (2, 1), (2, 3)),
    "more padding than window": ((1, 4, 5, 16), (2, 2), (1, 1), (3, 3), (1, 1)),
    "one window": ((2, 7, 7, 80), (7, 7), (1, 1), (0, 0), (1, 1)),
}


def module_of(type: TensorType, make: Callable[[Builder, Value], Op]) -> Module:
    b = Builder()
    x = b.input("x", type)
    b.output(b(make(b, x)))
    return b.module


def depthwise(type: TensorType, weight: Tensor, bias: Tensor, window: tuple[tuple[int, int], ...]) -> Module:
    """``silu(conv(x)) + x`` where the sizes allow it, else without the sum."""
    stride, padding, dilation = window

    def make(b: Builder, x: Value) -> Op:
        w, shift = b.weight("w", weight), b.weight("b", bias)
        product = b(ops.Conv2d(x, w, shift, stride=stride, padding=padding, dilation=dilation,
                               groups=weight.shape[0], channels_last=True))  # fmt: skip
        activated = ops.Silu(product)
        return ops.Add(b(activated), x) if product.type == x.type else activated

    return module_of(type, make)


def expected(x: Tensor, weight: Tensor, bias: Tensor, window: tuple[tuple[int, int], ...]) -> Tensor:
    exact = (value.double() for value in (weight, bias))
    product = F.conv2d(x.double().permute(0, 3, 1, 2), *exact, *window, weight.shape[0])
    result = F.silu(product).permute(0, 2, 3, 1)
    return result + x.double() if result.shape == x.shape else result


def filters(channels: int, kernel: tuple[int, int], dtype: DType) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(channels)
    weight = torch.randn(channels, 1, *kernel, generator=generator) / (kernel[0] * kernel[1]) ** 0.5
    return weight.to(dtype.to_torch()), torch.randn(channels, generator=generator).to(dtype.to_torch())


def error(found: Tensor, exact: Tensor) -> float:
    assert found.shape == exact.shape
    return float((found.double() - exact).abs().max() / exact.abs().max())


def image(size: tuple[int, ...], dtype: DType) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(7)).to(dtype.to_torch())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, DType.F32) for name in WINDOWS), *((name, DType.BF16) for name in list(WINDOWS)[2:8])],
    ids=str,
)
def test_a_depthwise_convolution(name: str, dtype: DType) -> None:
    size, kernel, *window = WINDOWS[name]
    weight, bias = filters(size[-1], kernel, dtype)
    x = image(size, dtype)
    (found,) = Compiled(depthwise(TensorType(dtype, size), weight, bias, tuple(window)))(x)
    assert error(found, expected(x, weight, bias, tuple(window))) < TOLERANCE[dtype]


@pytest.mark.parametrize("target", ["x86-64-v2", "x86-64-v3", "x86-64-v4"])
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16], ids=str)
def test_a_depthwise_convolution_for_narrower_registers(target: str, dtype: DType) -> None:
    from trimtab.backends.tvm.targets import find_target

    missing = missing_features(find_target(target).features)
    if missing:
        pytest.skip(f"this processor lacks {', '.join(missing)}")
    size, kernel, *window = (1, 11, 30, 44), (3, 3), (1, 1), (1, 1), (1, 1)
    weight, bias = filters(size[-1], kernel, dtype)
    x = image(size, dtype)
    (found,) = Compiled(depthwise(TensorType(dtype, size), weight, bias, tuple(window)), target)(x)
    assert error(found, expected(x, weight, bias, tuple(window))) < TOLERANCE[dtype]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_depthwise_convolution_of_an_unknown_size(axis: int) -> None:
    """Batch and height are any; without a known width the general loops compute it."""
    window = ((2, 2), (1, 1), (1, 1))
    weight, bias = filters(24, (3, 3), DType.F32)
    shape: list[object] = [2, 9, 20, 24]
    shape[axis] = symbol("n", 1, 64)
    code = Compiled(depthwise(TensorType(DType.F32, tuple(shape)), weight, bias, window))  # type: ignore[arg-type]
    for length in (1, 2, 5, 33):
        size = [2, 9, 20, 24]
        size[axis] = length
        x = image(tuple(size), DType.F32)
        assert error(code(x)[0], expected(x, weight, bias, window)) < TOLERANCE[DType.F32]


def test_two_filters_a_channel() -> None:
    weight, bias = filters(24, (3, 3), DType.F32)
    x = image((1, 6, 7, 12), DType.F32)

    def make(b: Builder, x: Value) -> Op:
        return ops.Conv2d(x, b.weight("w", weight), b.weight("b", bias), stride=(1, 1), padding=(1, 1),
                          dilation=(1, 1), groups=12, channels_last=True)  # fmt: skip

    (found,) = Compiled(module_of(TensorType(DType.F32, (1, 6, 7, 12)), make))(x)
    exact = F.conv2d(x.double().permute(0, 3, 1, 2), weight.double(), bias.double(), 1, 1, 1, 12).permute(0, 2, 3, 1)
    assert error(found, exact) < TOLERANCE[DType.F32]


POOLS: dict[str, tuple[Callable[[Value], Op], Callable[[Tensor], Tensor]]] = {
    "max": (lambda x: ops.MaxPool2d(x, (3, 3), (2, 2), (1, 1), channels_last=True),
            lambda x: F.max_pool2d(x, 3, 2, 1)),
    "max with gaps": (lambda x: ops.MaxPool2d(x, (2, 3), (1, 3), (1, 1), (3, 2), True, channels_last=True),
                      lambda x: F.max_pool2d(x, (2, 3), (1, 3), 1, (3, 2), True)),
    "mean": (lambda x: ops.AvgPool2d(x, (3, 2), (2, 1), (1, 1), channels_last=True),
             lambda x: F.avg_pool2d(x, (3, 2), (2, 1), 1)),
    "mean of what is there": (lambda x: ops.AvgPool2d(x, (3, 3), (2, 2), (1, 1), True, False, channels_last=True),
                              lambda x: F.avg_pool2d(x, 3, 2, 1, True, False)),
    "mean of the image": (lambda x: ops.AdaptiveAvgPool2d(x, (1, 1), channels_last=True),
                          lambda x: F.adaptive_avg_pool2d(x, 1)),
    "means of parts": (lambda x: ops.AdaptiveAvgPool2d(x, (2, 3), channels_last=True),
                       lambda x: F.adaptive_avg_pool2d(x, (2, 3))),
}  # fmt: skip


@pytest.mark.parametrize(
    ("size", "dtype"), [((2, 8, 27, 3), DType.F32), ((1, 7, 19, 32), DType.F32), ((1, 7, 7, 96), DType.BF16)], ids=str
)
@pytest.mark.parametrize("name", POOLS)
def test_pooling(name: str, dtype: DType, size: tuple[int, ...]) -> None:
    make, reference = POOLS[name]
    x = image(size, dtype)
    (found,) = Compiled(module_of(TensorType(dtype, size), lambda b, x: make(x)))(x)
    exact = reference(x.double().permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert error(found, exact) < TOLERANCE[dtype]


PLANES: dict[str, tuple[Callable[[Value], Op], Callable[[Tensor], Tensor]]] = {
    "max": (lambda x: ops.MaxPool2d(x, (3, 3), (2, 2), (1, 1)), lambda x: F.max_pool2d(x, 3, 2, 1)),
    "mean": (lambda x: ops.AvgPool2d(x, (3, 3), (1, 1), (1, 1), False, False),
             lambda x: F.avg_pool2d(x, 3, 1, 1, False, False)),
    "mean with an edge": (lambda x: ops.AvgPool2d(x, (2, 4), (2, 3), (1, 2), True),
                          lambda x: F.avg_pool2d(x, (2, 4), (2, 3), (1, 2), True)),
    "means of parts": (lambda x: ops.AdaptiveAvgPool2d(x, (3, 1)), lambda x: F.adaptive_avg_pool2d(x, (3, 1))),
}  # fmt: skip


@pytest.mark.parametrize(
    ("size", "dtype"), [((2, 3, 9, 70), DType.F32), ((1, 4, 6, 19), DType.BF16), ((1, 2, 3, 4), DType.F32)], ids=str
)
@pytest.mark.parametrize("name", PLANES)
def test_pooling_of_planes(name: str, dtype: DType, size: tuple[int, ...]) -> None:
    make, reference = PLANES[name]
    x = image(size, dtype)
    (found,) = Compiled(module_of(TensorType(dtype, size), lambda b, x: make(x)))(x)
    assert error(found, reference(x.double())) < TOLERANCE[dtype]


def test_a_maximum_keeps_what_is_not_a_number_and_infinities() -> None:
    x = torch.full((1, 5, 5, 16), -torch.inf)
    x[0, 0, 0, 3], x[0, 4, 4, 5] = torch.nan, torch.inf
    (found,) = Compiled(module_of(TensorType(DType.F32, (1, 5, 5, 16)), lambda b, x: POOLS["max"][0](x)))(x)
    torch.testing.assert_close(found, POOLS["max"][1](x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), equal_nan=True)


@pytest.mark.parametrize("channels", [1, 15, 16, 40])
def test_filters_are_stored_in_panels_and_come_back(channels: int) -> None:
    from trimtab.backends.tvm.layouts import Layout

    weight, _ = filters(channels, (3, 5), DType.F32)
    layout = Layout("taps", 16)
    stored = layout.pack(weight)
    assert stored.shape == layout.stored_shape(tuple(weight.shape)) == (-(-channels // 16), 15, 16)
    assert torch.equal(layout.unpack(stored, tuple(weight.shape)), weight)
    last = channels - 1
    assert stored[last // 16, 7, last % 16] == weight[last, 0, 1, 2]
