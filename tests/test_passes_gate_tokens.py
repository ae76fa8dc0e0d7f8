"""gate-tokens on whole models, against a transcription of the policy's formula that runs inside of the model."""

from __future__ import annotations

import math
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
from trimtab.passes.tokens.learned_gate import GateWeights, policy_scores, straight_through

Gate = tuple[Tensor, Tensor, Tensor, Tensor]
"""F_q and F_k of each head, ``[H, D, C]`` and ``[H, D]``."""


def scores(policy: Tensor, x: Tensor, gate: Gate) -> Tensor:
    """The mean over heads of sigmoid(F_q(policy) . F_k(x)), head by head."""
    wq, bq, wk, bk = gate
    total = torch.zeros(len(x), dtype=x.dtype)
    for head in range(len(wq)):
        query = wq[head] @ policy + bq[head]
        total += torch.sigmoid((x @ wk[head].T + bk[head]) @ query)
    return total / len(wq)


def gated(model: TinyVit, image: Tensor, keep: float, gates: Mapping[int, Gate]) -> Tensor:
    """The model with a gate before the blocks that ``gates`` has: the best stay, image by image."""
    return torch.cat([_gated_one(model, one[None], keep, gates) for one in image])


def _gated_one(model: TinyVit, image: Tensor, keep: float, gates: Mapping[int, Gate]) -> Tensor:
    x, p = model.embed(image), model.special
    for number, block in enumerate(model.blocks):
        if number in gates:
            normal = F.layer_norm(x[0], x.shape[-1:])
            policy = normal[0] if p else normal.mean(0)
            order = torch.argsort(scores(policy, normal[p:], gates[number]), descending=True, stable=True)
            kept = order[: math.ceil(keep * len(order))]
            x = torch.cat((x[:, :p], x[:, p:][:, kept]), 1)
        x = block(x)
    return model.read(x)


