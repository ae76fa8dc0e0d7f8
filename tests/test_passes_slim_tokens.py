"""slim-tokens on whole models, against a transcription of SiT's slimming module that runs inside of the model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_vit import Head, TinyVit, images, in_double, tiny_vit, traced
from torch import Tensor, nn

import trimtab
from trimtab.errors import PassError, UsageError
from trimtab.ir import Builder, Module, interpret, parse_module, print_module, verify
from trimtab.passes.samples import count_macs, smallest_sizes
from trimtab.passes.tokens.entry import at_shares
from trimtab.passes.tokens.slimming import SlimmingWeights, pooling_weights, shares


def slimmed(model: TinyVit, image: Tensor, weights: Mapping[int, list[Tensor]]) -> Tensor:
    """The model with a slimming module behind the blocks that ``weights`` has, from the formulas of SiT: each new token
    is a mean of all that are not protected, weighted by a softmax over them."""
    x, p, left = model.embed(image), model.special, None
    for number, block in enumerate(model.blocks):
        x = block(x)
        if number in weights:
            w1, b1, w2, scale = weights[number]
            rows = x[:, p:]
            centered = rows - rows.mean(-1, keepdim=True)
            normal = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            logits = F.gelu(normal @ w1.T + b1) @ w2.T * scale  # [B, T, M]
            share = logits.exp() / logits.exp().sum(1, keepdim=True)
            x = torch.cat((x[:, :p], torch.einsum("btm,btc->bmc", share, rows)), 1)
            back = share / share.sum(2, keepdim=True)
            left = back if left is None else torch.einsum("btm,bmk->btk", left, back)
    y = model.read(x)
    if model.kind == "dense" and left is not None:
        y = torch.cat((y[:, :p], torch.einsum("btm,bmc->btc", left, y[:, p:])), 1)
    return y


@cache
def vit(head: Head, size: int = 20, depth: int = 3) -> Module:
    return traced(tiny_vit(head, size=size, depth=depth), size)


def slim(module: Module, options: str = "", **kwargs: object) -> Module:
    return trimtab.optimize(module, f"slim-tokens{{{options}}}", check="never", **kwargs).module  # type: ignore[arg-type]


def own_weights(module: Module) -> dict[int, list[Tensor]]:
    """The new weights by number of the layer that their module stands behind: W1, b1, W2, scale."""
    found: dict[int, list[Tensor]] = {}
    for id, weight in module.weights.items():
        if id.startswith("slim_tokens."):
            found.setdefault(int(id.split(".")[1]), []).append(weight.tensor().double())
    return found


def others(module: Module) -> dict[str, Tensor]:
    """Random new weights, so that a test does not depend on what they start as."""
    generator = torch.Generator().manual_seed(5)
    return {
        id: torch.randn(weight.type.shape, generator=generator) * 0.4 + (1.0 if id.endswith("scale") else 0.0)  # type: ignore[arg-type]
        for id, weight in module.weights.items()
        if id.startswith("slim_tokens.")
    }


def with_weights(module: Module, values: Mapping[str, Tensor]) -> Module:
    """The module after these values have come back from a network."""
    network = trimtab.to_torch(module)
    with torch.no_grad():
        for id, parameter in network.weights().items():
            if id in values:
                parameter.copy_(values[id])
    module = module.copy()
    trimtab.update(module, network)
    return module


@pytest.mark.parametrize(
    ("head", "size", "options", "places"),
    [
        ("class", 20, "after=[0, 1]", {0: 12, 1: 6}),
        ("distilled", 20, "keep=0.3,after=[1]", {1: 7}),
        ("mean", 16, "keep=0.8,after=[0]", {0: 12}),
        ("dense", 16, "keep=0.4,after=[0, 1],unmerge=true", {0: 6, 1: 2}),
        ("class", 12, "keep=0.1", {1: 1}),
    ],
)
def test_agrees_with_the_formulas(head: Head, size: int, options: str, places: dict[int, int]) -> None:
    model = tiny_vit(head, size=size)
    module = slim(vit(head, size), options)
    module = with_weights(module, others(module))
    weights = own_weights(module)
    assert {place: len(w2) for place, (_, _, w2, _) in weights.items()} == places
    for batch in (1, 3):
        image = images(batch, size, seed=batch)
        (got,) = interpret(module, [image], precision=torch.float64)
        expected = in_double(model, lambda net, x: slimmed(net, x, weights), image)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_multiply_accumulates() -> None:
    module = vit("class", depth=4)
    before = count_macs(module, smallest_sizes(module.main))
    smaller = slim(module, "after=[1]")
    after = count_macs(smaller, smallest_sizes(smaller.main))

    def layer(tokens: int) -> int:
        return tokens * 32 * (4 * 32 + 2 * 64) + 2 * tokens * tokens * 32

    modules = 25 * 32 * 16 + 25 * 16 * 12 + 12 * 25 * 32
    assert before - after == 2 * (layer(26) - layer(13)) - modules
    smaller = slim(module, "budget=0.7,after=[0, 1]")
    assert 0.62 < count_macs(smaller, smallest_sizes(smaller.main)) / before <= 0.7


def test_places_follow_sit() -> None:
    found = {depth: at_shares(depth, 9 / 16, 12 / 16, 14 / 16) for depth in (16, 12, 4, 3, 2)}
    assert found == {16: [9, 12, 14], 12: [7, 9, 11], 4: [2, 3], 3: [2], 2: [1]}


def test_it_starts_near_means_of_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    places = torch.randn(24, 64, generator=generator)
    seen, new = (places + 0.3 * torch.randn(8, 24, 64, generator=generator) for _ in range(2))
    w1, b1, w2, scale = pooling_weights(seen, 12, generator)
    hidden = F.gelu(F.linear(F.layer_norm(new, (64,)), w1, b1))
    mixed = torch.softmax(F.linear(hidden, w2) * scale, 1).mT @ new
    pairs = new.unflatten(1, (12, 2)).mean(2)
    assert float((mixed - pairs).norm()) < 0.5 * float((new.mean(1, keepdim=True) - pairs).norm())


def test_the_start_depends_on_the_data() -> None:
    first, again = (slim(vit("class"), "after=[0]") for _ in range(2))
    assert all(first.weights[id].sha256 == again.weights[id].sha256 for id in first.weights)
    fitted = slim(vit("class"), "after=[0]", calibration=[(images(8),)])
    assert bool((own_weights(first)[0][2] != own_weights(fitted)[0][2]).any())
    assert all(weight.trainable for id, weight in first.weights.items() if id.startswith("slim_tokens."))


def test_training_reaches_the_new_weights_and_comes_back(tmp_path: Path) -> None:
    module = slim(vit("class"), "after=[0, 1]")
    untrained = own_weights(module)
    network = trimtab.to_torch(module)
    image, labels = images(8), torch.arange(8) % 5
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(network(image), labels)
        optimizer.zero_grad()
        loss.backward()
        for id, parameter in network.weights().items():
            if id.startswith("slim_tokens."):
                assert parameter.grad is not None
                assert bool(torch.isfinite(parameter.grad).all())
                assert float(parameter.grad.abs().max()) > 1e-8, id
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    trimtab.update(module, network)
    assert all(
        bool((old != new).any())
        for place, weights in own_weights(module).items()
        for old, new in zip(untrained[place], weights, strict=True)
    )
    again = parse_module(print_module(module), lambda id, _: module.weights[id].source)
    assert again == module
    made = trimtab.compile(module, target="native")
    session = trimtab.load(str(made.save(tmp_path / "model.trim", check=False)))
    for batch in (8, 1):
        np.testing.assert_allclose(
            np.asarray(session(image[:batch].numpy())),
            network(image[:batch]).detach().numpy(),
            rtol=1e-4,
            atol=1e-4,
        )


def test_keeping_all_is_the_same_module() -> None:
    module = vit("class")
    result = trimtab.optimize(module, "slim-tokens{keep=1.0}")
    assert result.module == module
    assert not result.report.rows[0].changed


def test_errors_are_in_words() -> None:
    module = vit("class")
    for options, message in [
        ("keep=0.0", r"keep=0\.0.*0 < keep <= 1"),
        ("keep=1.5", r"keep=1\.5"),
        ("max_drop=0.1", "train the module"),
        ("layers=[1]", "has no option layers"),
    ]:
        with pytest.raises(UsageError, match=f"(?s){message}"):
            slim(module, options)
    for after in ("[2]", "[1, 0]", "[0, 0]", "[-1]"):
        with pytest.raises(PassError, match=r"(?s)wrong places.*give some of 0 to 1"):
            slim(module, f"after={after}")
    with pytest.raises(PassError, match=r"(?s)has a row for each token.*unmerge=true"):
        slim(vit("dense", 16), "")


class _Text(nn.Module):
    """Two post-norm layers with a padding mask, and the mean of the tokens that are not padding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.words(ids)
        for qkv, norm in zip(self.qkv, self.norms, strict=True):
            q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in qkv(x).chunk(3, -1))
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :].bool())
            x = norm(x + mixed.transpose(1, 2).flatten(2))
        weights = mask[:, :, None].to(x.dtype)
        return (x * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def test_padding_counts_for_nothing() -> None:
    torch.manual_seed(3)
    ids = torch.randint(50, (4, 11))
    mask = (torch.arange(11)[None] < torch.tensor([11, 6, 2, 1])[:, None]).long()
    module = trimtab.trace(_Text().eval(), (ids, mask), dynamic_shapes={"ids": {0: "batch"}, "mask": {0: "batch"}})
    smaller = slim(module, "after=[0]")
    (before,) = interpret(module, [ids, mask], precision=torch.float64)
    (after,) = interpret(smaller, [ids, mask], precision=torch.float64)
    other = torch.where(mask.bool(), ids, (ids + 7) % 50)
    torch.testing.assert_close(interpret(smaller, [other, mask], precision=torch.float64)[0], after)
    assert bool((interpret(smaller, [ids, mask], precision=torch.float64)[0][0] - before[0]).abs().max() > 1e-3)
    # Of a single token every mean is the token itself.
    torch.testing.assert_close(after[3], before[3])


def test_gradients_are_those_of_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 5, 4), "up": (2, 4), "bias": (2,), "down": (3, 2), "scale": (1,)}
    build = Builder()
    x, up, bias, down, scale = (build.weight(id, torch.zeros(shape)) for id, shape in shapes.items())
    there = torch.tensor([[1.0, 1, 0, 1, 0], [0, 0, 0, 0, 0]])[:, :, None]
    weights = SlimmingWeights((up, bias), down, scale)
    build.output(shares(build, x, weights), shares(build, x, weights, build.weight("there", there)))
    verify(build.module)
    given = [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes.values()
    ]

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        tensors = {"there": there.double(), **dict(zip(shapes, values, strict=True))}
        return interpret(build.module, [], precision=torch.float64, weights=tensors, grad=True)

    assert torch.autograd.gradcheck(run, given)
    everywhere, some = run(*given)
    torch.testing.assert_close(everywhere.sum(2), torch.ones(2, 3, dtype=torch.float64))
    assert bool((some[0][:, [2, 4]] == 0).all())
    assert bool(torch.isfinite(some).all())  # all of the second are padding
