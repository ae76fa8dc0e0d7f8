"""Products of integers in compiled code: exact sums on every instruction set, and whole quantized graphs."""

from __future__ import annotations

import pytest
import torch
from tvm_harness import Compiled

from integer_graphs import different_integers, main, random_modules
from trimtab.cpu_features import missing_features
from trimtab.ir import Builder, DType, Module, TensorType, ops, symbol
from trimtab.passes.optimize import optimize

pytest.importorskip("tvm", reason="the TVM backend is not installed")

from trimtab.backends.tvm.targets import find_target

TARGETS = ("x86-64-v2", "x86-64-v3", "x86-64-v4", "native")
ROWS = symbol("rows", 1, 64)


def compiled_for(target: str, module: Module) -> Compiled:
    """``module`` for a target, or a skip where this machine cannot run its code."""
    if missing := missing_features(find_target(target).features):
        pytest.skip(f"this machine lacks {', '.join(missing)}")
    return Compiled(module, target)


def product(dtype: DType, rows: object, depth: int, weight: torch.Tensor) -> Module:
    build = Builder()
    x = build.input("x", TensorType(dtype, (rows, depth)))  # type: ignore[arg-type]
    build.output(build(ops.LinearInteger(x, build.weight("w", weight))))
    return build.module


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [DType.U8, DType.I8], ids=str)
def test_the_largest_sums_do_not_saturate(target: str, dtype: DType) -> None:
    limits = torch.iinfo(dtype.to_torch())
    weight = torch.full((70, 512), -128, dtype=torch.int8)
    weight[1::2] = 127
    compiled = compiled_for(target, product(dtype, 5, 512, weight))
    for value in (limits.min, limits.max):
        x = torch.full((5, 512), value, dtype=dtype.to_torch())
        x[2, ::2] = limits.min
        assert torch.equal(compiled(x)[0].long(), x.long() @ weight.long().T)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [DType.U8, DType.I8], ids=str)
@pytest.mark.parametrize(("depth", "columns"), [(64, 64), (72, 100), (13, 9), (384, 33), (4, 1)])
def test_sums_are_exact_for_ragged_sizes(target: str, dtype: DType, depth: int, columns: int) -> None:
    weight = torch.randint(-128, 128, (columns, depth)).to(torch.int8)
    compiled = compiled_for(target, product(dtype, ROWS, depth, weight))
    limits = torch.iinfo(dtype.to_torch())
    for rows in (1, 7, 33):
        x = torch.randint(limits.min, limits.max + 1, (rows, depth)).to(dtype.to_torch())
        assert torch.equal(compiled(x)[0].long(), x.long() @ weight.long().T)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("depth", [3, 4, 8, 16, 20, 64, 200])
def test_sums_of_single_results_keep_all_lanes(target: str, depth: int) -> None:
    """LLVM takes such sums for a dot product of bytes, whose last lanes it once dropped."""
    build = Builder()
    x = build.input("x", TensorType(DType.U8, (3, 1, depth)))
    y = build.input("y", TensorType(DType.I8, (3, depth, 1)))
    product = build(ops.MatmulInteger(x, y))
    build.output(build(ops.Dequantize(product, build.weight("scale", torch.tensor(0.5)))))
    compiled = compiled_for(target, optimize(build.module, "group-fusions").module)
    assert len(compiled.code.calls) == 1
    x, y = torch.randint(0, 256, (3, 1, depth)).byte(), torch.randint(-128, 128, (3, depth, 1)).to(torch.int8)
    assert torch.equal(compiled(x, y)[0], x.float() @ y.float() / 2)


def test_a_norm_writes_integers_and_a_product_reads_them() -> None:
    build = Builder()
    x = build.input("x", TensorType(DType.F32, (6, 64)))
    y = build(ops.LayerNorm(x))
    y = build(ops.Quantize(y, build.weight("s", torch.tensor(0.03)), dtype=DType.I8, low=-127, high=127))
    y = build(ops.LinearInteger(y, build.weight("w", torch.randint(-127, 128, (48, 64)).to(torch.int8))))
    y = build(ops.Dequantize(y, build.weight("t", torch.rand(48) * 0.01)))
    y = build(ops.Gelu(y))
    build.output(build(ops.Quantize(y, build.weight("u", torch.tensor(0.05)), dtype=DType.I8, low=-127, high=127)))
    grouped = optimize(build.module, "group-fusions").module
    kernels = sorted(call.name for call in Compiled(grouped).code.calls)
    assert kernels == ["layer_norm_quantize", "linear_integer_dequantize_gelu_quantize"]


@pytest.mark.parametrize("backend", ["tvm", "mlir"])
def test_random_quantized_graphs_give_the_same_integers(backend: str) -> None:
    if backend == "mlir":
        pytest.importorskip("iree.compiler", reason="the MLIR backend is not installed")
    ((module, count),) = random_modules(12, seed=11, at_once=12)
    assert count == 12
    assert different_integers(module, 3, backend, "native") == 0


def test_the_comparison_sees_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    def slightly_off(module: Module, inputs: object) -> tuple[torch.Tensor, ...]:
        from trimtab.ir import interpret

        first, *others = interpret(module, inputs)  # type: ignore[arg-type]
        return (first + 1, *others)

    monkeypatch.setattr("integer_graphs.interpret", slightly_off)
    assert main(["--graphs", "2", "--seed", "4"]) == 1
