"""Integer functions against float64, the same integers compiled, and transformers with nothing left in float."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlir_harness
import pytest
import torch
import torch.nn.functional as F
import tvm_harness
from tiny_vit import TinyVit, images, tiny_vit
from torch import Tensor, nn

import trimtab
from trimtab.errors import TrimtabError
from trimtab.ir import Builder, DType, Module, TensorType, Value, interpret, ops
from trimtab.passes.integer_math.fixed_point import MOST, encoded
from trimtab.passes.integer_math.functions import (
    PROBABILITY_UNIT,
    SCORE_UNIT,
    binary_codes,
    exponential,
    gelu,
    gelu_unit,
    softmax,
    square_root,
)
from trimtab.passes.integer_math.layer_norm import normalised, scaled
from trimtab.passes.integer_math.power_factors import PowerFactors, power_factors

PIPELINE = "cleanup,fuse,quantize,quantize-attention,integer-only"
MOVES = {"reshape", "permute", "expand", "slice", "select", "concat", "full"}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def of_function(make: Callable[[Builder, Value], Value], x: Tensor) -> Module:
    build = Builder()
    value = build.input("x", TensorType(DType.from_torch(x.dtype), tuple(x.shape)))
    build.output(make(build, value))
    return build.module


def run(make: Callable[[Builder, Value], Value], x: Tensor) -> Tensor:
    (found,) = interpret(of_function(make, x), [x])
    return found


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# -- functions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 8, 31])
def test_factors_are_multipliers_and_shifts(bits: int) -> None:
    factors = torch.rand(500, generator=generator(), dtype=torch.float64) * torch.logspace(-14, 0, 500).double()
    factors = torch.cat((factors, -factors, torch.tensor([1 - 1e-12, 2.0**-20, 0.0], dtype=torch.float64)))
    multipliers, shifts = encoded(factors, bits)
    assert int(shifts.min()) >= 1
    assert int(shifts.max()) <= 62
    assert int(multipliers.double().abs().max()) < 2**bits
    found = multipliers.double() * 2.0 ** -shifts.double()
    # Half a unit of the last of `bits` places; where the shift is at its end, half of 2^-62.
    assert ((found - factors).abs() <= factors.abs() * 2.0**-bits * (1 + 1e-9) + 2.0**-63).all()


def test_factors_that_are_too_large_are_refused() -> None:
    with pytest.raises(TrimtabError, match="too far apart"):
        encoded(torch.tensor([1.0, 2.0**40], dtype=torch.float64), 31)


def test_exponential() -> None:
    x = torch.cat((torch.arange(-30000, 1), torch.tensor([-(2**31) + 1]))).int()
    found = run(exponential, x).double()
    assert 2**30 < found[30000] < 2**31
    error = (found / found[30000] - (x.double() * SCORE_UNIT).exp()).abs()
    assert float(error.max()) < 0.002
    assert found[-1] == 0


@pytest.mark.parametrize("count", [1, 7, 197, 3000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 40.0])
def test_softmax(count: int, spread: float) -> None:
    x = (torch.randn(9, count, generator=generator(count)) * spread / SCORE_UNIT).round().int()
    found = run(lambda b, v: softmax(b, v, 1), x).double() * PROBABILITY_UNIT
    assert float((found - (x.double() * SCORE_UNIT).softmax(1)).abs().max()) < 0.001
    assert float((found.sum(1) - 1).abs().max()) < 1e-4


def test_softmax_of_extreme_scores() -> None:
    x = torch.tensor([[-MOST, MOST, 0], [-MOST, -MOST, -MOST], [MOST, MOST, -MOST]], dtype=torch.int32)
    found = run(lambda b, v: softmax(b, v, 1), x).double() * PROBABILITY_UNIT
    expected = torch.tensor([[0, 1, 0], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("per_octave", [1, 2])
@pytest.mark.parametrize("most", [4, 16, 32])
def test_codes_are_exact(per_octave: int, most: int) -> None:
    large = torch.randint(0, 2**30 + 1, (20000,), generator=generator())
    small = large >> torch.randint(0, 31, (20000,), generator=generator(1))
    near = torch.cat([(2.0 ** (torch.arange(0, 121) / 4)).long() + offset for offset in (-1, 0, 1, 2)])
    p = torch.cat((large, small, near.clamp(0, 2**30))).int()
    found = run(lambda b, v: binary_codes(b, v, per_octave, most), p)
    expected = (-per_octave * (p.double() * PROBABILITY_UNIT).log2()).round().clamp(max=most)
    assert torch.equal(found.double(), expected)


def test_square_root() -> None:
    numbers = torch.randint(0, 2**60, (20000,), generator=generator())
    numbers = numbers >> torch.randint(0, 60, (20000,), generator=generator(1))
    squares = torch.randint(0, 2**30, (5000,), generator=generator(2)) ** 2
    x = torch.cat((numbers, squares, squares - 1, torch.arange(100), torch.tensor([2**60]))).clamp(min=0)
    found = run(square_root, x)
    exact = torch.tensor([math.isqrt(int(number)) for number in x])
    assert bool(((found - exact == 0) | (found - exact == 1)).all())


@pytest.mark.parametrize("largest", [1.0, 8.0, 30.0, 1000.0])
def test_gelu(largest: float) -> None:
    unit = gelu_unit(largest)
    assert largest <= unit * 2**15
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    units = []

    def make(build: Builder, value: Value) -> Value:
        y, of_result = gelu(build, value, unit)
        units.append(of_result)
        return y

    found = run(make, x).double() * units[0]
    assert float((found - F.gelu(x.double() * unit)).abs().max()) < 0.019


def _norm_case(kind: str) -> tuple[Tensor, PowerFactors]:
    alphas = torch.randint(0, 4, (48,), generator=generator(), dtype=torch.int32)
    codes = torch.randint(0, 256, (5, 3, 48), generator=generator(1), dtype=torch.uint8)
    if kind == "constant":
        codes.fill_(131)
    elif kind == "one huge":
        codes.fill_(120)
        codes[..., 5] = 255
    elif kind == "saturated":
        codes = (codes > 127).to(torch.uint8) * 255
    unit = 1e-20 if kind == "tiny unit" else 0.01
    return codes, PowerFactors(unit, 120, torch.zeros_like(alphas) if kind == "constant" else alphas)


@pytest.mark.parametrize("kind", ["random", "constant", "one huge", "saturated", "tiny unit"])
def test_layer_norm(kind: str) -> None:
    codes, factors = _norm_case(kind)
    weight = torch.randn(48, generator=generator(2), dtype=torch.float64) * 40
    bias = torch.randn(48, generator=generator(3), dtype=torch.float64) * 9
    weight[3] = bias[4] = 0

    def make(build: Builder, value: Value) -> Value:
        normal = normalised(build, value, factors, 1e-5)
        return scaled(build, normal, weight, bias, zero=100, dtype=DType.U8, low=0, high=255)

    found = run(make, codes)
    x = (codes.double() - factors.zero) * factors.scales
    exact = F.layer_norm(x, (48,), weight, bias, 1e-5)
    # Half a step, and of the result a 256th by the multiplier of 8 bits.
    error = (found.double() - (exact + 100).clamp(0, 255)).abs()
    assert bool((error <= 0.51 + (exact - bias).abs() / 256).all())


def test_power_factors_fit_the_channels() -> None:
    sizes = torch.tensor([1.0, 0.4, 0.2, 0.1, 0.01, 1.0])
    x = torch.rand(4, 30, 6, generator=generator()) * 2 * sizes - sizes
    module = of_function(lambda b, v: b(ops.LayerNorm(v)), x)
    (value,) = module.main.inputs
    factors = power_factors(module, [value], [(x,), (x * 0.9,)], "a test")[value]
    assert factors.alphas.tolist() == [3, 2, 1, 0, 0, 3]
    rounded = ((x / factors.scales).round() + factors.zero).clamp(0, 255) - factors.zero
    error = (rounded * factors.scales - x).abs()
    assert bool((error <= factors.scales * 0.51).all())


# -- the same integers from all backends ---------------------------------------------------------------------------

FUNCTIONS: dict[str, tuple[Callable[[Builder, Value], Value], Callable[[], Tensor]]] = {
    "softmax": (lambda b, v: softmax(b, v, 1), lambda: torch.randint(-9000, 9000, (5, 33), generator=generator())),
    "log2": (lambda b, v: binary_codes(b, v, 1, 16), lambda: torch.randint(0, 2**30, (333,), generator=generator())),
    "log-sqrt2": (lambda b, v: binary_codes(b, v, 2, 16),
                  lambda: torch.randint(0, 2**30, (333,), generator=generator())),
    "gelu": (lambda b, v: gelu(b, v, 2.0**-10)[0], lambda: torch.arange(-32768, 32768, 97)),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["tvm", "mlir"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_the_same_compiled(backend: str, name: str) -> None:
    make, data = FUNCTIONS[name]
    x = data().int()
    module = of_function(make, x)
    compiled = (tvm_harness if backend == "tvm" else mlir_harness).Compiled(module)
    assert torch.equal(compiled(x)[0], interpret(module, [x])[0])


@pytest.mark.parametrize("backend", ["tvm", "mlir"])
def test_layer_norm_is_the_same_compiled(backend: str) -> None:
    codes, factors = _norm_case("random")

    def make(build: Builder, value: Value) -> Value:
        one = torch.full((), 30.0, dtype=torch.float64)
        return scaled(
            build, normalised(build, value, factors, 1e-5), one, one * 0, zero=0, dtype=DType.I8, low=-128, high=127
        )

    module = of_function(make, codes)
    compiled = (tvm_harness if backend == "tvm" else mlir_harness).Compiled(module)
    assert torch.equal(compiled(codes)[0], interpret(module, [codes])[0])


def test_a_transformer_is_the_same_compiled() -> None:
    module = trimtab.trace(tiny_vit(depth=2), (images(2),))
    result = trimtab.optimize(
        module, PIPELINE.replace("attention", "attention{softmax=log-sqrt2}"), calibration=[(images(2),)]
    ).module
    compiled = tvm_harness.Compiled(result)
    for seed in range(3):
        x = images(2, seed=40 + seed)
        assert torch.equal(compiled(x)[0], interpret(result, [x])[0])


# -- graphs -------------------------------------------------------------------------------------------------------


def floats(module: Module) -> list[str]:
    """Names of the ops that compute with floating numbers, moves and ends apart."""
    return sorted(
        op.name
        for op in module.main.ops
        if op.name not in MOVES | {"quantize", "dequantize"}
        and any(value.type.dtype.is_floating for value in (*op.operands, *op.results))
    )


def optimized(module: Module, pipeline: str, *batches: tuple[Tensor, ...]) -> tuple[Module, str]:
    result = trimtab.optimize(module, pipeline, calibration=list(batches))
    return result.module, "; ".join(result.report.rows[-1].notes)


@pytest.mark.parametrize("head", ["class", "distilled", "mean"])
@pytest.mark.parametrize("softmax", ["uniform", "log2", "log-sqrt2"])
def test_a_vision_transformer_has_no_float_inside(head: str, softmax: str) -> None:
    model = tiny_vit(head, depth=2)  # type: ignore[arg-type]
    module = trimtab.trace(model, (images(2),), dynamic_shapes={"image": {0: "batch"}})
    batches = [(images(4, seed=seed),) for seed in range(2)]
    pipeline = PIPELINE.replace("attention", f"attention{{softmax={softmax}}}")
    result, notes = optimized(module, pipeline, *batches)
    assert floats(result) == []
    kinds = [op.name for op in result.main.ops]
    assert kinds.count("quantize") == 1
    assert kinds.count("dequantize") == 1
    assert notes.endswith("1 rounded from float: it is an input")
    x = images(8, seed=9)
    exact = interpret(module, [x])[0]
    error = distance(interpret(result, [x])[0], exact)
    alone = distance(interpret(optimized(module, pipeline.rsplit(",", 1)[0], *batches)[0], [x])[0], exact)
    assert error < alone + 0.02
    assert error < (0.03 if softmax == "uniform" and head != "mean" else 0.08)


def test_a_float_residual_stream_leaves_only_its_sums() -> None:
    model = tiny_vit(depth=2)
    module = trimtab.trace(model, (images(2),))
    result, notes = optimized(module, PIPELINE + "{residual=float}", (images(2),))
    assert set(floats(result)) == {"add"}
    assert len(floats(result)) == 5
    assert "in floating point: 5 add" in notes
    assert "the residual stream is in float" in notes
    again = trimtab.optimize(result, "integer-only{residual=float}", calibration=[(images(2),)]).report
    assert not again.rows[0].changed
    x = images(2, seed=3)
    assert distance(interpret(result, [x])[0], interpret(module, [x])[0]) < 0.03


def test_outputs_are_made_from_integers() -> None:
    module = trimtab.trace(tiny_vit("dense", depth=2), (images(2),))
    result, notes = optimized(module, PIPELINE, (images(2),))
    assert floats(result) == []
    assert "in floating point" not in notes
    x = images(2, seed=3)
    assert distance(interpret(result, [x])[0], interpret(module, [x])[0]) < 0.05


class _PostNorm(nn.Module):
    """Norms after the sums, ReLU, an activation without an integer form, and masked attention with shared keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24)
        self.one, self.two, self.three = nn.Linear(24, 40), nn.Linear(40, 40), nn.Linear(40, 24)
        self.norm1, self.norm2 = nn.LayerNorm(24), nn.LayerNorm(24)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, count, _ = x.shape
        q = self.q(x).reshape(batch, count, 4, 6).transpose(1, 2)
        k, v = self.kv(x).reshape(batch, count, 2, 2, 6).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        x = self.norm1(x + self.out(mixed.transpose(1, 2).reshape(batch, count, 24)))
        return self.norm2(x + self.three(F.silu(self.two(F.relu(self.one(x))))))


