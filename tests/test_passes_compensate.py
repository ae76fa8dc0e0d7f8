"""The pass compensate: linear repairs of the blocks of a lossy module, fitted on calibration data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from calibrated_models import Decoder, PostNorm, language_model, token_ids, vision_model
from tiny_vit import images
from torch import Tensor, nn

import trimtab
from trimtab.errors import PassError, UsageError
from trimtab.ir import Module, Weight, interpret, ops
from trimtab.passes import PassManager
from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.contracts import Contract, Lossy
from trimtab.passes.normal_equations import NormalEquations
from trimtab.passes.registry import load_pass
from trimtab.passes.report import OptimizeReport
from trimtab.passes.residual_blocks import find_blocks


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Round the weights of linear layers but the last to a few bits, one scale a row."""

    name: ClassVar[str] = "round-weights"
    contract: ClassVar[Contract] = Lossy()
    bits: int = 4

    def run(self, module: Module, ctx: Context) -> Changed:
        levels = 2 ** (self.bits - 1) - 1
        for op in [op for op in module.walk() if isinstance(op, ops.Linear)][:-1]:
            old = module.weights[op.weight.weight]
            step = old.tensor().abs().amax(1, keepdim=True) / levels
            module.weights[old.id] = Weight.from_tensor(old.id, torch.round(old.tensor() / step) * step)
        return True


def vision_batches(*seeds: int) -> list[tuple[Tensor, ...]]:
    return [(images(8, seed=seed),) for seed in seeds]


def text_batches(*seeds: int) -> list[tuple[Tensor, ...]]:
    return [(token_ids(8, 16, seed),) for seed in seeds]


CASES = {
    "vision": (vision_model, vision_batches),
    "causal": (lambda: language_model(Decoder), text_batches),
    "post_norm": (lambda: language_model(PostNorm), text_batches),
}


def compensated(module: Module, passes: Sequence[Pass], batches: Any) -> tuple[Module, OptimizeReport]:
    result, report = PassManager(passes).run(module, Context(tuple(batches)))
    return result, report


def distance(module: Module, original: Module, batches: list[tuple[Tensor, ...]]) -> float:
    pairs = [(interpret(module, batch)[0], interpret(original, batch)[0]) for batch in batches]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)) ** 0.5


