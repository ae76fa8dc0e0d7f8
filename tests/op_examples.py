"""Example uses of every op, with random inputs: what the tests of the IR and of the backends run.

``EXAMPLES`` maps each op class to examples; :func:`build_module` makes a module whose inputs are the operands and
whose outputs are the results; :func:`random_inputs` draws tensors that lie in the op's domain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trimtab.ir import Builder, Dim, DimExpr, DType, Graph, Module, Op, TensorType, Value, ops, symbol
from trimtab.ir.dims import evaluate, symbols_of

BATCH = symbol("batch", 1, 64)
SEQ = symbol("seq", 2, 128)
SIZES: tuple[Mapping[str, int], ...] = ({"batch": 3, "seq": 7}, {"batch": 1, "seq": 2})
"""Values of the symbols at which the examples with symbolic shapes are run."""

Operand = TensorType | tuple[TensorType, ...] | None
Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]


@dataclass(frozen=True)
class OpExample:
    """One use of an op.

    Args:
        cls: the op class.
        label: names the example in test ids.
        operands: per declared operand a type, a tuple of types, or None when absent.
        attributes: attributes by name.
        ranges: bounds of the random values of an operand, by its name: ``[low, high)``.
        draw: functions that make the data of an operand, by its name, where a range does not say enough.
        special: put NaN, infinities, zeros, denormals and large numbers among floating operands.
        body: builds the region from the types of its inputs.
    """

    cls: type[Op]
    label: str
    operands: tuple[Operand, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    draw: Mapping[str, Draw] = field(default_factory=dict)
    special: bool = False
    body: Callable[[], Graph] | None = None

    def __str__(self) -> str:
        return f"{self.cls.name}-{self.label}"

    @property
    def named_types(self) -> list[tuple[str, TensorType]]:
        """Each operand's name and type, variable operands flattened and absent ones left out."""
        flat: list[tuple[str, TensorType]] = []
        for declared, given in zip(self.cls.operand_fields, self.operands, strict=True):
            if given is not None:
                flat += [(declared.name, t) for t in (given if isinstance(given, tuple) else (given,))]
        return flat

    @property
    def is_symbolic(self) -> bool:
        found = any(t.symbols for _, t in self.named_types)
        return found or any(symbols_of(d) for d in _dims_in(tuple(self.attributes.values())))

    @property
    def bindings(self) -> tuple[Mapping[str, int], ...]:
        """Values of the symbols to run the example at; one empty mapping when it is static."""
        return SIZES if self.is_symbolic else ({},)


def build_module(example: OpExample) -> Module:
    """The op alone: inputs ``x0, x1, ...`` are its operands, outputs its results.

    A symbolic example has a last input ``sizes: f32[batch, seq]`` that no op reads, so that its symbols are bound.
    """
    b = Builder()
    flat = iter([b.input(f"x{i}", type) for i, (_, type) in enumerate(example.named_types)])
    if example.is_symbolic:
        b.input("sizes", f32(BATCH, SEQ))
    groups: list[Any] = []
    for given in example.operands:
        many = isinstance(given, tuple)
        groups.append(tuple(next(flat) for _ in given) if many else None if given is None else next(flat))
    regions = [example.body()] if example.body is not None else []
    op = b.add(example.cls(*groups, *regions, **example.attributes))
    b.output(*op.results)
    return b.module