@pytest.mark.parametrize("floating", [True, False])
@pytest.mark.parametrize("per_head", ["true", "false"])
def test_other_transformers(floating: bool, per_head: str) -> None:
    torch.manual_seed(3)
    model = _PostNorm().eval()
    mask = torch.rand(2, 1, 9, 9, generator=generator()) < 0.7
    given = torch.where(mask, 0.0, -50.0) if floating else mask
    x = torch.randn(2, 9, 24, generator=generator(1))
    module = trimtab.trace(model, (x, given))
    batches = [(torch.randn(2, 9, 24, generator=generator(10 + n)), given) for n in range(8)]
    result, notes = optimized(module, PIPELINE.replace("attention", f"attention{{per_head={per_head}}}"), *batches)
    # A floating mask is an input, of which minus infinity is looked for.
    assert floats(result) == (["gt", "silu"] if floating else ["silu"])
    assert "silu has no integer form" in notes
    other = torch.randn(2, 9, 24, generator=generator(2))
    for hidden in [given, torch.where(mask, 0.0, -math.inf)] if floating else [given]:
        found, exact = interpret(result, [other, hidden])[0], interpret(module, [other, hidden])[0]
        assert distance(found, exact) < 0.03


def test_nothing_between_products_in_a_perceptron() -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(16, 40), nn.GELU(), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 8)).eval()
    x = torch.randn(50, 16, generator=generator())
    module = trimtab.trace(model, (x,))
    result, _ = optimized(module, "cleanup,fuse,quantize,integer-only", (x,))
    assert floats(result) == []
    kinds = [op.name for op in result.main.ops]
    assert (kinds.count("quantize"), kinds.count("dequantize"), kinds.count("linear_integer")) == (1, 1, 3)
    other = torch.randn(50, 16, generator=generator(1))
    assert distance(interpret(result, [other])[0], interpret(module, [other])[0]) < 0.04


