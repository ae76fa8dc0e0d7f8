"""A small vision transformer, written out so that tests can run it with their own reduction of tokens in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trimtab
from trimtab.ir import Module

Head = Literal["class", "distilled", "mean", "dense"]


class Block(nn.Module):
    """A pre-norm block with attention in one packed projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[B, H, N, D]``."""
        batch, count, width = x.shape
        packed = self.qkv(self.norm1(x)).reshape(batch, count, 3, self.heads, width // self.heads)
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        return q, k, v

    def attend(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x and what attention adds to it; ``bias`` is added to the scores."""
        q, k, v = self.heads_of(x)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return x + self.proj(mixed.transpose(1, 2).reshape(x.shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attend(x))

    def mlp(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class TinyVit(nn.Module):
    """Patches of 4 pixels, blocks, a norm, and a head.

    Args:
        head: what the output is read from: the class token; the class and distillation tokens; the mean of all
            tokens; or each token, without a head.
        size: pixels of the image's side.
        depth: blocks.
    """

    def __init__(self, head: Head = "class", size: int = 20, depth: int = 3, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.kind = head
        self.special = {"class": 1, "distilled": 2, "mean": 0, "dense": 1}[head]
        tokens = (size // 4) ** 2 + self.special
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.first = nn.Parameter(torch.randn(1, self.special, width))
        self.positions = nn.Parameter(torch.randn(1, tokens, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def embed(self, image: Tensor) -> Tensor:
        patches = self.patches(image).flatten(2).transpose(1, 2)
        if self.special:
            patches = torch.cat((self.first.expand(image.shape[0], -1, -1), patches), 1)
        return patches + self.positions

    def read(self, x: Tensor) -> Tensor:
        """The output from the tokens after the last block."""
        x = self.norm(x)
        if self.kind == "dense":
            return x
        if self.kind == "mean":
            return self.head(x.mean(1))
        return self.head(x[:, 0] + x[:, 1] if self.kind == "distilled" else x[:, 0])

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image)
        for block in self.blocks:
            x = block(x)
        return self.read(x)


def tiny_vit(head: Head = "class", **options: int) -> TinyVit:
    """The model with weights that depend on the options alone."""
    torch.manual_seed(7)
    return TinyVit(head, **options).eval()


def images(batch: int, size: int = 20, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def traced(model: nn.Module, size: int = 20) -> Module:
    """The module with a symbolic batch."""
    return trimtab.trace(model, (images(2, size),), dynamic_shapes={"image": {0: "batch"}})


def in_double(model: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], image: Tensor) -> Tensor:
    """What ``run`` computes with ``model`` in float64."""
    with torch.no_grad():
        result = run(model.double(), image.double())
    model.float()
    return result
