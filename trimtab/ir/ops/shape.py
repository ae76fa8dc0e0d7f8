"""Ops that move or select elements without computing: reshape, permute, slice, concat, pad, ...

Axes are non-negative. Shapes and slice bounds are dimensions, so they may contain symbols.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.errors import VerificationError
from trimtab.ir.core import Value
from trimtab.ir.dims import Dim, bounds, product
from trimtab.ir.op import Op
from trimtab.ir.ops.reduction import check_axes
from trimtab.ir.types import TensorType


class Reshape(Op):
    """The same elements in row-major order under another shape; stands for view, flatten, squeeze and unsqueeze."""

    x: Value
    shape: tuple[Dim, ...]

    @staticmethod
    def reference(x: Tensor, *, shape: tuple[int, ...]) -> Tensor:
        return x.reshape(shape)

    def infer(self) -> tuple[TensorType, ...]:
        # Equality of element counts is decided on normal forms: torch would ask its solver at every reshape.
        if self.x.type.elements != product(self.shape):
            raise VerificationError(
                "reshape changes the number of elements",
                values={"x": self.x.type, "shape": list(map(str, self.shape)),
                        "elements": f"{self.x.type.elements} and {product(self.shape)}"},
                rule="a reshape keeps the number of elements, for every value of the symbols",
                location=self.location,
            )  # fmt: skip
        return (self.x.type.with_shape(*self.shape),)


class Permute(Op):
    """Axes reordered: result axis i is x's axis ``dims[i]``."""

    x: Value
    dims: tuple[int, ...]

    @staticmethod
    def reference(x: Tensor, *, dims: tuple[int, ...]) -> Tensor:
        return x.permute(dims)

    def verify(self) -> None:
        check_axes(self, self.dims, self.x.type.rank)


class Expand(Op):
    """x broadcast to ``shape``: axes of size 1 are repeated, missing leading axes added."""

    x: Value
    shape: tuple[Dim, ...]

    @staticmethod
    def reference(x: Tensor, *, shape: tuple[int, ...]) -> Tensor:
        return x.expand(shape)

    def infer(self) -> tuple[TensorType, ...]:
        own = self.x.type.shape
        aligned = self.shape[len(self.shape) - len(own) :] if len(self.shape) >= len(own) else None
        if aligned is None or any(size not in (1, target) for size, target in zip(own, aligned, strict=True)):
            raise VerificationError(
                "expand cannot broadcast",
                values={"x": self.x.type, "shape": list(map(str, self.shape))},
                rule="each axis of x has size 1 or the target's size",
                location=self.location,
            )
        return (self.x.type.with_shape(*self.shape),)


class Slice(Op):
    """``x[start:stop:step]`` along ``dim``, with ``0 <= start <= stop <= size`` and a positive step."""

    x: Value
    dim: int
    start: Dim
    stop: Dim
    step: int = 1

    @staticmethod
    def reference(x: Tensor, *, dim: int, start: int, stop: int, step: int) -> Tensor:
        return torch.ops.aten.slice(x, dim, start, stop, step)  # type: ignore[no-any-return]

    def infer(self) -> tuple[TensorType, ...]:
        check_axes(self, (self.dim,), self.x.type.rank)
        shape = self.x.type.shape
        size = shape[self.dim]
        if (
            self.step < 1
            or bounds(self.start)[0] < 0
            or bounds(size - self.stop)[0] < 0
            or bounds(self.stop - self.start)[1] < 0
        ):
            raise VerificationError(
                "slice is out of range",
                values={"x": self.x.type, "dim": self.dim, "start": self.start, "stop": self.stop, "step": self.step},
                rule="0 <= start <= stop <= size for every value of the symbols, and step >= 1",
                location=self.location,
            )
        length = (self.stop - self.start + self.step - 1) // self.step
        return (self.x.type.with_shape(*shape[: self.dim], length, *shape[self.dim + 1 :]),)


class Select(Op):
    """``x[index]`` along ``dim``, which is dropped; ``0 <= index < size``."""

    x: Value
    dim: int
    index: Dim

    @staticmethod
    def reference(x: Tensor, *, dim: int, index: int) -> Tensor:
        return x.select(dim, index)

    def infer(self) -> tuple[TensorType, ...]:
        check_axes(self, (self.dim,), self.x.type.rank)
        shape = self.x.type.shape
        if bounds(self.index)[0] < 0 or bounds(shape[self.dim] - self.index)[0] < 1:
            raise VerificationError(
                "select is out of range",
                values={"x": self.x.type, "dim": self.dim, "index": self.index},
                rule="0 <= index < size for every value of the symbols",
                location=self.location,
            )
        return (self.x.type.with_shape(*shape[: self.dim], *shape[self.dim + 1 :]),)


