"""Elementwise ops as scalar expressions.

Every function here works on one element in the working type (float32 for the half types) and follows torch on NaN,
signs and rounding.  Calls such as ``exp`` on float32 are replaced by vectorisable code later, see
``codegen/vector_math.py``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from tvm import te, tirx

from trimtab.backends.tvm.codegen.comparison import eq, is_float, is_nan, is_nonzero, larger, ne, smaller
from trimtab.backends.tvm.codegen.expression import let
from trimtab.backends.tvm.rules.registry import Expr, Operand, Scope, cast, compute, const, lowers, tvm_dtype, work_type
from trimtab.ir import ops
from trimtab.ir.op import Op


def _c(x: Expr, value: float | int) -> Expr:
    return const(value, str(x.ty.dtype))


def shared(function: Callable[..., Expr]) -> Callable[..., Expr]:
    """Make the arguments of a function that uses them several times into named values.

    Without names, nesting such functions would copy their arguments and grow the expression exponentially.
    """

    @functools.wraps(function)
    def call(*args: Expr) -> Expr:
        def bind(position: int, bound: list[Expr]) -> Expr:
            if position == len(args):
                return function(*bound)
            return let(args[position], lambda v: bind(position + 1, [*bound, v]), "v")

        return bind(0, [])

    return call


def select(condition: Expr, x: Expr, y: Expr) -> Expr:
    return tirx.Select(condition, x, y)


maximum = shared(larger)
minimum = shared(smaller)


def sigmoid(x: Expr) -> Expr:
    return te.sigmoid(x)


@shared
def expm1(x: Expr) -> Expr:
    """``e^x - 1`` by Kahan's correction ``(u - 1) x / log(u)``, exact where e^x rounds to 1."""
    one = _c(x, 1)

    def corrected(u: Expr) -> Expr:
        ordinary = select(eq(u - one, _c(x, -1)), _c(x, -1), (u - one) * x / te.log(u))
        return select(tirx.Or(x > _c(x, 50), is_nan(x)), u, select(eq(u, one), x, ordinary))

    return let(te.exp(x), corrected, "u")


@shared
def log1p(x: Expr) -> Expr:
    """``log(1 + x)`` by ``log(u) x / (u - 1)`` with u = 1 + x rounded (Kahan)."""
    one = _c(x, 1)

    def corrected(u: Expr) -> Expr:
        safe = select(eq(u, one), _c(x, 2), u)
        return select(eq(u, one), x, select(eq(u, _c(x, math.inf)), u, te.log(u) * x / (safe - one)))

    return let(one + x, corrected, "u")


def tanh(x: Expr) -> Expr:
    return te.tanh(x)


def erf(x: Expr) -> Expr:
    return te.erf(x)


@shared
def softplus(x: Expr) -> Expr:
    """``log(1 + e^x)`` without overflow."""
    return maximum(x, _c(x, 0)) + log1p(te.exp(_c(x, 0) - absolute(x)))


@shared
def absolute(x: Expr) -> Expr:
    if str(x.ty.dtype).startswith("uint"):
        return x
    return te.abs(x) if is_float(str(x.ty.dtype)) else select(x < _c(x, 0), _c(x, 0) - x, x)


@shared
def sign(x: Expr) -> Expr:
    zero, one = _c(x, 0), _c(x, 1)
    if str(x.ty.dtype).startswith("uint"):
        return select(eq(x, zero), zero, one)
    signed = select(x < zero, _c(x, -1), zero)
    return select(x > zero, one, select(is_nan(x), x, signed) if is_float(str(x.ty.dtype)) else signed)


def negate(x: Expr) -> Expr:
    return x * _c(x, -1) if is_float(str(x.ty.dtype)) else _c(x, 0) - x


def hard_sigmoid(x: Expr) -> Expr:
    return minimum(maximum(x + _c(x, 3), _c(x, 0)), _c(x, 6)) / _c(x, 6)


@shared
def gelu(x: Expr) -> Expr:
    return _c(x, 0.5) * x * (_c(x, 1) + te.erf(x * _c(x, math.sqrt(0.5))))


