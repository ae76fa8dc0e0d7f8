"""Convolutions with channels last as compiled, over ragged sizes, types and targets, against float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab
from trimtab.ir import Builder, DType, Module, TensorType, symbol
from trimtab.ir.ops import Add, Conv2d, Relu

pytest.importorskip("tvm", reason="the TVM backend is not installed")

# Batch, height, width, input and output channels; kernel, stride, padding, dilation.
CASES = {
    "3x3": ((1, 14, 14, 32, 64), (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3 over two": ((2, 17, 19, 16, 50), (3, 3), (2, 2), (1, 1), (1, 1)),
    "stem": ((1, 33, 35, 3, 40), (7, 7), (2, 2), (3, 3), (1, 1)),
    "patches": ((2, 16, 24, 12, 33), (4, 4), (4, 4), (0, 0), (1, 1)),
    "one pixel over two": ((3, 9, 15, 24, 20), (1, 1), (2, 2), (0, 0), (1, 1)),
    "dilated": ((1, 13, 15, 16, 24), (3, 3), (1, 1), (2, 2), (2, 2)),
    "one side": ((2, 8, 21, 10, 17), (1, 5), (1, 2), (0, 2), (1, 1)),
    "small maps": ((2, 7, 7, 64, 200), (3, 3), (1, 1), (1, 1), (1, 1)),
    "deep": ((1, 5, 7, 512, 130), (3, 3), (1, 1), (1, 1), (1, 1)),
    "short lines": ((1, 9, 3, 16, 32), (3, 3), (1, 1), (1, 1), (1, 1)),
    "one channel": ((1, 12, 20, 1, 8), (3, 9), (1, 1), (1, 4), (1, 1)),
}
TOLERANCE = {DType.F32: 2e-6, DType.BF16: 1.2e-2}
"""Largest error over the largest result: rounding of the result, and of the sums for f32."""


def convolution(
    case: str, dtype: DType, groups: int = 1, batch: Any = None, height: Any = None, width: Any = None
) -> tuple[Module, torch.Tensor, dict[str, Any]]:
    """``relu(conv(x) + conv(x))``, one of them with a bias, the weight, and how they are computed by torch."""
    (images, rows, across, inputs, outputs), kernel, stride, padding, dilation = CASES[case]
    generator = torch.Generator().manual_seed(inputs)
    scale = (inputs // groups * kernel[0] * kernel[1]) ** 0.5
    weight = (torch.randn(outputs, inputs // groups, *kernel, generator=generator) / scale).to(dtype.to_torch())
    how: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    b = Builder()
    x = b.input("x", TensorType(dtype, (batch or images, height or rows, width or across, inputs)))
    w, bias = b.weight("w", weight), b.weight("b", torch.full((outputs,), 0.25, dtype=dtype.to_torch()))
    first = b(Conv2d(x, w, bias, **how, channels_last=True))
    second = b(Conv2d(x, w, **how, channels_last=True))
    b.output(b(Relu(b(Add(first, second)))))
    return b.module, weight, how


def error(case: str, target: str, path: Path, dtype: DType = DType.F32, groups: int = 1, **symbols: Any) -> float:
    """Largest difference from float64, over the largest result."""
    module, weight, how = convolution(case, dtype, groups, **symbols)
    trimtab.compile(module, target=target, pipeline="", backend="tvm").save(path)
    images, rows, across, inputs, _ = CASES[case][0]
    x = torch.randn(images, rows, across, inputs, generator=torch.Generator().manual_seed(3)).to(dtype.to_torch())
    y = torch.nn.functional.conv2d(x.double().permute(0, 3, 1, 2), weight.double(), **how).permute(0, 2, 3, 1)
    exact = torch.relu(2 * y + 0.25)
    with trimtab.load(path) as session:
        result = torch.from_numpy(session(x.view(torch.uint16).numpy() if dtype is DType.BF16 else x.numpy()))
    found = result.view(torch.bfloat16) if dtype is DType.BF16 else result
    return float((found.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("case", CASES)
def test_a_convolution(case: str, tmp_path: Path) -> None:
    assert error(case, "native", tmp_path / "m.trim") < TOLERANCE[DType.F32]


@pytest.mark.parametrize("case", ["3x3", "3x3 over two", "stem", "patches", "dilated", "small maps", "deep"])
def test_a_convolution_of_bfloat16(case: str, tmp_path: Path) -> None:
    assert error(case, "native", tmp_path / "m.trim", DType.BF16) < TOLERANCE[DType.BF16]


@pytest.mark.parametrize("names", [["batch"], ["height", "width"]], ids=str)
def test_a_convolution_of_bfloat16_of_any_size(names: list[str], tmp_path: Path) -> None:
    symbols = {name: symbol(name, 1, 64) for name in names}
    assert error("small maps", "native", tmp_path / "m.trim", DType.BF16, **symbols) < TOLERANCE[DType.BF16]


@pytest.mark.parametrize(("case", "group"), [("3x3", 2), ("small maps", 2), ("stem", 1)])
def test_tile_registers_are_used_where_rows_of_a_window_have_whole_steps(case: str, group: int) -> None:
    from trimtab.backends.tvm.codegen import machine
    from trimtab.backends.tvm.layouts import choose_layouts
    from trimtab.backends.tvm.microkernels import AMX

    module, _, _ = convolution(case, DType.BF16)
    assert choose_layouts(module, replace(machine.AVX512, instruction_sets=(AMX,)))["w"].group == group


@pytest.mark.parametrize("target", ["x86-64-v2", "x86-64-v3", "x86-64-v4"])
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16], ids=str)
def test_a_convolution_for_narrower_registers(target: str, dtype: DType, tmp_path: Path) -> None:
    from trimtab.backends.tvm.targets import find_target, host_features

    missing = set(find_target(target).features) - host_features()
    if missing:
        pytest.skip(f"this processor lacks {', '.join(sorted(missing))}")
    assert error("3x3 over two", target, tmp_path / "m.trim", dtype) < TOLERANCE[dtype]


@pytest.mark.parametrize("groups", [2, 8])
def test_a_convolution_in_groups(groups: int, tmp_path: Path) -> None:
    assert error("small maps", "native", tmp_path / "m.trim", groups=groups) < TOLERANCE[DType.F32]


@pytest.mark.parametrize(
    "names", [["batch"], ["width"], ["batch", "height"], ["height", "width"], ["batch", "height", "width"]], ids=str
)
def test_a_convolution_of_any_size(names: list[str], tmp_path: Path) -> None:
    symbols = {name: symbol(name, 1, 64) for name in names}
    assert error("3x3", "native", tmp_path / "m.trim", **symbols) < TOLERANCE[DType.F32]


def test_a_convolution_of_any_size_with_channels_second(tmp_path: Path) -> None:
    b = Builder()
    shape = (symbol("batch", 1, 64), 6, symbol("height", 1, 64), symbol("width", 1, 64))
    x, weight = b.input("x", TensorType(DType.F32, shape)), torch.randn(10, 6, 3, 3) / 8
    how: dict[str, Any] = {"stride": (1, 2), "padding": (1, 1), "dilation": (1, 1)}
    b.output(b(Conv2d(x, b.weight("w", weight), **how)))
    trimtab.compile(b.module, target="native", pipeline="", backend="tvm").save(tmp_path / "m.trim")
    with trimtab.load(tmp_path / "m.trim") as session:
        for sizes in ((2, 9, 21), (1, 1, 1), (3, 7, 2)):
            image = torch.randn(sizes[0], 6, *sizes[1:])
            exact = torch.nn.functional.conv2d(image.double(), weight.double(), **how)
            found = torch.from_numpy(session(image.numpy())).double()
            assert float((found - exact).abs().max()) < 2e-6 * float(exact.abs().max())
