"""Constants, ranges and sizes as data."""

from __future__ import annotations

from typing import Any

from torch_mlir.dialects import tensor

from trimtab.backends.mlir.rules.registry import lowers
from trimtab.backends.mlir.scalar import Scalar, cast
from trimtab.backends.mlir.tensors import Code, Tensor, mlir_type
from trimtab.ir import ops
from trimtab.ir.dtypes import DType


@lowers(ops.Full)
def _full(op: Any, code: Code) -> Tensor:
    return Tensor(code.filled(op.result.type, op.value), op.result.type)


@lowers(ops.Arange)
def _arange(op: Any, code: Code) -> Tensor:
    work = DType.F64 if op.dtype.is_floating else DType.I64
    return code.compute(op.result.type, lambda at: cast(cast(at[0], DType.I64), work) * op.step + op.start)


@lowers(ops.DimValue)
def _dim_value(op: Any, code: Code) -> Tensor:
    element = cast(Scalar(code.size(op.dim), None), op.dtype)
    return Tensor(tensor.from_elements(mlir_type(op.result.type), [element.value]), op.result.type)