@shared
def gelu_tanh(x: Expr) -> Expr:
    inner = _c(x, math.sqrt(2 / math.pi)) * (x + _c(x, 0.044715) * x * x * x)
    return x * sigmoid(_c(x, 2) * inner)  # 1 + tanh(y) = 2 sigmoid(2 y)


@shared
def gelu_sigmoid(x: Expr) -> Expr:
    return x * sigmoid(_c(x, 1.702) * x)


_GELU = {"none": gelu, "tanh": gelu_tanh, "sigmoid": gelu_sigmoid}


def _extern(name: str) -> Callable[[Expr], Expr]:
    """A libm function; float32 uses the single-precision variant."""

    def call(x: Expr) -> Expr:
        dtype = str(x.ty.dtype)
        return tirx.call_pure_extern(dtype, name + ("f" if dtype == "float32" else ""), x)

    return call


_FLOAT_ONLY: dict[type[Op], Callable[[Expr], Expr]] = {
    ops.Exp: te.exp, ops.Log: te.log, ops.Log1p: _extern("log1p"), ops.Expm1: _extern("expm1"), ops.Sqrt: te.sqrt,
    ops.Rsqrt: lambda x: _c(x, 1) / te.sqrt(x), ops.Reciprocal: lambda x: _c(x, 1) / x,
    ops.Sin: _extern("sin"), ops.Cos: _extern("cos"), ops.Tan: _extern("tan"), ops.Asin: _extern("asin"),
    ops.Acos: _extern("acos"), ops.Atan: _extern("atan"), ops.Sinh: _extern("sinh"), ops.Cosh: _extern("cosh"),
    ops.Tanh: tanh, ops.Asinh: _extern("asinh"), ops.Acosh: _extern("acosh"), ops.Atanh: _extern("atanh"),
    ops.Erf: erf, ops.Sigmoid: sigmoid, ops.Silu: shared(lambda x: x * sigmoid(x)),
    ops.Mish: shared(lambda x: x * te.tanh(softplus(x))), ops.HardSigmoid: hard_sigmoid,
    ops.HardSwish: shared(lambda x: x * hard_sigmoid(x)),
}  # fmt: skip

_ANY_NUMBER: dict[type[Op], Callable[[Expr], Expr]] = {
    ops.Neg: negate, ops.Abs: absolute, ops.Sign: sign, ops.Relu: lambda x: maximum(x, _c(x, 0)),
}  # fmt: skip

_ROUNDING: dict[type[Op], Callable[[Expr], Expr]] = {
    ops.Floor: te.floor, ops.Ceil: te.ceil, ops.Round: te.nearbyint, ops.Trunc: te.trunc,
}  # fmt: skip


def _pointwise(op: Op, scope: Scope, function: Callable[..., Expr], *operands: Operand) -> Any:
    """``function`` of the broadcast elements, computed in the working type and rounded to the result's."""
    result = tvm_dtype(op.results[0].type.dtype)

    def element(*indices: Expr) -> Expr:
        values = [operand.broadcast(indices, op.results[0].type.shape) for operand in operands]
        return cast(function(*(cast(v, work_type(str(v.ty.dtype))) for v in values)), result)

    return compute(scope.shape(op.results[0].type.shape), element, op.name)


@lowers(*_FLOAT_ONLY, check=lambda op: "" if op.x.type.dtype.is_floating else "it needs a floating-point operand")
def _float_function(op: Any, scope: Scope, x: Operand) -> Any:
    return _pointwise(op, scope, _FLOAT_ONLY[type(op)], x)


@lowers(*_ANY_NUMBER)
def _number_function(op: Any, scope: Scope, x: Operand) -> Any:
    return _pointwise(op, scope, _ANY_NUMBER[type(op)], x)


@lowers(*_ROUNDING)
def _rounding(op: Any, scope: Scope, x: Operand) -> Any:
    function = _ROUNDING[type(op)] if is_float(x.dtype) else lambda v: v
    return _pointwise(op, scope, function, x)


@lowers(ops.IsNan, ops.IsInf)
def _classify(op: Any, scope: Scope, x: Operand) -> Any:
    if not is_float(x.dtype):
        return _pointwise(op, scope, lambda v: const(False, "bool"), x)
    if isinstance(op, ops.IsNan):
        return _pointwise(op, scope, is_nan, x)
    return _pointwise(op, scope, lambda v: eq(te.abs(v), _c(v, math.inf)), x)


