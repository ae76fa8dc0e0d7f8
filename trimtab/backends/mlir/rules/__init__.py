"""The lowering rules, one file a family of ops. Importing this package registers them all."""

from trimtab.backends.mlir.rules import (
    attention,
    contraction,
    convolution,
    creation,
    elementwise,
    indexing,
    movement,
    normalization,
    pooling,
    quantization,
    reduction,
    resize,
    sorting,
)
from trimtab.backends.mlir.rules.registry import rule_for

__all__ = ["attention", "contraction", "convolution", "creation", "elementwise", "indexing", "movement",
           "normalization", "pooling", "quantization", "reduction", "resize", "rule_for", "sorting"]  # fmt: skip
