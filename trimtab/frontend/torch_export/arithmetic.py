"""Converters of elementwise operators, comparisons, casts, and operators that are the identity at inference."""

from __future__ import annotations

import math
from typing import Any

from trimtab.frontend.torch_export.call import Call
from trimtab.frontend.torch_export.registry import Refusal, converts
from trimtab.ir import ops
from trimtab.ir.core import Value
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op

_UNARY: dict[str, type[Op]] = {
    "neg": ops.Neg,
    "abs": ops.Abs,
    "sign": ops.Sign,
    "exp": ops.Exp,
    "log": ops.Log,
    "log1p": ops.Log1p,
    "expm1": ops.Expm1,
    "sqrt": ops.Sqrt,
    "rsqrt": ops.Rsqrt,
    "reciprocal": ops.Reciprocal,
    "sin": ops.Sin,
    "cos": ops.Cos,
    "tan": ops.Tan,
    "asin": ops.Asin,
    "acos": ops.Acos,
    "atan": ops.Atan,
    "sinh": ops.Sinh,
    "cosh": ops.Cosh,
    "tanh": ops.Tanh,
    "asinh": ops.Asinh,
    "acosh": ops.Acosh,
    "atanh": ops.Atanh,
    "erf": ops.Erf,
    "sigmoid": ops.Sigmoid,
    "relu": ops.Relu,
    "silu": ops.Silu,
    "mish": ops.Mish,
    "hardsigmoid": ops.HardSigmoid,
    "hardswish": ops.HardSwish,
    "floor": ops.Floor,
    "ceil": ops.Ceil,
    "round": ops.Round,
    "trunc": ops.Trunc,
    "isnan": ops.IsNan,
    "isinf": ops.IsInf,
    "logical_not": ops.LogicalNot,
    "bitwise_not": ops.BitwiseNot,
}
_TO_BOOL = ("isnan", "isinf", "logical_not")

_BINARY: dict[str, type[Op]] = {
    "mul": ops.Mul,
    "remainder": ops.Remainder,
    "fmod": ops.Fmod,
    "bitwise_and": ops.BitwiseAnd,
    "bitwise_or": ops.BitwiseOr,
    "bitwise_xor": ops.BitwiseXor,
    "__and__": ops.BitwiseAnd,
    "__or__": ops.BitwiseOr,
    "__xor__": ops.BitwiseXor,
    "maximum": ops.Maximum,
    "minimum": ops.Minimum,
    "atan2": ops.Atan2,
    "bitwise_left_shift": ops.ShiftLeft,
    "bitwise_right_shift": ops.ShiftRight,
    "eq": ops.Eq,
    "ne": ops.Ne,
    "lt": ops.Lt,
    "le": ops.Le,
    "gt": ops.Gt,
    "ge": ops.Ge,
}
_LOGICAL: dict[str, type[Op]] = {
    "logical_and": ops.LogicalAnd,
    "logical_or": ops.LogicalOr,
    "logical_xor": ops.LogicalXor,
}


def _register_unary(name: str, cls: type[Op]) -> None:
    @converts(f"aten.{name}.default")
    def convert(call: Call, x: Value) -> Value:
        # Floating functions of integers promote; rounding, sign and bit functions keep the dtype.
        return call(cls(x if name in _TO_BOOL else call.cast(x, call.dtype)))


def _register_binary(name: str, cls: type[Op]) -> None:
    @converts(*(f"aten.{name}.{overload}" for overload in ("default", "Tensor", "Scalar", "Scalar_Tensor")))
    def convert(call: Call, x: Any, other: Any) -> Value:
        return call(cls(*call.promoted(x, other)))


def _register_logical(name: str, cls: type[Op]) -> None:
    @converts(f"aten.{name}.default")
    def convert(call: Call, x: Value, other: Value) -> Value:
        return call(cls(*call.promoted(x, other)))


for _name, _cls in _UNARY.items():
    _register_unary(_name, _cls)
for _name, _cls in _BINARY.items():
    _register_binary(_name, _cls)
