"""Which ops give the same results every time: only these may be merged or evaluated ahead of time."""

from __future__ import annotations

from trimtab.ir.op import Op
from trimtab.ir.ops import Opaque
from trimtab.ir.ops.opaque import resolve_operator


def is_deterministic(op: Op) -> bool:
    """False for a torch operator that draws random numbers; every op of our own is deterministic."""
    if not isinstance(op, Opaque):
        return True
    import torch

    return torch.Tag.nondeterministic_seeded not in resolve_operator(op.target).tags