def projected(model: TinyVit, number: int) -> Gate:
    """The projections of a block to queries and keys, with the norm's scale and shift and the attention's scale."""
    block = model.blocks[number]
    assert isinstance(block.qkv, nn.Linear)
    heads, channels = block.heads, block.qkv.in_features
    weight, bias = block.qkv.weight.double(), block.qkv.bias.double()
    bias = bias + weight @ block.norm1.bias.double()
    weight = weight * block.norm1.weight.double()
    scale = (channels // heads) ** -0.25
    queries, keys = (torch.cat((weight, bias[:, None]), 1)[i * channels : (i + 1) * channels] for i in (0, 1))
    width = channels // heads
    squares = [
        (scale**4 * (queries[rows].T @ keys[rows]).square().sum())
        for rows in (slice(head * width, (head + 1) * width) for head in range(heads))
    ]
    typical = (sum(squares) / heads) ** 0.5
    assert typical > 2  # so that the products are scaled down
    scale *= (2 / typical.item()) ** 0.5
    parts = [(weight[i * channels : (i + 1) * channels], bias[i * channels : (i + 1) * channels]) for i in (0, 1)]
    return tuple(  # type: ignore[return-value]
        value.detach().reshape(heads, channels // heads, *value.shape[1:]) * scale for part in parts for value in part
    )


def own_gates(module: Module) -> dict[int, Gate]:
    """The gates by number of the layer that they stand before."""
    found: dict[int, Gate] = {}
    for number in {int(id.split(".")[1]) for id in module.weights if id.startswith("gate_tokens.")}:
        wq, bq, wk, bk = (
            module.weights[f"gate_tokens.{number}.{name}"].tensor().double()
            for name in ("query.weight", "query.bias", "key.weight", "key.bias")
        )
        found[number] = (wq.reshape(wk.shape), bq.reshape(bk.shape[:2]), wk, bk[:, :, 0])
    return found


@cache
def vit(head: Head, size: int = 20, depth: int = 3) -> Module:
    return traced(tiny_vit_with_norms(head, size, depth), size)


@cache
def tiny_vit_with_norms(head: Head, size: int = 20, depth: int = 3) -> TinyVit:
    """Norms with scales and shifts of their own, which gates must take over."""
    model = tiny_vit(head, size=size, depth=depth)
    with torch.no_grad():
        for block in model.blocks:
            block.norm1.weight.uniform_(0.5, 1.5)  # type: ignore[union-attr]
            block.norm1.bias.normal_()  # type: ignore[union-attr]
            block.qkv.weight.mul_(3)  # type: ignore[union-attr]  # so that scores differ
    return model


def gate(module: Module, options: str = "") -> Module:
    return trimtab.optimize(module, f"gate-tokens{{{options}}}", check="never").module


@pytest.mark.parametrize(
    ("head", "size", "keep", "layers"),
    [("class", 20, 0.5, (1, 2)), ("distilled", 16, 0.3, (0, 2)), ("mean", 20, 0.8, (1,)), ("class", 12, 0.01, (2,))],
)
def test_agrees_with_the_formulas(head: Head, size: int, keep: float, layers: tuple[int, ...]) -> None:
    model = tiny_vit_with_norms(head, size)
    module = gate(vit(head, size), f"keep={keep},layers={list(layers)}")
    found = own_gates(module)
    for number, own in found.items():
        for value, wanted in zip(own, projected(model, number), strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
    assert sorted(found) == list(layers)
    for batch in (1, 3):
        image = images(batch, size, seed=batch)
        (got,) = interpret(module, [image], precision=torch.float64)
        expected = in_double(model, lambda net, x: gated(net, x, keep, found), image)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_multiply_accumulates_and_places() -> None:
    module = vit("class")
    before = count_macs(module, smallest_sizes(module.main))
    smaller = gate(module, "keep=0.5,layers=[2]")
    after = count_macs(smaller, smallest_sizes(smaller.main))

    def layer(tokens: int) -> int:
        return tokens * 32 * (4 * 32 + 2 * 64) + 2 * tokens * tokens * 32

    own = 32 * 32 + 32 * 32 + 25 * 2 * 32 + 32  # F_q, F_k on the query, products, and the bias of F_k
    assert before - after == layer(26) - layer(14) - own
    assert sorted(own_gates(gate(module))) == [1, 2]
    smaller = gate(module, "budget=0.7")
    assert 0.6 < count_macs(smaller, smallest_sizes(smaller.main)) / before <= 0.7


def test_training_reaches_the_policy_and_comes_back(tmp_path: Path) -> None:
    module = gate(vit("class"), "keep=0.5")
    ours = [id for id in module.weights if id.startswith("gate_tokens.")]
    assert len(ours) == 8
    assert all(module.weights[id].trainable for id in ours)
    before = {id: module.weights[id].sha256 for id in ours}
    network = trimtab.to_torch(module)
    image, labels = images(8), torch.arange(8) % 5
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(network(image), labels)
        optimizer.zero_grad()
        loss.backward()
        for id in ours:
            gradient = network.weights()[id].grad
            assert gradient is not None
            assert bool(torch.isfinite(gradient).all())
            assert float(gradient.abs().max()) > 1e-5, id
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    trimtab.update(module, network)
    assert all(module.weights[id].sha256 != before[id] for id in ours)
    assert parse_module(print_module(module), lambda id, _: module.weights[id].source) == module
    made = trimtab.compile(module, target="native")
    session = trimtab.load(str(made.save(tmp_path / "model.trim", check=False)))
    for batch in (8, 1):
        expected = network(image[:batch]).detach().numpy()
        np.testing.assert_allclose(np.asarray(session(image[:batch].numpy())), expected, rtol=1e-4, atol=1e-4)


def test_keeping_all_is_the_same_module() -> None:
    result = trimtab.optimize(vit("class"), "gate-tokens{keep=1.0}")
    assert result.module == vit("class")
    assert not result.report.rows[0].changed


def test_errors_are_in_words() -> None:
    for keep in ("0.0", "1.5"):
        with pytest.raises(UsageError, match=r"(?s)keep=.*0 < keep <= 1"):
            gate(vit("class"), f"keep={keep}")
    with pytest.raises(PassError, match="wrong layers"):
        gate(vit("class"), "layers=[3]")
    with pytest.raises(PassError, match=r"(?s)has a row for each token"):
        gate(vit("dense", 16))
    with pytest.raises(PassError, match="tokens that were dropped cannot be given back"):
        gate(vit("dense", 16), "unmerge=true")


class _Text(nn.Module):
    """Two post-norm layers with a padding mask, and the mean of the tokens that are not padding; where ``turned``, the
    queries go through a function that is not linear."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.turned = turned

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.words(ids)
        for qkv, norm in zip(self.qkv, self.norms, strict=True):
            q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in qkv(x).chunk(3, -1))
            q = torch.tanh(q) if self.turned else q
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :].bool())
            x = norm(x + mixed.transpose(1, 2).flatten(2))
        weights = mask[:, :, None].to(x.dtype)
        return (x * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


@pytest.mark.parametrize("turned", [False, True])
def test_padding_goes_first(turned: bool) -> None:
    torch.manual_seed(3)
    ids = torch.randint(50, (4, 11))
    mask = (torch.arange(11)[None] < torch.tensor([11, 6, 5, 1])[:, None]).long()
    shapes = {"ids": {0: "batch"}, "mask": {0: "batch"}}
    module = trimtab.trace(_Text(turned).eval(), (ids, mask), dynamic_shapes=shapes)
    result = trimtab.optimize(module, "gate-tokens{keep=0.5}", check="never")
    (before,) = interpret(module, [ids, mask], precision=torch.float64)
    (after,) = interpret(result.module, [ids, mask], precision=torch.float64)
    assert float((after[0] - before[0]).abs().max()) > 1e-3  # 6 of 11 stay
    torch.testing.assert_close(after[1:], before[1:])
    notes = " ".join(result.report.rows[0].notes)
    assert ("starts with cosines" in notes) == turned
    if turned:
        query, key = (result.module.weights[f"gate_tokens.1.{name}.weight"].tensor() for name in ("query", "key"))
        torch.testing.assert_close(query * 8**0.25, torch.eye(16), rtol=0, atol=0.01)
        assert bool((query.reshape(key.shape) != key).any())


def test_gradients_are_those_of_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"policy": (2, 1, 4), "x": (2, 5, 4), "wq": (6, 4), "bq": (6,), "wk": (2, 3, 4), "bk": (2, 3, 1)}
    build = Builder()
    policy, x, wq, bq, wk, bk = (build.weight(id, torch.zeros(shape)) for id, shape in shapes.items())
    found = policy_scores(build, policy, x, GateWeights((wq, bq), (wk, bk)))
    build.output(found, straight_through(build, found))
    verify(build.module)
    given = [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes.values()
    ]

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        tensors = dict(zip(shapes, values, strict=True))
        return interpret(build.module, [], precision=torch.float64, weights=tensors, grad=True)

    assert torch.autograd.gradcheck(lambda *values: run(*values)[0], given)
    got, zeros = run(*given)
    for row in range(2):
        own = (given[2].reshape(2, 3, 4), given[3].reshape(2, 3), given[4], given[5][:, :, 0])
        torch.testing.assert_close(got[row], scores(given[0][row, 0], given[1][row], own))
    torch.testing.assert_close(zeros, torch.zeros_like(zeros), rtol=0, atol=1e-12)
    weights = torch.randn(zeros.shape, generator=generator, dtype=torch.float64)
    through = torch.autograd.grad((zeros * weights).sum(), given, retain_graph=True)
    direct = torch.autograd.grad((got * weights).sum(), given)
    for one, other in zip(through, direct, strict=True):
        torch.testing.assert_close(one, other)
    in_single = interpret(
        build.module, [], weights={id: t.detach().float() for id, t in zip(shapes, given, strict=True)}
    )
    assert float(in_single[1].abs().max()) < 2**-40
