"""Weights: the tensors of a module, by id, lazy and without copies.

A weight knows its type and where its data comes from (a torch tensor, a numpy array, a slice of a mapped file, or
a function that computes it).  Data is read only when somebody asks for it, and one block at a time when hashing or
writing, so that a module never needs a second copy of itself in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from trimtab.ir.dtypes import DType
from trimtab.ir.types import TensorType

if TYPE_CHECKING:
    import numpy as np
    import torch

_BLOCK_BYTES = 64 << 20


class TensorSource(Protocol):
    """Where the data of a weight comes from."""

    def tensor(self) -> torch.Tensor:
        """The data as a CPU tensor; shares memory with the source when it can. Callers must not write to it."""
        ...


class TorchSource:
    """A tensor already in memory."""

    def __init__(self, data: torch.Tensor) -> None:
        self._data = data.detach()

    def tensor(self) -> torch.Tensor:
        return self._data


class ArraySource:
    """A numpy array, possibly a memory map. ``dtype`` tells the element type where numpy has none (bf16 as uint16)."""

    def __init__(self, data: np.ndarray[Any, Any], dtype: DType, shape: tuple[int, ...] | None = None) -> None:
        self._data = data
        self._dtype = dtype
        self._shape = shape

    def tensor(self) -> torch.Tensor:
        import warnings

        import numpy as np
        import torch

        shape = self._shape if self._shape is not None else self._data.shape
        data = np.ascontiguousarray(self._data)
        if data.size == 0:
            return torch.empty(shape, dtype=self._dtype.to_torch())
        with warnings.catch_warnings():
            # A read-only map is what we want; nobody writes to a weight's tensor.
            warnings.filterwarnings("ignore", message=".*not writable.*")
            flat = torch.from_numpy(data.reshape(-1).view(np.uint8)).view(self._dtype.to_torch())
        return flat.reshape(shape)


class ComputedSource:
    """Data made on demand by a function without arguments, e.g. a constant-folded expression of other weights.

    The result is kept only when ``keep`` is set, because a large derived weight is cheaper to recompute than to hold.
    """

    def __init__(self, compute: Callable[[], torch.Tensor], *, keep: bool = False) -> None:
        self._compute = compute
        self._keep = keep
        self._data: torch.Tensor | None = None

    def tensor(self) -> torch.Tensor:
        if self._data is not None:
            return self._data
        data = self._compute().detach()
        if self._keep:
            self._data = data
        return data


class Weight:
    """A named constant tensor of a module. Immutable; replace the weight in the table to change data.

    Args:
        id: key in the module's table, for example the parameter's name in the user's model.
        type: a static tensor type.
        source: where the data comes from.
        trainable: a parameter (True) or a buffer or constant (False).
        sha256: the content hash when it is already known (hex).
    """

    __slots__ = ("_sha256", "id", "source", "trainable", "type")

    def __init__(
        self, id: str, type: TensorType, source: TensorSource, *, trainable: bool = False, sha256: str = ""
    ) -> None:
        self.id = id
        self.type = type
        self.source = source
        self.trainable = trainable
        self._sha256 = sha256

    def __repr__(self) -> str:
        return f"Weight(@{self.id}: {self.type})"

    @staticmethod
    def from_tensor(id: str, data: torch.Tensor, *, trainable: bool = False) -> Weight:
        """A weight that shares memory with ``data``."""
        type = TensorType(DType.from_torch(data.dtype), tuple(data.shape))
        return Weight(id, type, TorchSource(data), trainable=trainable)

    def renamed(self, id: str) -> Weight:
        """The same data under another id."""
        return Weight(id, self.type, self.source, trainable=self.trainable, sha256=self._sha256)

    def tensor(self) -> torch.Tensor:
        """The data as a CPU tensor that callers must not write to; unpacked for sub-byte types."""
        return self.source.tensor()

    @property
    def nbytes(self) -> int:
        """Bytes in storage."""
        size = self.type.bytes
        assert isinstance(size, int)  # weights have static types: checked by the verifier
        return size

    def blocks(self) -> Iterator[bytes | memoryview]:
        """The data in row-major order as little-endian bytes, a block at a time."""
        import torch

        flat = self.tensor().detach().cpu().contiguous().reshape(-1)
        if self.type.dtype.is_sub_byte:
            flat = pack_sub_byte(self.tensor(), self.type.dtype).reshape(-1)
        if not flat.numel():
            return
        raw = flat.view(torch.uint8).numpy()
        for start in range(0, raw.nbytes, _BLOCK_BYTES):
            yield raw[start : start + _BLOCK_BYTES].data

    @property
    def sha256(self) -> str:
        """Hash of the type and the data (hex), computed once."""
        if not self._sha256:
            digest = hashlib.sha256(str(self.type).encode())
            for block in self.blocks():
                digest.update(block)
            self._sha256 = digest.hexdigest()
        return self._sha256


def pack_sub_byte(data: torch.Tensor, dtype: DType) -> torch.Tensor:
    """Pack an unpacked 4-bit tensor ``[..., n]`` (one element a byte) into ``uint8[..., ceil(n/2)]``, even ones low."""
    import torch

    codes = (
        data.to(torch.uint8) & 0x0F if dtype is not DType.I4 else data.to(torch.int16).bitwise_and(0x0F).to(torch.uint8)
    )
    if codes.dim() == 0:
        return codes.reshape(1)
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_sub_byte(packed: torch.Tensor, dtype: DType, length: int) -> torch.Tensor:
    """The inverse of :func:`pack_sub_byte`: ``uint8[..., ceil(length/2)]`` to one element a byte, ``[..., length]``."""
    import torch

    codes = torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(-2)[..., :length]
    if dtype is DType.I4:
        signed = codes.to(torch.int8)
        return torch.where(signed > 7, signed - 16, signed)
    return codes
