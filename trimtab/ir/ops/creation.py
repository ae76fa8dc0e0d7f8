"""Ops without operands: constants, ranges and sizes as data."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.ir.dims import Dim
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op


class Full(Op):
    """A tensor of ``shape`` filled with ``value``; the scalar constants of a graph are ``full`` of shape ``[]``."""

    value: float | int | bool
    dtype: DType
    shape: tuple[Dim, ...] = ()

    @staticmethod
    def reference(*, value: float, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        return torch.full(shape, value, dtype=dtype)


class Arange(Op):
    """``start, start + step, ...``, ``length`` elements: ``arange(0, seq)`` has a symbolic length."""

    length: Dim
    dtype: DType
    start: float | int = 0
    step: float | int = 1

    @staticmethod
    def reference(*, length: int, dtype: torch.dtype, start: float, step: float) -> Tensor:
        if dtype.is_floating_point:
            return (torch.arange(length, dtype=torch.float64) * step + start).to(dtype)
        return (torch.arange(length, dtype=torch.int64) * step + start).to(dtype)


class DimValue(Op):
    """A dimension as a scalar tensor, where a model computes with a size."""

    dim: Dim
    dtype: DType

    @staticmethod
    def reference(*, dim: int, dtype: torch.dtype) -> Tensor:
        return torch.full((), dim, dtype=dtype)
