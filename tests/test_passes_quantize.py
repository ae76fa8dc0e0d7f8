"""Quantization of linear layers: the integers against plain arithmetic, what stays in float, and bounds on the loss."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_vit import Block
from torch import Tensor, nn

import trimtab
from trimtab.errors import PassError, TrimtabError
from trimtab.ir import Builder, DType, Module, TensorType, interpret, ops
from trimtab.passes.quantization.bits import FLOAT, Bits, fewest_changes
from trimtab.passes.quantization.scales import LEAST_SCALE, Affine, Integers, quantized_rows, row_scales

W8A8 = Bits(8, 8)


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative to the length of ``expected``."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def optimized(module: Module, pipeline: str, batches: list[tuple[Tensor, ...]] | None = None) -> Module:
    return trimtab.optimize(module, pipeline, calibration=batches).module


def traced(model: nn.Module, *inputs: Tensor) -> Module:
    return trimtab.trace(model.eval(), inputs)


# -- scales -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("ends", [(-1.7, 3.1), (0.4, 2.0), (-5.0, -1.0), (-0.001, 900.0)])
def test_an_affine_range_is_covered_and_holds_zero(bits: int, ends: tuple[float, float]) -> None:
    how = Affine.of_range(*ends, Integers.affine(bits))
    assert 0 <= how.zero <= 2**bits - 1
    assert float(how.rounded(torch.zeros(1, dtype=torch.float64))) == 0
    x = torch.linspace(min(ends[0], 0), max(ends[1], 0), 1001, dtype=torch.float64)
    # Rounding the zero point moves the range by up to half a step, so that its ends are a step away at most.
    assert float((how.rounded(x) - x).abs().max()) <= how.scale * 1.0001
    assert how.clipped(x) == 0


@pytest.mark.parametrize("ends", [(0.0, 0.0), (1e-45, 1e-44), (-1e30, 1e30), (2.5, 2.5)])
def test_extreme_ranges_have_scales(ends: tuple[float, float]) -> None:
    for integers in (Integers.affine(8), Integers.symmetric(8)):
        how = Affine.of_range(*ends, integers)
        assert math.isfinite(how.scale)
        assert how.scale >= LEAST_SCALE
        for end in ends:
            found = float(how.rounded(torch.tensor([end], dtype=torch.float64)))
            assert abs(found - end) <= how.scale


def test_clipped_is_the_share_outside() -> None:
    how = Affine.of_range(-1.0, 1.0, Integers.symmetric(8))
    assert how.clipped(torch.tensor([-3.0, -1.0, 0.0, 1.0, 1.001, 2.0, 5.0, 0.5])) == 3 / 8


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_rows_of_weights_have_scales_of_their_own(bits: int) -> None:
    weight = torch.randn(9, 40) * torch.logspace(-3, 3, 9)[:, None]
    weight[4] = 0
    weight[5] = -2.5
    integers = Integers.symmetric(bits)
    scales = row_scales(weight, integers, search=False)
    largest = 2 ** (bits - 1) - 1
    torch.testing.assert_close(scales.double(), (weight.double().abs().amax(1) / largest).clamp(min=LEAST_SCALE))
    stored = quantized_rows(weight, scales, integers)
    assert stored.dtype == torch.int8
    assert int(stored.abs().max()) == largest
    assert not stored[4].any()
    assert (stored[5] == -largest).all()
    assert float((stored * scales[:, None] - weight).abs().div(scales[:, None]).max()) <= 0.5001


def test_searched_scales_err_less() -> None:
    weight = torch.randn(16, 256, dtype=torch.float64)
    integers = Integers.symmetric(4)

    def error(search: bool) -> Tensor:
        scales = row_scales(weight, integers, search)
        return (quantized_rows(weight, scales, integers) * scales[:, None].double() - weight).square().sum(1)

    plain, searched = error(False), error(True)
    assert (searched <= plain).all()
    assert searched.sum() < 0.8 * plain.sum()


# -- layers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 12), (2, 7, 33)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_equals_plain_integer_arithmetic(shape: tuple[int, ...], bias: bool) -> None:
    layer = nn.Linear(shape[-1], 21, bias=bias)
    x = torch.randn(shape) + 0.3
    result = optimized(traced(layer, x), "cleanup,quantize{factors=false}", [(x,)])
    low, high = float(x.min()), float(x.max())
    scale = torch.tensor((high - low) / 255).double()
    zero = round(-low / float(scale.float()))
    unsigned = ((x / scale.float()).round() + zero).clamp(0, 255).double()
    rows = layer.weight.detach().double()
    units = (rows.abs().amax(1) / 127).float().double()
    signed = (rows / units[:, None]).round()
    expected = ((unsigned - zero) @ signed.T) * (units * scale.float().double())
    if layer.bias is not None:
        expected = expected + layer.bias.detach().double()
    (found,) = interpret(result, [x])
    # The bias is rounded to units of the sums, and float32 rounds the result.
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=float((units * scale).max()))
    assert [op.name for op in result.main.ops].count("linear_integer") == 1


def test_rows_have_scales_that_need_no_data() -> None:
    layer = nn.Linear(48, 16)
    x = torch.randn(2, 9, 48) * torch.logspace(-4, 4, 9)[:, None]
    x[0, 3] = 0
    result = optimized(traced(layer, x), "cleanup,quantize{inputs=row}")
    units = (x.double().abs().amax(-1, keepdim=True) / 127).clamp(min=LEAST_SCALE)
    rounded = (x / units).round().clamp(-127, 127) * units
    weight = layer.weight.detach()
    scales = row_scales(weight, Integers.symmetric(8), search=False)
    stored = quantized_rows(weight, scales, Integers.symmetric(8)).double() * scales[:, None].double()
    exact = F.linear(rounded, stored, layer.bias.detach().double())
    (found,) = interpret(result, [x], precision=torch.float64)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-9)
    (as_declared,) = interpret(result, [x])
    assert distance(as_declared, exact) < 0.01


def test_inputs_and_weights_that_are_shared_stay_shared() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.one, self.two = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return torch.cat((self.one(y), self.two(y), self.one(x)), -1)

    x = torch.randn(3, 5, 16)
    module = traced(Model(), x)
    result = optimized(module, "cleanup,quantize", [(x,)])
    kinds = [op.name for op in result.main.ops]
    assert kinds.count("linear_integer") == 3
    assert kinds.count("quantize") == 2  # the norm's result, which two layers read, and x
    bytes_of = [w for w in result.weights.values() if w.type.dtype is DType.I8]
    assert len(bytes_of) == 2  # the weight of `one` once
    assert distance(interpret(result, [x])[0], interpret(module, [x])[0]) < 0.02


def test_a_norm_with_a_second_reader_is_left_to_it() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = nn.LayerNorm(24), nn.Linear(24, 24)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return y + self.layer(y)

    x = torch.randn(4, 24)
    result = optimized(traced(Model(), x), "cleanup,quantize", [(x,)])
    (add,) = [op for op in result.main.ops if isinstance(op, ops.Add)]
    assert any(isinstance(value.producer, ops.LayerNorm) for value in add.operands)


def test_a_symbolic_batch_stays_symbolic() -> None:
    model = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 30), nn.GELU(), nn.Linear(30, 5))
    module = trimtab.trace(model.eval(), (torch.randn(2, 12),), dynamic_shapes={"input": {0: "batch"}})
    result = optimized(module, "cleanup,fuse,quantize", [(torch.randn(60, 12),), (torch.randn(1, 12),)])
    assert result.main.outputs[0].type.shape[0] == module.main.outputs[0].type.shape[0] != 2
    for batch in (1, 4, 7):
        x = torch.randn(batch, 12)
        assert distance(interpret(result, [x])[0], interpret(module, [x])[0]) < 0.1


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(lambda b, x: ops.Linear(x, b.input("w", TensorType(DType.F32, (4, 8)))), "computed", id="input"),
        pytest.param(
            lambda b, x: ops.Linear(b(ops.Cast(x, DType.F16)), b.weight("w", torch.randn(4, 8).half())),
            "f16 by f16", id="f16",
        ),
    ],
)  # fmt: skip
def test_what_stays_in_float_has_a_reason(make: object, reason: str) -> None:
    build = Builder()
    x = build.input("x", TensorType(DType.F32, (3, 8)))
    build.output(build(make(build, x)))  # type: ignore[operator]
    result = trimtab.optimize(build.module, "quantize{inputs=row}")
    (row,) = result.report.rows
    assert not row.changed
    assert reason in " ".join(row.rules[0]["rejected"])


def test_fewer_bits_err_more_and_edges_keep_eight() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    x = torch.randn(64, 32)
    module = traced(model, x)
    expected = interpret(module, [x])[0]
    errors = []
    for bits in (8, 6, 4, 3):
        result = trimtab.optimize(module, f"cleanup,quantize{{bits={bits}}}", calibration=[(x,)])
        schemes = [facts["scheme"] for facts in result.report.rows[-1].layers]
        assert schemes == ["W8A8", f"W{bits}A{bits}", "W8A8"]
        errors.append(distance(interpret(result.module, [x])[0], expected))
    assert errors == sorted(errors)
    assert errors[0] < 0.02
    assert errors[-1] > 0.05


@pytest.mark.parametrize("bits", [4, 8])
def test_factors_keep_small_channels_beside_large_ones(bits: int) -> None:
    layer = nn.Linear(32, 24)
    sizes = torch.logspace(0, 2.5, 32)  # what the smallest channels carry is lost at 4 bits anyway
    module = traced(layer, torch.randn(4, 32))
    batches = [(torch.randn(4, 32) * sizes,) for _ in range(20)]
    x = torch.randn(4, 32) * sizes
    exact = F.linear(x.double(), layer.weight.detach().double(), layer.bias.detach().double())
    errors = {}
    for factors in ("true", "false"):
        result = trimtab.optimize(
            module, f"cleanup,quantize{{bits={bits},edge_bits={bits},factors={factors}}}", calibration=batches
        )
        errors[factors] = distance(interpret(result.module, [x])[0], exact)
        (facts,) = result.report.rows[-1].layers
        assert facts["has_factors"] == (factors == "true")
    assert errors["true"] < (0.7 if bits == 8 else 1.02) * errors["false"]


def test_factors_do_not_store_a_shared_weight_twice() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    sizes = torch.logspace(0, 3, 16)
    batches = [(torch.randn(8, 16) * sizes,) for _ in range(3)]
    result = optimized(traced(Model(), *batches[0]), "cleanup,quantize", batches)
    assert sum(w.type.dtype is DType.I8 for w in result.weights.values()) == 1


def test_feedback_makes_up_for_coarse_weights() -> None:
    layer = nn.Linear(48, 40)
    mixing = (
        torch.randn(48, 48) @ torch.diag(torch.logspace(0, -2, 48)) @ torch.randn(48, 48)
    )  # channels that correlate
    module = traced(layer, torch.randn(8, 48))
    batches = [(torch.randn(8, 48) @ mixing,) for _ in range(40)]
    x = torch.randn(8, 48) @ mixing
    exact = F.linear(x.double(), layer.weight.detach().double(), layer.bias.detach().double())

    def error(options: str) -> float:
        pipeline = f"cleanup,quantize{{bits=3,edge_bits=3,input_bits=8,{options}}}"
        return distance(interpret(optimized(module, pipeline, batches), [x])[0], exact)

    assert error("feedback=true") < 0.7 * error("feedback=false")


# -- what goes wrong ----------------------------------------------------------------------------------------------


def test_without_data_the_pass_says_what_to_do() -> None:
    module = traced(nn.Linear(4, 4), torch.randn(2, 4))
    with pytest.raises(TrimtabError, match="no data to find the ranges") as caught:
        trimtab.optimize(module, "quantize")
    assert "inputs=row" in str(caught.value)


@pytest.mark.parametrize("options", ["bits=1", "bits=9", "input_bits=1", "edge_bits=16"])
def test_bits_are_checked(options: str) -> None:
    module = traced(nn.Linear(4, 4), torch.randn(2, 4))
    with pytest.raises(TrimtabError, match="from 2 to 8"):
        trimtab.optimize(module, f"quantize{{inputs=row,{options}}}")


def test_nan_in_the_data_is_named() -> None:
    module = traced(nn.Linear(4, 4), torch.randn(2, 4))
    bad = torch.randn(2, 4)
    bad[1, 2] = math.nan
    with pytest.raises(TrimtabError, match="batch 1"):
        trimtab.optimize(module, "quantize", calibration=[(torch.randn(2, 4),), (bad,)])


@pytest.mark.parametrize("kind", ["zeros", "constant channel", "outlier channel", "one huge value", "denormals"])
@pytest.mark.parametrize("inputs", ["tensor", "row"])
def test_extreme_data_gives_finite_results(kind: str, inputs: str) -> None:
    x = torch.randn(6, 16)
    if kind == "zeros":
        x = torch.zeros(6, 16)
    elif kind == "constant channel":
        x[:, 3] = 7
    elif kind == "outlier channel":
        x[:, 3] *= 1000
    elif kind == "one huge value":
        x[2, 3] = 1e30
    else:
        x *= 1e-42
    layer = nn.Linear(16, 8)
    module = traced(layer, x)
    result = optimized(module, f"cleanup,quantize{{inputs={inputs}}}", [(x,)])
    (found,) = interpret(result, [x])
    assert found.isfinite().all()
    # Of each output, the error that a step of the input and of the weights can make.
    step = (float(x.max().clamp(min=0)) - float(x.min().clamp(max=0))) / 255 if inputs == "tensor" else None
    moved = x.abs().amax(1, keepdim=True).double() / 127 if step is None else torch.tensor(step).double()
    rows = layer.weight.detach().double()
    bound = moved * rows.abs().sum(1) + x.double().abs() @ (rows.abs().amax(1, keepdim=True) / 127).expand_as(rows).T
    exact = F.linear(x.double(), rows, layer.bias.detach().double())
    assert ((found.double() - exact).abs() <= bound + 1e-4 + moved * rows.abs().amax(1)).all()


# -- the residual stream ------------------------------------------------------------------------------------------


class _Stream(nn.Module):
    """Blocks whose residual stream has two channels hundreds of times larger than the others, which its norms damp."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.blocks = nn.ModuleList(Block(32, 4) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 6)
        with torch.no_grad():
            self.embed.bias[5], self.embed.bias[20] = 450.0, -540.0
            for norm in [self.norm, *(n for block in self.blocks for n in (block.norm1, block.norm2))]:
                norm.weight.mul_(36)
                norm.weight[[5, 20]] = 0.01

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def test_rounding_the_residual_stream_ruins_what_the_default_keeps() -> None:
    model = _Stream()
    batches = [(torch.randn(4, 10, 8),) for _ in range(4)]
    module = traced(model, *batches[0])
    x = torch.randn(4, 10, 8)

    def said(module: Module) -> Tensor:
        """What the outputs say about their tokens: how they differ from the mean of all."""
        (found,) = interpret(module, [x])
        return found - found.mean((0, 1))

    kept = said(optimized(module, "cleanup,quantize", batches))
    ruined = said(optimized(module, "cleanup,quantize{residual=true}", batches))
    assert distance(kept, said(module)) < 0.1
    assert distance(ruined, said(module)) > 0.5


