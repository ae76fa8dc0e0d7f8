"""Tensors stored in a model: initializers, ``Constant`` nodes and tensor attributes, read lazily and without copies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir

from trimtab.errors import ImportModelError, UnsupportedOpError
from trimtab.frontend.onnx.element_types import SUPPORTED_TEXT, dtype_of
from trimtab.frontend.onnx.external_data import ExternalFiles
from trimtab.ir.types import TensorType
from trimtab.ir.weights import ArraySource, ComputedSource, TensorSource

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file: its type is known, its data is read on demand."""

    name: str
    type: TensorType
    source: TensorSource

    @property
    def elements(self) -> int:
        count = self.type.elements
        assert isinstance(count, int)
        return count

    def tensor(self) -> torch.Tensor:
        return self.source.tensor()


class OnnxTensorSource:
    """A tensor inside the model file. Raw data is shared with the file's message, other encodings are decoded anew."""

    def __init__(self, tensor: Any, type: TensorType) -> None:
        self._tensor = tensor
        self._type = type

    def tensor(self) -> torch.Tensor:
        array = np.asarray(self._tensor.numpy())
        shape = tuple(int(dim) for dim in self._type.shape)  # type: ignore[arg-type]
        return ArraySource(array, self._type.dtype, shape).tensor()


def store(tensor: Any, files: ExternalFiles) -> StoredTensor:
    """Take over an onnx_ir tensor.

    Raises:
        UnsupportedOpError: the IR has no such element type.
        ImportModelError: external data that is missing or out of bounds.
    """
    name = tensor.name or ""
    dtype = dtype_of(int(tensor.dtype))
    if dtype is None:
        raise UnsupportedOpError(
            "a stored tensor has an element type that Trimtab does not know",
            values={"tensor": name or "(unnamed)", "type": tensor.dtype},
            rule=f"tensors hold {SUPPORTED_TEXT}",
            fix="convert the tensor before export",
        )
    shape = tuple(tensor.shape.numpy())
    type = TensorType(dtype, shape)
    if isinstance(tensor, onnx_ir.ExternalTensor):
        data = files.bytes_of(name, type, str(tensor.location), tensor.offset, tensor.length)
        mapped = ArraySource(data, dtype, shape)
        if data.ctypes.data % max(dtype.bits // 8, 1):
            # Numbers that lie across word boundaries are not safe to compute with: copy them when they are read.
            return StoredTensor(name, type, ComputedSource(lambda: ArraySource(data.copy(), dtype, shape).tensor()))
        return StoredTensor(name, type, mapped)
    return StoredTensor(name, type, OnnxTensorSource(tensor, type))


_FIELDS = {
    "FLOAT": "float_data",
    "COMPLEX64": "float_data",
    "DOUBLE": "double_data",
    "COMPLEX128": "double_data",
    "INT64": "int64_data",
    "UINT32": "uint64_data",
    "UINT64": "uint64_data",
}
"""The field of a tensor message that holds the elements, where it is not int32_data."""


def check_tensor_proto(proto: Any, where: str) -> None:
    """Compare the stated dimensions of a tensor message with the data it holds, before anything is allocated.

    Raises:
        ImportModelError: dimensions and data do not agree.
    """
    dims = list(proto.dims)
    if any(dim < 0 for dim in dims):
        raise ImportModelError(
            "a stored tensor has a negative dimension", values={"tensor": proto.name, "dims": dims}, where=where
        )
    try:
        dtype = onnx_ir.DataType(proto.data_type)
    except ValueError:
        raise ImportModelError(
            "a stored tensor has an unknown element type",
            values={"tensor": proto.name or "(unnamed)", "type code": proto.data_type},
            fix="export the model again; the file is damaged",
            where=where,
        ) from None
    if proto.data_location == 1 or dtype.name in ("STRING", "UNDEFINED"):
        return  # external data is checked against its file, strings are refused where they are used
    bits, count = dtype.bitwidth, math.prod(dims)
    if proto.HasField("raw_data"):
        expected, found, unit = (count * bits + 7) // 8, len(proto.raw_data), "bytes"
    else:
        field = _FIELDS.get(dtype.name, "int32_data")
        per_entry = 8 // bits if bits in (2, 4) else 1
        expected = (count + per_entry - 1) // per_entry * (2 if dtype.name.startswith("COMPLEX") else 1)
        found, unit = len(getattr(proto, field)), f"elements in {field}"
    if expected != found:
        raise ImportModelError(
            "a stored tensor has data of the wrong size",
            values={"tensor": proto.name or "(unnamed)", "dims": dims, f"expected {unit}": expected, "found": found},
            rule="the data holds exactly the elements that the dimensions state",
            fix="export the model again; the file is damaged",
            where=where,
        )
