"""Groups of ops compiled as one kernel: results, how many kernels there are, and what happens where it cannot be."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from random_graphs import random_module
from tvm_harness import Compiled, assert_matches, random

from trimtab.errors import BackendError, Location, UnsupportedByBackendError
from trimtab.ir import Builder, Dim, DType, Graph, Module, TensorType, Value, ops, symbol
from trimtab.ir.fused import fuse
from trimtab.ir.op import Op
from trimtab.passes.base import Context
from trimtab.passes.group_fusions import GroupFusions
from trimtab.passes.manager import PassManager
from trimtab.passes.samples import generate_samples

pytest.importorskip("tvm", reason="the TVM backend is not installed")

BATCH = symbol("batch", 1, 64)


def f32(*shape: Dim) -> TensorType:
    return TensorType(DType.F32, shape)


def weight(b: Builder, *shape: int) -> Value:
    generator = torch.Generator().manual_seed(math.prod(shape))
    return b.weight("w", torch.randn(shape, generator=generator))


def grouped(module: Module) -> Module:
    GroupFusions().run(module, Context())
    return module


def check(module: Module, kernels: list[str], *batches: int) -> Compiled:
    """Group, compile, compare with the interpreter at each batch size, and compare the names of the kernels."""
    compiled = Compiled(grouped(module))
    assert sorted(compiled.code.kernels) == sorted(kernels)
    generator = torch.Generator().manual_seed(1)
    for batch in batches or (1,):
        inputs = [random(value.type.bind({"batch": batch}), generator) for value in module.main.inputs]
        assert_matches(module, inputs, compiled=compiled, rtol=1e-4, atol=1e-5)
    return compiled


def test_a_slice_in_the_middle_of_a_pad_is_computed_at_the_place_that_the_pad_names() -> None:
    b = Builder()
    x = b.input("x", f32(20, 10, 3))
    b.output(b(ops.Pad(b(ops.Slice(x, dim=0, start=5, stop=15)), before=(0, 2, 0), after=(0, 2, 0))))
    check(b.module, ["slice_pad"])


def test_a_result_between_two_loops_over_the_rows_keeps_all_its_rows() -> None:
    """The masks' maxima: three axes, which one index runs through. TVM cut them to the extent of the last."""
    b = Builder()
    x, mask = b.input("x", f32(2, 3, 40, 6)), b.input("mask", f32(2, 3, 40, 6))
    masked = b(ops.Eq(b(ops.Amax(mask, dims=(3,), keepdim=True)), b.weight("none", torch.tensor([-math.inf]))))
    b.output(b(ops.Where(masked, b.weight("zero", torch.zeros(1)), b(ops.Softmax(x, dim=3)))))
    check(b.module, ["amax_eq_softmax_where"])


# -- each form of kernel ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(BATCH, 48), (5, 384), (BATCH, 100), (3, 7)])
def test_skip_and_norm_write_both_results_in_one_pass(rows: Dim, columns: int) -> None:
    b = Builder()
    x, y = b.input("x", f32(rows, 3, columns)), b.input("y", f32(rows, 3, columns))
    total = b(ops.Add(x, y))
    b.output(total, b(ops.LayerNorm(total, weight(b, columns), weight(b, columns))))
    check(b.module, ["add_layer_norm"], 1, 7)


def test_skip_and_norm_in_half_precision_normalise_the_rounded_sum() -> None:
    b = Builder()
    x, y = (b.input(name, TensorType(DType.F16, (5, 32))) for name in "xy")
    total = b(ops.Add(x, y))
    b.output(total, b(ops.RmsNorm(total)))
    module = grouped(b.module)
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(5, 32, generator=generator).half() for _ in range(2)]
    assert_matches(module, inputs, rtol=2e-3, atol=1e-3)


def test_an_epilogue_reads_its_tile_twice_and_other_tensors() -> None:
    b = Builder()
    x, y = b.input("x", f32(BATCH, 6, 40)), b.input("y", f32(BATCH, 6, 100))
    h = b(ops.Linear(x, weight(b, 100, 40), weight(b, 100)))
    h = b(ops.Mul(h, b(ops.Sigmoid(h))))
    b.output(b(ops.Add(b(ops.Mul(h, weight(b, 100))), y)))
    check(b.module, ["linear_sigmoid_mul_mul_add"], 1, 9)