# -- bounds on the loss -------------------------------------------------------------------------------------------


def test_fewest_changes_takes_the_worst_layers_first() -> None:
    losses = [0.0, 0.5, 0.01, 0.2, 0.05]
    share = {W8A8: 1.0, Bits(4, 4): 10.0, FLOAT: 0.0}

    def loss(bits: object) -> float:
        return sum(share[its] * lost for its, lost in zip(bits, losses, strict=True))  # type: ignore[call-overload]

    found = fewest_changes([W8A8] * 5, loss, 0.1)
    assert found.bits == [W8A8, FLOAT, W8A8, FLOAT, W8A8]
    assert found.lost == pytest.approx(0.06)
    assert found.lost_at_first == pytest.approx(0.76)
    assert found.alone == losses
    found = fewest_changes([Bits(4, 4)] * 5, loss, 1.4)
    assert found.bits == [Bits(4, 4), W8A8, Bits(4, 4), W8A8, Bits(4, 4)]
    assert fewest_changes([Bits(4, 4)] * 5, loss, 0.3).bits == [W8A8, FLOAT, W8A8, W8A8, W8A8]
    assert fewest_changes([Bits(4, 4), FLOAT], lambda bits: 1.0 * (bits[0] != FLOAT), 0.5).bits == [FLOAT, FLOAT]
    assert fewest_changes([W8A8] * 5, loss, 1.0).bits == [W8A8] * 5


