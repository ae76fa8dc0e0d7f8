"""The pass reparameterize-scales: one range for all channels behind a norm, which changes nothing before rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calibrated_models import Decoder, PostNorm, language_model, moved, token_ids, vision_model
from pass_harness import read
from tiny_vit import images
from torch import Tensor

from trimtab.errors import UsageError
from trimtab.ir import Module, interpret, ops
from trimtab.passes import PassManager, load_pass
from trimtab.passes.base import Context
from trimtab.passes.norm_scales.clipping import clipped_ranges
from trimtab.passes.norm_scales.statistics import Statistics
from trimtab.passes.reparameterize_scales import one_range
from trimtab.passes.report import PassRow

MODULE = """
symbols batch=1..8
weight @gamma: f64[12]
weight @beta: f64[12]
weight @w: f64[5, 12]
weight @v: f64[3, 12]
weight @b: f64[3]
graph main(%x: f64[batch, 7, 12]) {
  %n = layer_norm(%x, @gamma, @beta) : f64[batch, 7, 12]
  %y = linear(%n, @w) : f64[batch, 7, 5]
  %z = linear(%n, @v, @b) : f64[batch, 7, 3]
  return y=%y, z=%z
}"""
BARE = """
symbols batch=1..8
weight @w: f64[5, 12]
graph main(%x: f64[batch, 7, 12]) {
  %n = NORM(%x) : f64[batch, 7, 12]
  %y = linear(%n, @w) : f64[batch, 7, 5]
  return y=%y
}"""


def module_with_uneven_channels() -> Module:
    gamma, beta = torch.rand(12) * 3 + 0.1, torch.randn(12)
    gamma[3], beta[3], beta[7] = 40.0, -20.0, 30.0
    weights = {"gamma": gamma, "beta": beta, "w": torch.randn(5, 12), "v": torch.randn(3, 12), "b": torch.randn(3)}
    return read(MODULE, **{id: data.double() for id, data in weights.items()})


def batches(count: int = 2, size: int = 8) -> list[tuple[Tensor, ...]]:
    return [(torch.randn(size, 7, 12, dtype=torch.float64),) for _ in range(count)]


def run(module: Module, data: Any, passes: str = "reparameterize-scales") -> tuple[Module, PassRow]:
    result, report = PassManager(passes).run(module, Context(tuple(data)))
    return result, report.rows[-1]


def normed(module: Module, batch: tuple[Tensor, ...]) -> Tensor:
    """What the norm gives, ``[rows, C]``."""
    seen: list[Tensor] = []

    def observe(op: object, results: Any) -> None:
        if isinstance(op, ops.LayerNorm | ops.RmsNorm):
            seen.append(results[0].flatten(0, -2))

    interpret(module, batch, observer=observe)
    return seen[0]


@pytest.mark.parametrize("options", ["", "{bits=4}", "{clip=false}"])
@pytest.mark.parametrize("before", ["cleanup,raise", "cleanup,fuse"])
def test_models_stay_the_same(before: str, options: str) -> None:
    module, _ = PassManager(before).run(language_model(Decoder, double=True))
    result, row = run(module, [(token_ids(3, 9, 1),), (token_ids(2, 12, 2),)], f"reparameterize-scales{options}")
    assert row.rules[0]["applied"] == 4
    assert moved(module, result, token_ids(5, 17, 9)) < 1e-12


def test_vision_models_stay_the_same() -> None:
    module, _ = PassManager("cleanup,fuse").run(vision_model(double=True))
    result, row = run(module, [(images(3, seed=1).double(),)])
    assert row.rules[0]["applied"] == 7
    assert moved(module, result, images(5, seed=9).double()) < 1e-12


def test_a_norm_that_the_residual_reads_is_left_alone() -> None:
    module, _ = PassManager("cleanup,fuse").run(language_model(PostNorm, double=True))
    result, row = run(module, [(token_ids(3, 9, 1),)])
    assert not row.changed
    assert result == module
    assert row.rules[0]["rejected"]["it is also read by add"] == 2


@pytest.mark.parametrize("bits", [4, 8])
def test_all_channels_have_one_range(bits: int) -> None:
    module, data = module_with_uneven_channels(), batches()
    result, row = run(module, data, f"reparameterize-scales{{bits={bits}, clip=false}}")
    assert moved(module, result, *batches(1, 5)[0]) < 1e-12
    rows = torch.cat([normed(result, batch) for batch in data])
    low, high = rows.amin(0), rows.amax(0)
    torch.testing.assert_close(low, low[:1].expand(12), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(high, high[:1].expand(12), rtol=1e-9, atol=1e-9)
    # Zero is one of the numbers of the quantizer.
    step = float(high[0] - low[0]) / (2**bits - 1)
    assert round(-float(low[0]) / step) == pytest.approx(-float(low[0]) / step)
    assert 0 <= round(-float(low[0]) / step) < 2**bits
    old = torch.cat([normed(module, batch) for batch in data])
    spread = old.amax(0) - old.amin(0)
    assert row.notes[0].startswith(f"the steps of channels were up to {float(spread.max() / spread.min()):.3g} times")


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_a_norm_without_weight_gets_one(norm: str) -> None:
    module = read(BARE.replace("NORM", norm), w=torch.randn(5, 12).double())
    scales = torch.rand(12, dtype=torch.float64) * 5 + 0.1
    data = [(batch[0] * scales,) for batch in batches()]
    result, row = run(module, data, "reparameterize-scales{clip=false}")
    assert row.changed
    assert moved(module, result, batches(1, 5)[0][0] * scales) < 1e-12
    largest = torch.cat([normed(result, batch) for batch in data]).abs().amax(0)
    if norm == "rms_norm":
        torch.testing.assert_close(largest, largest[:1].expand(12))


def test_a_quantizer_for_the_whole_tensor_loses_less() -> None:
    """The layers' error on fresh inputs with 6 bits, one range a tensor, and weights that are not rounded."""
    module, data = module_with_uneven_channels(), batches(4)
    result, _ = run(module, data, "reparameterize-scales{bits=6}")
    fresh = batches(1)[0]
    assert tensor_error(result, fresh, 6) < 0.1 * tensor_error(module, fresh, 6)