for _name, _cls in _LOGICAL.items():
    _register_logical(_name, _cls)


@converts(
    "aten.add.Tensor", "aten.add.Scalar", "aten.sub.Tensor", "aten.sub.Scalar", "aten.rsub.Tensor", "aten.rsub.Scalar"
)
def add_or_subtract(call: Call, x: Any, other: Any, alpha: Any = 1) -> Value:
    kind = str(call.node.target).split(".")[1]
    left, right = call.promoted(x, other)
    if alpha != 1:
        right = call(ops.Mul(right, call.operand(alpha, right.type.dtype)))
    if kind == "add":
        return call(ops.Add(left, right))
    if alpha != 1 and kind == "rsub":
        left, right = call(ops.Mul(left, call.operand(alpha, left.type.dtype))), call.promoted(x, other)[1]
    return call(ops.Sub(left, right) if kind == "sub" else ops.Sub(right, left))


@converts(
    "aten.div.Tensor", "aten.div.Scalar", "aten.div.Tensor_mode", "aten.div.Scalar_mode", "aten.true_divide.Tensor"
)
def divide(call: Call, x: Any, other: Any, rounding_mode: str | None = None) -> Value:
    if rounding_mode is None:
        return call(ops.Div(call.operand(x, call.dtype), call.operand(other, call.dtype)))
    return call(ops.Div(*call.promoted(x, other), rounding=rounding_mode))


@converts("aten.floor_divide.default", "aten.floor_divide.Scalar")
def floor_divide(call: Call, x: Any, other: Any) -> Value:
    return call(ops.Div(*call.promoted(x, other), rounding="floor"))


@converts("aten.pow.Tensor_Scalar", "aten.pow.Tensor_Tensor", "aten.pow.Scalar")
def power(call: Call, x: Any, exponent: Any) -> Value:
    base, index = call.promoted(x, exponent)
    if exponent == 2:
        # torch squares by multiplication too, so this is the same number, and a cheaper op.
        return call(ops.Mul(base, base))
    return call(ops.Pow(base, index))


@converts("aten.square.default")
def square(call: Call, x: Value) -> Value:
    return call(ops.Mul(x, x))


@converts("aten.max.other", "aten.min.other")
def larger_or_smaller(call: Call, x: Value, other: Value) -> Value:
    cls = ops.Maximum if "max" in str(call.node.target) else ops.Minimum
    return call(cls(*call.promoted(x, other)))


@converts(
    "aten.clamp.default",
    "aten.clamp_min.default",
    "aten.clamp_max.default",
    "aten.hardtanh.default",
    "aten.relu6.default",
)
def clamp(call: Call, x: Value, min: Any = None, max: Any = None, min_val: Any = None, max_val: Any = None) -> Value:
    name = str(call.node.target).split(".")[1]
    low, high = (min_val, max_val) if name == "hardtanh" else (0, 6) if name == "relu6" else (min, max)
    for bound in (low, high):
        if bound is not None and not isinstance(bound, int | float):
            raise Refusal("a clamp bound that depends on a size")
    return call(ops.Clamp(call.cast(x, call.dtype), min=low, max=high))


@converts("aten.clamp.Tensor", "aten.clamp_min.Tensor", "aten.clamp_max.Tensor")
def clamp_tensor(call: Call, x: Value, min: Value | None = None, max: Value | None = None) -> Value:
    result = call.cast(x, call.dtype)
    if min is not None:
        result = call(ops.Maximum(result, call.cast(min, call.dtype)))
    return call(ops.Minimum(result, call.cast(max, call.dtype))) if max is not None else result


@converts("aten.gelu.default")
def gelu(call: Call, x: Value, approximate: str) -> Value:
    return call(ops.Gelu(x, approximate=approximate))


@converts("aten.leaky_relu.default")
def leaky_relu(call: Call, x: Value, negative_slope: float) -> Value:
    return call(ops.LeakyRelu(x, negative_slope=negative_slope))


