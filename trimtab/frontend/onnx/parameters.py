"""Which weights are parameters: ONNX files do not say, the ops that read them do."""

from __future__ import annotations

from trimtab.ir.core import Module
from trimtab.ir.ops import (
    BatchNorm,
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    Embedding,
    GroupNorm,
    LayerNorm,
    Linear,
    RmsNorm,
)

LAYERS = (
    BatchNorm, Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, Embedding, GroupNorm, LayerNorm, Linear,
    RmsNorm,
)  # fmt: skip
PARAMETERS = ("weight", "bias", "table")
"""Operands of layers that training adjusts; the mean and variance of a batch norm are statistics."""


def mark_parameters(module: Module) -> None:
    """Set ``trainable`` on the floating weights that layers of ``module`` have as their parameters."""
    for op in module.walk():
        if isinstance(op, LAYERS):
            for field, held in op.arguments():
                if field.name in PARAMETERS and held is not None and not isinstance(held, tuple) and held.is_weight:
                    weight = module.weights[held.weight]
                    weight.trainable = weight.type.dtype.is_floating
