"""Which weights are parameters: ONNX files do not say, the ops that read them do.

Layers may still be in pieces here: a linear layer is a matrix product and an addition, a norm ends in a product and an
addition with a vector.
"""

from __future__ import annotations

from collections.abc import Iterator

from trimtab.ir.core import Module, Value
from trimtab.ir.op import Op
from trimtab.ir.ops import (
    Add,
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
    Matmul,
    Mul,
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
        for value in _parameters(op):
            if value.is_weight:
                weight = module.weights[value.weight]
                weight.trainable = weight.type.dtype.is_floating


def _parameters(op: Op) -> Iterator[Value]:
    """The operands of an op that are parameters if they are weights."""
    if isinstance(op, LAYERS):
        for field, held in op.arguments():
            if field.name in PARAMETERS and isinstance(held, Value):
                yield held
    elif isinstance(op, Matmul):
        yield from (value for value in op.operands if value.type.rank == 2)
    elif isinstance(op, Add | Mul):
        yield from (value for value in op.operands if value.type.rank == 1 and value.type.elements != 1)