@lowers(ops.LogicalNot)
def _logical_not(op: Any, scope: Scope, x: Operand) -> Any:
    return _pointwise(op, scope, lambda v: tirx.Not(is_nonzero(v)), x)


@lowers(ops.BitwiseNot)
def _bitwise_not(op: Any, scope: Scope, x: Operand) -> Any:
    return _pointwise(op, scope, lambda v: tirx.Not(v) if x.dtype == "bool" else tirx.bitwise_not(v), x)


@lowers(ops.Gelu)
def _gelu(op: Any, scope: Scope, x: Operand) -> Any:
    return _pointwise(op, scope, _GELU[op.approximate], x)


@lowers(ops.LeakyRelu)
def _leaky_relu(op: Any, scope: Scope, x: Operand) -> Any:
    return _pointwise(op, scope, lambda v: select(v > _c(v, 0), v, v * _c(v, op.negative_slope)), x)


@lowers(ops.Elu)
def _elu(op: Any, scope: Scope, x: Operand) -> Any:
    def element(v: Expr) -> Expr:
        low = select(v > _c(v, 0), _c(v, 0), v)
        negative = expm1(low * _c(v, op.input_scale)) * _c(v, op.alpha * op.scale)
        return select(v > _c(v, 0), v * _c(v, op.scale), negative)

    return _pointwise(op, scope, element, x)


@lowers(ops.Softplus)
def _softplus(op: Any, scope: Scope, x: Operand) -> Any:
    def element(v: Expr) -> Expr:
        scaled = v * _c(v, op.beta)
        return select(scaled > _c(v, op.threshold), v, softplus(scaled) / _c(v, op.beta))

    return _pointwise(op, scope, element, x)


@lowers(ops.Clamp)
def _clamp(op: Any, scope: Scope, x: Operand) -> Any:
    def element(v: Expr) -> Expr:
        if not is_float(x.dtype):
            return _clamp_integer(v, op.min, op.max)
        # A NaN bound makes everything NaN in torch; maximum and minimum pass it on.
        v = v if op.min is None else maximum(v, _c(v, float(op.min)))
        return v if op.max is None else minimum(v, _c(v, float(op.max)))

    return _pointwise(op, scope, element, x)


def _clamp_integer(v: Expr, low: float | None, high: float | None) -> Expr:
    """Bounds of any kind on integers: torch compares in the promoted type and converts back towards zero."""
    dtype = str(v.ty.dtype)
    least, most = int(tirx.min_value(dtype).value), int(tirx.max_value(dtype).value)

    def bound(value: float) -> int:
        return max(least, min(most, math.trunc(value) if math.isfinite(value) else (most if value > 0 else least)))

    if low is not None:
        v = tirx.max(v, _c(v, bound(low)))
    return v if high is None else tirx.min(v, _c(v, bound(high)))


@lowers(ops.Cast)
def _cast(op: Any, scope: Scope, x: Operand) -> Any:
    target = tvm_dtype(op.dtype)

    def element(v: Expr) -> Expr:
        if target == "bool":
            return is_nonzero(v)
        if x.dtype == "bool" and is_float(target):
            return cast(select(v, const(1, "float32"), const(0, "float32")), target)
        if x.dtype == "bool":
            return select(v, const(1, target), const(0, target))
        if is_float(x.dtype) and not is_float(target) and target not in ("int64", "int32"):
            # Small integers: torch converts through a wider integer and wraps.
            return cast(tirx.Cast("int64", v), target)
        return cast(v, target)

    return _pointwise(op, scope, element, x)


# -- two operands -------------------------------------------------------------------------------------------------


def _opposite(mod: Expr, y: Expr) -> Expr:
    """Whether a remainder is not zero and has not the sign of the divisor."""
    zero = _c(mod, 0)
    return tirx.Or(tirx.And(mod > zero, y < zero), tirx.And(mod < zero, y > zero))


