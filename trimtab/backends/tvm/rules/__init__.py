"""How each op of the IR is expressed in TVM: one file a family.

Importing this package fills the registry; :func:`trimtab.backends.tvm.rules.registry.rule_for` looks ops up.
"""

from __future__ import annotations

from trimtab.backends.tvm.rules import (  # noqa: F401  imported for their registrations
    attention,
    contraction,
    convolution,
    creation,
    elementwise,
    groupwise,
    indexing,
    movement,
    normalization,
    pooling,
    quantization,
    reduction,
    resize,
    rotary,
    scattering,
    sorting,
)
from trimtab.backends.tvm.rules.registry import Rule, rule_for

__all__ = ["Rule", "rule_for"]
