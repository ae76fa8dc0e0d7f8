"""Reductions and softmax. Half types accumulate in float32, and results round once, as in torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import te, tirx

from trimtab.backends.tvm.codegen.comparison import eq, is_float, is_nan, is_nonzero
from trimtab.backends.tvm.rules.registry import (
    Expr,
    Operand,
    Scope,
    cast,
    compute,
    const,
    i64,
    lowers,
    tvm_dtype,
    work_type,
)
from trimtab.ir import ops


def reducer(kind: str) -> Callable[..., Expr]:
    def start(dtype: str) -> Expr:
        if kind in ("sum", "prod"):
            return const(int(kind == "prod"), dtype)
        if is_float(dtype):
            return const(-math.inf if kind == "max" else math.inf, dtype)
        return tirx.min_value(dtype) if kind == "max" else tirx.max_value(dtype)

    # te.comm_reducer looks into the code of these functions: they must be lambdas.
    step = {
        "sum": lambda a, b: a + b, "prod": lambda a, b: a * b,
        "max": lambda a, b: tirx.max(a, b), "min": lambda a, b: tirx.min(a, b),
    }[kind]  # fmt: skip
    return te.comm_reducer(step, start, name=kind)


def reduce(
    shape: Sequence[Expr],
    dims: Sequence[int],
    keepdim: bool,
    kind: str,
    value: Callable[..., Expr],
    name: str,
    *,
    materialize: bool = False,
) -> Any:
    """Reduce ``value(*indices)`` over the axes ``dims`` of ``shape``; ``kind`` is sum, prod, max or min."""
    axes = {dim: te.reduce_axis((i64(0), shape[dim]), "k") for dim in sorted(dims)}
    kept = [i64(1) if d in axes else extent for d, extent in enumerate(shape) if keepdim or d not in axes]

    def element(*indices: Expr) -> Expr:
        rest = list(indices)
        source = []
        for d in range(len(shape)):
            if d in axes:
                source.append(axes[d].var)
                if keepdim:
                    rest.pop(0)
            else:
                source.append(rest.pop(0))
        return reducer(kind)(value(*source), axis=list(axes.values()))

    return compute(kept, element, name, materialize=materialize)


@lowers(ops.Sum, ops.Mean, ops.Prod, ops.Amax, ops.Amin, absorbs_permute=True)
def _reduce(op: Any, scope: Scope, x: Operand) -> Any:
    result = tvm_dtype(op.result.type.dtype)
    shape = scope.shape(op.result.type.shape)
    if not op.dims:
        return compute(shape, lambda *i: x(*i), op.name)
    if x.dtype == "bool":
        return _bool_reduce(op, scope, x)
    kind = {ops.Sum: "sum", ops.Mean: "sum", ops.Prod: "prod", ops.Amax: "max", ops.Amin: "min"}[type(op)]
    work = work_type(x.dtype)
    reduced = reduce(x.shape, op.dims, op.keepdim, kind, lambda *i: cast(x(*i), work), op.name)
    if isinstance(op, ops.Mean):
        count: Expr = i64(1)
        for dim in op.dims:
            count = count * x.shape[dim]
        return compute(shape, lambda *i: cast(reduced(*i) / tirx.Cast(work, count), result), "mean")
    return reduced if work == result else compute(shape, lambda *i: cast(reduced(*i), result), op.name)


def _bool_reduce(op: Any, scope: Scope, x: Operand) -> Any:
    kind = "min" if isinstance(op, ops.Prod | ops.Amin | ops.All) else "max"
    reduced = reduce(x.shape, op.dims, op.keepdim, kind, lambda *i: tirx.Cast("int8", is_nonzero(x(*i))), op.name)
    return compute(scope.shape(op.result.type.shape), lambda *i: reduced(*i) != const(0, "int8"), op.name)


@lowers(ops.Any, ops.All)
def _truth_reduce(op: Any, scope: Scope, x: Operand) -> Any:
    if not op.dims:
        return compute(scope.shape(op.result.type.shape), lambda *i: is_nonzero(x(*i)), op.name)
    return _bool_reduce(op, scope, x)


@lowers(ops.Argmax, ops.Argmin)
def _arg_extremum(op: Any, scope: Scope, x: Operand) -> Any:
    kind = "max" if isinstance(op, ops.Argmax) else "min"

    def read(*indices: Expr) -> Expr:
        value = x(*indices)
        return cast(value, "int8") if x.dtype == "bool" else cast(value, work_type(x.dtype))

    best = reduce(x.shape, (op.dim,), True, kind, read, "best", materialize=True)

    def position(*indices: Expr) -> Expr:
        value, winner = read(*indices), best(*indices[: op.dim], i64(0), *indices[op.dim + 1 :])
        found = eq(value, winner)
        if is_float(x.dtype):
            found = tirx.Or(found, is_nan(value))
        return tirx.Select(found, cast(indices[op.dim], index), tirx.max_value(index))

    # A vector holds twice as many positions of 32 bits.
    size = op.x.type.shape[op.dim]
    index = "int32" if isinstance(size, int) and size < 1 << 31 else "int64"
    first = reduce(x.shape, (op.dim,), op.keepdim, "min", position, op.name)
    shape = scope.shape(op.result.type.shape)
    return first if index == "int64" else compute(shape, lambda *i: tirx.Cast("int64", first(*i)), "position")


@lowers(ops.Softmax, ops.LogSoftmax)
def _softmax(op: Any, scope: Scope, x: Operand) -> Any:
    work, result = work_type(x.dtype), tvm_dtype(op.result.type.dtype)
    if x.rank == 0:
        return compute([], lambda: const(float(isinstance(op, ops.Softmax)), result), op.name)

    def read(*indices: Expr) -> Expr:
        return cast(x(*indices), work)

    def at_row(tensor: Any, indices: Sequence[Expr]) -> Expr:
        return tensor(*indices[: op.dim], i64(0), *indices[op.dim + 1 :])

    largest = reduce(x.shape, (op.dim,), True, "max", read, "largest", materialize=True)
    if isinstance(op, ops.LogSoftmax):
        total = reduce(x.shape, (op.dim,), True, "sum", lambda *i: te.exp(read(*i) - at_row(largest, i)), "total")
        logs = compute(total.shape, lambda *i: te.log(total(*i)), "logs", materialize=True)
        return compute(x.shape, lambda *i: cast(read(*i) - at_row(largest, i) - at_row(logs, i), result), "log_softmax")
    powers = compute(x.shape, lambda *i: te.exp(read(*i) - at_row(largest, i)), "powers", materialize=True)
    total = reduce(x.shape, (op.dim,), True, "sum", lambda *i: powers(*i), "total")
    scale = compute(total.shape, lambda *i: const(1, work) / total(*i), "scale", materialize=True)
    return compute(x.shape, lambda *i: cast(powers(*i) * at_row(scale, i), result), "softmax")