@shared
def floor_divide(x: Expr, y: Expr) -> Expr:
    """Quotient rounded down; for floats as torch computes it, from the remainder, so that it agrees with ``%``."""
    if not is_float(str(x.ty.dtype)):
        return tirx.floordiv(x, y)

    def from_remainder(mod: Expr) -> Expr:
        def rounded(quotient: Expr) -> Expr:
            def nearest(floored: Expr) -> Expr:
                whole = select(quotient - floored > _c(x, 0.5), floored + _c(x, 1), floored)
                return select(eq(y, _c(x, 0)), x / y, select(ne(quotient, _c(x, 0)), whole, x / y * _c(x, 0)))

            return let(te.floor(quotient), nearest, "floor")

        return let(select(_opposite(mod, y), (x - mod) / y - _c(x, 1), (x - mod) / y), rounded, "quotient")

    return let(fmod(x, y), from_remainder, "mod")


def fmod(x: Expr, y: Expr) -> Expr:
    dtype = str(x.ty.dtype)
    if is_float(dtype):
        return tirx.call_pure_extern(dtype, "fmodf" if dtype == "float32" else "fmod", x, y)
    return tirx.truncmod(x, y)


@shared
def remainder(x: Expr, y: Expr) -> Expr:
    if not is_float(str(x.ty.dtype)):
        return tirx.floormod(x, y)

    def signed(mod: Expr) -> Expr:
        return select(_opposite(mod, y), mod + y, mod)

    return let(fmod(x, y), signed, "mod")


@shared
def power(x: Expr, y: Expr) -> Expr:
    """x to the y. Small constant exponents become products and roots; the rest is libm's pow."""
    dtype = str(x.ty.dtype)
    exponent = getattr(y, "value", None)
    if exponent is not None:
        simple = _constant_power(x, float(exponent))
        if simple is not None:
            return simple
    if is_float(dtype):
        return tirx.call_pure_extern(dtype, "powf" if dtype == "float32" else "pow", x, y)
    return _integer_power(x, y)


def _constant_power(x: Expr, exponent: float) -> Expr | None:
    one = _c(x, 1)
    if exponent in (1.0, 2.0, 3.0):
        return {1.0: x, 2.0: x * x, 3.0: x * x * x}[exponent]
    if not is_float(str(x.ty.dtype)):
        return None
    simple = {
        0.5: lambda: te.sqrt(x),
        -0.5: lambda: one / te.sqrt(x),
        -1.0: lambda: one / x,
        -2.0: lambda: one / (x * x),
    }
    return simple[exponent]() if exponent in simple else None


@shared
def _integer_power(x: Expr, y: Expr) -> Expr:
    """Square and multiply over the bits of the exponent; negative exponents give 0, except of 1 and -1."""
    dtype = str(x.ty.dtype)
    bits = int(dtype.lstrip("uint")) - (not dtype.startswith("uint"))

    def from_bit(bit: int, result: Expr, base: Expr) -> Expr:
        if bit == min(bits, 6):
            return result
        odd = ne((y >> _c(x, bit)) & _c(x, 1), _c(x, 0))
        return let(select(odd, result * base, result), lambda r: let(
            base * base, lambda b: from_bit(bit + 1, r, b), "base"), "power")  # fmt: skip

    result = from_bit(0, _c(x, 1), x)
    if dtype.startswith("uint"):
        return result
    odd = ne(y & _c(x, 1), _c(x, 0))
    unit = select(eq(x, _c(x, -1)), select(odd, _c(x, -1), _c(x, 1)), select(eq(x, _c(x, 1)), _c(x, 1), _c(x, 0)))
    return select(y < _c(x, 0), unit, result)


def true_divide(x: Expr, y: Expr) -> Expr:
    return x / y


def trunc_divide(x: Expr, y: Expr) -> Expr:
    return te.trunc(x / y) if is_float(str(x.ty.dtype)) else tirx.truncdiv(x, y)


@shared
def shift_left(x: Expr, y: Expr) -> Expr:
    """torch gives 0 for a shift by the width or more, or by a negative amount."""
    width = int(str(x.ty.dtype).lstrip("uint"))
    outside = y >= _c(y, width)
    if not str(y.ty.dtype).startswith("uint"):
        outside = tirx.Or(y < _c(y, 0), outside)
    return select(outside, _c(x, 0), x << select(outside, _c(y, 0), y))


