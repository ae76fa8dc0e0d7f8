"""The pass smooth: scales of channels move from activations into weights and change nothing before rounding."""

from __future__ import annotations

import pytest
import torch
from calibrated_models import Decoder, PostNorm, language_model, moved, token_ids, vision_model
from pass_harness import read
from tiny_vit import images
from torch import Tensor

from trimtab.errors import CalibrationError, UsageError
from trimtab.ir import Module, interpret, ops
from trimtab.passes import PassManager, load_pass
from trimtab.passes.base import Context
from trimtab.passes.report import PassRow

TWO_READERS = """
symbols batch=1..8
weight @gamma: f64[6]
weight @beta: f64[6]
weight @w: f64[5, 6]
weight @v: f64[3, 6]
weight @b: f64[3]
graph main(%x: f64[batch, 7, 6]) {
  %n = layer_norm(%x, @gamma, @beta) : f64[batch, 7, 6]
  %y = linear(%n, @w) : f64[batch, 7, 5]
  %z = linear(%n, @v, @b) : f64[batch, 7, 3]
  return y=%y, z=%z
}"""
RESIDUAL_READER = """
symbols batch=1..8
weight @gamma: f64[6]
weight @w: f64[6, 6]
graph main(%x: f64[batch, 7, 6]) {
  %n = layer_norm(%x, @gamma) : f64[batch, 7, 6]
  %y = linear(%n, @w) : f64[batch, 7, 6]
  %z = add(%n, %y) : f64[batch, 7, 6]
  return z=%z
}"""
SHARED_WEIGHT = """
symbols batch=1..8
weight @w: f64[6, 6]
weight @u: f64[6, 6]
graph main(%x: f64[batch, 7, 6]) {
  %n = layer_norm(%x) : f64[batch, 7, 6]
  %y = linear(%n, @w) : f64[batch, 7, 6]
  %m = layer_norm(%y) : f64[batch, 7, 6]
  %z = linear(%m, @w) : f64[batch, 7, 6]
  %o = rms_norm(%z) : f64[batch, 7, 6]
  %p = linear(%o, @u) : f64[batch, 7, 6]
  return p=%p
}"""
GROUPED_QUERIES = """
symbols batch=1..8
weight @q: f64[12, 6]
weight @k: f64[6, 6]
weight @v: f64[6, 6]
weight @c: f64[6]
weight @o: f64[5, 12]
graph main(%x: f64[batch, 7, 6]) {
  %q0 = linear(%x, @q) : f64[batch, 7, 12]
  %q1 = reshape(%q0) {shape=[batch, 7, 4, 3]} : f64[batch, 7, 4, 3]
  %q = permute(%q1) {dims=[0, 2, 1, 3]} : f64[batch, 4, 7, 3]
  %k0 = linear(%x, @k) : f64[batch, 7, 6]
  %k1 = reshape(%k0) {shape=[batch, 7, 2, 3]} : f64[batch, 7, 2, 3]
  %k = permute(%k1) {dims=[0, 2, 1, 3]} : f64[batch, 2, 7, 3]
  %v0 = linear(%x, @v, @c) : f64[batch, 7, 6]
  %v1 = reshape(%v0) {shape=[batch, 7, 2, 3]} : f64[batch, 7, 2, 3]
  %v = permute(%v1) {dims=[0, 2, 1, 3]} : f64[batch, 2, 7, 3]
  %a = attention(%q, %k, %v) {scale=0.5} : f64[batch, 4, 7, 3]
  %b = permute(%a) {dims=[0, 2, 1, 3]} : f64[batch, 7, 4, 3]
  %d = reshape(%b) {shape=[batch, 7, 12]} : f64[batch, 7, 12]
  %y = linear(%d, @o) : f64[batch, 7, 5]
  return y=%y
}"""
SLICES = """
weight @w: f64[4, 4]
weight @v: f64[2, 2]
graph main(%x: f64[3, 6]) {
  %n = layer_norm(%x) : f64[3, 6]
  %a, %b = split(%n) {dim=1, sizes=[4, 2]} : f64[3, 4], f64[3, 2]
  %y = linear(%a, @w) : f64[3, 4]
  %z = linear(%b, @v) : f64[3, 2]
  return y=%y, z=%z
}"""
SQUARE = """
weight @w: f64[4, 4]
weight @v: f64[2, 4]
graph main(%x: f64[3, 4]) {
  %a = linear(%x, @w) : f64[3, 4]
  %b = mul(%a, %a) : f64[3, 4]
  %y = linear(%b, @v) : f64[3, 2]
  return y=%y
}"""