@pytest.mark.parametrize("weights", ["f32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_rounded_weights_are_repaired_on_fresh_inputs(name: str, weights: Any) -> None:
    make, batches = CASES[name]
    original = trimtab.optimize(make(), "cleanup,fuse").module
    data = batches(*range(6))
    rounded, _ = compensated(original, [RoundWeights()], data)
    repaired, report = compensated(original, [RoundWeights(), load_pass("compensate")(weights=weights)], data)
    fresh = batches(100, 101, 102)
    assert distance(repaired, original, fresh) < 0.9 * distance(rounded, original, fresh)
    assert "repaired" in report.rows[-1].notes[0]


def test_what_is_fitted_is_the_least_squares_solution_of_the_compensated_inputs() -> None:
    """The first repair against numpy's solver on rows that are all kept, and the second on what the first one gives."""
    original = trimtab.optimize(vision_model(), "cleanup,fuse").module
    data = vision_batches(*range(4))
    rounded, _ = compensated(original, [RoundWeights()], data)
    repaired, _ = compensated(original, [RoundWeights(), load_pass("compensate")(damping=1e-9)], data)
    found = [module_weights(repaired, number) for number in range(2)]
    for number in range(2):
        inputs, ends = captured(rounded, number, found[:number], data[:3])
        wanted = torch.cat([value(original, find_blocks(original)[number].end, batch) for batch in data[:3]])
        columns = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], 1)
        solution = torch.linalg.lstsq(columns, wanted.double() - ends).solution
        weight, bias = found[number]
        torch.testing.assert_close(weight.double(), solution[:-1].T, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(bias.double(), solution[-1], rtol=1e-3, atol=1e-4)


def module_weights(module: Module, number: int) -> tuple[Tensor, Tensor]:
    weights = module.weights
    return weights[f"compensate.{number}.weight"].tensor(), weights[f"compensate.{number}.bias"].tensor()


def value(module: Module, wanted: Any, batch: tuple[Tensor, ...]) -> Tensor:
    seen: list[Tensor] = []
    interpret(module, batch, observer=lambda op, results: seen.extend(results) if wanted.producer is op else None)
    return seen[0].flatten(0, -2)


def captured(
    module: Module, number: int, repairs: list[tuple[Tensor, Tensor]], batches: list[tuple[Tensor, ...]]
) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of a block, where the blocks before it are repaired by hand: their ends are replaced."""
    blocks = find_blocks(module)
    inputs, ends = [], []
    for batch in batches:
        changed: list[Tensor] = []

        def add(op: Any, results: Any, changed: list[Tensor] = changed) -> None:
            for block, (weight, bias) in zip(blocks, repairs, strict=False):
                if block.end.producer is op:
                    results[0].add_(nn.functional.linear(changed[-1], weight, bias))
            for block in blocks[: number + 1]:
                if block.start.producer is op:
                    changed.append(results[0].clone())
            if blocks[number].end.producer is op:
                ends.append(results[0].flatten(0, -2).double())

        interpret(module, batch, observer=add)
        inputs.append(changed[number].flatten(0, -2).double())
    return torch.cat(inputs), torch.cat(ends)


def test_a_repair_that_explains_nothing_is_left_out() -> None:
    """Few rows and many channels: what fits them by chance does not hold on others."""
    original = trimtab.optimize(vision_model(), "cleanup,fuse").module
    tiny = [(images(1, seed=seed),) for seed in range(2)]
    _, report = compensated(original, [RoundWeights(bits=8), load_pass("compensate")(damping=1e-12)], tiny)
    rejected = report.rows[-1].rules[0]["rejected"]
    assert rejected
    assert all("held-out" in reason for reason in rejected)


def test_refuses_without_a_lossy_pass() -> None:
    with pytest.raises(PassError, match="nothing to compensate"):
        compensated(vision_model(), [load_pass("compensate")()], vision_batches(0, 1))


def test_refuses_without_calibration() -> None:
    with pytest.raises(PassError, match="two calibration batches"):
        compensated(vision_model(), [RoundWeights(), load_pass("compensate")()], vision_batches(0))
    with pytest.raises(UsageError, match="damping"):
        load_pass("compensate")(damping=0.0)


def test_refuses_a_module_without_blocks() -> None:
    module = trimtab.trace(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)).eval(), (torch.randn(2, 4),))
    with pytest.raises(PassError, match="blocks of this model cannot be found"):
        compensated(module, [RoundWeights(), load_pass("compensate")()], [(torch.randn(2, 4),)] * 2)


def test_blocks_begin_and_end_with_the_residual() -> None:
    module = trimtab.optimize(vision_model(), "cleanup,raise").module
    blocks = find_blocks(module)
    assert len(blocks) == 3
    assert all(first.end is second.start for first, second in pairwise(blocks))
    assert isinstance(blocks[-1].end.producer, ops.Add)
    assert all(isinstance(user, ops.LayerNorm) for user in blocks[-1].end.users)
    # Behind `push-slices` the last block computes the class token alone.
    *_, whole, last = find_blocks(trimtab.optimize(vision_model(), "cleanup,fuse").module)
    assert whole.end.type.shape[1] == 26
    assert last.start.type.shape[1] == last.end.type.shape[1] == 1
    assert isinstance(last.start.producer, ops.Slice)
    assert last.start.producer.x is whole.end
    (post,) = find_blocks(trimtab.optimize(language_model(PostNorm), "cleanup,raise").module)
    assert isinstance(post.end.producer, ops.LayerNorm)


def test_normal_equations_agree_with_a_solver_that_keeps_all_rows() -> None:
    x = torch.randn(200, 7) * torch.tensor([1.0, 5, 0.1, 1, 1, 1, 1]) + 3
    y = torch.randn(200, 5)
    sums = NormalEquations(7, 5)
    for part in range(0, 200, 50):
        sums.add(x[part : part + 50], y[part : part + 50])
    weight, bias = sums.solve(1e-12)
    expected = torch.linalg.lstsq(torch.cat([x, torch.ones(200, 1)], 1).double(), y.double()).solution
    torch.testing.assert_close(torch.cat([weight, bias[None]]), expected, rtol=1e-6, atol=1e-8)
    rest = (x.double() @ weight + bias - y.double()).square().sum() / y.double().square().sum()
    assert sums.left_over(weight, bias) == pytest.approx(float(rest), rel=1e-9)


def test_constant_inputs_are_repaired_by_a_bias() -> None:
    sums = NormalEquations(3, 2)
    sums.add(torch.ones(5, 3), torch.tensor([[1.0, 2.0]]).expand(5, 2))
    weight, bias = sums.solve(1e-3)
    assert not weight.any()
    torch.testing.assert_close(bias, torch.tensor([1.0, 2.0], dtype=torch.float64))


def test_the_reference_is_the_module_before_the_first_lossy_pass() -> None:
    """Exact passes and further lossy ones do not move it, and the caller's context is left as it was."""
    seen: list[Module | None] = []

    @dataclass(frozen=True)
    class Look(Pass):
        name: ClassVar[str] = "look"
        contract: ClassVar[Contract] = Lossy()

        def run(self, module: Module, ctx: Context) -> Changed:
            seen.append(ctx.reference)
            return False

    original = trimtab.optimize(vision_model(), "cleanup,fuse").module
    ctx = Context(tuple(vision_batches(0, 1)))
    passes = [Look(), RoundWeights(), Look(), load_pass("dce")(), RoundWeights(bits=3), Look()]
    PassManager(passes, check="never").run(original, ctx)
    assert seen[0] is None
    assert seen[1] is seen[2]
    assert seen[1] == original
    assert ctx.reference is None
