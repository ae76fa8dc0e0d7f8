"""The demo's model: a small vision transformer for 8x8 images of digits. Imported only when the demo runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """A pre-norm transformer block: attention and a two-layer perceptron, each added to its input.

    Args:
        width: features of a token.
        heads: attention heads; they divide ``width``.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """f32[batch, tokens, width] to the same."""
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x + self.projection(attended.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class DigitTransformer(nn.Module):
    """A vision transformer: patches, a class token, blocks, and a linear classifier on the class token.

    Args:
        width: features of a token.
        depth: number of blocks.
        heads: attention heads.
        patch: side of a patch in pixels.
        stride: pixels from one patch to the next; ``patch`` by default, so that patches do not overlap.
        padding: pixels around the image, in the middle between black and white, that patches may reach into.
        patch_dropout: the largest share of patches to leave out in training, at random; each batch leaves out a share
            between none and this (after Liu et al., PatchDropout, arXiv 2208.07220).
    """

    def __init__(
        self,
        width: int = 48,
        depth: int = 3,
        heads: int = 4,
        patch: int = 2,
        stride: int | None = None,
        padding: int = 0,
        patch_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.patch_dropout = patch_dropout
        stride = stride or patch
        self.patches = nn.Conv2d(1, width, patch, stride=stride, padding=padding)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        # A patch is four pixels and says little without its place: places start as large as the patches' features.
        self.positions = nn.Parameter(torch.randn(1, 1 + ((8 + 2 * padding - patch) // stride + 1) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """f32[batch, 1, 8, 8] with pixels from -1 to 1, to logits f32[batch, 10]."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        if self.training and self.patch_dropout:
            x = self._without_some(x)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x[:, 0]))
        return logits

    def _without_some(self, x: torch.Tensor) -> torch.Tensor:
        """f32[batch, 1 + patches, width] to the same with fewer patches, others for each image."""
        batch, tokens, width = x.shape
        kept = tokens - 1 - int(torch.rand(()) * self.patch_dropout * (tokens - 1))
        places = 1 + torch.rand(batch, tokens - 1).topk(kept).indices
        return torch.cat([x[:, :1], x.gather(1, places[:, :, None].expand(-1, -1, width))], dim=1)