@pytest.mark.parametrize("shape", [(BATCH, 3, 20, 16), (1, 3, 20, 16), (2, 1, 20, 70)])
def test_a_product_is_stored_with_its_axes_in_another_order(shape: tuple[Dim, ...]) -> None:
    b = Builder()
    x = b.input("x", f32(*shape[:3], 9))
    y = b.input("y", f32(*shape[:2], 9, shape[3]))
    scaled = b(ops.Mul(b(ops.Matmul(x, y)), b.scalar(0.5, DType.F32)))
    b.output(b(ops.Permute(scaled, dims=(0, 2, 1, 3))))
    check(b.module, ["matmul_mul_permute"], 1, 4)


def test_a_convolution_takes_norm_activation_and_residual() -> None:
    b = Builder()
    x = b.input("x", f32(BATCH, 8, 9, 9))
    h = b(ops.Conv2d(x, weight(b, 8, 8, 3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1)))
    variance = b.weight("v", torch.rand(8) + 0.5)
    h = b(ops.BatchNorm(h, weight(b, 8), variance, weight(b, 8), weight(b, 8)))
    b.output(b(ops.Relu(b(ops.Add(h, x)))))
    check(b.module, ["conv2d_batch_norm_add_relu"], 1, 3)


def test_a_norm_in_pieces_computes_its_scale_once_a_row() -> None:
    b = Builder()
    x = b.input("x", f32(BATCH, 5, 72))
    mean = b(ops.Mean(b(ops.Mul(x, x)), dims=(2,), keepdim=True))
    scale = b(ops.Rsqrt(b(ops.Add(mean, b.scalar(1e-5, DType.F32)))))
    b.output(b(ops.Mul(b(ops.Mul(x, scale)), weight(b, 72))))
    compiled = check(b.module, ["mul_mean_add_rsqrt_mul_mul"], 1, 6)
    (text,) = loops(compiled)
    assert text.count("T.sqrt(") == 1, "the square root stands outside of the loop over a row"


def test_a_reduction_over_tokens_with_what_is_around_it() -> None:
    b = Builder()
    x, m = b.input("x", f32(BATCH, 9, 40)), b.input("m", f32(BATCH, 9, 1))
    total = b(ops.Sum(b(ops.Mul(x, m)), dims=(1,)))
    b.output(b(ops.Div(total, b(ops.Sum(m, dims=(1,))))))
    check(b.module, ["mul_sum_div", "sum"], 1, 5)


def test_softmax_between_pointwise_ops() -> None:
    b = Builder()
    x, m = b.input("x", f32(BATCH, 2, 7, 33)), b.input("m", f32(BATCH, 1, 1, 33))
    scores = b(ops.Softmax(b(ops.Add(b(ops.Mul(x, b.scalar(0.3, DType.F32))), m)), dim=3))
    b.output(b(ops.Mul(scores, scores)))
    check(b.module, ["mul_add_softmax_mul"], 1, 3)


def test_elements_with_several_results_are_one_vectorised_loop() -> None:
    b = Builder()
    x, y = b.input("x", f32(BATCH, 40)), b.input("y", f32(BATCH, 40))
    total = b(ops.Exp(b(ops.Add(x, y))))
    b.output(b(ops.Neg(total)), b(ops.Sqrt(total)))
    compiled = check(b.module, ["add_exp_neg_sqrt"], 1, 7)
    (text,) = loops(compiled)
    assert text.count("T.parallel(") == 1
    assert "T.vectorized(" in text


def test_a_chain_reads_through_moves_and_indices() -> None:
    b = Builder()
    ids = b.input("ids", TensorType(DType.I64, (BATCH, 6)))
    h = b(ops.Add(b(ops.Embedding(weight(b, 50, 24), ids)), weight(b, 6, 24)))
    turned = b(ops.Permute(b(ops.Slice(h, dim=1, start=1, stop=5)), dims=(0, 2, 1)))
    b.output(b(ops.Tanh(turned)))
    module = grouped(b.module)
    compiled = Compiled(module)
    assert list(compiled.code.kernels) == ["embedding_add_slice_permute_tanh"]
    generator = torch.Generator().manual_seed(1)
    assert_matches(module, [torch.randint(0, 50, (3, 6), generator=generator)], compiled=compiled)


def test_equal_groups_share_a_kernel_and_every_op_is_named() -> None:
    b = Builder()
    x = b.input("x", f32(BATCH, 16))
    for line in (1, 2, 3):
        with b.at(Location("model.py", line)):
            x = b(ops.Gelu(b(ops.Linear(x, weight(b, 16, 16)))))
    b.output(x)
    compiled = check(b.module, ["linear_gelu"], 1, 5)
    origins = compiled.code.kernels["linear_gelu"]
    assert origins == tuple(f"{op} at model.py:{line}" for line in (1, 2, 3) for op in ("linear", "gelu"))


