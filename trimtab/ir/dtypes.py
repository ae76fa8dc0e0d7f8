"""Element types, their storage, and their torch counterparts.

Sub-byte types are stored packed in bytes: ``i4`` and ``u4`` put two elements in a byte, the element with the even
index in the low four bits; a row (last axis) of odd length is padded with a zero nibble.  ``pot4`` is a 4-bit
power-of-two code packed the same way: bit 3 is the sign and bits 0..2 an exponent e, with value ``(-1)^sign * 2^-e``
and code 7 meaning zero.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class DType(Enum):
    """An element type. ``str(DType.F32) == "f32"``."""

    F64 = "f64"
    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    I64 = "i64"
    I32 = "i32"
    I16 = "i16"
    I8 = "i8"
    U64 = "u64"
    U32 = "u32"
    U16 = "u16"
    U8 = "u8"
    BOOL = "bool"
    I4 = "i4"
    U4 = "u4"
    POT4 = "pot4"

    def __str__(self) -> str:
        return self.value

    __repr__ = __str__

    @property
    def bits(self) -> int:
        """Bits one element takes in storage (8 for ``bool``)."""
        if self is DType.BOOL:
            return 8
        return int("".join(filter(str.isdigit, self.value)))

    @property
    def is_floating(self) -> bool:
        return self in (DType.F64, DType.F32, DType.F16, DType.BF16)

    @property
    def is_integer(self) -> bool:
        return not self.is_floating and self not in (DType.BOOL, DType.POT4)

    @property
    def is_sub_byte(self) -> bool:
        return self.bits < 8

    def to_torch(self) -> torch.dtype:
        """The torch dtype of this type; sub-byte types are held unpacked, one element in a signed or unsigned byte."""
        import torch

        names = {
            DType.F64: "float64", DType.F32: "float32", DType.F16: "float16", DType.BF16: "bfloat16",
            DType.BOOL: "bool", DType.I4: "int8", DType.U4: "uint8", DType.POT4: "uint8",
        }  # fmt: skip
        name = names.get(self) or self.value.replace("i", "int").replace("u", "uint")
        dtype: torch.dtype = getattr(torch, name)
        return dtype

    @staticmethod
    def from_torch(dtype: torch.dtype) -> DType:
        """The type of a torch dtype. Raises ``ValueError`` for complex, quantized and float8 types."""
        name = str(dtype).removeprefix("torch.")
        short = {"float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16", "bool": "bool"}.get(name)
        if short is None:
            short = name.replace("uint", "u").replace("int", "i")
        return DType(short)
