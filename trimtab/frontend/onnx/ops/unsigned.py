"""Arithmetic on unsigned 16, 32 and 64-bit integers, which torch stores but does not compute with.

The values are computed as 64-bit signed integers and cast back, which wraps as unsigned arithmetic does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trimtab.frontend.onnx.node import Node
from trimtab.ir.core import Value
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op

WIDENED = (DType.U16, DType.U32, DType.U64)


def compute(node: Node, make: Callable[..., Op], operands: Sequence[Value], *, wraps: bool = False) -> Value:
    """``make(*operands)`` in a type torch computes with, the result cast back where it has the widened type.

    Args:
        wraps: whether the operation is the same on signed and unsigned bits, so that it is right for u64 too.
    """
    dtype = operands[0].type.dtype
    if dtype not in WIDENED:
        return node.emit(make(*operands))
    if dtype is DType.U64 and not wraps:
        node.refuse("unsigned 64-bit integers", "use int64", rule="the operation differs from that on signed integers")
    result = node.emit(make(*(node.cast(value, DType.I64) for value in operands)))
    return node.cast(result, dtype) if result.type.dtype is DType.I64 else result
