"""sample-tokens on whole models, against a transcription of ATS that drops tokens for real, one input at a time."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_vit import Block, Head, TinyVit, images, in_double, tiny_vit, traced
from torch import Tensor, nn

import trimtab
from trimtab.errors import PassError, UsageError
from trimtab.ir import interpret, parse_module, print_module
from trimtab.ir.ops import Attention
from trimtab.passes.samples import count_macs, smallest_sizes

Plan = Mapping[int, tuple[int, int]]
"""For layers that sample: how many tokens are kept, and at how many points the distribution is looked up."""


def attend(block: Block, x: Tensor, kept: list[int] | None = None) -> Tensor:
    """The rows ``kept`` of x [1, N, C], all by default, after attention to all of x."""
    q, k, v = (part[0] for part in block.heads_of(x))
    weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)  # [H, N, N]
    rows = list(range(x.shape[1])) if kept is None else kept
    mixed = weights[:, rows] @ v
    return x[:, rows] + block.proj(mixed.transpose(0, 1).reshape(1, len(rows), -1))


def pick(block: Block, x: Tensor, special: int, unused: int, keep: int, points: int) -> list[int]:
    """The rows of x [1, N, C] that are sampled, with ``unused`` rows of padding or copies beside them."""
    q, k, v = (part[0] for part in block.heads_of(x))
    weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1).sum(0)
    attention = weights[0] if special else weights.sum(0)
    scores = (attention * v.transpose(0, 1).flatten(1).norm(dim=-1))[special:]
    if not len(scores):
        return list(range(special))
    found = [(0.0, -1)] * unused + sorted((float(s / scores.sum()), j) for j, s in enumerate(scores))
    total = np.cumsum([score for score, _ in found])
    share = (total - total[0]) / (total[-1] - total[0]) if len(found) > 1 else total
    first = min(value for value in share if value > 0)
    grid = [first + i / (points - 1) * (1 - first) if points > 1 else 1.0 for i in range(points)]
    places = {int(np.abs(y - share).argmin()) for y in grid}
    best = sorted(found[place][::-1] for place in sorted(places)[-keep:])
    return [*range(special), *(special + j for j, _ in best)]


def ats(model: TinyVit, image: Tensor, plan: Plan, counts: list[list[int]] | None = None) -> Tensor:
    return torch.cat([_ats_one(model, model.embed(one[None]), 0, plan, model.special, counts) for one in image])


def _ats_one(
    model: TinyVit | Sentences, x: Tensor, padding: int, plan: Plan, special: int, counts: list[list[int]] | None = None
) -> Tensor:
    rows = x.shape[1] + padding - special  # places of tokens, used or not
    different = []
    for number, block in enumerate(model.blocks):
        kept = None
        if number in plan:
            kept = pick(block, x, special, rows - (x.shape[1] - special), *plan[number])
            rows = plan[number][0]
            different.append(len(kept) - special)
        x = block.mlp(attend(block, x, kept))
    if counts is not None:
        counts.append(different)
    return model.read(x)


def peaked(model: nn.Module) -> None:
    """Make attention differ so much between tokens that some are picked several times."""
    with torch.no_grad():
        for block in model.blocks:
            block.qkv.weight.mul_(4)


def model_of(head: Head, depth: int = 3) -> TinyVit:
    model = tiny_vit(head, depth=depth)
    peaked(model)
    return model


@functools.cache
def module_of(head: Head, depth: int = 3) -> trimtab.Module:
    """``model_of(head, depth)`` traced; only read by the tests."""
    return traced(model_of(head, depth))


def reduced(module: trimtab.Module, options: str) -> trimtab.Module:
    return trimtab.optimize(module, f"sample-tokens{{{options}}}", check="never").module


@pytest.mark.parametrize(
    ("head", "options", "plan"),
    [
        ("class", "keep=0.5", {0: (13, 13)}),
        ("class", "k=[18, 11, 6]", {0: (18, 18), 1: (11, 11), 2: (6, 6)}),
        ("class", "k=[9, 1],layers=[1, 2],points=20", {1: (9, 20), 2: (1, 20)}),
        ("distilled", "k=[20, 20, 3]", {0: (20, 20), 2: (3, 3)}),
        ("mean", "k=[17, 12, 12]", {0: (17, 17), 1: (12, 12)}),
        ("mean", "keep=0.5,layers=[2],points=25", {2: (13, 25)}),
    ],
)
def test_agrees_with_the_formulas(head: Head, options: str, plan: Plan) -> None:
    model, module = model_of(head), reduced(module_of(head), options)
    for batch in (1, 8):
        image = images(batch, seed=batch)
        (got,) = interpret(module, [image], precision=torch.float64)
        counts: list[list[int]] = []
        expected = in_double(model, lambda net, x, counts=counts: ats(net, x, plan, counts), image)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    if "points" not in options:
        assert np.any(np.array(counts) < [keep for keep, _ in plan.values()])  # rows that are copies


def test_queries_are_fewer_than_keys_and_shapes_stay_symbolic() -> None:
    module = reduced(module_of("class", 4), "keep=0.5")
    attentions = [op for op in module.main.ops if isinstance(op, Attention)]
    counts = [(op.q.type.shape[2], op.k.type.shape[2]) for op in attentions]
    # The first quarter of the layers does not sample.
    assert counts == [(26, 26), (14, 26), (14, 14), (14, 14)]
    assert all(str(op.q.type.shape[0]) == "batch" for op in attentions)
    assert [op.mask is not None for op in attentions] == [False, False, True, True]
    assert parse_module(print_module(module), lambda id, _: module.weights[id].source) == module


def test_the_compiled_model_agrees(tmp_path: Path) -> None:
    module = reduced(module_of("class", 2), "k=[12, 5],points=16")
    made = trimtab.compile(module, target="native")
    session = trimtab.load(str(made.save(tmp_path / "model.trim", check=False)))
    for batch in (1, 8):
        image = images(batch, seed=batch)
        got = np.asarray(session(image.numpy()))
        np.testing.assert_allclose(got, interpret(module, [image])[0].numpy(), rtol=1e-4, atol=1e-5)


def test_keeping_all_is_the_same_module() -> None:
    module = module_of("class")
    for options in ("keep=1.0", "k=[25, 25, 25]"):
        result = trimtab.optimize(module, f"sample-tokens{{{options}}}")
        assert result.module == module
        assert print_module(result.module) == print_module(module)
        assert not result.report.rows[0].changed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("keep=0.0", "0 < keep <= 1"),
        ("k=[5, 0, 0]", "keeps 1 or more"),
        ("k=[26, 5, 5]", "from 1 to 25"),
        ("k=[5, 5]", "one number for each layer"),
        ("k=[5],layers=[7]", "of attention layers that were found"),
        ("k=[5, 5, 5],calibrated=true", "each of them says"),
        ("budget=0.5,max_drop=0.1", "give one of the two"),
        ("calibrated=true", "counted on calibration data"),
        ("budget=0.01", "the budget cannot be met"),
    ],
)
def test_wrong_options_are_refused(options: str, message: str) -> None:
    with pytest.raises((PassError, UsageError), match=message):
        reduced(module_of("class"), options)


@pytest.mark.parametrize("unmerge", ["", ",unmerge=true"])
def test_a_dense_output_is_refused(unmerge: str) -> None:
    with pytest.raises(PassError, match="a row for each token"):
        reduced(module_of("dense"), f"keep=0.5{unmerge}")


def test_a_budget_is_met_closely() -> None:
    budget = 0.65
    module = module_of("class", 4)
    smaller = reduced(module, f"budget={budget}")
    taken, full = (count_macs(m, smallest_sizes(m.main)) for m in (smaller, module))
    assert budget - 0.06 < taken / full <= budget


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_numbers_are_calibrated(keep: float) -> None:
    model = model_of("class", 4)
    batches = [(images(7, seed=1),), (images(6, seed=2),)]
    result = trimtab.optimize(
        module_of("class", 4), f"sample-tokens{{keep={keep},calibrated=true}}", calibration=batches
    )
    counts: list[list[int]] = []
    for (image,) in batches:
        in_double(model, lambda net, x: ats(net, x, dict.fromkeys((1, 2, 3), (25, 25)), counts), image)
    assert len(counts) == 13
    # 12 of the 13 samples, the least share of at least nine tenths, have no more than this.
    wanted = [min(sorted(column)[11], 25 if keep == 1 else 13) for column in zip(*counts, strict=True)]
    assert f"k 1: {wanted[0]}, 2: {wanted[1]}, 3: {wanted[2]}" in result.report.rows[0].notes
    kept = [min(wanted[: number + 1]) for number in range(3)]
    plan = {n + 1: (kept[n], 25) for n in range(3) if n == 0 or kept[n] < kept[n - 1]}
    image = images(5, seed=9)
    (got,) = interpret(result.module, [image], precision=torch.float64)
    expected = in_double(model, lambda net, x: ats(net, x, plan), image)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_gradients_reach_all_weights_and_training_helps() -> None:
    module = reduced(module_of("class"), "k=[16, 10, 6]")
    network = trimtab.to_torch(module)
    image, labels = images(8), torch.arange(8) % 5
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(10):
        loss = F.cross_entropy(network(image), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in network.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    trimtab.update(module, network)
    torch.testing.assert_close(interpret(module, [image])[0], network(image).detach(), rtol=1e-5, atol=1e-5)


class Sentences(nn.Module):
    """A text encoder with a padding mask; read from the first token, or the mean over all that are not padding."""

    def __init__(self, mean: bool, additive: bool) -> None:
        super().__init__()
        self.words, self.blocks = nn.Embedding(50, 32), nn.ModuleList(Block(32, 2) for _ in range(3))
        self.mean, self.additive = mean, additive

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.words(ids)
        keys = mask[:, None, None, :].bool()
        scores = torch.zeros_like(keys, dtype=x.dtype).masked_fill(~keys, -1e30) if self.additive else keys
        for block in self.blocks:
            x = block.mlp(block.attend(x, scores))
        if not self.mean:
            return self.read(x)
        weights = mask[:, :, None].to(x.dtype)
        return (x * weights).sum(1) / weights.sum(1).clamp(min=1e-9)

    def read(self, x: Tensor) -> Tensor:
        return x.mean(1) if self.mean else x[:, 0]


@pytest.mark.parametrize(("mean", "additive"), [(False, True), (True, False)])
def test_padding_is_never_sampled(mean: bool, additive: bool) -> None:
    torch.manual_seed(3)
    model, lengths = Sentences(mean, additive).eval(), [16, 14, 12, 9, 7, 5, 2, 1]
    peaked(model)
    ids, mask = torch.randint(50, (8, 16)), (torch.arange(16)[None] < torch.tensor(lengths)[:, None]).long()
    module = trimtab.trace(model, (ids, mask), dynamic_shapes={"ids": {0: "batch"}, "mask": {0: "batch"}})
    smaller = reduced(module, "k=[11, 7, 4]")
    (got,) = interpret(smaller, [ids, mask], precision=torch.float64)

    def expected(net: nn.Module, _: Tensor) -> Tensor:
        assert isinstance(net, Sentences)
        plan = {0: (11, 11), 1: (7, 7), 2: (4, 4)}
        rows = [(net.words(one[None, :length]), 16 - length) for one, length in zip(ids, lengths, strict=True)]
        return torch.cat([_ats_one(net, x, padding, plan, 0 if mean else 1) for x, padding in rows])

    torch.testing.assert_close(got, in_double(model, expected, ids), rtol=1e-9, atol=1e-9)
    # What lies in the places of padding changes nothing, nor does the rest of the batch.
    other = torch.where(mask.bool(), ids, (ids + 7) % 50)
    torch.testing.assert_close(interpret(smaller, [other[2:3], mask[2:3]], precision=torch.float64)[0], got[2:3])