def test_only_what_is_read_is_rounded_to_a_scale() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.all = nn.Linear(12, 30)
            self.parts = nn.ModuleList(nn.Linear(10, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([part(y) for part, y in zip(self.parts, self.all(x).split(10, -1), strict=True)], -1)

    torch.manual_seed(2)
    x = torch.randn(7, 12, generator=generator())
    module = trimtab.trace(Model().eval(), (x,))
    result, _ = optimized(module, "cleanup,quantize,integer-only", (x,))
    (found,) = interpret(result, [x])
    assert distance(found, interpret(module, [x])[0]) < 0.02
    widths = [op.result.type.shape[-1] for op in result.main.ops if isinstance(op, ops.Requantize)]
    assert widths == [10, 10, 10]


def test_outlier_channels_do_not_ruin_an_integer_residual_stream() -> None:
    model: TinyVit = tiny_vit(depth=2)
    with torch.no_grad():
        model.positions[..., 3] += 200
        model.positions[..., 9] -= 90
        for norm in [model.norm, *(n for block in model.blocks for n in (block.norm1, block.norm2))]:
            norm.weight.mul_(20)
            norm.weight[[3, 9]] = 0.01
    module = trimtab.trace(model, (images(2),))
    result, _ = optimized(module, PIPELINE, (images(2),))
    x = images(2, seed=3)
    # The norms' inputs have 8 bits and factors of 8 between channels at most; the stream itself loses nothing.
    kept, exact = interpret(result, [x])[0], interpret(module, [x])[0]
    assert kept.isfinite().all()
    floating, _ = optimized(module, PIPELINE + "{residual=float}", (images(2),))
    assert distance(kept, interpret(floating, [x])[0]) < 0.5 * distance(exact, exact.mean()) + 1e-6


def test_without_data_or_anything_to_do() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    x = torch.randn(4, 8, generator=generator())
    module = trimtab.trace(model, (x,))
    quantized = trimtab.optimize(module, "cleanup,fuse,quantize", calibration=[(x,)]).module
    with pytest.raises(TrimtabError, match="no data to find the ranges"):
        trimtab.optimize(quantized, "integer-only")
    assert not trimtab.optimize(module, "integer-only").report.rows[0].changed
    rows = trimtab.optimize(module, "cleanup,fuse,quantize{inputs=row},integer-only", calibration=[(x,)]).report.rows
    assert not rows[-1].changed
    assert "its scale is computed" in " ".join(rows[-1].rules[0]["rejected"])


def test_zeros_give_finite_results() -> None:
    module = trimtab.trace(tiny_vit(depth=1), (images(2),))
    result, _ = optimized(module, PIPELINE, (torch.zeros(2, 3, 20, 20),))
    for x in (torch.zeros(2, 3, 20, 20), images(2) * 1e6):
        assert interpret(result, [x])[0].isfinite().all()
