"""Constants, ranges and sizes."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from trimtab.backends.tvm.rules.registry import Expr, Scope, cast, compute, const, i64, lowers, tvm_dtype
from trimtab.ir import ops


def constant_of(op: Any, scope: Scope) -> Expr | None:
    """The value of an op whose elements are all one constant expression, else None."""
    if isinstance(op, ops.Full):
        return const(op.value, tvm_dtype(op.dtype))
    if isinstance(op, ops.DimValue):
        return cast(scope.dim(op.dim), tvm_dtype(op.dtype))
    return None


@lowers(ops.Full, ops.DimValue)
def _constant(op: Any, scope: Scope) -> Any:
    value = constant_of(op, scope)
    return compute(scope.shape(op.result.type.shape), lambda *indices: value, op.name)


@lowers(ops.Arange)
def _arange(op: Any, scope: Scope) -> Any:
    dtype = tvm_dtype(op.dtype)

    def element(index: Expr) -> Expr:
        if op.dtype.is_floating:
            wide = tirx.Cast("float64", index) * const(float(op.step), "float64") + const(float(op.start), "float64")
            return cast(wide, dtype) if dtype == "float64" else cast(cast(wide, "float32"), dtype)
        if isinstance(op.step, int) and isinstance(op.start, int):
            return cast(index * i64(op.step) + i64(op.start), dtype)
        wide = tirx.Cast("float64", index) * const(float(op.step), "float64") + const(float(op.start), "float64")
        return cast(tirx.Cast("int64", wide), dtype)

    return compute(scope.shape(op.result.type.shape), element, op.name)
