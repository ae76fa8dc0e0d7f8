"""What the micro-kernel generators must know about each instruction set: one description each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from trimtab.backends.tvm.microkernels.amx import TileProduct
from trimtab.backends.tvm.microkernels.products import (
    DotProduct,
    FloatProduct,
    MatrixProduct,
    NibbleProduct,
    PairProduct,
    Product,
    ScaledProduct,
    WidenedProduct,
)

Products = dict[str, Product | TileProduct]


@dataclass(frozen=True)
class InstructionSet:
    """One instruction set.

    Attributes:
        name: in the names of the symbols.
        architecture: first part of an LLVM triple; empty when any will do.
        features: CPU features that all its kernels need, in LLVM's names.
        vector_bytes: width of a vector register.
        registers: number of them.
        chains: independent accumulators that keep the multiply-add units busy: latency times number of units.
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
    def register_constraint(self) -> str:
        """LLVM's letter for vector registers in inline assembly; empty when the processor is not known."""
        return {"x86_64": "v", "aarch64": "w"}.get(self.architecture, "")

    @property
    def lanes(self) -> int:
        """Accumulators (32 bits each) in a register."""
        return self.vector_bytes // 4


def _floats(converts_half: bool = True, half_features: tuple[str, ...] = ()) -> Products:
    """Kinds that end in an f32 multiply-add of vectors."""
    return {
        "f32": FloatProduct("f32", "f32", "f32"),
        "bf16": FloatProduct("bf16", "bf16", "f32"),
        "f32*bf16": FloatProduct("f32", "bf16", "f32"),
        "f32*f16": FloatProduct("f32", "f16", "f32", features=half_features, converts_half=converts_half),
        **_scaled(),
    }


def _scaled(permutation: str = "") -> Products:
    """Kinds whose second factor is integers with a scale for each group."""
    temporaries = 1 if permutation else 0
    return {
        **{f"f32*{b}": ScaledProduct("f32", b, "f32", signed=b == "s8") for b in ("s8", "u8")},
        **{f"f32*{b}": NibbleProduct("f32", b, "f32", 2, parts=2, temporaries=temporaries, signed=b == "i4",
                                     permutation=permutation)
           for b in ("i4", "u4")},
    }  # fmt: skip


def _widened() -> Products:
    return {f"{a}*s8": WidenedProduct(a, "s8", "i32") for a in ("u8", "s8")}


def _pmaddwd(intrinsic: str, temporaries: int) -> Products:
    # The accumulators wait for an addition only.
    return {f"{a}*s8": PairProduct(a, "s8", "i32", 4, parts=2, temporaries=temporaries, chains=4, intrinsic=intrinsic)
            for a in ("u8", "s8")}  # fmt: skip


def _vpdpbusd(bits: int, feature: str) -> Products:
    """Integer kinds by vpdpbusd, which multiplies unsigned by signed bytes and adds without saturation."""
    unsigned = DotProduct("u8", "s8", "i32", 4, (feature,), operand=f"<{bits // 8} x i8>",
                          intrinsic=f"llvm.x86.avx512.vpdpbusd.{bits}")  # fmt: skip
    return {"u8*s8": unsigned, "s8*s8": replace(unsigned, a_dtype="s8", swapped=True, toggles_b=True, temporaries=1)}


def _dotprod() -> Products:
    """Integer kinds by sdot and udot, which need both operands of one signedness."""
    signed = DotProduct("s8", "s8", "i32", 4, ("dotprod",), operand="<16 x i8>",
                        intrinsic="llvm.aarch64.neon.sdot.v4i32.v16i8")  # fmt: skip
    unsigned = replace(signed, a_dtype="u8", toggles_b=True, temporaries=1,
                       intrinsic="llvm.aarch64.neon.udot.v4i32.v16i8")  # fmt: skip
    return {"s8*s8": signed, "u8*s8": unsigned}


def _i8mm() -> Products:
    names = {"u8": "usmmla", "s8": "smmla"}
    return {f"{a}*s8": MatrixProduct(a, "s8", "i32", 8, ("i8mm",), rows_at_once=2,
                                     intrinsic=f"llvm.aarch64.neon.{name}.v4i32.v16i8")
            for a, name in names.items()}  # fmt: skip


_AVX2 = ("avx2", "fma")
_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")

# LLVM's vector operations without an intrinsic of a processor, on registers that nearly every processor has.
PORTABLE = InstructionSet("portable", "", (), 16, 16, 4, {**_floats(converts_half=False), **_widened()})

AVX2 = InstructionSet("avx2", "x86_64", _AVX2, 32, 16, 10,
                      {**_floats(half_features=("f16c",)), **_pmaddwd("llvm.x86.avx2.pmadd.wd", 3)})  # fmt: skip
AVX_VNNI = replace(AVX2, name="avxvnni", products={**AVX2.products, **_vpdpbusd(256, "avxvnni")})

AVX512 = InstructionSet("avx512", "x86_64", _AVX512, 64, 32, 8, {
    **_floats(),
    **_pmaddwd("llvm.x86.avx512.pmaddw.d.512", 8),
    **_scaled("llvm.x86.avx512.permvar.sf.512"),
})  # fmt: skip
AVX512_VNNI = replace(AVX512, name="avx512vnni", chains=10,
                      products={**AVX512.products, **_vpdpbusd(512, "avx512vnni")})  # fmt: skip
AVX512_BF16 = replace(AVX512_VNNI, name="avx512bf16", chains=12, products={
    **AVX512_VNNI.products,
    "bf16": DotProduct("bf16", "bf16", "f32", 2, ("avx512bf16",), operand="<32 x bfloat>",
                       intrinsic="llvm.x86.avx512bf16.dpbf16ps.512"),
})  # fmt: skip

AMX = InstructionSet("amx", "x86_64", ("amx-tile",), 64, 8, 4, {
    "bf16": TileProduct("bf16", "bf16", "f32", 2, ("amx-bf16",), "tdpbf16ps"),
    "u8*s8": TileProduct("u8", "s8", "i32", 4, ("amx-int8",), "tdpbusd"),
    "s8*s8": TileProduct("s8", "s8", "i32", 4, ("amx-int8",), "tdpbssd"),
})  # fmt: skip

NEON = InstructionSet("neon", "aarch64", ("neon",), 16, 32, 16, {**_floats(), **_widened()})
NEON_DOTPROD = replace(NEON, name="dotprod", products={**NEON.products, **_dotprod()})
NEON_I8MM = replace(NEON, name="i8mm", products={**NEON.products, **_i8mm()})
