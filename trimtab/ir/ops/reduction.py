"""Reductions and scans. ``dims`` are non-negative axes; reduced axes are dropped unless ``keepdim``."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.errors import VerificationError
from trimtab.ir.core import Value
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op


class _Reduction(Op):
    x: Value
    dims: tuple[int, ...]
    keepdim: bool = False

    def verify(self) -> None:
        check_axes(self, self.dims, self.x.type.rank)


def check_axes(op: Op, dims: tuple[int, ...], rank: int) -> None:
    """Raise unless ``dims`` are distinct axes ``0 <= dim < rank``."""
    if any(not 0 <= dim < rank for dim in dims) or len(set(dims)) != len(dims):
        raise VerificationError(
            f"{op.name} has wrong axes",
            values={"dims": dims, "rank": rank},
            rule="axes are distinct and lie between 0 and rank - 1",
            location=op.location,
        )


class Sum(_Reduction):
    """Sum over ``dims``. The result has x's dtype; no dims means no reduction."""

    @staticmethod
    def reference(x: Tensor, *, dims: tuple[int, ...], keepdim: bool) -> Tensor:
        return torch.sum(x, dims, keepdim=keepdim, dtype=x.dtype) if dims else x


class Mean(_Reduction):
    """Arithmetic mean over ``dims``; floating types."""

    @staticmethod
    def reference(x: Tensor, *, dims: tuple[int, ...], keepdim: bool) -> Tensor:
        return torch.mean(x, dims, keepdim=keepdim) if dims else x


class Prod(_Reduction):
    """Product over ``dims``. The result has x's dtype."""

    @staticmethod
    def reference(x: Tensor, *, dims: tuple[int, ...], keepdim: bool) -> Tensor:
        for dim in sorted(dims, reverse=True):
            x = torch.prod(x, dim, keepdim=keepdim, dtype=x.dtype)
        return x


class Amax(_Reduction):
    """Largest element over ``dims``; NaN wins."""

    @staticmethod
    def reference(x: Tensor, *, dims: tuple[int, ...], keepdim: bool) -> Tensor:
        return torch.amax(x, dims, keepdim=keepdim) if dims else x


class Amin(_Reduction):
    """Smallest element over ``dims``; NaN wins."""

    @staticmethod
    def reference(x: Tensor, *, dims: tuple[int, ...], keepdim: bool) -> Tensor:
        return torch.amin(x, dims, keepdim=keepdim) if dims else x


class Any(_Reduction):
    """Whether any element over ``dims`` is non-zero; result bool."""

    @staticmethod
    def reference(x: Tensor, *, dims: tuple[int, ...], keepdim: bool) -> Tensor:
        return torch.any(x, dims, keepdim=keepdim) if dims else x.to(torch.bool)


class All(_Reduction):
    """Whether all elements over ``dims`` are non-zero; result bool."""

    @staticmethod
    def reference(x: Tensor, *, dims: tuple[int, ...], keepdim: bool) -> Tensor:
        return torch.all(x, dims, keepdim=keepdim) if dims else x.to(torch.bool)


class _AlongAxis(Op):
    x: Value
    dim: int

    def verify(self) -> None:
        check_axes(self, (self.dim,), self.x.type.rank)


class Argmax(_AlongAxis):
    """Index (i64) of the first largest element along ``dim``."""

    keepdim: bool = False

    @staticmethod
    def reference(x: Tensor, *, dim: int, keepdim: bool) -> Tensor:
        return torch.argmax(x, dim, keepdim=keepdim)


class Argmin(_AlongAxis):
    """Index (i64) of the first smallest element along ``dim``."""

    keepdim: bool = False

    @staticmethod
    def reference(x: Tensor, *, dim: int, keepdim: bool) -> Tensor:
        return torch.argmin(x, dim, keepdim=keepdim)


class Cumsum(_AlongAxis):
    """Running sum along ``dim``, inclusive, in ``dtype``."""

    dtype: DType

    @staticmethod
    def reference(x: Tensor, *, dim: int, dtype: torch.dtype) -> Tensor:
        return torch.cumsum(x, dim, dtype=dtype)


class Softmax(_AlongAxis):
    """``e^x / sum(e^x)`` along ``dim``."""

    @staticmethod
    def reference(x: Tensor, *, dim: int) -> Tensor:
        return torch.softmax(x, dim)


class LogSoftmax(_AlongAxis):
    """``log(softmax(x))`` along ``dim``."""

    @staticmethod
    def reference(x: Tensor, *, dim: int) -> Tensor:
        return torch.log_softmax(x, dim)


class Topk(_AlongAxis):
    """The k largest (or smallest) elements along ``dim``, sorted, and their indices (i64); two results."""

    k: int
    largest: bool = True

    @staticmethod
    def reference(x: Tensor, *, dim: int, k: int, largest: bool) -> tuple[Tensor, Tensor]:
        values, indices = torch.topk(x, k, dim, largest=largest, sorted=True)
        return values, indices


class Sort(_AlongAxis):
    """Stably sorted elements along ``dim`` and their indices (i64); two results."""

    descending: bool = False

    @staticmethod
    def reference(x: Tensor, *, dim: int, descending: bool) -> tuple[Tensor, Tensor]:
        values, indices = torch.sort(x, dim=dim, descending=descending, stable=True)
        return values, indices