def test_the_body_of_a_repeat_is_made_of_groups() -> None:
    b = Builder()
    x = b.input("x", f32(BATCH, 16))
    body = Graph()
    h, w = body.add_input(f32(BATCH, 16)), body.add_input(f32(16, 16))
    linear = body.ops.append(ops.Linear(h, w)).result
    body.set_outputs([body.ops.append(ops.Add(body.ops.append(ops.Tanh(linear)).result, h)).result])
    b.output(b(ops.Repeat((x,), (b.weight("stack", torch.randn(3, 16, 16)),), (), body, 3)))
    compiled = check(b.module, ["linear_tanh_add"], 1, 4)
    (stored,) = compiled.code.weights
    assert stored.layout is not None, "the stacked matrix is packed although a group reads it"


# -- groups that do not become one kernel -----------------------------------------------------------------------------


def handmade(module: Module, *members: Op) -> Module:
    """``module`` with these ops in one group, whatever the pass thinks of it."""
    fuse(module, members, members[-1])
    return module


def test_a_group_around_generated_loops_is_inlined() -> None:
    b = Builder()
    q = b.input("q", f32(BATCH, 2, 5, 8))
    scaled = b.add(ops.Mul(q, q))
    attended = b.add(ops.Attention(scaled.result, q, q, scale=0.5))
    turned = b.add(ops.Permute(attended.result, dims=(0, 2, 1, 3)))
    b.output(turned.result)
    module = handmade(b.module, scaled, attended, turned)
    check(module, ["mul", "attention"], 1, 3)


def test_a_group_that_returns_an_input_is_inlined() -> None:
    b = Builder()
    x = b.input("x", f32(4, 6))
    body = Graph()
    inner = body.add_input(f32(4, 6))
    body.set_outputs([inner, body.ops.append(ops.Exp(inner)).result])
    b.output(*b.add(ops.Fused((x,), body, "exp")).results)
    check(b.module, ["exp"])


def test_what_cannot_be_compiled_is_named_inside_a_group() -> None:
    b = Builder()
    x = b.input("x", f32(4, 6))
    with b.at(Location("model.py", 7)):
        opaque = b.add(ops.Opaque((x,), target="aten.erfinv.default", call='[{"operand": 0}]'))
    last = b.add(ops.Neg(opaque.result))
    b.output(last.result)
    module = handmade(b.module, opaque, last)
    with pytest.raises(UnsupportedByBackendError, match=r"model\.py:7"):
        Compiled(module)


def test_a_failure_to_lower_names_the_op_inside_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.backends.tvm.rules import registry

    def broken(*_: object) -> None:
        raise ValueError("no such luck")

    b = Builder()
    x = b.input("x", f32(4, 6))
    with b.at(Location("model.py", 3)):
        first = b(ops.Exp(x))
    with b.at(Location("model.py", 4)):
        b.output(b(ops.Sin(first)))
    module = grouped(b.module)
    monkeypatch.setitem(registry._RULES, ops.Sin, registry.Rule(broken))
    with pytest.raises(BackendError, match=r"op=sin, error=.'no such luck'.") as caught:
        Compiled(module)
    assert caught.value.location == Location("model.py", 4)


# -- random graphs ----------------------------------------------------------------------------------------------------


def test_random_graphs_give_the_results_of_the_interpreter() -> None:
    """A dozen graphs with groups, leaving out those that hold something that TVM cannot compile by itself."""
    checked = 0
    for seed in itertools.count():
        module, _ = PassManager("dce", check="never").run(random_module(seed, 24))
        if not GroupFusions().run(together := module.copy(), Context()):
            continue
        try:
            apart = Compiled(module)
        except (BackendError, UnsupportedByBackendError):
            continue
        (inputs, *_) = (sample.inputs for sample in generate_samples(module, Context(), math.inf))
        for got, expected in zip(Compiled(together)(*inputs), apart(*inputs), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
        checked += 1
        if checked == 12:
            return


def loops(compiled: Compiled) -> list[str]:
    """The generated loops of each kernel, as text."""
    from trimtab.backends.tvm.emit import emit
    from trimtab.backends.tvm.pipeline import lower
    from trimtab.backends.tvm.targets import find_target

    spec = find_target("native", 2)
    emitted = emit(compiled.module, spec.machine).relax
    lowered = lower(emitted, spec.tvm_target(), spec.machine, compiled.module.symbols()).module
    functions = {name.name_hint: function for name, function in lowered.functions_items()}
    return [functions[name].script() for name in compiled.code.kernels]