def _model_with_one_bad_layer() -> tuple[Module, list[tuple[Tensor, ...]]]:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    with torch.no_grad():
        model[2].weight[:, 0] = 0  # an input that is nothing but large: it takes all the steps
        model[0].weight[0] *= 300
    batches = [(torch.randn(16, 16),) for _ in range(3)]
    return traced(model, *batches[0]), batches


def test_max_drop_leaves_the_bad_layer_in_float() -> None:
    module, batches = _model_with_one_bad_layer()
    plain = trimtab.optimize(module, "cleanup,quantize", calibration=batches)
    bounded = trimtab.optimize(module, "cleanup,quantize{max_drop=0.03}", calibration=batches)
    x = torch.randn(16, 16)
    expected = interpret(module, [x])[0]
    assert distance(interpret(plain.module, [x])[0], expected) > 0.1
    assert distance(interpret(bounded.module, [x])[0], expected) < 0.06
    layers = bounded.report.rows[-1].layers
    assert [facts["scheme"] for facts in layers] == ["W8A8", "float", "W8A8"]
    assert max(range(3), key=lambda n: layers[n]["sensitivity"]) == 1


def test_without_fallback_the_pass_refuses_and_says_what_would_do() -> None:
    module, batches = _model_with_one_bad_layer()
    with pytest.raises(PassError, match="loses more than max_drop") as caught:
        trimtab.optimize(module, "cleanup,quantize{max_drop=0.03,fallback=false}", calibration=batches)
    assert "1 of 3 layers" in str(caught.value)
    assert "2.weight" in str(caught.value)


