"""What the micro-kernel generators must know about each instruction set: one description each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trimtab.backends.tvm.microkernels.amx import TileProduct
from trimtab.backends.tvm.microkernels.products import (
    DotProduct,
    FloatProduct,
    NibbleProduct,
    PairProduct,
    Product,
    WidenedProduct,
)


@dataclass(frozen=True)
class InstructionSet:
    """One instruction set.

    Attributes:
        name: in the names of the symbols.
        architecture: first part of an LLVM triple; empty when any will do.
        features: CPU features that all its kernels need, in LLVM's names.
        vector_bytes: width of a vector register.
        registers: number of them.
        chains: independent accumulators that keep the multiply-add units busy: latency times units.
        products: how each kind of data is multiplied.
    """

    name: str
    architecture: str
    features: tuple[str, ...]
    vector_bytes: int
    registers: int
    chains: int
    products: Mapping[str, Product | TileProduct]

    @property
    def lanes(self) -> int:
        """Accumulators (32 bits each) in a register."""
        return self.vector_bytes // 4


def _floats(converts_half: bool = True, half_features: tuple[str, ...] = ()) -> dict[str, Product | TileProduct]:
    """Kinds that end in an f32 multiply-add of vectors."""
    return {
        "f32": FloatProduct("f32", "f32", "f32"),
        "bf16": FloatProduct("bf16", "bf16", "f32"),
        "f32*bf16": FloatProduct("f32", "bf16", "f32"),
        "f32*f16": FloatProduct("f32", "f16", "f32", features=half_features, converts_half=converts_half),
        "f32*i4": NibbleProduct("f32", "i4", "f32", group=2, parts=2),
    }


def _pairs(intrinsic: str) -> dict[str, Product | TileProduct]:
    return {f"{a}*s8": PairProduct(a, "s8", "i32", group=4, parts=2, intrinsic=intrinsic) for a in ("u8", "s8")}


def _vpdpbusd(bits: int, feature: str) -> dict[str, Product | TileProduct]:
    """Integer kinds by vpdpbusd, which multiplies unsigned by signed bytes and adds without saturation."""
    operand, intrinsic = f"<{bits // 8} x i8>", f"llvm.x86.avx512.vpdpbusd.{bits}"
    common = {"group": 4, "features": (feature,), "intrinsic": intrinsic, "operand": operand}
    return {
        "u8*s8": DotProduct("u8", "s8", "i32", **common),
        "s8*s8": DotProduct("s8", "s8", "i32", swapped=True, toggles_b=True, **common),
    }


_AVX2 = ("avx2", "fma")
_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")

PORTABLE = InstructionSet("portable", "", (), 16, 16, 4, {**_floats(converts_half=False),
    "u8*s8": WidenedProduct("u8", "s8", "i32"), "s8*s8": WidenedProduct("s8", "s8", "i32")})  # fmt: skip
AVX2 = InstructionSet("avx2", "x86_64", _AVX2, 32, 16, 10,
    {**_floats(half_features=("f16c",)), **_pairs("llvm.x86.avx2.pmadd.wd")})  # fmt: skip
AVX_VNNI = InstructionSet("avxvnni", "x86_64", _AVX2, 32, 16, 10, {**AVX2.products, **_vpdpbusd(256, "avxvnni")})
AVX512 = InstructionSet("avx512", "x86_64", _AVX512, 64, 32, 8,
    {**_floats(), **_pairs("llvm.x86.avx512.pmaddw.d.512")})  # fmt: skip
AVX512_VNNI = InstructionSet("avx512vnni", "x86_64", _AVX512, 64, 32, 10,
    {**AVX512.products, **_vpdpbusd(512, "avx512vnni")})  # fmt: skip
AVX512_BF16 = InstructionSet("avx512bf16", "x86_64", _AVX512, 64, 32, 12, {
    **AVX512_VNNI.products,
    "bf16": DotProduct("bf16", "bf16", "f32", group=2, features=("avx512bf16",), operand="<32 x bfloat>",
                       intrinsic="llvm.x86.avx512bf16.dpbf16ps.512"),
})  # fmt: skip
AMX = InstructionSet("amx", "x86_64", ("amx-tile",), 64, 8, 4, {
    "bf16": TileProduct("bf16", "bf16", "f32", 2, ("amx-bf16",), "tdpbf16ps"),
    "u8*s8": TileProduct("u8", "s8", "i32", 4, ("amx-int8",), "tdpbusd"),
    "s8*s8": TileProduct("s8", "s8", "i32", 4, ("amx-int8",), "tdpbssd"),
})  # fmt: skip
