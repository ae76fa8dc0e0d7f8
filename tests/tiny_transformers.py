"""Transformers of one small layer, for tests that compile them many times."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import trimtab
from trimtab.ir import Module

WIDTH, HEADS, TOKENS, VOCABULARY, PIXELS, PATCH = 32, 2, 24, 50, 16, 4


class _Layer(nn.Module):
    """Attention with a mask and a feed-forward part, each before a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        x = self.first(x + self.out(mixed.transpose(1, 2).flatten(2)))
        return self.second(x + self.down(nn.functional.gelu(self.up(x))))


class _Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.layer = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(TOKENS, WIDTH), _Layer()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        return torch.tanh(self.layer(x, mask[:, None, None, :].bool()))


class _Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.layer, self.head = nn.Conv2d(3, WIDTH, PATCH, PATCH), _Layer(), nn.Linear(WIDTH, 10)
        self.first = nn.Parameter(torch.randn(1, 1, WIDTH))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1)
        return self.head(self.layer(x)[:, 0])


def text_inputs(batch: int, length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 * batch + length)
    mask = (torch.arange(length) <= torch.arange(batch)[:, None] + length // 2).long()
    return [torch.randint(0, VOCABULARY, (batch, length), generator=generator), mask]


def image_inputs(batch: int) -> list[Tensor]:
    return [torch.randn(batch, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(batch))]


def text_model(symbolic: bool = True) -> Module:
    """``ids, mask: i64[batch, length] -> f32[batch, length, WIDTH]``; 2 by 12 where sizes are not symbolic."""
    axes = {0: torch.export.Dim("batch", min=1, max=16), 1: torch.export.Dim("length", min=2, max=TOKENS)}
    return _traced(_Text, text_inputs(2, 12), {"ids": axes, "mask": axes} if symbolic else None)


def image_model(symbolic: bool = True) -> Module:
    """``pixels: f32[batch, 3, PIXELS, PIXELS] -> f32[batch, 10]``; a batch of 2 where its size is not symbolic."""
    shapes = {"pixels": {0: torch.export.Dim("batch", min=1, max=16)}} if symbolic else None
    return _traced(_Image, image_inputs(2), shapes)


def _traced(kind: type[nn.Module], inputs: list[Tensor], shapes: object) -> Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind().eval()
    module = trimtab.trace(model, tuple(inputs), dynamic_shapes=shapes)  # type: ignore[arg-type]
    return trimtab.optimize(module, "cleanup,fuse").module