def test_a_metric_bounds_the_loss_too() -> None:
    module, batches = _model_with_one_bad_layer()
    x = batches[0][0]
    wanted = interpret(module, [x])[0].argmax(-1)

    def accuracy(candidate: Module) -> float:
        return float((interpret(candidate, [x])[0].argmax(-1) == wanted).float().mean())

    result = trimtab.optimize(module, "cleanup,quantize{bits=4,max_drop=0.05}", calibration=batches, metric=accuracy)
    assert accuracy(result.module) >= 0.95


def test_layers_that_gain_nothing_stay_in_float() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    x = torch.randn(8, 16)
    timed: list[str] = []

    def seconds(module: Module) -> float:
        (op,) = [op for op in module.main.ops if isinstance(op, ops.Linear | ops.LinearInteger)]
        timed.append(op.name)
        depth = int(op.weight.type.shape[1])
        return 1.0 if isinstance(op, ops.Linear) else {16: 2.0, 32: 0.5}[depth]

    result = trimtab.optimize(traced(model, x), "cleanup,quantize{measured=true}", calibration=[(x,)], seconds=seconds)
    layers = result.report.rows[-1].layers
    assert [facts["scheme"] for facts in layers] == ["float", "W8A8", "W8A8"]
    assert [facts["integer_ms"] for facts in layers] == [2000.0, 500.0, 500.0]
    assert timed == ["linear", "linear_integer"] * 2  # equal layers once


