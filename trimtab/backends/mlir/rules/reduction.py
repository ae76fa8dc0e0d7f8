"""Reductions over axes."""

from __future__ import annotations

import math
from typing import Any

from torch_mlir import ir

from trimtab.backends.mlir.rules.normalization import mean_over
from trimtab.backends.mlir.rules.registry import lowers
from trimtab.backends.mlir.scalar import Scalar, cast, maximum, minimum, select, work_type
from trimtab.backends.mlir.tensors import Code, Tensor
from trimtab.ir import ops
from trimtab.ir.dtypes import DType
from trimtab.ir.types import TensorType


def _finished(op: Any, code: Code, made: Tensor) -> Tensor:
    made = made if made.shape == op.result.type.shape else code.reshape(made, op.result.type.shape)
    return made if made.type == op.result.type else code.elementwise(op.result.type, [made], lambda e: e)


@lowers(ops.Sum)
def _sum(op: Any, code: Code, x: Tensor) -> Tensor:
    work = work_type(x.dtype)
    return _finished(op, code, code.reduce(x, op.dims, 0, work, lambda e, so_far: so_far + e, op.keepdim))


@lowers(ops.Mean)
def _mean(op: Any, code: Code, x: Tensor) -> Tensor:
    return _finished(op, code, mean_over(code, x, op.dims)) if op.dims else x


@lowers(ops.Prod)
def _prod(op: Any, code: Code, x: Tensor) -> Tensor:
    work = work_type(x.dtype)
    return _finished(op, code, code.reduce(x, op.dims, 1, work, lambda e, so_far: so_far * e, op.keepdim))


@lowers(ops.Amax, ops.Amin)
def _extremum(op: Any, code: Code, x: Tensor) -> Tensor:
    largest = isinstance(op, ops.Amax)
    start = _lowest(x.dtype) if largest else _highest(x.dtype)
    pick = maximum if largest else minimum
    return _finished(op, code, code.reduce(x, op.dims, start, x.dtype, pick, op.keepdim))


def _lowest(dtype: DType) -> float | int:
    if dtype.is_floating:
        return -math.inf
    return 0 if str(dtype).startswith(("u", "b")) else -(1 << (dtype.bits - 1))


def _highest(dtype: DType) -> float | int:
    if dtype.is_floating:
        return math.inf
    if dtype is DType.BOOL:
        return 1
    return (1 << dtype.bits) - 1 if str(dtype).startswith("u") else (1 << (dtype.bits - 1)) - 1


@lowers(ops.Any, ops.All)
def _logic(op: Any, code: Code, x: Tensor) -> Tensor:
    every = isinstance(op, ops.All)
    truth = code.elementwise(x.type.with_dtype(DType.BOOL), [x], lambda e: cast(e, DType.BOOL))
    body = (lambda e, so_far: so_far & e) if every else (lambda e, so_far: so_far | e)
    return _finished(op, code, code.reduce(truth, op.dims, every, DType.BOOL, body, op.keepdim))


@lowers(ops.Argmax, ops.Argmin)
def _arg_extremum(op: Any, code: Code, x: Tensor) -> Tensor:
    """The first place of the extremum; a NaN counts as one, as in torch."""
    largest = isinstance(op, ops.Argmax)
    shape = [1 if axis == op.dim else size for axis, size in enumerate(x.shape)]
    value_type, index_type = x.type.with_shape(*shape), TensorType(DType.I64, tuple(shape))
    start = _lowest(x.dtype) if largest else _highest(x.dtype)
    outputs = [Tensor(code.filled(value_type, start), value_type), Tensor(code.filled(index_type, 0), index_type)]

    def body(e: Scalar, best: Scalar, at: Scalar) -> list[Scalar]:
        better = e > best if largest else e < best
        if e.is_float:
            better = better | (e.differs(e) & best.equals(best))
        return [select(better, e, best), select(better, cast(code.place(op.dim, x.rank), DType.I64), at)]

    loops = ir.AffineMap.get_identity(x.rank)
    kept = ir.AffineMap.get(x.rank, 0, [
        ir.AffineExpr.get_constant(0) if axis == op.dim else ir.AffineExpr.get_dim(axis) for axis in range(x.rank)
    ])  # fmt: skip
    reduced = [axis == op.dim for axis in range(x.rank)]
    made = code.generic([(x, loops)], [(output, kept) for output in outputs], reduced, body)
    return _finished(op, code, made[1])
