"""Rotary embedding as one pass over the rows: a pair of channels is read once and written once."""

from __future__ import annotations

from typing import Any

from trimtab.backends.tvm.codegen.expression import Expr, int_value, product
from trimtab.backends.tvm.codegen.loops import bind_all, loop, sequence, vectors
from trimtab.backends.tvm.rules.movement import unflatten
from trimtab.backends.tvm.rules.registry import Operand, Scope, Target, cast, i64, loops_for, work_type
from trimtab.ir import ops


@loops_for(ops.RotaryEmbedding, absorbs_permute=True)
def _rotary_embedding(op: Any, scope: Scope, outs: list[Target], x: Operand, cos: Operand, sin: Operand) -> Any:
    """Permutations before and after are read and written through, so that heads need not be moved on their own."""
    (out,) = outs
    work, lanes = work_type(x.dtype), scope.machine.lanes(x.dtype)
    width = op.cos.type.shape[-1]
    leading, leading_shape = x.shape[:-1], op.x.type.shape[:-1]

    def turn(at: list[Expr], pair: Expr) -> Any:
        left, right = (pair * i64(2), pair * i64(2) + i64(1)) if op.interleaved else (pair, pair + i64(width // 2))
        a, b = (cast(x(*at, channel), work) for channel in (left, right))

        def factor(table: Operand, channel: Expr) -> Expr:
            return cast(table.broadcast([*at, channel], (*leading_shape, width)), work)

        low = a * factor(cos, left) - b * factor(sin, left)
        high = b * factor(cos, right) + a * factor(sin, right)
        return sequence(out.store([*at, left], cast(low, out.dtype)), out.store([*at, right], cast(high, out.dtype)))

    def row(flat: Expr) -> Any:
        def channels(bound: dict[Any, Expr]) -> Any:
            at = [bound[axis] for axis in range(len(leading))]

            def copy(channel: Expr) -> Any:
                return out.store([*at, channel + i64(width)], x(*at, channel + i64(width)))

            rotated = vectors(width // 2, lanes, lambda pair: turn(at, pair))
            return sequence(rotated, vectors(x.shape[-1] - i64(width), lanes, copy))

        return bind_all(dict(enumerate(unflatten(flat, leading))), channels)

    rows = product(leading)
    size = int_value(rows * x.shape[-1])
    small = size is not None and size < scope.machine.serial_work
    return loop(rows, row, "serial" if small else "parallel", "row")
