"""Linear layers whose weights are integers with scales.

Where the weights lie in panels, the code generator reads them as they are; elsewhere it widens element by element.
"""

from __future__ import annotations

from typing import Any

from tvm import te, tirx

from trimtab.backends.tvm.codegen.program import SCALED
from trimtab.backends.tvm.layouts import NIBBLES, Layout
from trimtab.backends.tvm.rules.registry import Expr, Operand, Scope, cast, compute, i64, lowers
from trimtab.ir import ops
from trimtab.ir.dtypes import DType

_KINDS = {DType.I4: "f32*i4", DType.U4: "f32*u4"}
_BYTES = {DType.I4: "f32*s8", DType.U4: "f32*u8", DType.I8: "f32*s8", DType.U8: "f32*u8"}
_ZEROS = {dtype: kind.partition("*")[2] for dtype, kind in _BYTES.items()}
"""Zero points as they are stored in panels."""


def _check(op: Any) -> str:
    dtypes = {value.type.dtype for value in (op.x, op.scale, op.bias) if value is not None}
    if dtypes != {DType.F32}:
        return f"the input, scales and bias must be f32, not {', '.join(sorted(map(str, dtypes)))}"
    return ""


def _kind(weight: Operand, scale: Operand, zero: Operand | None, group: int) -> str:
    """The kind of data, where the operands lie in panels of one width; else the empty text."""
    pairs = weight.layout.kind == "nibbles"
    if weight.layout.is_plain or scale.layout != Layout("panels", weight.layout.block) or (pairs and group % NIBBLES):
        return ""
    kind = (_KINDS if pairs else _BYTES)[weight.type.dtype]
    if zero is None:
        return kind
    is_packed = zero.layout == scale.layout and zero.type.dtype in _ZEROS
    return f"{kind}-{_ZEROS[zero.type.dtype]}" if is_packed else ""


@lowers(ops.LinearGroupwise, check=_check, reads_sub_byte=("weight", "zero"))
def _groupwise(
    op: Any, scope: Scope, x: Operand, weight: Operand, scale: Operand, zero: Operand | None, bias: Operand | None
) -> Any:
    work = "float32"
    k = te.reduce_axis((i64(0), x.shape[-1]), "k")

    def widened(row: Expr, column: Expr) -> Expr:
        group = tirx.floordiv(column, i64(op.group))
        value = cast(weight.packed(row, column), work)
        if zero is not None:
            value = value - cast(zero.packed(row, group), work)
        return value * scale.packed(row, group)

    def term(*at: Expr) -> Expr:
        *rows, column = at
        return te.sum(x(*rows, k.var) * widened(column, k.var), axis=k)

    shape = scope.shape(op.result.type.shape)
    kind = _kind(weight, scale, zero, op.group)
    product = te.compute(tuple(shape), term, name="linear", attrs={SCALED: kind} if kind else None)
    if bias is None:
        return product
    return compute(shape, lambda *at: product(*at) + bias.broadcast(at), "linear_bias")