def test_without_a_target_nothing_is_measured() -> None:
    x = torch.randn(8, 16)
    with pytest.raises(TrimtabError, match="cannot measure") as caught:
        trimtab.optimize(traced(nn.Linear(16, 4), x), "quantize{measured=true}", calibration=[(x,)])
    assert "trimtab.compile" in str(caught.value)


def test_layers_are_timed_on_the_target() -> None:
    pytest.importorskip("tvm", reason="the TVM backend is not installed")
    x = torch.randn(64, 256)
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    made = trimtab.compile(
        traced(model, x), target="native", pipeline="cleanup,quantize{measured=true}", calibration=[(x,)]
    )
    row = next(row for row in made.report["passes"] if row["name"] == "quantize")
    for facts in row["layers"]:
        assert facts["float_ms"] > 0
        assert facts["integer_ms"] > 0
        assert (facts["scheme"] == "float") == (facts["integer_ms"] >= facts["float_ms"])


def test_the_report_has_the_facts_of_each_layer() -> None:
    layer = nn.Linear(64, 32)
    x = torch.randn(50, 64)
    result = trimtab.optimize(traced(layer, x), "cleanup,quantize{factors=false}", calibration=[(x,)])
    (facts,) = result.report.to_dict()["passes"][-1]["layers"]
    assert facts["layer"].startswith("weight")
    assert facts["scheme"] == "W8A8"
    assert facts["low"] == pytest.approx(float(x.min()), abs=0.05)
    assert facts["high"] == pytest.approx(float(x.max()), abs=0.05)
    assert facts["clipped"] == 0
    (found,) = interpret(result.module, [x])
    exact = F.linear(x.double(), layer.weight.detach().double(), layer.bias.detach().double())
    noise = float((found.double() - exact).square().sum())
    signal = float((exact - layer.bias.detach().double()).square().sum())
    assert facts["sqnr_db"] == pytest.approx(10 * math.log10(signal / noise), abs=0.3)


# -- statistics that are kept -------------------------------------------------------------------------------------


@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_statistics_are_kept_in_a_file(tmp_path: Path, observer: str) -> None:
    module, batches = _model_with_one_bad_layer()
    path = tmp_path / "statistics.safetensors"
    pipeline = f'quantize{{observer={observer},factors=false,statistics="{path}"}}'
    first = optimized(module, pipeline, batches)
    assert path.exists()
    again = optimized(module, pipeline)  # without data
    x = torch.randn(16, 16)
    assert torch.equal(interpret(first, [x])[0], interpret(again, [x])[0])
    other = traced(nn.Linear(16, 3), x)
    with pytest.raises(TrimtabError, match="of another module"):
        optimized(other, pipeline)
    with pytest.raises(TrimtabError, match="observer"):
        optimized(module, f'quantize{{observer=entropy,statistics="{path}"}}')