def smoothed(module: Module, *batches: tuple[Tensor, ...], passes: str = "smooth") -> tuple[Module, PassRow]:
    result, report = PassManager(passes).run(module, Context(batches))
    return result, report.rows[-1]


def random_batches(count: int = 2, size: int = 3) -> list[tuple[Tensor, ...]]:
    return [(torch.randn(size, 7, 6, dtype=torch.float64),) for _ in range(count)]


@pytest.mark.parametrize("alpha", ["0.5", "0.85", "0", "1", "auto"])
@pytest.mark.parametrize("before", ["cleanup,raise", "cleanup,fuse"])
@pytest.mark.parametrize("kind", [Decoder, PostNorm])
def test_language_models_stay_the_same(kind: type, before: str, alpha: str) -> None:
    module, _ = PassManager(before).run(language_model(kind, double=True))
    result, row = smoothed(module, (token_ids(3, 9, 1),), (token_ids(2, 12, 2),), passes=f"smooth{{alpha={alpha}}}")
    assert row.changed
    assert moved(module, result, token_ids(5, 17, 9)) < 1e-12


@pytest.mark.parametrize("before", ["cleanup,raise", "cleanup,fuse"])
def test_vision_models_stay_the_same(before: str) -> None:
    module, _ = PassManager(before).run(vision_model(double=True))
    result, row = smoothed(module, (images(3, seed=1).double(),))
    assert {rule["rule"]: rule["applied"] for rule in row.rules} == {"values": 3, "linear": 0, "norms": 7}
    assert moved(module, result, images(5, seed=9).double()) < 1e-12


def test_what_moves_through_a_decoder() -> None:
    """Four norms, the values of attention, a rectifier and the factor of a gate."""
    module, _ = PassManager("cleanup,fuse").run(language_model(Decoder))
    _, row = smoothed(module, (token_ids(3, 9),))
    assert {rule["rule"]: rule["applied"] for rule in row.rules} == {"values": 1, "linear": 2, "norms": 4}
    _, row = smoothed(module, (token_ids(3, 9),), passes="smooth{attention=false, linear=false}")
    assert {rule["rule"]: rule["applied"] for rule in row.rules} == {"norms": 4}


def test_the_scale_is_that_of_the_paper() -> None:
    module = read(TWO_READERS, **{id: torch.randn(shape).double() for id, shape in
                                 {"gamma": 6, "beta": 6, "w": (5, 6), "v": (3, 6), "b": 3}.items()})  # fmt: skip
    batches = random_batches()
    result, _ = smoothed(module, *batches, passes="smooth{alpha=0.7}")
    normed = torch.cat([norm_of(module, batch[0]).flatten(0, 1) for batch in batches])
    old_w, old_v = (module.weights[id].tensor() for id in ("w", "v"))
    expected = normed.abs().amax(0) ** 0.7 / torch.cat([old_w, old_v]).abs().amax(0) ** 0.3
    (norm,) = [op for op in result.main.ops if isinstance(op, ops.LayerNorm)]
    assert norm.weight is not None
    assert norm.bias is not None
    torch.testing.assert_close(result.weights[norm.weight.weight].tensor() * expected, module.weights["gamma"].tensor())
    torch.testing.assert_close(result.weights[norm.bias.weight].tensor() * expected, module.weights["beta"].tensor())
    linear = [op for op in result.main.ops if isinstance(op, ops.Linear)]
    for op, old in zip(linear, (old_w, old_v), strict=True):
        torch.testing.assert_close(result.weights[op.weight.weight].tensor(), old * expected)