class Concat(Op):
    """Values joined along ``dim``."""

    values: tuple[Value, ...]
    dim: int

    @staticmethod
    def reference(values: list[Tensor], *, dim: int) -> Tensor:
        return torch.cat(values, dim)

    def verify(self) -> None:
        dtypes = {value.type.dtype for value in self.values}
        if len(dtypes) != 1:
            raise VerificationError(
                "concat has values of several dtypes",
                values={"dtypes": sorted(map(str, dtypes))},
                rule="joined values share one dtype",
                location=self.location,
            )


class Split(Op):
    """x cut along ``dim`` into consecutive parts of the given ``sizes``; one result a part."""

    x: Value
    dim: int
    sizes: tuple[Dim, ...]

    @staticmethod
    def reference(x: Tensor, *, dim: int, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        return torch.split(x, list(sizes), dim)

    def infer(self) -> tuple[TensorType, ...]:
        check_axes(self, (self.dim,), self.x.type.rank)
        shape = self.x.type.shape
        total: Dim = 0
        for size in self.sizes:
            total = total + size
        if total != shape[self.dim]:
            raise VerificationError(
                "split sizes do not add up",
                values={"x": self.x.type, "dim": self.dim, "sizes": total},
                rule="the sizes sum to the axis",
                location=self.location,
            )
        return tuple(self.x.type.with_shape(*shape[: self.dim], size, *shape[self.dim + 1 :]) for size in self.sizes)


class Pad(Op):
    """x with ``before[i]`` and ``after[i]`` elements added around axis i. ``mode`` constant fills with ``value``;
    reflect mirrors without repeating the edge; edge repeats it; wrap continues from the other side."""

    x: Value
    before: tuple[int, ...]
    after: tuple[int, ...]
    mode: Literal["constant", "reflect", "edge", "wrap"] = "constant"
    value: float | int | bool = 0

    @staticmethod
    def reference(x: Tensor, *, before: tuple[int, ...], after: tuple[int, ...], mode: str, value: float) -> Tensor:
        if mode == "constant":
            pairs = [n for low, high in zip(reversed(before), reversed(after), strict=True) for n in (low, high)]
            return F.pad(x, pairs, value=value)
        for dim, (low, high) in enumerate(zip(before, after, strict=True)):
            if low or high:
                size = x.shape[dim]
                index = torch.arange(-low, size + high, device=x.device)
                if mode == "edge":
                    index = index.clamp(0, size - 1)
                elif mode == "wrap":
                    index = index.remainder(size)
                else:
                    period = 2 * (size - 1) if size > 1 else 1
                    index = index.remainder(period)
                    index = torch.where(index < size, index, period - index)
                x = x.index_select(dim, index)
        return x

    def infer(self) -> tuple[TensorType, ...]:
        # torch's own inference takes a symbolic size for the number it was tried with.
        if not len(self.before) == len(self.after) == self.x.type.rank:
            raise VerificationError(
                "pad needs two widths per axis",
                values={"x": self.x.type, "before": self.before, "after": self.after},
                location=self.location,
            )
        widths = zip(self.before, self.x.type.shape, self.after, strict=True)
        return (self.x.type.with_shape(*(low + size + high for low, size, high in widths)),)


class Tile(Op):
    """x repeated ``repeats[i]`` times along axis i."""

    x: Value
    repeats: tuple[Dim, ...]

    @staticmethod
    def reference(x: Tensor, *, repeats: tuple[int, ...]) -> Tensor:
        return x.repeat(*repeats)


class Flip(Op):
    """x reversed along ``dims``."""

    x: Value
    dims: tuple[int, ...]

    @staticmethod
    def reference(x: Tensor, *, dims: tuple[int, ...]) -> Tensor:
        return torch.flip(x, dims)

    def verify(self) -> None:
        check_axes(self, self.dims, self.x.type.rank)


class Roll(Op):
    """x rotated by ``shifts[i]`` places along ``dims[i]``; elements leaving one end enter at the other."""

    x: Value
    shifts: tuple[int, ...]
    dims: tuple[int, ...]

    @staticmethod
    def reference(x: Tensor, *, shifts: tuple[int, ...], dims: tuple[int, ...]) -> Tensor:
        return torch.roll(x, shifts, dims)

    def verify(self) -> None:
        check_axes(self, self.dims, self.x.type.rank)


class Tril(Op):
    """The lower triangle of the last two axes, up to ``diagonal`` above the main one; the rest zero."""

    x: Value
    diagonal: int = 0

    @staticmethod
    def reference(x: Tensor, *, diagonal: int) -> Tensor:
        return torch.tril(x, diagonal)


class Triu(Op):
    """The upper triangle of the last two axes, from ``diagonal`` above the main one; the rest zero."""

    x: Value
    diagonal: int = 0

    @staticmethod
    def reference(x: Tensor, *, diagonal: int) -> Tensor:
        return torch.triu(x, diagonal)
