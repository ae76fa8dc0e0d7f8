"""merge-tokens on whole models, against a transcription of ToMe that runs inside of the model in torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_vit import Head, TinyVit, images, in_double, tiny_vit, traced
from torch import Tensor, nn

import trimtab
from trimtab.errors import PassError, UsageError
from trimtab.ir import interpret, parse_module, print_module
from trimtab.ir.ops import Attention, Scatter
from trimtab.passes.samples import count_macs, smallest_sizes


def tome(model: TinyVit, image: Tensor, removals: Sequence[int], proportional: bool = True) -> Tensor:
    """The model with ToMe between attention and MLP, token by token, from the formulas of arXiv 2210.09461.

    The original interleaves kept and receiving tokens where there is a distillation token; no result depends on it.
    """
    outputs = [_tome_one(model, one[None], removals, proportional) for one in image]
    return torch.cat(outputs)


def _tome_one(model: TinyVit, image: Tensor, removals: Sequence[int], proportional: bool) -> Tensor:
    x = model.embed(image)
    sizes = torch.ones(x.shape[1], dtype=x.dtype)
    home = [{row} for row in range(x.shape[1])]  # the original tokens of each row
    for block, r in zip(model.blocks, removals, strict=True):
        _, k, _ = block.heads_of(x)
        bias = sizes.log()[None, None, None] if proportional else None
        x = block.attend(x, bias)
        if r:
            metric = F.normalize(k.mean(1)[0], dim=-1)
            free = range(model.special, len(metric))
            candidates = [row for row in free if row % 2 == 0]
            receivers = [row for row in free if row % 2 == 1]
            links = []
            for row in candidates:
                cosines = [float(metric[row] @ metric[other]) for other in receivers]
                best = max(range(len(receivers)), key=cosines.__getitem__)
                links.append((cosines[best], row, receivers[best]))
            chosen = sorted(links, key=lambda link: -link[0])[:r]
            rows = x[0].clone() * sizes[:, None]
            counts = sizes.clone()
            for _, row, other in chosen:
                rows[other] += x[0, row] * sizes[row]
                counts[other] += sizes[row]
                home[other] |= home[row]
            gone = {row for _, row, _ in chosen}
            kept = [row for row in range(len(metric)) if row not in gone]
            order = (
                [row for row in kept if row < model.special]
                + [row for row in kept if row >= model.special and row % 2 == 0]
                + [row for row in kept if row >= model.special and row % 2 == 1]
            )
            home = [home[row] for row in order]
            sizes = counts[order]
            x = (rows[order] / sizes[:, None])[None]
        x = block.mlp(x)
    if model.kind == "mean":
        return model.head((model.norm(x) * sizes[None, :, None]).sum(1) / sizes.sum())
    if model.kind == "dense":
        back = torch.empty(sum(map(len, home)), x.shape[-1], dtype=x.dtype)
        for row, originals in enumerate(home):
            back[sorted(originals)] = x[0, row]
        return model.norm(back[None])
    return model.read(x)


def reduced(module: trimtab.Module, options: str) -> trimtab.Module:
    return trimtab.optimize(module, f"merge-tokens{{{options}}}", check="never").module


@pytest.mark.parametrize(
    ("head", "size", "r"),
    [("class", 20, 4), ("distilled", 20, 5), ("mean", 20, 3), ("mean", 16, 5), ("dense", 16, 4), ("class", 12, 1)],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_agrees_with_the_formulas(head: Head, size: int, r: int, batch: int) -> None:
    model, image = tiny_vit(head, size=size), images(batch, size, seed=r)
    module = reduced(traced(model, size), f"r={r},unmerge={'true' if head == 'dense' else 'false'}")
    (got,) = interpret(module, [image], precision=torch.float64)
    expected = in_double(model, lambda net, x: tome(net, x, [r, r, r]), image)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_without_proportional_attention() -> None:
    model, image = tiny_vit("mean"), images(2)
    module = reduced(traced(model), "r=6,proportional=false")
    (got,) = interpret(module, [image], precision=torch.float64)
    expected = in_double(model, lambda net, x: tome(net, x, [6, 6, 6], proportional=False), image)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_a_falling_schedule_in_some_layers() -> None:
    model, image = tiny_vit("class", depth=4), images(2)
    module = reduced(traced(model), "r=3,schedule=linear,inflect=-1.0,layers=[0, 1, 3]")
    (got,) = interpret(module, [image], precision=torch.float64)
    expected = in_double(model, lambda net, x: tome(net, x, [6, 3, 0, 0]), image)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_the_compiled_model_agrees_and_keeps_attention_whole() -> None:
    module = reduced(traced(tiny_vit("class")), "r=4")
    assert sum(isinstance(op, Attention) for op in module.main.ops) == 3
    assert parse_module(print_module(module), lambda id, _: module.weights[id].source) == module
    made = trimtab.compile(module, target="native")
    for batch in (1, 8):
        image = images(batch, seed=batch)
        got = np.asarray(trimtab.load(_saved(made))(image.numpy()))
        np.testing.assert_allclose(got, interpret(module, [image])[0].numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("head", "layers"), [("class", 2), ("mean", 3)])
def test_behind_the_last_layer_only_what_is_read_is_computed(head: Head, layers: int) -> None:
    """A class token is alone: where it is all that is read, no tokens of the last layer are matched or added up."""
    module = trimtab.optimize(traced(tiny_vit(head)), "cleanup,merge-tokens{r=4},fuse", check="never").module
    assert sum(isinstance(op, Scatter) for op in module.walk()) == 2 * layers  # of tokens and of their sizes


def _saved(made: trimtab.Artifact) -> str:
    import tempfile
    from pathlib import Path

    folder = tempfile.mkdtemp()
    return str(made.save(Path(folder) / "model.trim", check=False))


def test_nothing_to_remove_is_the_same_module() -> None:
    module = traced(tiny_vit("class"))
    for options in ("r=0", "schedule=ratio,keep=1.0"):
        result = trimtab.optimize(module, f"merge-tokens{{{options}}}")
        assert result.module == module
        assert print_module(result.module) == print_module(module)
        assert not result.report.rows[0].changed


def test_too_many_tokens_are_refused() -> None:
    with pytest.raises(PassError, match=r"r=13, tokens=26, protected=1.*give r=12 or less"):
        reduced(traced(tiny_vit("class")), "r=13")
    with pytest.raises(UsageError, match="r is 0 or more"):
        reduced(traced(tiny_vit("class")), "r=-1")


def test_a_dense_output_is_refused_without_unmerge() -> None:
    with pytest.raises(PassError, match=r"has a row for each token.*unmerge=true"):
        reduced(traced(tiny_vit("dense")), "r=2")


@pytest.mark.parametrize("budget", [0.9, 0.7, 0.6])
def test_a_budget_is_met_closely(budget: float) -> None:
    module = traced(tiny_vit("class", depth=4))
    full = count_macs(module, smallest_sizes(module.main))
    smaller = reduced(module, f"budget={budget}")
    taken = count_macs(smaller, smallest_sizes(smaller.main)) / full
    assert budget - 0.06 < taken <= budget
    with pytest.raises(PassError, match="the budget cannot be met"):
        reduced(module, "budget=0.01")


@pytest.mark.parametrize("inflect", [-1, 1])
def test_a_budget_keeps_the_slope_of_a_linear_schedule(inflect: int) -> None:
    module = traced(tiny_vit("class", size=20, depth=3), 20)
    full = count_macs(module, smallest_sizes(module.main))
    result = trimtab.optimize(module, f"merge-tokens{{budget=0.9,schedule=linear,inflect={inflect}}}")
    assert 0.8 < count_macs(result.module, smallest_sizes(result.module.main)) / full <= 0.9
    tokens, _, *counts = [int(word) for word in result.report.rows[0].notes[0].split() if word.isdigit()]
    removed = [before - after for before, after in pairwise([tokens, *counts])]
    assert len(removed) == 2, "one of three layers keeps all"
    assert (removed[0] > removed[1]) == (inflect < 0)


def test_options_that_choose_the_amount_exclude_each_other() -> None:
    module = traced(tiny_vit("class"))
    for options in ("budget=0.7,schedule=ratio", "max_drop=0.1,schedule=linear"):
        with pytest.raises(UsageError, match="max_drop chooses also how many go in which layer"):
            reduced(module, options)


def test_a_bound_on_the_drift_is_kept() -> None:
    module = traced(tiny_vit("class", size=16), 16)
    batches = [(images(2, 16, seed=1),), (images(2, 16, seed=2),)]
    result = trimtab.optimize(module, "merge-tokens{max_drop=0.05}", calibration=batches)
    moved = [
        float((after - before).norm() / before.norm())
        for batch in batches
        for before, after in zip(interpret(module, batch), interpret(result.module, batch), strict=True)
    ]
    assert 0 < np.mean(moved) <= 0.05
    full, less = (count_macs(m, smallest_sizes(m.main)) for m in (module, result.module))
    assert less < full
    assert "when a layer alone reduces: layer 0 " in " ".join(result.report.rows[0].notes)
    with pytest.raises(PassError, match="a metric, or on calibration data"):
        trimtab.optimize(module, "merge-tokens{max_drop=0.1}")


def test_gradients_reach_all_weights_and_training_helps() -> None:
    module = reduced(traced(tiny_vit("class")), "r=4")
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
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trimtab.update(module, network)
    torch.testing.assert_close(interpret(module, [image])[0], network(image).detach(), rtol=1e-5, atol=1e-5)


class _Sentences(nn.Module):
    """A text encoder of post-norm blocks with a padding mask and the mean over tokens that are not padding."""

    def __init__(self, additive: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 32)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, activation="gelu") for _ in range(3)
        )
        self.additive = additive

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.words(ids)
        for layer in self.layers:
            keys = mask[:, None, None, :].bool()
            scores = torch.zeros_like(keys, dtype=x.dtype).masked_fill(~keys, -1e30) if self.additive else keys
            q, k, v = F.linear(x, layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias).chunk(3, -1)
            q, k, v = (t.reshape(*t.shape[:2], 2, 16).transpose(1, 2) for t in (q, k, v))
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=scores)
            x = layer.norm1(x + layer.self_attn.out_proj(mixed.transpose(1, 2).reshape(x.shape)))
            x = layer.norm2(x + layer.linear2(F.gelu(layer.linear1(x))))
        weights = mask[:, :, None].to(x.dtype)
        return (x * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


@pytest.mark.parametrize("additive", [False, True])
def test_padding_is_merged_first_and_counts_for_nothing(additive: bool) -> None:
    torch.manual_seed(3)
    model = _Sentences(additive).eval()
    ids = torch.randint(50, (4, 16))
    mask = (torch.arange(16)[None] < torch.tensor([16, 9, 5, 1])[:, None]).long()
    module = trimtab.trace(model, (ids, mask), dynamic_shapes={"ids": {0: "batch"}, "mask": {0: "batch"}})
    smaller = reduced(module, "r=3")
    assert sum(isinstance(op, Scatter) for op in smaller.main.ops)
    (original,) = interpret(module, [ids, mask], precision=torch.float64)
    (after,) = interpret(smaller, [ids, mask], precision=torch.float64)
    assert bool(torch.isfinite(after).all())
    moved = (after - original).norm(dim=1) / original.norm(dim=1)
    # 9 of 16 places go: the more of them are padding, the less the sentence moves.
    assert float(moved[0]) > float(moved[2]) > float(moved[3])
    assert float(moved[3]) < 1e-9
    # What lies in the places of padding changes nothing.
    other = torch.where(mask.bool(), ids, (ids + 7) % 50)
    torch.testing.assert_close(interpret(smaller, [other, mask], precision=torch.float64)[0], after)
