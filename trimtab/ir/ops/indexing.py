"""Ops that read or write at places given by integer tensors. Negative indices count from the end."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.errors import VerificationError
from trimtab.ir.core import Value
from trimtab.ir.op import Op
from trimtab.ir.ops.reduction import check_axes


class Embedding(Op):
    """Rows of ``table`` ``[V, D]`` at ``indices`` (any shape, i32 or i64): result ``[*indices, D]``."""

    table: Value
    indices: Value

    @staticmethod
    def reference(table: Tensor, indices: Tensor) -> Tensor:
        return F.embedding(torch.where(indices < 0, indices + table.shape[0], indices), table)


class IndexSelect(Op):
    """Slices of x along ``dim`` at ``indices`` of any rank r: axis ``dim`` becomes the r axes of ``indices``."""

    x: Value
    indices: Value
    dim: int

    @staticmethod
    def reference(x: Tensor, indices: Tensor, *, dim: int) -> Tensor:
        size = x.shape[dim]
        flat = indices.reshape(-1).to(torch.int64)
        picked = x.index_select(dim, torch.where(flat < 0, flat + size, flat))
        return picked.reshape(*x.shape[:dim], *indices.shape, *x.shape[dim + 1 :])

    def verify(self) -> None:
        check_axes(self, (self.dim,), self.x.type.rank)


class Gather(Op):
    """``result[i, j, ...] = x[..., indices[i, j, ...], ...]`` along ``dim``; indices has x's rank (torch.gather)."""

    x: Value
    indices: Value
    dim: int

    @staticmethod
    def reference(x: Tensor, indices: Tensor, *, dim: int) -> Tensor:
        size = x.shape[dim]
        wide = indices.to(torch.int64)
        return torch.gather(x, dim, torch.where(wide < 0, wide + size, wide))

    def verify(self) -> None:
        check_axes(self, (self.dim,), self.x.type.rank)


class Index(Op):
    """Advanced indexing of x by integer tensors that broadcast together, one for each of the consecutive axes
    ``dim, dim + 1, ...``: ``x[:, i0, i1]``. The indexed axes become the axes of the broadcast indices."""

    x: Value
    indices: tuple[Value, ...]
    dim: int = 0

    @staticmethod
    def reference(x: Tensor, indices: list[Tensor], *, dim: int) -> Tensor:
        return torch.ops.aten.index(x, [None] * dim + list(indices))  # type: ignore[no-any-return]

    def verify(self) -> None:
        check_axes(self, tuple(range(self.dim, self.dim + len(self.indices))), self.x.type.rank)
        if any(not value.type.dtype.is_integer for value in self.indices):
            raise VerificationError(
                "index takes integer tensors",
                values={"indices": [v.type for v in self.indices]},
                rule="a bool index gives a shape that depends on data",
                location=self.location,
            )


class Scatter(Op):
    """x with ``updates`` written (or combined, by ``reduce``) at ``indices`` along ``dim``; indices and updates have
    x's rank (torch.scatter). With ``reduce="none"`` indices must not repeat."""

    x: Value
    indices: Value
    updates: Value
    dim: int
    reduce: Literal["none", "add", "mul", "amax", "amin"] = "none"

    @staticmethod
    def reference(x: Tensor, indices: Tensor, updates: Tensor, *, dim: int, reduce: str) -> Tensor:
        size = x.shape[dim]
        wide = indices.to(torch.int64)
        wide = torch.where(wide < 0, wide + size, wide)
        if reduce == "none":
            return torch.scatter(x, dim, wide, updates)
        kind = {"add": "sum", "mul": "prod"}.get(reduce, reduce)
        return torch.scatter_reduce(x, dim, wide, updates, kind, include_self=True)

    def verify(self) -> None:
        check_axes(self, (self.dim,), self.x.type.rank)


class IndexPut(Op):
    """x with ``updates`` written (or added) where advanced indexing by ``indices`` on the leading axes would read."""

    x: Value
    indices: tuple[Value, ...]
    updates: Value
    accumulate: bool = False

    @staticmethod
    def reference(x: Tensor, indices: list[Tensor], updates: Tensor, *, accumulate: bool) -> Tensor:
        return torch.ops.aten.index_put(x, list(indices), updates, accumulate)  # type: ignore[no-any-return]

    def verify(self) -> None:
        check_axes(self, tuple(range(len(self.indices))), self.x.type.rank)
        if any(not value.type.dtype.is_integer for value in self.indices):
            raise VerificationError(
                "index_put takes integer tensors",
                values={"indices": [v.type for v in self.indices]},
                rule="a bool index writes to places that depend on data",
                location=self.location,
            )