def norm_of(module: Module, x: Tensor) -> Tensor:
    gamma, beta = (module.weights[id].tensor() for id in ("gamma", "beta"))
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gamma + beta


def test_a_residual_that_reads_the_norm_forbids_it() -> None:
    module = doubled(RESIDUAL_READER, gamma=(6,), w=(6, 6))
    result, row = smoothed(module, *random_batches())
    assert not row.changed
    assert result == module
    norms = next(rule for rule in row.rules if rule["rule"] == "norms")
    assert norms["rejected"] == {"it is also read by add": 1}
    assert "layer_norm" in norms["near_misses"][0]["at"]


def test_shared_weights_stay_shared() -> None:
    module = doubled(SHARED_WEIGHT, w=(6, 6), u=(6, 6))
    batches = random_batches()
    result, row = smoothed(module, *batches)
    norms = next(rule for rule in row.rules if rule["rule"] == "norms")
    assert norms["rejected"] == {"the weight @w is shared by 2 readers": 2}
    assert norms["applied"] == 1
    assert len({op.weight.weight for op in result.main.ops if isinstance(op, ops.Linear)}) == 2
    assert moved(module, result, *random_batches(1, 5)[0]) < 1e-12


@pytest.mark.parametrize(
    ("text", "shapes", "applied"),
    [
        (GROUPED_QUERIES, {"q": (12, 6), "k": (6, 6), "v": (6, 6), "c": (6,), "o": (5, 12)}, "values"),
        (SLICES, {"w": (4, 4), "v": (2, 2)}, "norms"),
    ],
)
def test_channels_that_are_moved_and_shared_by_heads(
    text: str, shapes: dict[str, tuple[int, ...]], applied: str
) -> None:
    module = doubled(text, **shapes)
    make = (lambda: torch.randn(3, 6)) if text == SLICES else (lambda: torch.randn(3, 7, 6))
    result, row = smoothed(module, (make().double(),))
    assert [rule["rule"] for rule in row.rules if rule["applied"]] == [applied]
    assert moved(module, result, make().double()) < 1e-12


def test_a_square_lets_no_scale_through() -> None:
    module = doubled(SQUARE, w=(4, 4), v=(2, 4))
    _, row = smoothed(module, (torch.randn(3, 4).double(),))
    assert not row.changed


def test_channels_of_zeros_are_left_as_they_are() -> None:
    module = doubled(TWO_READERS, gamma=(6,), beta=(6,), w=(5, 6), v=(3, 6), b=(3,))
    gamma, beta, w, v = (module.weights[id].tensor() for id in ("gamma", "beta", "w", "v"))
    gamma[2] = beta[2] = 0.0
    w[:, 4] = v[:, 4] = 0.0
    result, row = smoothed(module, *random_batches())
    assert row.changed
    (norm,) = [op for op in result.main.ops if isinstance(op, ops.LayerNorm)]
    assert norm.weight is not None
    gain = result.weights[norm.weight.weight].tensor()
    torch.testing.assert_close(gain[[2, 4]], gamma[[2, 4]])
    assert all(bool(weight.tensor().isfinite().all()) for weight in result.weights.values())
    assert moved(module, result, *random_batches(1, 4)[0]) < 1e-12


@pytest.mark.parametrize("activations", ["tensor", "token"])
@pytest.mark.parametrize("alpha", ["0.5", "auto"])
def test_outliers_cost_less_in_eight_bits(alpha: str, activations: str) -> None:
    """A channel a thousand times the others: the layers' error on fresh inputs, in a quantizer of the test's own."""
    module = doubled(TWO_READERS, gamma=(6,), beta=(6,), w=(5, 6), v=(3, 6), b=(3,))
    module.weights["gamma"].tensor()[1] = 1000.0
    module.weights["beta"].tensor()[1] = 500.0
    result, _ = smoothed(module, *random_batches(), passes=f"smooth{{alpha={alpha}, activations={activations}}}")
    fresh = random_batches(1, 8)[0]
    assert quantized_error(result, fresh, activations) < 0.5 * quantized_error(module, fresh, activations)