@shared
def shift_right(x: Expr, y: Expr) -> Expr:
    """Shifts by the width or more leave the sign."""
    width = int(str(x.ty.dtype).lstrip("uint"))
    most = width - (not str(x.ty.dtype).startswith("uint"))
    outside = y >= _c(y, width)
    if not str(y.ty.dtype).startswith("uint"):
        outside = tirx.Or(y < _c(y, 0), outside)
    return x >> select(outside, _c(y, min(most, width - 1)), y)


def _atan2(x: Expr, y: Expr) -> Expr:
    dtype = str(x.ty.dtype)
    return tirx.call_pure_extern(dtype, "atan2f" if dtype == "float32" else "atan2", x, y)


def _bool_or_number(on_bool: Callable[[Expr, Expr], Expr], on_number: Callable[[Expr, Expr], Expr]) -> Any:
    return lambda x, y: on_bool(x, y) if str(x.ty.dtype) == "bool" else on_number(x, y)


_BINARY: dict[type[Op], Callable[[Expr, Expr], Expr]] = {
    ops.Add: _bool_or_number(tirx.Or, lambda x, y: x + y), ops.Sub: lambda x, y: x - y,
    ops.Mul: _bool_or_number(tirx.And, lambda x, y: x * y),
    ops.Pow: power, ops.Remainder: remainder, ops.Fmod: fmod,
    ops.Maximum: _bool_or_number(tirx.Or, maximum), ops.Minimum: _bool_or_number(tirx.And, minimum),
    ops.Atan2: _atan2,
    ops.LogicalAnd: lambda x, y: tirx.And(is_nonzero(x), is_nonzero(y)),
    ops.LogicalOr: lambda x, y: tirx.Or(is_nonzero(x), is_nonzero(y)),
    ops.LogicalXor: lambda x, y: ne(is_nonzero(x), is_nonzero(y)),
    ops.BitwiseAnd: _bool_or_number(tirx.And, lambda x, y: x & y),
    ops.BitwiseOr: _bool_or_number(tirx.Or, lambda x, y: x | y),
    ops.BitwiseXor: _bool_or_number(ne, lambda x, y: x ^ y),
    ops.ShiftLeft: shift_left, ops.ShiftRight: shift_right,
}  # fmt: skip


def _numbers(x: Expr) -> Expr:
    """Booleans compare as 0 and 1."""
    return tirx.Cast("int8", x) if str(x.ty.dtype) == "bool" else x


_COMPARISONS: dict[type[Op], Callable[[Expr, Expr], Expr]] = {
    ops.Eq: eq, ops.Ne: ne, ops.Lt: lambda x, y: x < y,
    ops.Le: lambda x, y: x <= y, ops.Gt: lambda x, y: x > y, ops.Ge: lambda x, y: x >= y,
}  # fmt: skip


@lowers(*_BINARY)
def _binary(op: Any, scope: Scope, x: Operand, y: Operand) -> Any:
    return _pointwise(op, scope, _BINARY[type(op)], x, y)


@lowers(*_COMPARISONS)
def _comparison(op: Any, scope: Scope, x: Operand, y: Operand) -> Any:
    compare = _COMPARISONS[type(op)]
    return _pointwise(op, scope, lambda a, b: compare(_numbers(a), _numbers(b)), x, y)


@lowers(ops.Div)
def _div(op: Any, scope: Scope, x: Operand, y: Operand) -> Any:
    function = {"none": true_divide, "trunc": trunc_divide, "floor": floor_divide}[op.rounding]
    return _pointwise(op, scope, function, x, y)


@lowers(ops.Where)
def _where(op: Any, scope: Scope, condition: Operand, x: Operand, y: Operand) -> Any:
    def element(c: Expr, a: Expr, b: Expr) -> Expr:
        chosen = is_nonzero(c)
        if x.dtype == "bool":
            # TVM turns selects between truth values in each other into code that it refuses.
            mask, yes, no = (tirx.Cast("int8", value) for value in (chosen, a, b))
            return ne(mask * yes + (const(1, "int8") - mask) * no, const(0, "int8"))
        return select(chosen, a, b)

    return _pointwise(op, scope, element, condition, x, y)
