"""The blocks of a transformer by structure: from the residual that one attention is added to, to that of the next.

Less is asked of a block than of a layer whose tokens are to be reduced (:mod:`trimtab.passes.tokens.stream`): attention
may be causal, on any number of tokens, and in pieces; what lies between attention and the residual sum may be anything
that is computed from it, such as integer products with their scales.  So the blocks of a module and of a lossy form
of it are found alike.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.errors import PassError
from trimtab.ir import ops
from trimtab.ir.core import Module, Value
from trimtab.ir.op import Op
from trimtab.passes.softmax1 import attends


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        start: the residual ``[..., C]`` that its attention reads and is added to; in a last block that computes few
            tokens, their rows.
        end: what the next block starts with, or the last residual sum, with the norm behind it in a post-norm model.
    """

    start: Value
    end: Value


def find_blocks(module: Module) -> list[Block]:
    """The blocks of ``module.main``, in order of execution.

    Raises:
        PassError: there is no attention whose result is added to the residual that it was computed from; the message
            says how many were looked at.
    """
    mixing = [op for op in module.main.ops if attends(op)]
    sums = [found for op in mixing if (found := _residual_sum(op)) is not None]
    starts = list(dict.fromkeys(residual for residual, _ in sums))
    if not starts:
        raise PassError(
            "the blocks of this model cannot be found",
            values={"attentions": len(mixing), "with a residual": 0},
            rule="a block begins with the residual that the result of an attention is added to",
            fix="run the group `raise` first; leave the pass out for a model without residuals around attention",
            location=mixing[0].location if mixing else None,
        )
    ends = [*map(_whole, starts[1:]), _last(sums[-1][1])]
    return [Block(start, end) for start, end in zip(starts, ends, strict=True)]


def _residual_sum(mixing: Op) -> tuple[Value, Value] | None:
    """The residual that the result of an attention is added to, and the sum; None where there is none.

    It is the first sum behind the attention of which one part comes from the attention and the other one does not, but
    is among what the attention was computed from.
    """
    graph = mixing.graph
    assert graph is not None
    before = _ancestors(mixing)
    behind = set(mixing.results)
    for op in graph.ops:
        parts = [value in behind for value in op.operands]
        if not any(parts):
            continue
        behind.update(op.results)
        if isinstance(op, ops.Add) and not all(parts):
            residual = op.operands[parts.index(False)]
            if (
                _whole(residual) in before
                and residual.type == op.result.type
                and isinstance(residual.type.shape[-1], int)
            ):
                return residual, op.result
    return None


def _whole(residual: Value) -> Value:
    """The stream that ``residual`` has rows of."""
    while isinstance(residual.producer, ops.Slice):
        residual = residual.producer.x
    return residual


def _ancestors(op: Op) -> set[Value]:
    """All values that ``op`` was computed from."""
    found: set[Value] = set()
    waiting = list(op.operands)
    while waiting:
        value = waiting.pop()
        if value not in found and not value.is_weight:
            found.add(value)
            waiting += value.producer.operands if value.producer is not None else ()
    return found


def _last(total: Value) -> Value:
    """The last value of the residual stream from the sum ``total`` on: through further sums, and the norms between."""
    between = False
    while True:
        norm = _only_norm(total)
        if (after := _next_sum(total)) is not None:
            total = after
        elif norm is not None and (after := _next_sum(norm)) is not None:
            total, between = after, True
        else:
            return norm if between and norm is not None else total


def _next_sum(value: Value) -> Value | None:
    """The sum of ``value`` and something that is computed from it or beside it."""
    for user in value.users:
        if isinstance(user, ops.Add) and user.result.type == value.type:
            other = user.operands[1] if user.operands[0] is value else user.operands[0]
            if other is not value and not other.is_weight and other.type == value.type:
                return user.result
    return None


def _only_norm(value: Value) -> Value | None:
    """The result of the norm that is all that reads ``value``."""
    users = value.users
    if len(users) == 1 and isinstance(users[0], ops.LayerNorm | ops.RmsNorm) and not value.is_output:
        return users[0].results[0]
    return None