@converts("aten.elu.default")
def elu(call: Call, x: Value, alpha: float, scale: float, input_scale: float) -> Value:
    return call(ops.Elu(x, alpha=alpha, scale=scale, input_scale=input_scale))


@converts("aten.softplus.default")
def softplus(call: Call, x: Value, beta: float, threshold: float) -> Value:
    return call(ops.Softplus(x, beta=beta, threshold=threshold))


@converts("aten.log_sigmoid.default")
def log_sigmoid(call: Call, x: Value) -> Value:
    # min(x, 0) - log(1 + e^-|x|) does not overflow for large |x|.
    tail = call(ops.Log1p(call(ops.Exp(call(ops.Neg(call(ops.Abs(x))))))))
    return call(ops.Sub(call(ops.Minimum(x, call.operand(0.0, x.type.dtype))), tail))


@converts("aten.prelu.default")
def prelu(call: Call, x: Value, weight: Value) -> Value:
    slope = weight
    if weight.type.shape != (1,) and x.type.rank > 1:
        slope = call(ops.Reshape(weight, shape=(1, weight.type.shape[0], *(1,) * (x.type.rank - 2))))
    zero = call.operand(0.0, x.type.dtype)
    return call(ops.Where(call(ops.Gt(x, zero)), x, call(ops.Mul(x, slope))))


@converts("aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf", "aten.where.Scalar")
def where(call: Call, condition: Value, x: Any, other: Any) -> Value:
    return call(
        ops.Where(call.cast(condition, DType.BOOL), call.operand(x, call.dtype), call.operand(other, call.dtype))
    )


@converts("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def masked_fill(call: Call, x: Value, mask: Value, value: Any) -> Value:
    if isinstance(value, float) and not x.type.dtype.is_floating and math.isinf(value):
        raise Refusal("an infinite fill of integers")
    return call(ops.Where(mask, call.operand(value, call.dtype), x))


@converts("aten.copy.default")
def copy(call: Call, x: Value, src: Value, non_blocking: bool) -> Value:
    source = call.cast(src, x.type.dtype)
    return source if source.type == x.type else call(ops.Expand(source, shape=x.type.shape))


@converts("aten.fill.Scalar", "aten.fill.Tensor")
def fill(call: Call, x: Value, value: Any) -> Value:
    if isinstance(value, Value):
        return call(ops.Expand(call.cast(value, x.type.dtype), shape=x.type.shape))
    scalar = call.operand(value, x.type.dtype)
    return call(ops.Expand(scalar, shape=x.type.shape)) if x.type.rank else scalar


@converts(
    "aten.to.dtype",
    "aten.to.dtype_layout",
    "aten.to.device",
    "aten.to.other",
    "aten._to_copy.default",
    "aten.type_as.default",
    "aten.contiguous.default",
    "aten.clone.default",
    "aten.alias.default",
    "aten.detach.default",
    "aten.detach_.default",
    "aten.lift_fresh_copy.default",
    "aten.lift_fresh.default",
    "aten.positive.default",
    "prims.convert_element_type.default",
)
def convert_dtype(call: Call, x: Value, **_: Any) -> Value:
    return call.cast(x, call.dtype)


@converts(
    "aten.dropout.default",
    "aten.dropout_.default",
    "aten.feature_dropout.default",
    "aten.native_dropout.default",
    "aten.alpha_dropout.default",
)
def dropout(call: Call, x: Value, p: float, train: bool | None) -> Value:
    if train and p > 0:
        raise Refusal("the model is in training mode: call .eval() before tracing")
    return x


@converts("aten.scalar_tensor.default")
def scalar_tensor(call: Call, s: Any, **_: Any) -> Value:
    return call.operand(s, call.dtype)


@converts(
    "aten._assert_tensor_metadata.default",
    "aten._assert_scalar.default",
    "aten._assert_async.msg",
    "aten.sym_constrain_range.default",
    "aten.sym_constrain_range_for_size.default",
)
def assertion(call: Call, **_: Any) -> None:
    """Checks that export leaves in a program: the types of the IR already say what they assert."""
