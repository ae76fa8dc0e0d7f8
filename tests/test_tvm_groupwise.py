"""Linear layers with weights of 4 and 8 bits agree with float64, and read their weights from panels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

pytest.importorskip("tvm")
from tvm_harness import Compiled

import trimtab
from trimtab.backends.tvm.layouts import Layout, packed_blocks
from trimtab.backends.tvm.targets import find_target
from trimtab.cli.artifact_module import module_from_artifact
from trimtab.cpu_features import missing_features
from trimtab.errors import UnsupportedByBackendError
from trimtab.ir import Builder, DType, Module, TensorType, Value, interpret, ops, symbol
from trimtab.ir.dims import Dim
from trimtab.ir.fused import fuse
from trimtab.ir.weights import TorchSource, Weight

RANGES = {DType.I4: (-8, 8), DType.U4: (0, 16), DType.I8: (-128, 128), DType.U8: (0, 256)}


class Layer:
    """A random layer: the module, and its result in float64.

    Args:
        rows: leading axes of the input.
        dtype: of the weights.
        zero: dtype of the zero points; None for none.
        after: what is computed from the layer's result.
    """

    def __init__(
        self, rows: Sequence[Dim], columns: int, depth: int, group: int, dtype: DType, seed: int,
        zero: DType | None = None, bias: bool = False, after: Callable[[Builder, Value], Value] | None = None,
    ) -> None:  # fmt: skip
        random = torch.Generator().manual_seed(seed)
        groups = depth // group
        self.random = random
        self.depth = depth
        self.weight = torch.randint(*RANGES[dtype], (columns, depth), generator=random).to(dtype.to_torch())
        self.scale = torch.rand((columns, groups), generator=random) / 16 + 1e-3
        self.zero = None
        builder = Builder()
        x = builder.input("x", TensorType(DType.F32, (*rows, depth)))
        if zero is not None:
            self.zero = torch.randint(*RANGES[zero], (columns, groups), generator=random).to(zero.to_torch())
        self.bias = torch.randn(columns, generator=random) if bias else None
        operands = {
            "weight": stored(builder, "w", dtype, self.weight),
            "scale": builder.weight("s", self.scale),
            "zero": None if zero is None or self.zero is None else stored(builder, "z", zero, self.zero),
            "bias": None if self.bias is None else builder.weight("b", self.bias),
        }
        y = builder(ops.LinearGroupwise(x, **operands, group=group))  # type: ignore[arg-type]
        builder.output(after(builder, y) if after else y)
        self.module: Module = builder.module

    def input(self, *rows: int) -> torch.Tensor:
        return torch.randn((*rows, self.depth), generator=self.random)

    def expected(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The result in float64, and the sum of the magnitudes of its terms."""
        group = self.depth // self.scale.shape[1]
        values = self.weight.double()
        if self.zero is not None:
            values = values - self.zero.double().repeat_interleave(group, dim=1)
        matrix = values * self.scale.double().repeat_interleave(group, dim=1)
        y, size = x.double() @ matrix.T, x.double().abs() @ matrix.abs().T
        return (y if self.bias is None else y + self.bias.double()), size

    def check(self, compiled: Compiled, x: torch.Tensor) -> None:
        (got,) = compiled(x)
        y, size = self.expected(x)
        assert got.shape == y.shape
        # The rounding errors of a sum in f32; with zero points, of sums that are subtracted from each other.
        bound = (self.depth + 8) * torch.finfo(torch.float32).eps * size + 1e-6
        assert ((got.double() - y).abs() <= bound).all(), float(((got.double() - y).abs() / bound).max())


def stored(builder: Builder, id: str, dtype: DType, data: torch.Tensor) -> Value:
    weight = Weight(builder.module.fresh_weight_id(id), TensorType(dtype, tuple(data.shape)), TorchSource(data))
    return builder.graph.weight(builder.module.add_weight(weight))


@pytest.mark.parametrize("dtype", RANGES, ids=str)
@pytest.mark.parametrize(("columns", "depth", "group"), [(100, 64, 32), (64, 96, 32), (33, 768, 64), (7, 768, 768)])
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 17, 128])
def test_results(dtype: DType, columns: int, depth: int, group: int, rows: int) -> None:
    layer = Layer((rows,), columns, depth, group, dtype, seed=rows * depth + columns)
    layer.check(Compiled(layer.module), layer.input(rows))


@pytest.mark.parametrize("dtype", RANGES, ids=str)
@pytest.mark.parametrize("zero", RANGES, ids=str)
@pytest.mark.parametrize("rows", [1, 7])
def test_zero_points(dtype: DType, zero: DType, rows: int) -> None:
    layer = Layer((rows,), 100, 192, 32, dtype, seed=rows, zero=zero, bias=True)
    layer.check(Compiled(layer.module), layer.input(rows))


