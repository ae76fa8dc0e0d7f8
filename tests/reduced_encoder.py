"""Encoders run in torch with a reduction of tokens between attention and MLP, one sample at a time, without any of
Trimtab: what passes that reduce tokens are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from tiny_vit import Block, TinyVit
from torch import Tensor, nn

import trimtab
from trimtab.ir import Module

Reduce = Callable[[int, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Layer, tokens [N, C], attention [H, N, N], keys [H, N, D] and sizes [N], to tokens [n, C] and sizes [n]."""

LENGTH, WORDS, WIDTH = 12, 20, 32


class TextBlock(Block):
    """A block with its norms behind the sums, as in BERT."""

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, count, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return q, k, v

    def attend(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.norm1(super().attend(x, bias))

    def mlp(self, x: Tensor) -> Tensor:
        return self.norm2(x + self.fc2(F.gelu(self.fc1(x))))


class TinyText(nn.Module):
    """Words, post-norm blocks that mask padding, and the mean of what is not padding, with ``class_too`` beside the
    first token."""

    def __init__(self, class_too: bool, additive: bool, depth: int) -> None:
        super().__init__()
        self.special, self.additive = int(class_too), additive
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Parameter(torch.randn(1, LENGTH, WIDTH))
        self.blocks = nn.ModuleList(TextBlock(WIDTH, 2) for _ in range(depth))
        self.head = nn.Linear(WIDTH, 5)

    def embed(self, ids: Tensor) -> Tensor:
        return self.words(ids) + self.places

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x, keys = self.embed(ids), mask[:, None, None, :].bool()
        if self.additive:
            keys = torch.where(keys, 0.0, torch.finfo(torch.float32).min)
        for block in self.blocks:
            x = block.mlp(block.attend(x, keys))
        weights = mask[:, :, None].to(x.dtype)
        pooled = (x * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return self.head(torch.cat((x[:, 0] + pooled, pooled)) if self.special else pooled)


def tiny_text(class_too: bool = False, additive: bool = False, depth: int = 3) -> TinyText:
    """The model with weights that depend on the options alone."""
    torch.manual_seed(8)
    return TinyText(class_too, additive, depth).eval()


def sentences(lengths: Sequence[int], padding: int = 0) -> tuple[Tensor, Tensor]:
    """Words and masks of sentences; what stands in their padding is drawn from the seed ``padding``."""
    shape = (len(lengths), LENGTH)
    ids = torch.randint(0, WORDS, shape, generator=torch.Generator().manual_seed(1))
    other = torch.randint(0, WORDS, shape, generator=torch.Generator().manual_seed(padding))
    mask = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
    return torch.where(mask, ids, other), mask.long()


def run_images(model: TinyVit, image: Tensor, reduce: Reduce, proportional: bool = False) -> Tensor:
    """``model(image)`` in float64 with ``reduce`` in every layer."""

    def one(x: Tensor) -> Tensor:
        tokens, sizes = _encoded(model, x, torch.ones(x.shape[1], dtype=x.dtype), reduce, proportional)
        if model.kind == "mean":
            return model.head(_mean(model.norm(tokens), sizes))
        return model.read(tokens)

    with torch.no_grad():
        result = torch.cat([one(x[None]) for x in model.double().embed(image.double())])
    model.float()
    return result


def run_text(model: TinyText, ids: Tensor, mask: Tensor, reduce: Reduce, proportional: bool = False) -> Tensor:
    """``model(ids, mask)`` in float64 with ``reduce`` in every layer."""
    with torch.no_grad():
        pooled, first = [], []
        for x, own in zip(model.double().embed(ids), mask, strict=True):
            tokens, sizes = _encoded(model, x[None], own.double(), reduce, proportional)
            pooled.append(_mean(tokens, sizes))
            first.append(tokens[:, 0])
        means = torch.cat(pooled)
        result = model.head(torch.cat((torch.cat(first) + means, means)) if model.special else means)
    model.float()
    return result


def _mean(x: Tensor, sizes: Tensor) -> Tensor:
    return (x * sizes[None, :, None]).sum(1) / sizes.sum()


def _encoded(
    model: TinyVit | TinyText, x: Tensor, sizes: Tensor, reduce: Reduce, proportional: bool
) -> tuple[Tensor, Tensor]:
    """Tokens [1, n, C] and sizes [n] behind the last block."""
    for number, block in enumerate(model.blocks):
        q, k, _ = block.heads_of(x)
        counts = sizes if proportional else (sizes > 0).to(x.dtype)
        bias = counts.log()[None, None, None]  # -inf for padding
        attention = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5 + bias).softmax(3)
        tokens, sizes = reduce(number, block.attend(x, bias)[0], attention[0], k[0], sizes)
        x = block.mlp(tokens[None])
    return x, sizes


class _DeitS(nn.Module):
    """The work of DeiT-S at 224 pixels, with one block's weights for all twelve."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.block, self.head = nn.Conv2d(3, 384, 16, 16), Block(384, 6), nn.Linear(384, 1000)
        self.block.fc1, self.block.fc2 = nn.Linear(384, 1536), nn.Linear(1536, 384)
        self.first = nn.Parameter(torch.zeros(1, 1, 384))

    def forward(self, image: Tensor) -> Tensor:
        patches = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat((self.first.expand(len(image), -1, -1), patches), 1)
        for _ in range(12):
            x = self.block(x)
        return self.head(F.layer_norm(x[:, 0], (384,)))


@cache
def deit_s_module() -> Module:
    """A module with the multiply-accumulates of DeiT-S for one image."""
    module = trimtab.trace(_DeitS().eval(), (torch.zeros(1, 3, 224, 224),))
    return trimtab.optimize(module, "cleanup", check="never").module
