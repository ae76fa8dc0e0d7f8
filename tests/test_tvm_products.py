"""Linear layers and matrix products as compiled, over ragged sizes, types and targets, against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import trimtab
from trimtab.cpu_features import missing_features
from trimtab.ir import Builder, DType, Module, TensorType, symbol
from trimtab.ir.ops import Cast, Gelu, Linear, Matmul

pytest.importorskip("tvm", reason="the TVM backend is not installed")

# Rows, depth, columns. In the last five a factor is too large for a cache: few long rows and panels for tile registers
# are covered part by part of the depth, many rows in blocks, and (900, 1536, 40) in both ways.
SIZES = [
    (1, 7, 5), (1, 64, 48), (2, 30, 31), (7, 33, 47), (15, 16, 17), (16, 96, 49), (17, 64, 100), (31, 32, 33),
    (33, 160, 64), (65, 64, 130), (197, 48, 96), (577, 32, 40), (100, 672, 70), (100, 3072, 70),
    (130, 2100, 70), (1001, 330, 50), (900, 1536, 40),
]  # fmt: skip
TOLERANCE = {DType.F32: 2e-6, DType.F16: 2e-3, DType.BF16: 1.2e-2}
"""Largest error over the largest result: rounding of the result, and of the sums for f32."""


def layer(rows: object, depth: int, columns: int, dtype: DType, stored: DType) -> tuple[Module, torch.Tensor]:
    """``gelu(x W^T + b)`` with W stored in one type and everything else in another, and the W that is meant."""
    generator = torch.Generator().manual_seed(depth)
    weight = (torch.randn(columns, depth, generator=generator) / depth**0.5).to(stored.to_torch())
    b = Builder()
    x = b.input("x", TensorType(dtype, (rows, depth)))  # type: ignore[arg-type]
    w = b.weight("w", weight)
    bias = b.weight("b", torch.zeros(columns, dtype=dtype.to_torch()) + 0.25)
    product = b(Linear(x, w if dtype is stored else b(Cast(w, dtype)), bias))
    b.output(b(Gelu(product)))
    return b.module, weight


def error(module: Module, weight: torch.Tensor, x: torch.Tensor, target: str, path: Path) -> float:
    """Largest difference from float64, over the largest result."""
    trimtab.compile(module, target=target, pipeline=None).save(path)
    exact = torch.nn.functional.gelu(x.double() @ weight.double().T + 0.25)
    with trimtab.load(path) as session:
        bits = x.view(torch.uint16).numpy() if x.dtype is torch.bfloat16 else x.numpy()
        result = torch.from_numpy(session(bits))
    found = result.view(torch.bfloat16) if x.dtype is torch.bfloat16 else result
    return float((found.double() - exact).abs().max() / exact.abs().max())


def inputs(rows: int, depth: int, dtype: DType) -> torch.Tensor:
    return torch.randn(rows, depth, generator=torch.Generator().manual_seed(rows)).to(dtype.to_torch())


@pytest.mark.parametrize(
    ("panels", "threads", "together"), [(6, 2, 3), (12, 2, 3), (24, 2, 4), (12, 1, 4), (6, 4, 2), (7, 2, 4), (1, 2, 1)]
)
def test_no_thread_gets_more_panels_than_one_by_one(panels: int, threads: int, together: int) -> None:
    from trimtab.backends.tvm.codegen.depth_parts import PANELS_TOGETHER, panels_together

    held = panels_together(panels, threads, PANELS_TOGETHER)
    tasks = -(-panels // held)
    assert held == together
    assert min(panels, -(-tasks // threads) * held) == -(-panels // threads)


def test_tiles_of_two_heights_cover_rows_once() -> None:
    from trimtab.backends.tvm.codegen.row_tiles import RowTiles

    for height in (1, 5, 6, 12):
        for rows in range(1, 4 * height * height):
            tiles = RowTiles(rows, height)
            assert tiles.count == -(-rows // height)
            assert tiles.repeats_rows == (tiles.count * height - tiles.lower != rows)
            # From so many rows on there are enough tiles to take a row less each.
            assert not (tiles.repeats_rows and rows >= (height - 1) * height)
    assert (RowTiles(145, 6).count, RowTiles(145, 6).lower) == (25, 5)
    one_height = RowTiles(145, 6, two_heights=False)
    assert (one_height.count, one_height.lower, one_height.repeats_rows) == (25, 0, True)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "stored"), [(DType.F32, DType.F32), (DType.BF16, DType.BF16), (DType.F32, DType.F16)], ids=str
)
def test_a_linear_layer(size: tuple[int, int, int], dtype: DType, stored: DType, tmp_path: Path) -> None:
    rows, depth, columns = size
    module, weight = layer(rows, depth, columns, dtype, stored)
    assert error(module, weight, inputs(rows, depth, dtype), "native", tmp_path / "m.trim") < TOLERANCE[dtype]


@pytest.mark.parametrize("target", ["x86-64-v2", "x86-64-v3", "x86-64-v4"])
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16], ids=str)
def test_a_linear_layer_for_narrower_registers(target: str, dtype: DType, tmp_path: Path) -> None:
    from trimtab.backends.tvm.targets import find_target

    missing = missing_features(find_target(target).features)
    if missing:
        pytest.skip(f"this processor lacks {', '.join(missing)}")
    module, weight = layer(19, 2100, 70, dtype, dtype)
    assert error(module, weight, inputs(19, 2100, dtype), target, tmp_path / "m.trim") < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16], ids=str)
def test_a_linear_layer_of_any_number_of_rows(dtype: DType, tmp_path: Path) -> None:
    module, weight = layer(symbol("rows", 1, 512), 64, 50, dtype, dtype)
    for rows in (1, 3, 5, 31, 32, 33, 190):
        assert error(module, weight, inputs(rows, 64, dtype), "native", tmp_path / "m.trim") < TOLERANCE[dtype]


@pytest.mark.parametrize("factors", [DType.BF16, DType.F32], ids=str)
@pytest.mark.parametrize("size", [(33, 96, 50), (70, 1088, 33), (5, 24, 16)], ids=str)
def test_sums_are_rounded_only_where_the_model_says_so(
    size: tuple[int, int, int], factors: DType, tmp_path: Path
) -> None:
    """Products of bf16 are not rounded before an op of f32 in the same kernel, but products of f32 by a cast are."""
    rows, depth, columns = size
    weight = (torch.randn(columns, depth, generator=torch.Generator().manual_seed(depth)) / depth**0.5).bfloat16()
    x = inputs(rows, depth, DType.BF16)
    b = Builder()
    image = b.input("x", TensorType(DType.BF16, (rows, depth)))
    matrix = b.weight("w", weight.to(factors.to_torch()))
    product = b(Linear(image if factors is DType.BF16 else b(Cast(image, factors)), matrix, None))
    narrow = product if factors is DType.BF16 else b(Cast(product, DType.BF16))
    b.output(b(Gelu(b(Cast(narrow, DType.F32)))))
    trimtab.compile(b.module, target="native", pipeline="fuse").save(tmp_path / "model.trim")
    with trimtab.load(tmp_path / "model.trim") as session:
        found = torch.from_numpy(session(x.view(torch.uint16).numpy())).double()
    sums = x.double() @ weight.double().T
    exact, rounded = (torch.nn.functional.gelu(v) for v in (sums, sums.bfloat16().double()))
    if factors is DType.F32:  # but for sums that lie between two numbers of bfloat16, where the last bit decides
        assert ((found - rounded).abs() < 1e-5).double().mean() > 0.98
    else:
        assert (found - exact).abs().max() < 1e-5 < (rounded - exact).abs().max()


@pytest.mark.parametrize("size", [(3, 5, 24, 40), (2, 17, 33, 31), (4, 16, 64, 48)], ids=str)
def test_a_batched_product(size: tuple[int, int, int, int], tmp_path: Path) -> None:
    batch, rows, depth, columns = size
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(batch, rows, depth, generator=generator), torch.randn(batch, depth, columns, generator=generator)
    b = Builder()
    places = [b.input(name, TensorType(DType.F32, tuple(t.shape))) for name, t in (("x", x), ("y", y))]
    b.output(b(Matmul(*places)))
    path = trimtab.compile(b.module, target="native", pipeline=None).save(tmp_path / "m.trim")
    with trimtab.load(path) as session:
        result = torch.from_numpy(session(x.numpy(), y.numpy()))
    assert float((result - x.double() @ y.double()).abs().max()) < 1e-5 * depth**0.5
