"""Attention in integers: against the formulas in float64, masks and shared heads, codes of probabilities, extremes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from tvm_harness import Compiled

import trimtab
from trimtab.errors import TrimtabError
from trimtab.ir import Builder, DType, Module, TensorType, interpret, ops
from trimtab.ir.dims import symbol
from trimtab.passes.integer_math.log_codes import LogCodes

Shape = tuple[int, ...]


def seeded(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def attention(
    data: tuple[Tensor, ...], *, scale: float = 0.3, causal: bool = False, constant_mask: bool = False
) -> Module:
    """A module of one attention whose inputs are q, k, v and perhaps a mask."""
    build = Builder()
    given = []
    for n, tensor in enumerate(data):
        if n == 3 and constant_mask:
            given.append(build.weight("mask", tensor))
        else:
            given.append(build.input(f"x{n}", TensorType(DType.from_torch(tensor.dtype), tuple(tensor.shape))))
    mask = given[3] if len(given) > 3 else None
    build.output(build(ops.Attention(*given[:3], mask, scale=scale, causal=causal)))
    return build.module


def quantized(module: Module, options: str, *batches: tuple[Tensor, ...]) -> Module:
    finite = [tuple(x.nan_to_num(neginf=-9.0) if x.is_floating_point() else x for x in batch) for batch in batches]
    return trimtab.optimize(module, f"quantize-attention{{{options}}}", calibration=finite).module


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# -- an independent transcription, in float64 --------------------------------------------------------------------


def symmetric(x: Tensor, bits: int, per_head: bool) -> tuple[Tensor, Tensor]:
    """Integers and their scale."""
    largest = x.abs().amax((0, 2, 3), keepdim=True)[0] if per_head else x.abs().max()
    most = 2 ** (bits - 1) - 1
    scale = (largest.double() / most).float()
    return (x / scale).round().clamp(-most, most).double(), scale.double()


def probabilities(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """In float64; rows that may attend to nothing are zero."""
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask.double()
    hidden = torch.zeros_like(scores, dtype=torch.bool)
    if mask is not None:
        hidden = (~mask if mask.dtype == torch.bool else mask == -math.inf).expand_as(scores)
    if causal:
        hidden = hidden | torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    scores = scores.masked_fill(hidden, -math.inf)
    exponentials = (scores - scores.amax(-1, keepdim=True).nan_to_num(neginf=0)).exp()
    total = exponentials.sum(-1, keepdim=True)
    return torch.where(total > 0, exponentials / total, 0)


def rounded_probabilities(p: Tensor, softmax: str, bits: int) -> tuple[Tensor, Tensor]:
    """What the integers stand for, and how far each is from where rounding would change."""
    if softmax == "uniform":
        steps = p * (2**bits - 1)
        return steps.round() / (2**bits - 1), (steps - steps.floor() - 0.5).abs()
    octaves = -(1 if softmax == "log2" else 2) * p.log2()
    codes = octaves.round()
    edge = (octaves - octaves.floor() - 0.5).abs()
    if softmax == "log2":
        values = 2.0**-codes
    else:
        odd = codes.nan_to_num(posinf=0) % 2 == 1
        values = 2.0 ** -torch.ceil(codes / 2) * torch.where(odd, math.sqrt(2), 1.0)
    return torch.where(codes >= 2**bits, 0.0, values), edge.nan_to_num(nan=1.0)


def transcription(
    data: tuple[Tensor, ...], scale: float, causal: bool, bits: int, softmax: str, softmax_bits: int, per_head: bool
) -> tuple[Tensor, Tensor]:
    """The result, and which of its rows no rounding of float32 can change."""
    q, k, v = data[:3]
    repeats = q.shape[1] // k.shape[1]
    (qi, qs), (ki, ks), (vi, vs) = (symmetric(x, bits, per_head) for x in (q, k, v))
    ki, vi = (x.repeat_interleave(repeats, 1) for x in (ki, vi))
    if per_head:
        ks, vs = (x.repeat_interleave(repeats, 0) for x in (ks, vs))
    scores = (qi @ ki.transpose(-1, -2)) * (qs * ks * scale)
    p = probabilities(scores, data[3] if len(data) > 3 else None, causal)
    rounded, edge = rounded_probabilities(p, softmax, softmax_bits)
    return (rounded @ vi) * vs, edge.amin(-1) > 1e-3


MASKS = {
    "none": lambda n, m: None,
    "bool": lambda n, m: seeded(2, 1, n, m, seed=5) > 0,
    "float": lambda n, m: torch.where(seeded(1, 1, n, m, seed=6) > 0.3, -math.inf, seeded(1, 1, n, m, seed=7)),
    "causal": lambda n, m: None,
    "causal and bool": lambda n, m: seeded(n, m, seed=8) > -1,
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("heads", [(3, 3), (6, 2)])
@pytest.mark.parametrize(("softmax", "bits"), [("uniform", 8), ("log2", 4), ("log-sqrt2", 4), ("log-sqrt2", 5)])
def test_results_equal_the_formulas(mask: str, heads: tuple[int, int], softmax: str, bits: int) -> None:
    n, m = (13, 13) if "causal" in mask else (7, 19)
    data = (seeded(2, heads[0], n, 16), seeded(2, heads[1], m, 16, seed=1), seeded(2, heads[1], m, 11, seed=2))
    made = MASKS[mask](n, m)
    data = data if made is None else (*data, made)
    causal = "causal" in mask
    result = quantized(attention(data, causal=causal), f"softmax={softmax},softmax_bits={bits}", data)
    assert [op.name for op in result.main.ops].count("attention") == 0
    (found,) = interpret(result, data)
    expected, sure = transcription(data, 0.3, causal, 8, softmax, bits, per_head=False)
    assert float(sure.double().mean()) > 0.5
    torch.testing.assert_close(found.double()[sure], expected[sure], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [8, 5])
def test_scales_of_heads(bits: int) -> None:
    sizes = torch.tensor([1.0, 30.0, 0.1, 4.0]).reshape(1, 4, 1, 1)
    data = (seeded(2, 4, 9, 8) * sizes, seeded(2, 2, 9, 8, seed=1), seeded(2, 2, 9, 8, seed=2) * sizes[:, :2])
    module = attention(data)
    result = quantized(module, f"per_head=true,bits={bits}", data)
    (found,) = interpret(result, data)
    expected, sure = transcription(data, 0.3, False, bits, "uniform", 8, per_head=True)
    torch.testing.assert_close(found.double()[sure], expected[sure], rtol=1e-5, atol=1e-6)
    exact = interpret(module, data)[0]
    whole = interpret(quantized(module, f"bits={bits}", data), data)[0]
    assert distance(found[:, 2], exact[:, 2]) < distance(whole[:, 2], exact[:, 2])


def test_few_bits_keep_peaked_attention_better_as_codes() -> None:
    # A few keys take most of the weight, and hundreds share the rest: uniform steps of a fifteenth lose these.
    data = (seeded(1, 4, 64, 32, scale=2.0), seeded(1, 4, 197, 32, seed=1), seeded(1, 4, 197, 32, seed=2))
    module = attention(data, scale=32**-0.5)
    exact = interpret(module, data)[0]
    error = {
        softmax: distance(interpret(quantized(module, f"softmax={softmax},softmax_bits=4", data), data)[0], exact)
        for softmax in ("uniform", "log2", "log-sqrt2")
    }
    assert error["log-sqrt2"] < error["log2"] < error["uniform"]
    assert error["log-sqrt2"] < error["uniform"] / 2


@pytest.mark.parametrize(("base", "bits"), [("log2", 2), ("log2", 3), ("log2", 4), ("log-sqrt2", 2),
                                            ("log-sqrt2", 4), ("log-sqrt2", 5)])  # fmt: skip
def test_planes_stand_for_the_codes(base: str, bits: int) -> None:
    codes = LogCodes(base, bits)  # type: ignore[arg-type]
    build = Builder()
    x = build.input("codes", TensorType(DType.U8, (codes.zero_code + 1,)))
    planes = codes.planes(build, x)
    build.output(*[value for value, _ in planes])
    every = torch.arange(codes.zero_code + 1, dtype=torch.uint8)
    found = interpret(build.module, [every])
    assert all(plane.dtype == torch.uint8 for plane in found)
    total = sum(plane.double() * factor for plane, (_, factor) in zip(found, planes, strict=True))
    expected = 2.0 ** (-every.double() / codes.per_octave)
    expected[-1] = 0
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("softmax", ["uniform", "log2", "log-sqrt2"])
def test_compiled_code_gives_the_same(softmax: str) -> None:
    data = (seeded(1, 4, 21, 16), seeded(1, 2, 21, 16, seed=1), seeded(1, 2, 21, 16, seed=2), seeded(21, 21) > 0)
    result = quantized(attention(data), f"softmax={softmax}", data)
    (found,) = Compiled(result)(*data)
    (expected,) = interpret(result, data)
    # The exponentials differ in the last bits, so that a probability may fall on the other side of a half.
    assert float((found - expected).abs().max()) <= (0.03 if softmax == "uniform" else 0.5)
    assert float((found - expected).abs().gt(1e-5).double().mean()) < 0.02


@pytest.mark.parametrize("kind", ["zeros", "huge", "tiny"])
@pytest.mark.parametrize("softmax", ["uniform", "log2", "log-sqrt2"])
def test_extremes(kind: str, softmax: str) -> None:
    factor = {"zeros": 0.0, "huge": 1e15, "tiny": 1e-38}[kind]
    data = tuple(seeded(1, 2, 5, 8, seed=n) * factor for n in range(3))
    (found,) = interpret(quantized(attention(data), f"softmax={softmax}", data), data)
    assert found.isfinite().all()
    # All probabilities are 1/5 when the scores are zero; codes are off by up to the root of their base.
    if kind == "zeros":
        assert not found.any()
    else:
        assert float(found.abs().max()) <= float(data[2].abs().max()) * 1.5


def test_a_row_without_keys_is_zero() -> None:
    mask = torch.ones(5, 6, dtype=torch.bool)
    mask[2] = False
    data = (seeded(1, 2, 5, 8), seeded(1, 2, 6, 8, seed=1), seeded(1, 2, 6, 8, seed=2), mask)
    for given in (mask, torch.where(mask, 0.0, -math.inf)):
        batch = (*data[:3], given)
        for softmax in ("uniform", "log2", "log-sqrt2"):
            (found,) = interpret(quantized(attention(batch), f"softmax={softmax}", batch), batch)
            assert not found[:, :, 2].any()
            assert found[:, :, 1].any()


def test_a_constant_mask_without_infinities_hides_nothing() -> None:
    data = (seeded(1, 2, 5, 8), seeded(1, 2, 6, 8, seed=1), seeded(1, 2, 6, 8, seed=2), seeded(2, 5, 6, seed=3))
    result = quantized(attention(data, constant_mask=True), "", data[:3])
    assert "where" not in [op.name for op in result.main.ops]
    expected, sure = transcription(data, 0.3, False, 8, "uniform", 8, per_head=False)
    torch.testing.assert_close(interpret(result, data[:3])[0].double()[sure], expected[sure], rtol=1e-5, atol=1e-6)


def test_symbolic_sizes_stay_symbolic() -> None:
    batch, tokens = symbol("batch"), symbol("tokens")
    build = Builder()
    q = build.input("q", TensorType(DType.F32, (batch, 4, tokens, 8)))
    k, v = (build.input(name, TensorType(DType.F32, (batch, 2, tokens, 8))) for name in "kv")
    build.output(build(ops.Attention(q, k, v, scale=0.3, causal=True)))
    data = (seeded(2, 4, 7, 8), seeded(2, 2, 7, 8, seed=1), seeded(2, 2, 7, 8, seed=2))
    result = quantized(build.module, "", data)
    other = (seeded(1, 4, 12, 8), seeded(1, 2, 12, 8, seed=1), seeded(1, 2, 12, 8, seed=2))
    assert distance(interpret(result, other)[0], interpret(build.module, other)[0]) < 0.06


def test_facts_and_refusals() -> None:
    data = (seeded(1, 2, 5, 8), seeded(1, 2, 6, 8, seed=1), seeded(1, 2, 6, 8, seed=2))
    module = attention(data)
    row = trimtab.optimize(module, "quantize-attention{softmax=log2}", calibration=[data]).report.rows[-1]
    (facts,) = row.layers
    assert facts["scheme"] == "A8, log2 P4"
    assert facts["v"] == pytest.approx(float(data[2].abs().max()), rel=1e-5)
    assert facts["clipped"] == 0
    result = quantized(module, "softmax=log2", data)
    exact = interpret(module, data)[0].double()
    noise = float((interpret(result, data)[0].double() - exact).square().sum())
    assert facts["sqnr_db"] == pytest.approx(10 * math.log10(float(exact.square().sum()) / noise), abs=1e-3)
    for options, said in [("bits=1", "from 2 to 8 bits"), ("softmax=log2,softmax_bits=5", "from 2 to 4"),
                          ("softmax_bits=9", "from 2 to 8")]:  # fmt: skip
        with pytest.raises(TrimtabError, match=said):
            quantized(module, options, data)
    with pytest.raises(TrimtabError, match="no data"):
        trimtab.optimize(module, "quantize-attention")


def test_half_precision_stays_with_a_reason() -> None:
    data = tuple(seeded(1, 2, 5, 8, seed=n).half() for n in range(3))
    result = trimtab.optimize(attention(data), "quantize-attention", calibration=[data])
    (row,) = result.report.rows
    assert not row.changed
    assert "f16, not f32" in " ".join(row.rules[0]["rejected"])