def test_auto_is_no_worse_than_any_alpha_on_the_calibration_data() -> None:
    module = doubled(TWO_READERS, gamma=(6,), beta=(6,), w=(5, 6), v=(3, 6), b=(3,))
    module.weights["gamma"].tensor()[1] = 30.0
    batch = random_batches(1, 8)[0]
    errors = {
        alpha: quantized_error(smoothed(module, batch, passes=f"smooth{{alpha={alpha}}}")[0], batch, "token")
        for alpha in ("0.1", "0.25", "0.5", "0.75", "0.9")
    }
    best, row = smoothed(module, batch, passes="smooth{alpha=auto, activations=token}")
    assert quantized_error(best, batch, "token") <= min(errors.values()) * (1 + 1e-9)
    assert row.notes[0].startswith("alpha from")


def quantized_error(module: Module, batch: tuple[Tensor, ...], activations: str) -> float:
    """The summed error of all linear layers whose inputs and weights go through 8 bits, symmetric throughout or, for a
    tensor's one scale, unsigned with a zero point."""
    total = 0.0
    inputs: dict[object, Tensor] = {}

    def observe(op: object, results: object) -> None:
        nonlocal total
        if isinstance(op, ops.LayerNorm):
            inputs[op.result] = results[0]  # type: ignore[index]
        if isinstance(op, ops.Linear) and op.x in inputs:
            x, w = inputs[op.x], module.weights[op.weight.weight].tensor()
            rows = w.abs().amax(1, keepdim=True) / 127
            error = quantized(x, activations) @ (torch.round(w / rows) * rows).T - x @ w.T
            total += float(error.square().sum())

    interpret(module, batch, observer=observe)
    return total


def quantized(x: Tensor, activations: str) -> Tensor:
    if activations == "token":
        step = x.abs().amax(-1, keepdim=True) / 127
        return torch.round(x / step) * step
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = (high - low) / 255
    zero = round(-low / step)
    return (torch.clamp(torch.round(x / step) + zero, 0, 255) - zero) * step


def test_weights_are_float32_where_they_were() -> None:
    """In float32 the module stays within its contract, which the manager checks, and weights are rounded once."""
    module, _ = PassManager("cleanup,fuse").run(language_model(Decoder))
    result, _ = smoothed(module, (token_ids(3, 9, 1),))
    assert moved(module, result, token_ids(3, 9, 5)) < 1e-6
    kinds = {weight.type.dtype for weight in result.weights.values()}
    assert kinds == {weight.type.dtype for weight in module.weights.values()}


def test_applications_can_be_limited() -> None:
    """Bisection allows the first n rewrites alone; what they leave is still the same function."""
    from trimtab.ir.rewrite import Rewrites

    module, _ = PassManager("cleanup,fuse").run(vision_model(double=True))
    copy = module.copy()
    ctx = Context(((images(2).double(),),), rewrites=Rewrites(limit=4))
    assert load_pass("smooth")().run(copy, ctx)
    assert ctx.rewrites.applied == 4
    assert moved(module, copy, images(3, seed=4).double()) < 1e-12


def test_refuses_in_words() -> None:
    module = doubled(TWO_READERS, gamma=(6,), beta=(6,), w=(5, 6), v=(3, 6), b=(3,))
    with pytest.raises(UsageError, match="alpha is from 0 to 1"):
        load_pass("smooth")(alpha=1.5)
    with pytest.raises(Exception, match="smooth needs calibration data"):
        smoothed(module)
    module.weights["gamma"].tensor()[3] = float("nan")
    with pytest.raises(CalibrationError, match="calibration batch 0"):
        load_pass("smooth")().run(module, Context(tuple(random_batches())))


def doubled(text: str, **shapes: tuple[int, ...]) -> Module:
    """A module in float64 with random weights."""
    return read(text, **{id: torch.randn(shape).double() for id, shape in shapes.items()})