def tensor_error(module: Module, batch: tuple[Tensor, ...], bits: int) -> float:
    x, total = normed(module, batch), 0.0
    low, high = x.min(), x.max()
    step = (high - low) / (2**bits - 1)
    rounded = torch.round((x - low) / step) * step + low
    for op in module.main.ops:
        if isinstance(op, ops.Linear):
            total += float(((rounded - x) @ module.weights[op.weight.weight].tensor().T).square().sum())
    return total


def test_constant_channels_and_zeros() -> None:
    module = module_with_uneven_channels()
    gamma, beta = module.weights["gamma"].tensor(), module.weights["beta"].tensor()
    gamma[1], gamma[2], beta[2], gamma[4] = 0.0, 0.0, 0.0, 1e-30
    result, row = run(module, batches())
    assert row.changed
    assert all(bool(weight.tensor().isfinite().all()) for weight in result.weights.values())
    assert moved(module, result, *batches(1, 5)[0]) < 1e-10
    assert float(normed(result, batches(1)[0]).abs().max()) < 1e4


def test_a_norm_of_nothing_but_zeros() -> None:
    module = module_with_uneven_channels()
    module.weights["gamma"].tensor().zero_()
    module.weights["beta"].tensor().zero_()
    result, _ = run(module, batches())
    assert moved(module, result, *batches(1, 5)[0]) < 1e-12


def test_one_range_is_that_of_the_paper() -> None:
    """Against the formulas of RepQ-ViT, written out: r = d / D and b = min / r - min of the whole."""
    low, high = -torch.rand(9).double() * 4 - 0.1, torch.rand(9).double() * 9 + 0.1
    steps, scale, shift = one_range(low, high, 8)
    d = (high - low) / 255
    z = -low / d
    whole_d, whole_z = d.mean(), z.mean().round()
    torch.testing.assert_close(steps, d)
    torch.testing.assert_close(scale, d / whole_d)
    torch.testing.assert_close(shift, low / (d / whole_d) + whole_z * whole_d)


def test_clipping_is_the_best_of_the_grid() -> None:
    rows = torch.randn(300, 4, dtype=torch.float64)
    rows[0, 1], rows[1, 2] = 12.0, -15.0
    found = Statistics(rows.amin(0), rows.amax(0), rows)
    low, high = clipped_ranges(found, 4)
    ratios = [1 - step / 20 for step in range(12)]
    for channel in range(4):
        x = rows[:, channel].tolist()
        mean = sum(x) / len(x)
        bounds = [(mean - a * (mean - min(x)), mean + b * (max(x) - mean)) for a in ratios for b in ratios]
        best = min(error(x, *pair) for pair in bounds)
        assert error(x, float(low[channel]), float(high[channel])) == pytest.approx(best, rel=1e-9)
    assert high[1] < 11.9
    assert low[2] > -14.9


def error(x: list[float], low: float, high: float) -> float:
    step = (high - low) / 15
    return sum((min(max(round((value - low) / step), 0), 15) * step + low - value) ** 2 for value in x)


def test_float32_modules_keep_their_contract() -> None:
    module, _ = PassManager("cleanup,fuse").run(vision_model())
    result, _ = run(module, [(images(3, seed=1),)])
    assert moved(module, result, images(3, seed=5)) < 1e-6


def test_refuses_in_words() -> None:
    with pytest.raises(UsageError, match="bits is from 2 to 8"):
        load_pass("reparameterize-scales")(bits=9)
    with pytest.raises(Exception, match="reparameterize-scales needs calibration data"):
        run(module_with_uneven_channels(), ())