def random_inputs(example: OpExample, bindings: Mapping[str, int], seed: int = 0) -> list[Tensor]:
    """A tensor per input of :func:`build_module`, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for name, type in example.named_types:
        shape = tuple(evaluate(dim, bindings) for dim in type.shape)
        if name in example.draw:
            tensors.append(example.draw[name](shape, generator).to(type.dtype.to_torch()))
        else:
            tensors.append(random_tensor(type.dtype, shape, generator, example.ranges.get(name), example.special))
    if example.is_symbolic:
        tensors.append(torch.zeros(bindings["batch"], bindings["seq"]))
    return tensors


def random_tensor(
    dtype: DType,
    shape: tuple[int, ...],
    generator: torch.Generator,
    bounds: tuple[float, float] | None = None,
    special: bool = False,
) -> Tensor:
    """Normal floats, small integers or fair bools, or uniform values in ``bounds``."""
    if dtype is DType.BOOL:
        return torch.rand(shape, generator=generator) < 0.5
    if not dtype.is_floating:
        low, high = bounds or ((0, 9) if dtype.value.startswith("u") else (-5, 6))
        return torch.randint(int(low), int(high), shape, generator=generator).to(dtype.to_torch())
    if bounds is not None:
        data = torch.rand(shape, generator=generator, dtype=torch.float64) * (bounds[1] - bounds[0]) + bounds[0]
    else:
        data = torch.randn(shape, generator=generator, dtype=torch.float64) * 1.5
    if special and data.numel():
        odd = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e30, -1e30, 1e-40], dtype=torch.float64)
        places = torch.randperm(data.numel(), generator=generator)[: len(odd)]
        data.view(-1)[places] = odd[torch.randperm(len(odd), generator=generator)][: len(places)]
    return data.to(dtype.to_torch())


def _dims_in(value: Any) -> list[Dim]:
    if isinstance(value, tuple | list):
        return [dim for item in value for dim in _dims_in(item)]
    return [value] if isinstance(value, DimExpr) else []


def _tensor(dtype: DType, *shape: Dim) -> TensorType:
    return TensorType(dtype, shape)


f64, f32, f16, bf16 = (partial(_tensor, d) for d in (DType.F64, DType.F32, DType.F16, DType.BF16))
i64, i32, i8, u8, b1 = (partial(_tensor, d) for d in (DType.I64, DType.I32, DType.I8, DType.U8, DType.BOOL))

EXAMPLES: dict[type[Op], list[OpExample]] = {}


def _add(cls: type[Op], label: str, *operands: Operand, ranges: Mapping[str, tuple[float, float]] | None = None,
         draw: Mapping[str, Draw] | None = None, special: bool = False, body: Callable[[], Graph] | None = None,
         **attributes: Any) -> None:  # fmt: skip
    absent = (None,) * (len(cls.operand_fields) - len(operands))
    example = OpExample(cls, label, (*operands, *absent), attributes, ranges or {}, draw or {}, special, body)
    EXAMPLES.setdefault(cls, []).append(example)


# -- elementwise, one operand -------------------------------------------------------------------------------------

_DOMAINS: dict[type[Op], tuple[float, float]] = {
    ops.Log: (0.01, 20), ops.Log1p: (-0.9, 20), ops.Sqrt: (0, 20), ops.Rsqrt: (0.01, 20), ops.Reciprocal: (0.1, 9),
    ops.Asin: (-1, 1), ops.Acos: (-1, 1), ops.Acosh: (1, 20), ops.Atanh: (-0.99, 0.99), ops.Tan: (-1.4, 1.4),
}  # fmt: skip
_FLOAT_UNARY = (
    ops.Exp, ops.Log, ops.Log1p, ops.Expm1, ops.Sqrt, ops.Rsqrt, ops.Reciprocal, ops.Sin, ops.Cos, ops.Tan, ops.Asin,
    ops.Acos, ops.Atan, ops.Sinh, ops.Cosh, ops.Tanh, ops.Asinh, ops.Acosh, ops.Atanh, ops.Erf, ops.Sigmoid, ops.Silu,
    ops.Mish, ops.HardSigmoid, ops.HardSwish, ops.Floor, ops.Ceil, ops.Round, ops.Trunc, ops.Gelu, ops.LeakyRelu,
    ops.Elu, ops.Softplus, ops.Neg, ops.Abs, ops.Sign, ops.Relu, ops.Clamp, ops.IsNan, ops.IsInf, ops.LogicalNot,
)  # fmt: skip
for _cls in _FLOAT_UNARY:
    _ranges = {"x": _DOMAINS[_cls]} if _cls in _DOMAINS else {}
    _extra = {"min": -0.5, "max": 1.0} if _cls is ops.Clamp else {}
    _add(_cls, "ragged", f32(3, 1, 13), ranges=_ranges, **_extra)
    _add(_cls, "scalar", f32(), ranges=_ranges, **_extra)
    _add(_cls, "symbolic", f32(BATCH, SEQ, 5), ranges=_ranges, **_extra)
    _add(_cls, "special", f32(4, 8), special=True, **_extra)
for _cls in (ops.Neg, ops.Abs, ops.Sign, ops.Relu, ops.LogicalNot):
    _add(_cls, "i64", i64(2, 5))
    _add(_cls, "i32", i32(BATCH, 3))
_add(ops.Exp, "f16", f16(3, 5))
_add(ops.Gelu, "tanh", f32(3, 1, 13), approximate="tanh")
_add(ops.Gelu, "sigmoid", f32(BATCH, SEQ, 5), approximate="sigmoid")
_add(ops.Gelu, "sigmoid-special", f32(4, 8), approximate="sigmoid", special=True)
_add(ops.Gelu, "bf16", bf16(2, 9))
_add(ops.LeakyRelu, "steep", f32(2, 9), negative_slope=0.3)
_add(ops.Elu, "selu", f32(2, 9), alpha=1.6732632423543772, scale=1.0507009873554805)
_add(ops.Elu, "celu", f32(2, 9), alpha=2.0, input_scale=0.5)
_add(ops.Softplus, "sharp", f32(2, 9), beta=3.0, threshold=1.0)
_add(ops.Clamp, "low", f32(2, 9), min=0.0)
_add(ops.Clamp, "high", f32(2, 9), max=0.25)
_add(ops.Clamp, "free", f32(2, 9))
_add(ops.Clamp, "integers", i32(2, 9), min=-1, max=3)
_add(ops.BitwiseNot, "i32", i32(2, 5))
_add(ops.BitwiseNot, "u8", u8(BATCH, 5))
_add(ops.BitwiseNot, "bool", b1(3, 3))
_add(ops.Cast, "widen", f32(BATCH, 3), dtype=DType.F64)
_add(ops.Cast, "narrow", f32(2, 3), dtype=DType.F16)
_add(ops.Cast, "brain", f32(2, 300), dtype=DType.BF16)
_add(ops.Cast, "to-integer", f32(2, 9), dtype=DType.I32)
_add(ops.Cast, "to-bool", f32(2, 9), dtype=DType.BOOL, special=True)
_add(ops.Cast, "from-bool", b1(2, 9), dtype=DType.F32)
_add(ops.Cast, "wrap", i32(2, 9), dtype=DType.U8, ranges={"x": (-300, 300)})
_add(ops.Cast, "scalar", i64(), dtype=DType.F32)

# -- elementwise, two operands ------------------------------------------------------------------------------------

_ARITHMETIC = (ops.Add, ops.Sub, ops.Mul, ops.Maximum, ops.Minimum)
_COMPARISONS = (ops.Eq, ops.Ne, ops.Lt, ops.Le, ops.Gt, ops.Ge)
_LOGIC = (ops.LogicalAnd, ops.LogicalOr, ops.LogicalXor)
for _cls in (*_ARITHMETIC, *_COMPARISONS, *_LOGIC):
    _add(_cls, "same", f32(2, 3, 5), f32(2, 3, 5))
    _add(_cls, "broadcast", f32(4, 1, 7), f32(3, 1))
    _add(_cls, "scalar", f32(3, 5), f32())
    _add(_cls, "symbolic", f32(BATCH, SEQ, 5), f32(SEQ, 1))
    _add(_cls, "special", f32(4, 8), f32(4, 8), special=True)
    _add(_cls, "i64", i64(2, 9), i64(9))
for _cls in (*_COMPARISONS[:2], *_LOGIC, ops.BitwiseAnd, ops.BitwiseOr, ops.BitwiseXor):
    _add(_cls, "bool", b1(BATCH, 5), b1(1, 5))
for _cls in (ops.BitwiseAnd, ops.BitwiseOr, ops.BitwiseXor):
    _add(_cls, "i32", i32(4, 5), i32(5))
    _add(_cls, "u8", u8(4, 5), u8(4, 1))
for _cls in (ops.ShiftLeft, ops.ShiftRight):
    _add(_cls, "i32", i32(4, 5), i32(4, 5), ranges={"x": (-1000, 1000), "y": (0, 8)})
    _add(_cls, "symbolic", i64(BATCH, 5), i64(5), ranges={"x": (-1000, 1000), "y": (0, 8)})
_add(ops.Add, "f16", f16(3, 5), f16(5))
_add(ops.Mul, "bf16", bf16(BATCH, 5), bf16(5))
_add(ops.Add, "empty-axis", f32(0, 5), f32(5))
for _cls in (ops.Div, ops.Remainder, ops.Fmod):
    _add(_cls, "floats", f32(4, 5), f32(5), ranges={"y": (0.5, 3)})
    _add(_cls, "negative", f32(4, 5), f32(5), ranges={"y": (-3, -0.5)})
    _add(_cls, "symbolic", f32(BATCH, SEQ), f32(BATCH, 1), ranges={"y": (0.5, 3)})
for _cls in (ops.Remainder, ops.Fmod):
    _add(_cls, "integers", i32(4, 9), i32(9), ranges={"y": (1, 5)})
    _add(_cls, "negative-integers", i64(4, 9), i64(9), ranges={"y": (-5, 0)})
_add(ops.Div, "special", f32(4, 8), f32(4, 8), special=True)
for _rounding in ("trunc", "floor"):
    _add(ops.Div, f"{_rounding}-floats", f32(4, 5), f32(5), ranges={"y": (0.5, 3)}, rounding=_rounding)
    _add(ops.Div, f"{_rounding}-integers", i64(4, 5), i64(5), ranges={"y": (1, 5)}, rounding=_rounding)
    _add(ops.Div, f"{_rounding}-negative", i32(4, 5), i32(5), ranges={"y": (-5, 0)}, rounding=_rounding)
_add(ops.Pow, "positive-base", f32(3, 5), f32(5), ranges={"x": (0.1, 4)})
_add(ops.Pow, "whole-exponent", f32(BATCH, 5), f32(), draw={"y": lambda shape, g: torch.full(shape, 3.0)})
_add(ops.Pow, "integers", i64(3, 5), i64(5), ranges={"y": (0, 4)})
_add(ops.Atan2, "quadrants", f32(4, 5), f32(4, 5))
_add(ops.Atan2, "symbolic", f32(BATCH, SEQ), f32(SEQ))
_add(ops.Where, "same", b1(2, 5), f32(2, 5), f32(2, 5))
_add(ops.Where, "broadcast", b1(BATCH, 1, SEQ), f32(), f32(4, SEQ))
_add(ops.Where, "integers", b1(5), i64(3, 5), i64(1, 5))
_add(ops.Where, "special", b1(4, 8), f32(4, 8), f32(8), special=True)

# -- matrix products ----------------------------------------------------------------------------------------------

_add(ops.Linear, "matrix", f32(3, 7), f32(5, 7), f32(5))
_add(ops.Linear, "no-bias", f32(2, 3, 7), f32(5, 7), None)
_add(ops.Linear, "vector", f32(7), f32(5, 7), f32(5))
_add(ops.Linear, "one-row", f32(1, 33), f32(65, 33), f32(65))
_add(ops.Linear, "symbolic", f32(BATCH, SEQ, 8), f32(17, 8), f32(17))
_add(ops.Linear, "bf16", bf16(4, 8), bf16(3, 8), bf16(3))
_add(ops.Matmul, "matrix", f32(3, 7), f32(7, 5))
_add(ops.Matmul, "batched", f32(2, 1, 3, 7), f32(4, 7, 5))
_add(ops.Matmul, "row", f32(7), f32(2, 7, 5))
_add(ops.Matmul, "column", f32(2, 3, 7), f32(7))
_add(ops.Matmul, "dot", f32(7), f32(7))
_add(ops.Matmul, "symbolic", f32(BATCH, 4, SEQ, 8), f32(BATCH, 4, 8, SEQ))
_add(ops.Matmul, "integers", i64(3, 7), i64(7, 5))

U8_RANGE, I8_RANGE = {"x": (0, 256)}, {"x": (-128, 128)}
_add(ops.Quantize, "tensor", f32(2, 300), f32(), dtype=DType.I8, low=-127, high=127, ranges={"scale": (0.01, 0.02)})
_add(ops.Quantize, "zero", f32(BATCH, 9, 16), f32(), u8(), dtype=DType.U8, low=0, high=255,
     ranges={"scale": (0.01, 0.02), "zero": (100, 140)})  # fmt: skip
_add(ops.Quantize, "rows", f32(BATCH, 9, 16), f32(BATCH, 9, 1), dtype=DType.I8, low=-127, high=127,
     ranges={"scale": (0.01, 0.02)})  # fmt: skip
_add(ops.Quantize, "six-bits", f32(5, 16), f32(16), i32(16), dtype=DType.U8, low=0, high=63,
     ranges={"scale": (0.05, 0.1), "zero": (20, 40)})  # fmt: skip
_add(ops.Quantize, "special", f32(5, 16), f32(), dtype=DType.I8, low=-128, high=127, special=True,
     draw={"scale": lambda shape, generator: torch.full(shape, 0.0137)})  # fmt: skip
_add(ops.Quantize, "special-channels", f32(5, 16), f32(16), dtype=DType.I8, low=-128, high=127, special=True,
     draw={"scale": lambda shape, generator: torch.rand(shape, generator=generator) + 0.01})  # fmt: skip
_add(ops.Dequantize, "sums", i32(BATCH, 9, 16), f32(16), i32(16),
     ranges={"x": (-(1 << 31), 1 << 31), "scale": (0.01, 0.02), "zero": (-(1 << 31), 1 << 31)})  # fmt: skip
_add(ops.Dequantize, "bytes", u8(9, 16), f32(), u8(), ranges={**U8_RANGE, "scale": (0.01, 0.02)})
_add(ops.Dequantize, "rows", i8(9, 16), f32(9, 1), ranges={**I8_RANGE, "scale": (0.01, 0.02)})
_add(
    ops.Requantize,
    "columns",
    i32(BATCH, 16),
    i32(16),
    i32(16),
    dtype=DType.I8,
    low=-128,
    high=127,
    zero=3,
    ranges={"x": (-(1 << 31), 1 << 31), "multiplier": (1 << 30, (1 << 31) - 1), "shift": (50, 62)},
)
_add(ops.Requantize, "tensor", i32(300), i32(), i32(), dtype=DType.U8, low=0, high=255,
     ranges={"x": (-4000, 4000), "multiplier": (1 << 10, 1 << 11), "shift": (12, 15)})  # fmt: skip
_EXTREMES = {"weight": (-128, 128), "y": (-128, 128)}
_add(ops.LinearInteger, "unsigned", u8(BATCH, 7, 64), i8(40, 64), ranges={**U8_RANGE, **_EXTREMES})
_add(ops.LinearInteger, "signed", i8(33, 64), i8(96, 64), ranges={**I8_RANGE, **_EXTREMES})
_add(ops.LinearInteger, "odd-depth", u8(5, 13), i8(9, 13), ranges={**U8_RANGE, **_EXTREMES})
_add(ops.MatmulInteger, "batch", u8(BATCH, 3, 7, 16), i8(BATCH, 3, 16, 9),
     ranges={**U8_RANGE, **_EXTREMES})  # fmt: skip
_add(ops.MatmulInteger, "unsigned", i8(5, 13), u8(13, 9), ranges={**I8_RANGE, "y": (0, 256)})
_PLAIN = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
_add(ops.ConvInteger, "patches", u8(BATCH, 3, 16, 16), i8(24, 3, 4, 4),
     ranges={**U8_RANGE, **_EXTREMES}, **{**_PLAIN, "stride": (4, 4)})  # fmt: skip
_add(ops.ConvInteger, "padded", u8(2, 8, 7, 9), i8(6, 4, 3, 3), u8(1), groups=2,
     ranges={**U8_RANGE, **_EXTREMES, "zero": (100, 140)}, **{**_PLAIN, "padding": (1, 1)})  # fmt: skip
_add(ops.ConvInteger, "channels-last", i8(2, 7, 9, 8), i8(6, 8, 3, 3), channels_last=True,
     ranges={**I8_RANGE, **_EXTREMES}, **{**_PLAIN, "padding": (1, 1)})  # fmt: skip
_add(ops.ConvInteger, "border", u8(2, 4, 7, 9), i8(6, 4, 3, 2), border=200,
     ranges={**U8_RANGE, **_EXTREMES}, **{**_PLAIN, "padding": (1, 2), "stride": (2, 1)})  # fmt: skip
_add(ops.ConvInteger, "border-channels-last", u8(BATCH, 9, 8, 8), i8(40, 8, 3, 3), border=77, channels_last=True,
     ranges={**U8_RANGE, **_EXTREMES}, **{**_PLAIN, "padding": (1, 1)})  # fmt: skip
_add(ops.LinearGroupwise, "bytes", f32(BATCH, 64), i8(40, 64), f32(40, 2), group=32,
     ranges={"weight": (-128, 128), "scale": (0.001, 0.01)})  # fmt: skip
_add(ops.LinearGroupwise, "zeros", f32(3, 5, 64), u8(40, 64), f32(40, 4), u8(40, 4), f32(40), group=16,
     ranges={"weight": (0, 16), "scale": (0.01, 0.1), "zero": (0, 16)})  # fmt: skip
_add(ops.Einsum, "matrix", (f32(3, 7), f32(7, 5)), equation="ij,jk->ik")
_add(ops.Einsum, "heads", (f32(BATCH, SEQ, 4, 8), f32(BATCH, SEQ, 4, 8)), equation="bqhd,bkhd->bhqk")
_add(ops.Einsum, "ellipsis", (f32(2, 3, 7), f32(7, 5)), equation="...j,jk->...k")
_add(ops.Einsum, "one", (f32(3, 5),), equation="ij->ji")
_add(ops.Einsum, "three", (f32(3, 4), f32(4, 5), f32(5, 2)), equation="ij,jk,kl->il")

# -- attention ----------------------------------------------------------------------------------------------------


def _mask_with_dead_rows(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    mask = torch.rand(shape, generator=generator) < 0.6
    mask[..., 1, :] = False
    return mask


def _float_mask(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    mask = torch.randn(shape, generator=generator)
    dead = torch.rand(shape, generator=generator) < 0.3
    return mask.masked_fill(dead, -math.inf).index_fill(-1, torch.tensor(0), 0.0)


def _float_mask_with_dead_rows(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    mask = _float_mask(shape, generator)
    mask[..., 1, :] = -math.inf
    return mask


_QKV = (f32(2, 4, 5, 8), f32(2, 4, 7, 8), f32(2, 4, 7, 6))
_add(ops.Attention, "plain", *_QKV, None, scale=0.35)
_add(ops.Attention, "rank-3", f32(4, 5, 8), f32(4, 7, 8), f32(4, 7, 8), None, scale=0.35)
_add(ops.Attention, "causal", f32(2, 4, 7, 8), f32(2, 4, 7, 8), f32(2, 4, 7, 8), None, scale=0.35, causal=True)
_add(ops.Attention, "causal-short-query", *_QKV, None, scale=0.35, causal=True)
_add(ops.Attention, "bool-mask", *_QKV, b1(2, 1, 5, 7), scale=0.35, draw={"mask": _mask_with_dead_rows})
_add(ops.Attention, "float-mask", *_QKV, f32(5, 7), scale=0.35, draw={"mask": _float_mask})
_add(ops.Attention, "float-mask-dead-row", *_QKV, f32(2, 4, 5, 7), scale=0.35,
     draw={"mask": _float_mask_with_dead_rows})  # fmt: skip
_add(ops.Attention, "causal-bool-mask", f32(2, 4, 7, 8), f32(2, 4, 7, 8), f32(2, 4, 7, 8), b1(2, 1, 1, 7), scale=0.35,
     causal=True, draw={"mask": lambda shape, g: (torch.rand(shape, generator=g) < 0.5).index_fill(-1, torch.tensor(0), 0)})  # fmt: skip  # noqa: E501
_add(ops.Attention, "causal-float-mask", f32(2, 4, 7, 8), f32(2, 4, 7, 8), f32(2, 4, 7, 8), f32(7, 7), scale=0.35,
     causal=True, draw={"mask": _float_mask})  # fmt: skip
_GROUPED = (f32(2, 6, 5, 8), f32(2, 2, 7, 8), f32(2, 2, 7, 8))
_add(ops.Attention, "grouped", *_GROUPED, None, scale=0.35)
_add(ops.Attention, "grouped-bool-mask", *_GROUPED, b1(2, 1, 5, 7), scale=0.35, draw={"mask": _mask_with_dead_rows})
_add(ops.Attention, "grouped-float-mask", *_GROUPED, f32(2, 6, 5, 7), scale=0.35, draw={"mask": _float_mask})
_add(ops.Attention, "one-key", f32(1, 2, 1, 8), f32(1, 2, 1, 8), f32(1, 2, 1, 8), None, scale=1.0)
_add(ops.Attention, "symbolic", f32(BATCH, 4, SEQ, 8), f32(BATCH, 4, SEQ, 8), f32(BATCH, 4, SEQ, 8), None, scale=0.35)
_add(ops.Attention, "symbolic-causal", f32(BATCH, 4, SEQ, 8), f32(BATCH, 2, SEQ, 8), f32(BATCH, 2, SEQ, 8), None,
     scale=0.35, causal=True)  # fmt: skip
_add(ops.Attention, "symbolic-mask", f32(BATCH, 4, SEQ, 8), f32(BATCH, 4, SEQ, 8), f32(BATCH, 4, SEQ, 8),
     b1(BATCH, 1, SEQ, SEQ), scale=0.35, draw={"mask": _mask_with_dead_rows})  # fmt: skip
_ANGLES = f32(7, 16)
_add(ops.RotaryEmbedding, "heads", f32(2, 3, 7, 16), _ANGLES, _ANGLES)
_add(ops.RotaryEmbedding, "interleaved", f32(2, 3, 7, 16), _ANGLES, _ANGLES, interleaved=True)
_add(ops.RotaryEmbedding, "partial", f32(2, 3, 7, 22), f32(2, 1, 7, 6), f32(7, 6))
_add(ops.RotaryEmbedding, "partial-interleaved", f32(7, 13), f32(1, 6), f32(7, 6), interleaved=True)
_add(ops.RotaryEmbedding, "one-row", f32(32), f32(32), f32(32))
_add(ops.RotaryEmbedding, "heads-last", f32(2, 7, 3, 10), f32(7, 1, 10), f32(2, 7, 1, 10))
_add(ops.RotaryEmbedding, "symbolic", f32(BATCH, 3, SEQ, 34), f32(1, 1, SEQ, 34), f32(BATCH, 1, SEQ, 34))
_add(ops.RotaryEmbedding, "bf16", bf16(BATCH, SEQ, 8), bf16(SEQ, 8), bf16(SEQ, 8))

# -- normalisation ------------------------------------------------------------------------------------------------

_add(ops.LayerNorm, "full", f32(2, 3, 7), f32(7), f32(7))
_add(ops.LayerNorm, "bare", f32(2, 3, 7), None, None, eps=1e-3)
_add(ops.LayerNorm, "no-bias", f32(2, 3, 7), f32(7), None)
_add(ops.LayerNorm, "two-axes", f32(2, 3, 7), f32(3, 7), f32(3, 7), axes=2)
_add(ops.LayerNorm, "symbolic", f32(BATCH, SEQ, 16), f32(16), f32(16))
_add(ops.LayerNorm, "large", f32(2, 33), f32(33), f32(33), ranges={"x": (9999, 10001)})
_add(ops.RmsNorm, "full", f32(2, 3, 7), f32(7))
_add(ops.RmsNorm, "bare", f32(2, 3, 7), None)
_add(ops.RmsNorm, "symbolic", f32(BATCH, SEQ, 16), f32(16), eps=1e-5)
_add(ops.GroupNorm, "full", f32(2, 6, 4, 3), f32(6), f32(6), groups=3)
_add(ops.GroupNorm, "instance", f32(2, 6, 9), None, None, groups=6)
_add(ops.GroupNorm, "symbolic", f32(BATCH, 6, SEQ), f32(6), f32(6), groups=2)
_add(ops.BatchNorm, "full", f32(2, 3, 4, 4), f32(3), f32(3), f32(3), f32(3), ranges={"variance": (0.1, 3)})
_add(ops.BatchNorm, "bare", f32(2, 3), f32(3), f32(3), None, None, ranges={"variance": (0.1, 3)})
_add(ops.BatchNorm, "symbolic", f32(BATCH, 3, SEQ), f32(3), f32(3), f32(3), None, ranges={"variance": (0.1, 3)})

# -- convolution, pooling, resizing -------------------------------------------------------------------------------

_add(ops.Conv1d, "plain", f32(2, 4, 11), f32(6, 4, 3), f32(6), stride=(2,), padding=(1,), dilation=(1,))
_add(ops.Conv1d, "symbolic", f32(BATCH, 4, SEQ), f32(6, 4, 3), None, stride=(1,), padding=(1,), dilation=(1,))
_add(ops.Conv2d, "plain", f32(2, 3, 9, 8), f32(5, 3, 3, 2), f32(5), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
_add(ops.Conv2d, "depthwise", f32(BATCH, 6, 7, 7), f32(6, 1, 3, 3), f32(6), stride=(1, 1), padding=(1, 1),
     dilation=(1, 1), groups=6)  # fmt: skip
_add(ops.Conv2d, "patches", f32(BATCH, 3, 8, 12), f32(16, 3, 4, 4), f32(16), stride=(4, 4), padding=(0, 0),
     dilation=(1, 1))  # fmt: skip
_add(ops.Conv2d, "grouped", f32(1, 4, 5, 5), f32(6, 2, 1, 1), None, stride=(1, 1), padding=(0, 0), dilation=(1, 1),
     groups=2)  # fmt: skip
_add(ops.Conv2d, "channels-last", f32(2, 9, 8, 3), f32(5, 3, 3, 2), f32(5), stride=(2, 1), padding=(1, 0),
     dilation=(1, 2), channels_last=True)  # fmt: skip
_add(ops.Conv2d, "channels-last-depthwise", f32(BATCH, 7, 6, 6), f32(6, 1, 3, 3), f32(6), stride=(1, 1),
     padding=(1, 1), dilation=(1, 1), groups=6, channels_last=True)  # fmt: skip
_add(ops.Conv2d, "channels-last-grouped", f32(1, 5, 5, 4), f32(6, 2, 3, 1), None, stride=(1, 1), padding=(1, 0),
     dilation=(1, 1), groups=2, channels_last=True)  # fmt: skip
_add(ops.Conv3d, "plain", f32(1, 2, 5, 6, 7), f32(3, 2, 2, 3, 2), f32(3), stride=(1, 2, 1), padding=(0, 1, 0),
     dilation=(1, 1, 1))  # fmt: skip
_add(ops.ConvTranspose1d, "plain", f32(2, 4, 5), f32(4, 3, 4), f32(3), stride=(2,), padding=(1,), output_padding=(1,),
     dilation=(1,))  # fmt: skip
_add(ops.ConvTranspose2d, "plain", f32(BATCH, 4, 5, 3), f32(4, 3, 2, 2), f32(3), stride=(2, 2), padding=(0, 0),
     output_padding=(0, 0), dilation=(1, 1))  # fmt: skip
_add(ops.ConvTranspose2d, "grouped", f32(1, 4, 5, 3), f32(4, 3, 3, 3), None, stride=(2, 1), padding=(1, 1),
     output_padding=(1, 0), dilation=(1, 1), groups=2)  # fmt: skip
_add(ops.MaxPool2d, "plain", f32(BATCH, 3, 8, 7), kernel=(3, 2), stride=(2, 2), padding=(1, 1))
_add(ops.MaxPool2d, "channels-last", f32(BATCH, 8, 7, 3), kernel=(3, 2), stride=(2, 2), padding=(1, 1),
     channels_last=True)  # fmt: skip
_add(ops.MaxPool2d, "ceil", f32(1, 2, 7, 7), kernel=(2, 2), stride=(2, 2), ceil_mode=True)
_add(ops.AvgPool2d, "plain", f32(BATCH, 3, 8, 7), kernel=(3, 2), stride=(2, 2), padding=(1, 1))
_add(ops.AvgPool2d, "without-pad", f32(1, 2, 7, 7), kernel=(3, 3), stride=(2, 2), padding=(1, 1),
     count_include_pad=False)  # fmt: skip
_add(ops.AvgPool2d, "channels-last", f32(1, 7, 6, 2), kernel=(3, 2), stride=(2, 2), padding=(1, 1),
     ceil_mode=True, channels_last=True, count_include_pad=False)  # fmt: skip
_add(ops.AdaptiveAvgPool2d, "channels-last", f32(BATCH, 7, 5, 3), size=(3, 2), channels_last=True)
_add(ops.AdaptiveAvgPool2d, "global", f32(BATCH, 3, 7, 5), size=(1, 1))
_add(ops.AdaptiveAvgPool2d, "ragged", f32(1, 3, 7, 5), size=(3, 2))
for _mode in ("nearest", "bilinear", "bicubic"):
    _add(ops.Resize2d, f"{_mode}-up", f32(BATCH, 2, 5, 4), size=(9, 11), mode=_mode)
    _add(ops.Resize2d, f"{_mode}-down", f32(1, 2, 9, 8), size=(4, 3), mode=_mode)
_add(ops.Resize2d, "aligned", f32(1, 2, 5, 4), size=(9, 11), align_corners=True)
_add(ops.Resize2d, "aligned-bicubic", f32(1, 2, 5, 4), size=(9, 11), mode="bicubic", align_corners=True)
_add(ops.Resize2d, "antialias", f32(1, 2, 9, 8), size=(4, 3), antialias=True)
_add(ops.Resize2d, "scaled", f32(1, 2, 5, 4), size=(8, 6), scale=(1.7, 1.6))

# -- reductions and scans -----------------------------------------------------------------------------------------

for _cls in (ops.Sum, ops.Mean, ops.Prod, ops.Amax, ops.Amin, ops.Any, ops.All):
    _add(_cls, "one-axis", f32(3, 4, 5), dims=(1,))
    _add(_cls, "two-axes-kept", f32(3, 4, 5), dims=(0, 2), keepdim=True)
    _add(_cls, "everything", f32(3, 4), dims=(0, 1))
    _add(_cls, "nothing", f32(3, 4), dims=())
    _add(_cls, "size-one", f32(3, 1), dims=(1,))
    _add(_cls, "symbolic", f32(BATCH, SEQ, 5), dims=(1,))
    _add(_cls, "special", f32(4, 8), dims=(0,), special=True)
for _cls in (ops.Sum, ops.Prod, ops.Amax, ops.Amin):
    _add(_cls, "i32", i32(3, 5), dims=(1,))
for _cls in (ops.Any, ops.All):
    _add(_cls, "bool", b1(BATCH, 5), dims=(1,))
for _cls in (ops.Argmax, ops.Argmin):
    _add(_cls, "last", f32(3, 5), dim=1)
    _add(_cls, "kept", f32(BATCH, SEQ, 5), dim=1, keepdim=True)
    _add(_cls, "ties", i32(4, 30), dim=1)
_add(ops.Cumsum, "floats", f32(3, 5), dim=1, dtype=DType.F32)
_add(ops.Cumsum, "counting", i32(BATCH, SEQ), dim=1, dtype=DType.I64)
_add(ops.Cumsum, "bools", b1(3, 5), dim=0, dtype=DType.I64)
for _cls in (ops.Softmax, ops.LogSoftmax):
    _add(_cls, "last", f32(2, 3, 7), dim=2)
    _add(_cls, "middle", f32(2, 3, 7), dim=1)
    _add(_cls, "one", f32(3, 1), dim=1)
    _add(_cls, "symbolic", f32(BATCH, SEQ, SEQ), dim=2)
    _add(_cls, "large", f32(3, 9), dim=1, ranges={"x": (-500, 500)})
_add(ops.Softmax, "masked", f32(3, 9), dim=1, draw={"x": _float_mask})
_add(ops.Topk, "largest", f32(3, 9), dim=1, k=4)
_add(ops.Topk, "smallest", f32(BATCH, 9, 2), dim=1, k=1, largest=False)
_add(ops.Sort, "ascending", f32(BATCH, SEQ), dim=1)
_add(ops.Sort, "descending-ties", i32(4, 30), dim=1, descending=True)

# -- moving elements ----------------------------------------------------------------------------------------------

_add(ops.Reshape, "merge", f32(2, 3, 4), shape=(6, 4))
_add(ops.Reshape, "scalar", f32(1, 1), shape=())
_add(ops.Reshape, "heads", f32(BATCH, SEQ, 32), shape=(BATCH, SEQ, 4, 8))
_add(ops.Reshape, "flatten", f32(BATCH, SEQ, 32), shape=(BATCH * SEQ, 32))
_add(ops.Reshape, "empty", f32(0, 3), shape=(3, 0, 2))
_add(ops.Permute, "heads", f32(BATCH, SEQ, 4, 8), dims=(0, 2, 1, 3))
_add(ops.Permute, "transpose", i64(3, 5), dims=(1, 0))
_add(ops.Permute, "scalar", f32(), dims=())
_add(ops.Expand, "axis", f32(1, 5), shape=(3, 5))
_add(ops.Expand, "leading", f32(1, 5), shape=(BATCH, SEQ, 5))
_add(ops.Expand, "scalar", f32(), shape=(2, 3))
_add(ops.Slice, "middle", f32(3, 9), dim=1, start=2, stop=7)
_add(ops.Slice, "strided", f32(3, 10), dim=1, start=1, stop=10, step=4)
_add(ops.Slice, "tail", f32(BATCH, SEQ, 3), dim=1, start=1, stop=SEQ)
_add(ops.Slice, "head", f32(BATCH, SEQ), dim=1, start=0, stop=SEQ - 1)
_add(ops.Slice, "nothing", f32(3, 9), dim=1, start=4, stop=4)
_add(ops.Select, "first", f32(BATCH, SEQ, 5), dim=1, index=0)
_add(ops.Select, "last", f32(BATCH, SEQ, 5), dim=1, index=SEQ - 1)
_add(ops.Select, "static", i64(4, 3), dim=0, index=2)
_add(ops.Concat, "two", (f32(2, 3), f32(2, 4)), dim=1)
_add(ops.Concat, "token", (f32(BATCH, 1, 8), f32(BATCH, SEQ, 8)), dim=1)
_add(ops.Concat, "one", (f32(2, 3),), dim=0)
_add(ops.Concat, "empty-part", (i64(2, 0), i64(2, 4), i64(2, 1)), dim=1)
_add(ops.Split, "parts", f32(2, 9), dim=1, sizes=(2, 3, 4))
_add(ops.Split, "symbolic", f32(BATCH, SEQ, 6), dim=1, sizes=(1, SEQ - 1))
_add(ops.Split, "one", f32(2, 9), dim=0, sizes=(2,))
_add(ops.Pad, "constant", f32(BATCH, 3, 5), before=(0, 1, 2), after=(0, 0, 3), value=0.5)
_add(ops.Pad, "infinite", f32(3, 5), before=(0, 1), after=(1, 0), value=-math.inf)
_add(ops.Pad, "crop", f32(3, 5), before=(0, -1), after=(1, -2))
_add(ops.Pad, "integers", i64(3, 5), before=(1, 1), after=(1, 0), value=7)
for _mode in ("reflect", "edge", "wrap"):
    _add(ops.Pad, _mode, f32(2, 4, 5), before=(0, 2, 1), after=(0, 1, 3), mode=_mode)
_add(ops.Tile, "both", f32(2, 3), repeats=(2, 3))
_add(ops.Tile, "symbolic", f32(1, 3), repeats=(BATCH, 1))
_add(ops.Flip, "two", f32(BATCH, 3, 4), dims=(1, 2))
_add(ops.Flip, "none", f32(3, 4), dims=())
_add(ops.Roll, "window", f32(BATCH, 7, 7, 2), shifts=(-3, 2), dims=(1, 2))
_add(ops.Roll, "wide", f32(3, 5), shifts=(12,), dims=(1,))
for _cls in (ops.Tril, ops.Triu):
    _add(_cls, "square", f32(5, 5))
    _add(_cls, "shifted", f32(2, 4, 6), diagonal=1)
    _add(_cls, "negative", f32(BATCH, 6, 4), diagonal=-2)
    _add(_cls, "bool", b1(5, 5))

# -- indexing -----------------------------------------------------------------------------------------------------

_add(ops.Embedding, "tokens", f32(11, 4), i64(BATCH, SEQ), ranges={"indices": (0, 11)})
_add(ops.Embedding, "i32", f32(11, 4), i32(3), ranges={"indices": (0, 11)})
_add(ops.Embedding, "scalar", f32(11, 4), i64(), ranges={"indices": (0, 11)})
_add(ops.IndexSelect, "negative", f32(3, 5, 2), i64(4), dim=1, ranges={"indices": (-5, 5)})
_add(ops.IndexSelect, "matrix", f32(BATCH, 5), i32(2, 3), dim=1, ranges={"indices": (0, 5)})
_add(ops.IndexSelect, "scalar", f32(3, 5), i64(), dim=0, ranges={"indices": (0, 3)})
_add(ops.Gather, "rows", f32(3, 5), i64(3, 2), dim=1, ranges={"indices": (-5, 5)})
_add(ops.Gather, "symbolic", f32(BATCH, 9, 4), i64(BATCH, SEQ, 4), dim=1, ranges={"indices": (0, 9)})
_add(ops.Index, "pair", f32(2, 5, 6, 3), (i64(4), i64(4)), dim=1, ranges={"indices": (-5, 5)})
_add(ops.Index, "broadcast", f32(5, 6), (i64(4, 1), i64(3)), ranges={"indices": (0, 5)})
_add(ops.Index, "symbolic", f32(9, 4), (i64(BATCH, SEQ),), ranges={"indices": (0, 9)})


def _distinct(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    # Permutations along axis 1, so that no place is written twice.
    return torch.rand(shape, generator=generator).argsort(1)


_add(ops.Scatter, "write", f32(3, 5), i64(3, 5), f32(3, 5), dim=1, draw={"indices": _distinct})
for _reduce in ("add", "mul", "amax", "amin"):
    _add(ops.Scatter, _reduce, f32(3, 5), i64(3, 4), f32(3, 4), dim=1, reduce=_reduce, ranges={"indices": (-5, 5)})
_add(ops.Scatter, "symbolic", f32(BATCH, 5), i64(BATCH, 5), f32(BATCH, 5), dim=1, draw={"indices": _distinct})
_add(ops.IndexPut, "write", f32(7, 3), (i64(4),), f32(4, 3),
     draw={"indices": lambda shape, g: torch.randperm(7, generator=g)[: shape[0]]})  # fmt: skip
_add(ops.IndexPut, "accumulate", f32(7, 3), (i64(4), i64(4)), f32(4), accumulate=True, ranges={"indices": (-3, 3)})

# -- constants, sizes, regions, operators of torch ----------------------------------------------------------------

_add(ops.Full, "scalar", value=2.5, dtype=DType.F32)
_add(ops.Full, "matrix", value=-3, dtype=DType.I64, shape=(2, 3))
_add(ops.Full, "bool", value=True, dtype=DType.BOOL, shape=(3,))
_add(ops.Full, "infinite", value=-math.inf, dtype=DType.F32, shape=(2,))
_add(ops.Full, "symbolic", value=0.5, dtype=DType.F32, shape=(BATCH, SEQ))
_add(ops.Arange, "count", length=7, dtype=DType.I64)
_add(ops.Arange, "strided", length=5, dtype=DType.I32, start=3, step=-2)
_add(ops.Arange, "floats", length=5, dtype=DType.F32, start=0.5, step=0.25)
_add(ops.Arange, "symbolic", length=SEQ, dtype=DType.I64)
_add(ops.DimValue, "static", dim=7, dtype=DType.I64)
_add(ops.DimValue, "symbolic", dim=BATCH * SEQ + 1, dtype=DType.I64)


def _residual_block() -> Graph:
    """The body ``x + tanh(x W^T)``: x carried, W stacked."""
    graph = Graph()
    x = graph.add_input(f32(BATCH, 4), "x")
    w = graph.add_input(f32(4, 4), "w")
    y = graph.ops.append(ops.Tanh(graph.ops.append(ops.Linear(x, w)).result)).result
    graph.set_outputs([graph.ops.append(ops.Add(x, y)).result])
    return graph


def _swap_and_add() -> Graph:
    """The body ``(a, b) -> (b + c, a)``: two values carried, c the same every time."""
    graph = Graph()
    a, b, c = (graph.add_input(f32(3), name) for name in "abc")
    graph.set_outputs([graph.ops.append(ops.Add(b, c)).result, a])
    return graph


def _skip_norm() -> Graph:
    """The body ``s = x + y, layer_norm(s)``, which returns both."""
    graph = Graph()
    x, y, w = graph.add_input(f32(BATCH, 4), "x"), graph.add_input(f32(BATCH, 4), "y"), graph.add_input(f32(4), "w")
    s = graph.ops.append(ops.Add(x, y)).result
    graph.set_outputs([s, graph.ops.append(ops.LayerNorm(s, w)).result])
    return graph


def _linear_gelu() -> Graph:
    """The body ``gelu(x W^T)``."""
    graph = Graph()
    x, w = graph.add_input(f32(BATCH, 4), "x"), graph.add_input(f32(3, 4), "w")
    product = graph.ops.append(ops.Linear(x, w)).result
    graph.set_outputs([graph.ops.append(ops.Gelu(product)).result])
    return graph


_add(ops.Fused, "linear-gelu", (f32(BATCH, 4), f32(3, 4)), body=_linear_gelu, kind="linear+gelu")
_add(ops.Fused, "skip-norm", (f32(BATCH, 4), f32(BATCH, 4), f32(4)), body=_skip_norm, kind="add+layer_norm")
_add(ops.Repeat, "stacked", (f32(BATCH, 4),), (f32(3, 4, 4),), (), body=_residual_block, n=3)
_add(ops.Repeat, "two-carried", (f32(3), f32(3)), (), (f32(3),), body=_swap_and_add, n=5)
_add(ops.Opaque, "one", (f32(BATCH, 5),), target="aten.erfinv.default", call='[{"operand": 0}]',
     ranges={"tensors": (-0.9, 0.9)})  # fmt: skip
_add(ops.Opaque, "two-results", (f32(3, 5),), target="aten.var_mean.correction", call='[{"operand": 0}, [1]]')
_add(ops.Opaque, "cast", (f32(3, 5),), target="aten.cumprod.default", call='[{"operand": 0}, 1]')

ALL_EXAMPLES: list[OpExample] = [example for examples in EXAMPLES.values() for example in examples]


def operand_values(module: Module) -> list[Value]:
    """The operands of the one op of :func:`build_module`'s module."""
    return list(next(iter(module.main.ops)).operands)
