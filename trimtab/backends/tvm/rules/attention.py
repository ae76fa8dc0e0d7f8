"""Attention as one kernel: scores, softmax and the weighted sum of a tile of queries stay in cache."""

from __future__ import annotations

from typing import Any

from trimtab.backends.tvm.codegen.attention import AttentionProblem, attention_loops
from trimtab.backends.tvm.codegen.expression import Expr
from trimtab.backends.tvm.rules.registry import Operand, Scope, Target, cast, i64, loops_for, work_type
from trimtab.ir import ops
from trimtab.ir.dims import Dim


def _aligned(operand: Operand, batch: tuple[Expr, ...]) -> list[Expr]:
    """Batch positions for an operand that may have fewer or unit leading axes."""
    lead = operand.rank - 3
    own = batch[len(batch) - lead :] if lead else ()
    return [i64(0) if dim == 1 else at for dim, at in zip(operand.type.shape, own, strict=False)]


def _known_axes(op: Any) -> str:
    heads, key_heads, width = op.q.type.shape[-3], op.k.type.shape[-3], op.v.type.shape[-1]
    if not isinstance(width, int):
        return "the size of a head's values must be known"
    if heads != key_heads and not (isinstance(heads, int) and isinstance(key_heads, int)):
        return "the number of heads must be known when it differs from the number of key heads"
    return ""


def _is_of_keys(op: Any) -> bool:
    """Whether the mask is the same for all queries and query heads that read a key head."""
    if op.mask is None or op.mask.type.rank < 2 or op.mask.type.shape[-2] != 1:
        return False
    own_keys = op.q.type.shape[-3] == op.k.type.shape[-3]
    return own_keys or op.mask.type.rank == 2 or op.mask.type.shape[-3] == 1


@loops_for(ops.Attention, absorbs_permute=True, check=_known_axes)
def _attention(
    op: Any, scope: Scope, outs: list[Target], q: Operand, k: Operand, v: Operand, mask: Operand | None
) -> Any:
    work = work_type(q.dtype)
    heads: Dim = op.q.type.shape[-3]
    known = isinstance(heads, int)

    def place(at: tuple[Expr, ...]) -> tuple[Expr, ...]:
        """The kernel's position as one of the operands: a symbolic head axis is one more batch axis of one head."""
        return at if known else (*at[:-3], *at[-2:])

    def reader(operand: Operand) -> Any:
        def read(*at: Expr) -> Expr:
            *batch, head, position, channel = place(at)
            return cast(operand(*_aligned(operand, tuple(batch)), head, position, channel), work)

        return read

    def read_mask(*at: Expr) -> Expr:
        assert mask is not None
        value = mask.broadcast(place(at))
        return value if mask.dtype == "bool" else cast(value, work)

    (out,) = outs
    return attention_loops(scope.machine, AttentionProblem(
        batch=scope.shape(op.result.type.shape[: -3 if known else -2]),
        heads=heads if isinstance(heads, int) else 1,
        key_heads=op.k.type.shape[-3] if known else 1,
        queries=q.shape[-2], keys=k.shape[-2], depth=q.shape[-1], width=op.v.type.shape[-1],
        q=reader(q), k=reader(k), v=reader(v), mask=read_mask if mask is not None else None,
        mask_is_bool=mask is not None and mask.dtype == "bool", mask_is_of_keys=_is_of_keys(op),
        out=lambda *at, value: out.store(place(at), cast(value, out.dtype)),
        scale=op.scale, causal=op.causal, dtype=work,
    ))  # fmt: skip
