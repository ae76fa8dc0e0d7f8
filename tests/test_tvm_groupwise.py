"""Linear layers with weights of 4 and 8 bits agree with float64, and read their weights from panels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

pytest.importorskip("tvm")
from tvm_harness import Compiled

from trimtab.backends.tvm.targets import find_target, target_names
from trimtab.backends.tvm.layouts import Layout, packed_blocks
from trimtab.cpu_features import missing_features
from trimtab.errors import UnsupportedByBackendError
from trimtab.ir import Builder, DType, Module, Symbol, TensorType, Value, interpret, ops
from trimtab.ir.dims import Dim
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
        self, rows: Sequence[Dim], columns: int, depth: int, group: int, dtype: DType, seed: int, zero: DType | None = None,
        bias: bool = False, after: Callable[[Builder, Value], Value] | None = None,
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


def kernel_texts(compiled: Compiled) -> str:
    """The code, to look for the names of micro-kernels in."""
    return str(compiled.code.calls)


@pytest.mark.parametrize("dtype", RANGES, ids=str)
@pytest.mark.parametrize(("columns", "depth", "group"), [(100, 64, 32), (64, 96, 32), (33, 768, 64), (7, 768, 768)])
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 17, 128])
def test_results(dtype: DType, columns: int, depth: int, group: int, rows: int) -> None:
    layer = Layer((rows,), columns, depth, group, dtype, seed=rows * depth + columns)
    layer.check(Compiled(layer.module), layer.input(rows))
