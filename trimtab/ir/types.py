"""The type of a value: element type and shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.ir.dims import Dim, Symbol, evaluate, product, symbols_of
from trimtab.ir.dtypes import DType


@dataclass(frozen=True)
class TensorType:
    """A dense tensor: ``f32[batch, 197, 384]``; a scalar is ``f32[]``."""

    dtype: DType
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def is_static(self) -> bool:
        return all(isinstance(dim, int) for dim in self.shape)

    @property
    def symbols(self) -> frozenset[Symbol]:
        return frozenset().union(*map(symbols_of, self.shape))

    @property
    def elements(self) -> Dim:
        """Number of elements."""
        return product(self.shape)

    @property
    def bytes(self) -> Dim:
        """Bytes in storage; rows of sub-byte types are padded to whole bytes."""
        if self.dtype.is_sub_byte and self.shape:
            per_byte = 8 // self.dtype.bits
            return product(self.shape[:-1]) * ((self.shape[-1] + per_byte - 1) // per_byte)
        return self.elements * max(self.dtype.bits // 8, 1)

    def with_shape(self, *shape: Dim) -> TensorType:
        return TensorType(self.dtype, shape)

    def with_dtype(self, dtype: DType) -> TensorType:
        return TensorType(dtype, self.shape)

    def bind(self, bindings: Mapping[str, Any]) -> TensorType:
        """The type with symbols replaced by ``bindings`` (ints or other dimensions)."""
        return TensorType(self.dtype, tuple(evaluate(dim, bindings) for dim in self.shape))
