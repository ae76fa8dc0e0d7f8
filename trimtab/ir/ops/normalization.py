"""Normalisations, kept whole."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.ir.core import Value
from trimtab.ir.op import Op


class LayerNorm(Op):
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last ``axes`` axes (Ba et al., arXiv 1607.06450).

    weight and bias have the shape of these axes; the variance is the biased one.
    """

    x: Value
    weight: Value | None = None
    bias: Value | None = None
    axes: int = 1
    eps: float = 1e-5

    @staticmethod
    def reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, axes: int, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-axes:], weight, bias, eps)


class RmsNorm(Op):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last ``axes`` axes (Zhang and Sennrich, arXiv 1910.07467)."""

    x: Value
    weight: Value | None = None
    axes: int = 1
    eps: float = 1e-6

    @staticmethod
    def reference(x: Tensor, weight: Tensor | None, *, axes: int, eps: float) -> Tensor:
        return F.rms_norm(x, x.shape[-axes:], weight, eps)


class GroupNorm(Op):
    """Normalise each of ``groups`` groups of channels of x ``[B, C, ...]``, then scale and shift by channel
    (Wu and He, arXiv 1803.08494). ``groups == C`` is instance normalisation."""

    x: Value
    weight: Value | None = None
    bias: Value | None = None
    groups: int
    eps: float = 1e-5

    @staticmethod
    def reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, groups: int, eps: float) -> Tensor:
        return F.group_norm(x, groups, weight, bias, eps)


class BatchNorm(Op):
    """Inference-mode batch normalisation of x ``[B, C, ...]`` with given mean and variance ``[C]``."""

    x: Value
    mean: Value
    variance: Value
    weight: Value | None = None
    bias: Value | None = None
    eps: float = 1e-5

    @staticmethod
    def reference(
        x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float
    ) -> Tensor:
        # Written out: torch's own batch norm refuses inputs of rank 1 and mixes precisions silently.
        shape = [1, -1] + [1] * (x.dim() - 2)
        scale = torch.rsqrt(variance + eps)
        if weight is not None:
            scale = scale * weight
        y = (x - mean.reshape(shape)) * scale.reshape(shape)
        return y if bias is None else y + bias.reshape(shape)
