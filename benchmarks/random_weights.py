"""Random weights under which a wrong import cannot hide.

A freshly built model is full of values that make mistakes invisible: norms with weight one and bias zero, layer
scales of 1e-6, zero position tables, and linear weights so small that every softmax is flat. `randomize` replaces
them so that each parameter, and each buffer that inference reads, changes the outputs measurably.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_SMALLEST_SPREAD = 0.1
"""Parameters with a smaller standard deviation than this are redrawn: their effect would drown in rounding."""


def _matrix_variance(module: nn.Module, weight: Tensor) -> float | None:
    """Variance for the weight of a matrix-like module, None for any other module.

    1/fan-in keeps the variance of what a linear layer is given. Convolutions are followed by an activation that
    halves it, so they get 2/fan-in (He et al., 2015, arXiv:1502.01852).
    """
    if isinstance(module, nn.Linear):
        return 1.0 / module.in_features
    if isinstance(module, nn.modules.conv._ConvNd):
        return 2.0 * module.groups / weight.shape[0] if module.transposed else 2.0 / weight[0].numel()
    if type(module).__name__ == "Conv1D" and weight.ndim == 2:  # GPT-2's linear layer with a transposed weight
        return 1.0 / weight.shape[0]
    return None


def _draw(module: nn.Module, name: str, parameter: Tensor) -> Tensor | None:
    """New values for one parameter, or None to keep the ones it has."""
    variance = _matrix_variance(module, parameter)
    if name == "weight" and variance is not None:
        return torch.randn_like(parameter) * math.sqrt(variance)
    if isinstance(module, nn.Embedding):
        return torch.randn_like(parameter)
    spread = 0.0 if parameter.numel() < 2 else float(parameter.std())
    centre = float(parameter.mean())
    if spread >= _SMALLEST_SPREAD:
        return None
    is_norm_weight = name == "weight" and parameter.ndim == 1
    if is_norm_weight or (name != "bias" and spread == 0.0 and centre != 0.0):  # the latter: a layer scale
        return torch.rand_like(parameter) + 0.5
    return 0.3 * torch.randn_like(parameter)


@torch.no_grad()
def randomize(model: nn.Module) -> nn.Module:
    """Redraws the degenerate weights and statistics of ``model`` in place, from the global torch generator.

    Linear and convolution weights become normal with a variance that keeps activations and attention scores of
    order one; embeddings become standard normal; constant and near-constant parameters become random; batch
    norm statistics get means around 0 and variances in [0.8, 2.0]. Parameters that already vary (state-space
    matrices, weight-norm gains) keep their values. Shared parameters are drawn once.

    Returns:
        ``model``, in evaluation mode.
    """
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.is_floating_point():
                continue
            seen.add(id(parameter))
            drawn = _draw(module, name, parameter)
            if drawn is not None:
                parameter.copy_(drawn)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None  # set together by torch
            module.running_mean.normal_(0.0, 0.3)
            module.running_var.uniform_(0.8, 2.0)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx].normal_()
    return model.eval()
