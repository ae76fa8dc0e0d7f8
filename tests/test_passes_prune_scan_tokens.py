"""prune-scan-tokens on a small Mamba, against the same model with pruning written out in torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trimtab
import zoo_models
from trimtab.errors import PassError
from trimtab.ir import Module, interpret
from trimtab.passes.samples import count_macs, smallest_sizes

TOKENS, WIDTH, INNER, STATE, RANK = 7, 16, 24, 4, 3


class _Mixer(nn.Module):
    """The selective recurrence of Mamba (arXiv 2312.00752), a step at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.enter, self.leave = nn.Linear(WIDTH, 2 * INNER, bias=False), nn.Linear(INNER, WIDTH, bias=False)
        self.near = nn.Conv1d(INNER, INNER, 3, padding=2, groups=INNER)
        self.select, self.rate = nn.Linear(INNER, RANK + 2 * STATE, bias=False), nn.Linear(RANK, INNER)
        self.log_decay = nn.Parameter(torch.rand(INNER, STATE))
        self.skip = nn.Parameter(torch.ones(INNER))

    def recurrence(self, x: Tensor, gaps: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What is added to x, and the recurrence's results ``[B, N, E]``; the state decays ``gaps`` times a step."""
        count = x.shape[1]
        hidden, gate = self.enter(self.norm(x)).chunk(2, -1)
        hidden = F.silu(self.near(hidden.transpose(1, 2))[..., :count]).transpose(1, 2)
        rate, into, out = self.select(hidden).split([RANK, STATE, STATE], -1)
        rate = F.softplus(self.rate(rate))
        exponent = rate[..., None] * -torch.exp(self.log_decay)
        decay = torch.exp(exponent if gaps is None else exponent * gaps[:, :, None, None])
        update = (rate * hidden)[..., None] * into[:, :, None, :]
        state, results = torch.zeros_like(update[:, 0]), []
        for t in range(count):
            state = decay[:, t] * state + update[:, t]
            results.append((state * out[:, t, None, :]).sum(-1))
        mixed = torch.stack(results, 1)
        return self.leave((mixed + hidden * self.skip) * F.silu(gate)), mixed


class _Mamba(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(_Mixer() for _ in range(3))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 7)

    def forward(self, x: Tensor) -> Tensor:
        for mixer in self.mixers:
            x = x + mixer.recurrence(x)[0]
        return self.head(self.norm(x))

    def pruned(self, x: Tensor, keeps: dict[int, int]) -> Tensor:
        """With ``keeps[block]`` tokens left behind a block; one sample at a time, from the description of the paper."""
        return torch.cat([self._pruned(one[None], keeps) for one in x])

    def _pruned(self, x: Tensor, keeps: dict[int, int]) -> Tensor:
        places = list(range(x.shape[1]))
        final = torch.empty_like(x)
        for number, mixer in enumerate(self.mixers):
            steps = [place - before for place, before in zip(places, [-1, *places[:-1]], strict=True)]
            gaps = torch.tensor([steps], dtype=x.dtype) if number and len(places) < final.shape[1] else None
            added, mixed = mixer.recurrence(x, gaps)
            x = x + added
            if number in keeps:
                scores = mixed[0].clamp(min=0).mean(-1)
                best = sorted(sorted(range(len(places)), key=lambda row: -float(scores[row]))[: keeps[number]])
                for row in set(range(len(places))) - set(best):
                    final[0, places[row]] = x[0, row]
                x, places = x[:, best], [places[row] for row in best]
        for row, place in enumerate(places):
            final[0, place] = x[0, row]
        return self.head(self.norm(final))


@pytest.fixture(scope="module")
def model() -> _Mamba:
    torch.manual_seed(2)
    return _Mamba().eval()


@pytest.fixture(scope="module")
def module(model: _Mamba) -> Module:
    return trimtab.trace(model, (_tokens(2),), dynamic_shapes={"x": {0: "batch"}})


def _tokens(batch: int) -> Tensor:
    return torch.randn(batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize(
    ("options", "keeps"),
    [("keep=0.7,after=[0]", {0: 5}), ("keep=0.5,after=[1]", {1: 4}), ("keep=0.7", {0: 5, 1: 4})],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_agrees_with_the_description(
    model: _Mamba, module: Module, options: str, keeps: dict[int, int], batch: int
) -> None:
    smaller = trimtab.optimize(module, f"prune-scan-tokens{{{options}}}", check="never").module
    x = _tokens(batch)
    (got,) = interpret(smaller, [x], precision=torch.float64)
    with torch.no_grad():
        expected = model.double().pruned(x.double(), keeps)
        whole = model(x.double())
    model.float()
    # Raising folds the exponential of the decay into a constant of float32.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(got, whole, rtol=1e-3, atol=1e-3)
    full, less = (count_macs(m, smallest_sizes(m.main)) for m in (module, smaller))
    assert less < 0.95 * full


def test_compiled_code_agrees_and_gradients_are_finite(module: Module, tmp_path) -> None:
    result = trimtab.optimize(module, "prune-scan-tokens{keep=0.6,after=[0, 1]}")
    assert result.report.rows[0].notes[0] == "7 tokens become 5 3"
    saved = trimtab.compile(result.module, target="native").save(tmp_path / "model.trim", check=False)
    x = _tokens(8)
    expected = interpret(result.module, [x])[0].numpy()
    np.testing.assert_allclose(trimtab.load(saved)(x.numpy()), expected, rtol=1e-4, atol=1e-5)
    network = trimtab.to_torch(result.module)
    network(x).square().mean().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in network.parameters())


def test_the_zoos_mamba_with_padding() -> None:
    entry = zoo_models.get("mamba")
    inputs = list(entry.inputs(2, 12).values())
    shapes = {name: {0: axes[0]} for name, axes in entry.dynamic_shapes().items()}
    module = trimtab.trace(entry.build(), tuple(inputs), dynamic_shapes=shapes)
    result = trimtab.optimize(module, "prune-scan-tokens{keep=0.75}")
    assert result.report.rows[0].notes[0] == "12 tokens become 9"
    (before,), (after,) = interpret(module, inputs), interpret(result.module, inputs)
    assert after.shape == before.shape
    # Three tokens of each row went around the last block, and the others changed by what they no longer see.
    assert 0 < float((after - before).norm() / before.norm()) < 1


def test_errors_and_keeping_all(module: Module) -> None:
    same = trimtab.optimize(module, "prune-scan-tokens{keep=1.0}")
    assert same.module == module
    with pytest.raises(PassError, match=r"after=\[2\], found=3.*give some of 0 to 1"):
        trimtab.optimize(module, "prune-scan-tokens{after=[2]}")
    vit = trimtab.trace(nn.Linear(3, 4).eval(), (torch.randn(2, 3),))
    with pytest.raises(PassError, match=r"no recurrence over tokens.*prune-tokens or merge-tokens"):
        trimtab.optimize(vit, "prune-scan-tokens")