TARGETS = ["x86-64-v2", "x86-64-v3", "x86-64-v4", "native"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", RANGES, ids=str)
@pytest.mark.parametrize("zero", [None, DType.U8], ids=str)
def test_instruction_sets(target: str, dtype: DType, zero: DType | None) -> None:
    if missing := missing_features(find_target(target).features):
        pytest.skip(f"this machine lacks {', '.join(missing)}")
    symbolic = (symbol("batch", 1, 64), 3)
    layer = Layer(symbolic, 100, 192, 64, dtype, seed=5, zero=zero, bias=True)
    compiled = Compiled(layer.module, target)
    for batch in (1, 2, 5, 6, 11, 43):
        layer.check(compiled, layer.input(batch, 3))


@pytest.mark.parametrize("group", [6, 10, 24, 48])
@pytest.mark.parametrize("dtype", [DType.I4, DType.U8], ids=str)
def test_groups_of_any_length(group: int, dtype: DType) -> None:
    layer = Layer((3,), 50, 5 * group, group, dtype, seed=group)
    layer.check(Compiled(layer.module), layer.input(3))


@pytest.mark.parametrize(("depth", "dtype"), [(45, DType.I4), (60, DType.U4)])
def test_odd_groups(depth: int, dtype: DType) -> None:
    layer = Layer((3,), 50, depth, 15, dtype, seed=2)
    layer.check(Compiled(layer.module), layer.input(3))


def test_symbolic_rows() -> None:
    layer = Layer((symbol("rows", 1, 200),), 100, 96, 32, DType.I4, seed=3)
    compiled = Compiled(layer.module)
    for rows in (1, 2, 3, 4, 5, 16, 17, 200):
        layer.check(compiled, layer.input(rows))


def test_activation_in_the_same_kernel() -> None:
    module = Layer((4,), 64, 96, 32, DType.I4, seed=4, bias=True, after=lambda b, y: b(ops.Relu(y)))
    members = list(module.module.main.ops)
    fuse(module.module, members, members[-1])
    compiled = Compiled(module.module)
    (call,) = compiled.code.calls
    assert len(call.ops) == 2
    x = module.input(4)
    torch.testing.assert_close(compiled(x)[0].double(), module.expected(x)[0].relu(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-35, 1e-20, 1e20])
def test_magnitudes(scale: float) -> None:
    layer = Layer((3,), 40, 64, 32, DType.I4, seed=6)
    layer.check(Compiled(layer.module), layer.input(3) * scale)


def test_one_huge_value_spoils_only_its_group() -> None:
    layer = Layer((1,), 40, 128, 32, DType.I4, seed=7)
    layer.weight[:, :32] = 0
    layer.weight[0, 0] = 1
    x = layer.input(1)
    x[0, 0] = 1e8
    compiled = Compiled(layer.module)
    y, _ = layer.expected(x)
    torch.testing.assert_close(compiled(x)[0].double()[:, 1:], y[:, 1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(value: float) -> None:
    layer = Layer((2,), 40, 64, 32, DType.I4, seed=8)
    layer.weight[layer.weight == 0] = 1
    x = layer.input(2)
    x[0, 5] = value
    (got,) = Compiled(layer.module)(x)
    assert not got[0].isfinite().any()
    assert got[1].isfinite().all()


def test_zeros_and_constant_rows() -> None:
    layer = Layer((2,), 40, 64, 32, DType.U4, seed=9)
    compiled = Compiled(layer.module)
    x = torch.zeros(2, 64)
    x[1] = 3.0
    assert (compiled(x)[0][0] == 0).all()
    layer.check(compiled, x)


@pytest.mark.parametrize("layout", [
    Layout("nibbles", 16), Layout("nibbles", 32, 4), Layout("nibbles", 32, 4, False), Layout("panels", 16, 4),
    Layout("panels", 48),
])  # fmt: skip
@pytest.mark.parametrize("shape", [(100, 64), (32, 96), (7, 24)])
def test_layouts_are_inverted(layout: Layout, shape: tuple[int, int]) -> None:
    dtype = DType.I4 if layout.signed else DType.U4
    data = torch.randint(*RANGES[dtype], shape, generator=torch.Generator().manual_seed(1)).to(dtype.to_torch())
    packed = layout.pack(data)
    assert tuple(packed.shape) == layout.stored_shape(shape)
    restored = layout.unpack(packed, shape)
    assert restored.dtype == data.dtype
    assert torch.equal(restored, data)
    weight = Weight("w", TensorType(dtype, shape), TorchSource(data))
    assert b"".join(map(bytes, packed_blocks(weight, layout, 1))) == packed.numpy().tobytes()
    assert Layout.from_dict(layout.to_dict()) == layout


def test_weights_take_half_a_byte() -> None:
    layer = Layer((1,), 128, 256, 32, DType.I4, seed=10)
    sizes = {weight.name: weight.nbytes for weight in Compiled(layer.module).code.weights}
    assert sizes == {"w": 128 * 128, "s": 128 * 8 * 4}


def test_artifact_restores_the_weights(tmp_path: Path) -> None:
    layer = Layer((2,), 100, 64, 32, DType.I4, seed=11)
    path = trimtab.compile(layer.module, target="native", pipeline=None).save(tmp_path / "model.trim")
    restored = module_from_artifact(path)
    assert torch.equal(restored.weights["w"].tensor(), layer.weight)
    x = layer.input(2)
    torch.testing.assert_close(interpret(restored, [x])[0], interpret(layer.module, [x])[0], rtol=0, atol=0)


def test_sub_byte_values_elsewhere_are_refused() -> None:
    builder = Builder()
    x = builder.input("x", TensorType(DType.F32, (2, 64)))
    weight = builder.input("w", TensorType(DType.I4, (8, 64)))
    builder.output(builder(ops.LinearGroupwise(x, weight, builder.weight("s", torch.ones(8, 2)), group=32)))
    with pytest.raises(UnsupportedByBackendError, match="i4"):
        Compiled(builder.module)
