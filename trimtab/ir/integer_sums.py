"""Zero points of products: what the sums of products of integers have too much."""

from __future__ import annotations

from collections.abc import Callable

from trimtab.ir.core import Value
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op
from trimtab.ir.ops import Add, Cast, DimValue, Full, Mul, Sub, Sum


def zero_of_product(
    emit: Callable[[Op], Value],
    x: Value,
    x_zero: Value | None,
    y_sums: Callable[[], Value],
    y_zero: Value | None,
) -> Value | None:
    """The z in ``sum((x - x_zero) * (y - y_zero)) = sum(x * y) - z``, the sums over the last axis of x.

    With both zero points this is ``x_zero * sum(y) + y_zero * (sum(x) - K * x_zero)``. It is computed in 32 bits and
    wraps as the sums do, so that the difference is exact whenever the left side has 32 bits.

    Args:
        emit: puts an op into the graph.
        x: integers ``[..., M, K]``, or ``[..., K]`` for a linear layer.
        x_zero: i32, of a shape that broadcasts to ``[..., M, 1]``; None for zero.
        y_sums: makes the sums of y over K in i32, in a shape that broadcasts to the product's.
        y_zero: i32, of a shape that broadcasts to the product's and has no rows, such as ``[N]``; None for zero.

    Returns:
        z in i32, in a shape that broadcasts to the product's; None when it is zero.
    """
    by_columns = None if x_zero is None else emit(Mul(x_zero, y_sums()))
    if y_zero is None:
        return by_columns
    sums = emit(Sum(emit(Cast(x, DType.I32)), dims=(x.type.rank - 1,), keepdim=True))
    if x_zero is not None:
        depth = x.type.shape[-1]
        count = Full(value=depth, dtype=DType.I32) if isinstance(depth, int) else DimValue(dim=depth, dtype=DType.I32)
        sums = emit(Sub(sums, emit(Mul(emit(count), x_zero))))
    by_rows = emit(Mul(y_zero, sums))
    return by_rows if by_columns is None else emit(Add(by_columns, by_rows))
