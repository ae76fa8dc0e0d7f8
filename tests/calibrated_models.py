"""Transformers with a few channels far from the others, for tests of passes that look at calibration data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from tiny_vit import images, tiny_vit
from torch import Tensor, nn

import trimtab
from trimtab.ir import Module, interpret

WIDTH, HEADS = 24, 3


class Decoder(nn.Module):
    """GPT-2's block, pre-norm and causal, with a rectifier, a gated MLP with RMS norm behind it, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, WIDTH)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH, eps=1e-6)
        self.last = nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, 32, bias=False), nn.Linear(WIDTH, 32, bias=False)
        self.down = nn.Linear(32, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, 40, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        x = x + self.fc2(F.relu(self.fc1(self.norm2(x))))
        y = self.norm3(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(self.last(x))


class PostNorm(nn.Module):
    """BERT's block: norms behind the residual sums, so that the residual reads what the layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        self.norm0, self.norm1, self.norm2 = (nn.LayerNorm(WIDTH) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm0(self.words(ids))
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = self.norm1(x + self.out(mixed.transpose(1, 2).flatten(2)))
        return self.norm2(x + self.fc2(F.gelu(self.fc1(x))))


def token_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 40, (batch, length), generator=torch.Generator().manual_seed(seed))


def language_model(kind: type[nn.Module], *, double: bool = False) -> Module:
    """``ids: i64[batch, length] -> [batch, length, ...]``, with gains and biases of norms that are not 1 and 0."""
    torch.manual_seed(3)
    model = _uneven(kind())
    axes = {0: torch.export.Dim("batch", min=1, max=16), 1: torch.export.Dim("length", min=2, max=32)}
    return trimtab.trace(model.double() if double else model, (token_ids(2, 7),), dynamic_shapes={"ids": axes})


def vision_model(*, double: bool = False) -> Module:
    """``image: [batch, 3, 20, 20] -> [batch, 5]``."""
    model = _uneven(tiny_vit())
    example = images(2)
    example, model = (example.double(), model.double()) if double else (example, model)
    return trimtab.trace(model, (example,), dynamic_shapes={"image": {0: "batch"}})


def _uneven(model: nn.Module) -> nn.Module:
    """Gains and biases of norms as trained models have them: a few far from the others."""
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.LayerNorm | nn.RMSNorm):
                part.weight.copy_(torch.rand_like(part.weight) + 0.5)
                part.weight[5] = 20
                if isinstance(part, nn.LayerNorm):
                    part.bias.copy_(0.3 * torch.randn_like(part.bias))
                    part.bias[2] = 4
    return model.eval()


def relative_error(result: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest distance of an output to the one expected, relative to the largest element."""
    return max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in zip(result, expected, strict=True)
    )


def moved(before: Module, after: Module, *inputs: Tensor) -> float:
    """How far the outputs are apart in float64, relatively."""
    old, new = (interpret(module, inputs, precision=torch.float64) for module in (before, after))
    return relative_error(new, old)
