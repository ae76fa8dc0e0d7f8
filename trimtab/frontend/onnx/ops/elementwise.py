"""Elementwise operators of one input that compute a mathematical function, and casts."""

from __future__ import annotations

import torch

from trimtab.frontend.onnx.element_types import SUPPORTED_TEXT, dtype_of, name_of
from trimtab.frontend.onnx.node import Node
from trimtab.frontend.onnx.ops.unsigned import WIDENED, compute
from trimtab.frontend.onnx.registry import onnx_op
from trimtab.ir import ops
from trimtab.ir.core import Value
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op
from trimtab.ir.ops.opaque import encode_call

_FUNCTIONS: dict[str, type[Op]] = {
    "Exp": ops.Exp, "Log": ops.Log, "Sqrt": ops.Sqrt, "Reciprocal": ops.Reciprocal, "Erf": ops.Erf,
    "Sin": ops.Sin, "Cos": ops.Cos, "Tan": ops.Tan, "Asin": ops.Asin, "Acos": ops.Acos, "Atan": ops.Atan,
    "Sinh": ops.Sinh, "Cosh": ops.Cosh, "Tanh": ops.Tanh, "Asinh": ops.Asinh, "Acosh": ops.Acosh, "Atanh": ops.Atanh,
    "Floor": ops.Floor, "Ceil": ops.Ceil, "Round": ops.Round, "Not": ops.LogicalNot, "IsNaN": ops.IsNan,
    "Neg": ops.Neg,
}  # fmt: skip


@onnx_op(*_FUNCTIONS, since=1)
def function(node: Node) -> Value:
    return node.emit(_FUNCTIONS[node.op](node.input(0)))


@onnx_op("Abs", since=6)
def absolute(node: Node) -> Value:
    x = node.input(0)
    return x if x.type.dtype in (*WIDENED, DType.U8) else node.emit(ops.Abs(x))


@onnx_op("Sign", since=9)
def sign(node: Node) -> Value:
    x = node.input(0)
    if x.type.dtype is DType.U64:
        return node.cast(node.cast(x, DType.BOOL), DType.U64)
    return compute(node, ops.Sign, (x,))


@onnx_op("BitwiseNot", since=18)
def bitwise_not(node: Node) -> Value:
    return compute(node, ops.BitwiseNot, (node.input(0),), wraps=True)


@onnx_op("IsInf", since=10)
def is_inf(node: Node) -> Value:
    x = node.input(0)
    negative, positive = node.flag("detect_negative", True), node.flag("detect_positive", True)
    if negative and positive:
        return node.emit(ops.IsInf(x))
    if not negative and not positive:
        return node.emit(ops.Lt(x, x))
    limit = node.scalar(float("-inf") if negative else float("inf"), x)
    return node.emit(ops.Eq(x, limit))


@onnx_op("Clip", since=11)
def clip(node: Node) -> Value:
    """Constant bounds give a clamp; bounds from data a maximum and a minimum."""
    x = node.input(0)
    bounds = [node.content(1), node.content(2)]
    given = [node.optional(1), node.optional(2)]
    concrete = all(
        value is None or (isinstance(bound, torch.Tensor) and bound.numel() == 1)
        for value, bound in zip(given, bounds, strict=True)
    )
    if concrete and x.type.dtype not in WIDENED:
        low, high = (bound.item() if isinstance(bound, torch.Tensor) else None for bound in bounds)
        return x if low is None and high is None else node.emit(ops.Clamp(x, min=low, max=high))
    for value, make in ((given[0], ops.Maximum), (given[1], ops.Minimum)):
        if value is not None:
            x = compute(node, make, (x, node.reshape(value, ())))
    return x


@onnx_op("Clip", since=6)
def clip_by_attributes(node: Node) -> Value:
    return node.emit(ops.Clamp(node.input(0), min=node.float_attr("min", None), max=node.float_attr("max", None)))


@onnx_op("Cast", since=6)
def cast(node: Node) -> Value:
    node.ignore("saturate", "round_mode")  # they concern 8-bit floats only
    return _cast(node, node.int_attr("to"))


@onnx_op("CastLike", since=15)
def cast_like(node: Node) -> Value:
    node.ignore("saturate", "round_mode")
    return node.cast(node.input(0), node.input(1).type.dtype)


@onnx_op("BitCast", since=26)
def bit_cast(node: Node) -> Value:
    x, dtype = node.input(0), dtype_of(node.int_attr("to"))
    if dtype is None:
        node.refuse("element type", f"use one of {SUPPORTED_TEXT}", to=name_of(node.int_attr("to")))
    if dtype.bits != x.type.dtype.bits:
        node.inconsistent("both types have one size", to=dtype)
    if dtype is DType.BOOL or x.type.dtype is DType.BOOL:
        return node.cast(x, dtype)
    call = encode_call((x, dtype.to_torch()), [x])
    return node.emit(ops.Opaque((x,), target="aten.view.dtype", call=call))


def _cast(node: Node, code: int) -> Value:
    dtype = dtype_of(code)
    if dtype is None:
        node.refuse(
            "element type", f"cast to one of {SUPPORTED_TEXT}", rule="the IR has no such type", to=name_of(code)
        )
    return node.cast(node.input(0), dtype)
