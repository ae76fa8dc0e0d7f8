"""Ops on single elements: arithmetic, comparisons, activations, conversions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from trimtab.backends.mlir.rules.registry import lowers
from trimtab.backends.mlir.scalar import Scalar, cast, constant, function, maximum, minimum, select
from trimtab.backends.mlir.tensors import Code, Tensor
from trimtab.ir import ops
from trimtab.ir.dtypes import DType


def _elementwise(
    *classes: type[Any], check: Callable[[Any], str] = lambda op: ""
) -> Callable[[Callable[..., Scalar]], Callable[..., Scalar]]:
    """Register a function ``(op, *elements) -> element``; ``check`` as in :func:`lowers`."""

    def register(body: Callable[..., Scalar]) -> Callable[..., Scalar]:
        @lowers(*classes, check=check)
        def rule(op: Any, code: Code, *operands: Tensor) -> Tensor:
            return code.elementwise(op.result.type, operands, lambda *elements: body(op, *elements))

        return body

    return register


_BY_NAME = {
    ops.Exp: "exp", ops.Log: "log", ops.Log1p: "log1p", ops.Expm1: "expm1", ops.Sqrt: "sqrt", ops.Rsqrt: "rsqrt",
    ops.Sin: "sin", ops.Cos: "cos", ops.Tan: "tan", ops.Asin: "asin", ops.Acos: "acos", ops.Atan: "atan",
    ops.Sinh: "sinh", ops.Cosh: "cosh", ops.Tanh: "tanh", ops.Asinh: "asinh", ops.Acosh: "acosh", ops.Atanh: "atanh",
    ops.Erf: "erf", ops.Atan2: "atan2",
}  # fmt: skip


@_elementwise(*_BY_NAME)
def _function(op: Any, *elements: Scalar) -> Scalar:
    return function(_BY_NAME[type(op)], *elements)


_ROUNDINGS = {ops.Floor: "floor", ops.Ceil: "ceil", ops.Round: "roundeven", ops.Trunc: "trunc"}


@_elementwise(*_ROUNDINGS)
def _rounding(op: Any, x: Scalar) -> Scalar:
    return function(_ROUNDINGS[type(op)], x) if x.is_float else x


@_elementwise(ops.Neg)
def _neg(op: Any, x: Scalar) -> Scalar:
    return -x


@_elementwise(ops.Abs)
def _abs(op: Any, x: Scalar) -> Scalar:
    if x.is_float:
        return function("absf", x)
    return maximum(x, -x) if x.is_signed else x  # 64-bit integers may be emulated on devices, which absi is not


@_elementwise(ops.Sign)
def _sign(op: Any, x: Scalar) -> Scalar:
    one, zero = constant(1, x.dtype), constant(0, x.dtype)
    signs = select(x > 0, one, select(x < 0, zero - one, zero) if x.is_float or x.is_signed else zero)
    return select(x.differs(x), x, signs) if x.is_float else signs


@_elementwise(ops.Reciprocal)
def _reciprocal(op: Any, x: Scalar) -> Scalar:
    return 1 / x


def sigmoid(x: Scalar) -> Scalar:
    """``1 / (1 + e^-x)``."""
    return 1 / (1 + function("exp", -x))


@_elementwise(ops.Sigmoid)
def _sigmoid(op: Any, x: Scalar) -> Scalar:
    return sigmoid(x)


@_elementwise(ops.Relu)
def _relu(op: Any, x: Scalar) -> Scalar:
    return maximum(x, 0)


@_elementwise(ops.Silu)
def _silu(op: Any, x: Scalar) -> Scalar:
    return x * sigmoid(x)


def softplus(x: Scalar) -> Scalar:
    """``log(1 + e^x)`` without overflow."""
    return maximum(x, 0) + function("log1p", function("exp", -function("absf", x)))


@_elementwise(ops.Mish)
def _mish(op: Any, x: Scalar) -> Scalar:
    return x * function("tanh", softplus(x))


@_elementwise(ops.HardSigmoid)
def _hard_sigmoid(op: Any, x: Scalar) -> Scalar:
    return minimum(maximum(x + 3, 0), 6) * (1 / 6)


@_elementwise(ops.HardSwish)
def _hard_swish(op: Any, x: Scalar) -> Scalar:
    return x * _hard_sigmoid(op, x)


@_elementwise(ops.IsNan)
def _is_nan(op: Any, x: Scalar) -> Scalar:
    return x.differs(x)


@_elementwise(ops.IsInf)
def _is_inf(op: Any, x: Scalar) -> Scalar:
    return function("absf", x).equals(math.inf) if x.is_float else constant(False, DType.BOOL)


@_elementwise(ops.LogicalNot)
def _logical_not(op: Any, x: Scalar) -> Scalar:
    return ~cast(x, DType.BOOL)


@_elementwise(ops.BitwiseNot)
def _bitwise_not(op: Any, x: Scalar) -> Scalar:
    return ~x


@_elementwise(ops.Gelu)
def _gelu(op: Any, x: Scalar) -> Scalar:
    if op.approximate == "sigmoid":
        return x * sigmoid(1.702 * x)
    if op.approximate == "tanh":
        return 0.5 * x * (1 + function("tanh", math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    return 0.5 * x * (1 + function("erf", x * math.sqrt(0.5)))


@_elementwise(ops.LeakyRelu)
def _leaky_relu(op: Any, x: Scalar) -> Scalar:
    return select(x > 0, x, x * op.negative_slope)


@_elementwise(ops.Elu)
def _elu(op: Any, x: Scalar) -> Scalar:
    negative = function("expm1", minimum(x, 0) * op.input_scale) * (op.alpha * op.scale)
    return select(x > 0, x * op.scale, negative)


@_elementwise(ops.Softplus)
def _softplus(op: Any, x: Scalar) -> Scalar:
    return select(x * op.beta > op.threshold, x, softplus(x * op.beta) * (1 / op.beta))


@_elementwise(ops.Clamp)
def _clamp(op: Any, x: Scalar) -> Scalar:
    if op.min is not None:
        x = maximum(x, op.min)
    return x if op.max is None else minimum(x, op.max)


@lowers(ops.Cast)
def _cast(op: Any, code: Code, x: Tensor) -> Tensor:
    return code.elementwise(op.result.type, [x], lambda e: e)


@_elementwise(ops.Add)
def _add(op: Any, x: Scalar, y: Scalar) -> Scalar:
    return x | y if x.dtype is DType.BOOL else x + y


@_elementwise(ops.Sub)
def _sub(op: Any, x: Scalar, y: Scalar) -> Scalar:
    return x - y


@_elementwise(ops.Mul)
def _mul(op: Any, x: Scalar, y: Scalar) -> Scalar:
    return x & y if x.dtype is DType.BOOL else x * y


@_elementwise(ops.Div)
def _div(op: Any, x: Scalar, y: Scalar) -> Scalar:
    if not x.is_float:
        return x // y if op.rounding == "floor" else x / y
    quotient = x / y
    return quotient if op.rounding == "none" else function(op.rounding, quotient)


@_elementwise(ops.Pow)
def _pow(op: Any, x: Scalar, y: Scalar) -> Scalar:
    return _float_power(x, y) if x.is_float else _integer_power(x, y)


def _float_power(x: Scalar, y: Scalar) -> Scalar:
    """``x^y`` of the C library: the code of ``math.powf`` takes logarithms and loses negative bases."""
    size = function("powf", function("absf", x), y)
    whole = y.equals(function("floor", y))
    half = y * 0.5
    odd = whole & half.differs(function("floor", half))
    signed = select((x < 0) & odd, -size, size)
    return select((x < 0) & ~whole, constant(math.nan, x.dtype), signed)


def _integer_power(x: Scalar, y: Scalar) -> Scalar:
    """Repeated squaring over all bits of the exponent, without a branch; a negative exponent gives what torch gives."""
    result, base, rest = constant(1, x.dtype), x, y
    assert x.dtype is not None
    for _ in range(x.dtype.bits.bit_length()):
        result = select((rest & constant(1, x.dtype)).differs(0), result * base, result)
        base, rest = base * base, rest >> constant(1, x.dtype)
    if not x.is_signed:
        return result
    # torch: 1 to any power is 1, -1 alternates, and everything else vanishes.
    odd = (y & constant(1, x.dtype)).differs(0)
    unit = select(x.equals(1), constant(1, x.dtype), constant(0, x.dtype))
    unit = select(x.equals(-1), select(odd, constant(-1, x.dtype), constant(1, x.dtype)), unit)
    return select(y < 0, unit, result)


def _rest_of_doubles(op: Any) -> str:
    return "IREE has no code for the rest of a division of f64" if op.result.type.dtype is DType.F64 else ""


@_elementwise(ops.Remainder, check=_rest_of_doubles)
def _remainder(op: Any, x: Scalar, y: Scalar) -> Scalar:
    rest = x % y
    if not x.is_float and not x.is_signed:
        return rest
    other_sign = (rest < 0) ^ (y < 0)
    return select(rest.differs(0) & other_sign, rest + y, rest)


@_elementwise(ops.Fmod, check=_rest_of_doubles)
def _fmod(op: Any, x: Scalar, y: Scalar) -> Scalar:
    return x % y


@_elementwise(ops.Maximum)
def _maximum(op: Any, x: Scalar, y: Scalar) -> Scalar:
    return x | y if x.dtype is DType.BOOL else maximum(x, y)


@_elementwise(ops.Minimum)
def _minimum(op: Any, x: Scalar, y: Scalar) -> Scalar:
    return x & y if x.dtype is DType.BOOL else minimum(x, y)


_COMPARISONS = {ops.Eq: "eq", ops.Ne: "ne", ops.Lt: "lt", ops.Le: "le", ops.Gt: "gt", ops.Ge: "ge"}


@_elementwise(*_COMPARISONS)
def _comparison(op: Any, x: Scalar, y: Scalar) -> Scalar:
    return x.compare(_COMPARISONS[type(op)], y)


@_elementwise(ops.LogicalAnd, ops.BitwiseAnd)
def _and(op: Any, x: Scalar, y: Scalar) -> Scalar:
    return x & y if isinstance(op, ops.BitwiseAnd) else cast(x, DType.BOOL) & cast(y, DType.BOOL)


@_elementwise(ops.LogicalOr, ops.BitwiseOr)
def _or(op: Any, x: Scalar, y: Scalar) -> Scalar:
    return x | y if isinstance(op, ops.BitwiseOr) else cast(x, DType.BOOL) | cast(y, DType.BOOL)


@_elementwise(ops.LogicalXor, ops.BitwiseXor)
def _xor(op: Any, x: Scalar, y: Scalar) -> Scalar:
    return x ^ y if isinstance(op, ops.BitwiseXor) else cast(x, DType.BOOL) ^ cast(y, DType.BOOL)


@_elementwise(ops.ShiftLeft)
def _shift_left(op: Any, x: Scalar, y: Scalar) -> Scalar:
    return x << y


@_elementwise(ops.ShiftRight)
def _shift_right(op: Any, x: Scalar, y: Scalar) -> Scalar:
    return x >> y


@_elementwise(ops.Where)
def _where(op: Any, condition: Scalar, x: Scalar, y: Scalar) -> Scalar:
    return select(condition, x, y)
