"""Comparisons that follow IEEE rules through TVM's simplifier.

The simplifier treats floats as if NaN did not exist (``x != x`` becomes false, ``!(x < y)`` becomes ``y <= x``) and the
code generator emits ordered comparisons, so whatever must see a NaN looks at the bits.
"""

from __future__ import annotations

from tvm import tirx

from trimtab.backends.tvm.codegen.expression import Expr, dtype_of

_MAGNITUDE = {"float32": ("int32", 0x7FFFFFFF, 0x7F800000), "float64": ("int64", (1 << 63) - 1, 0x7FF << 52)}


def is_float(dtype: str) -> bool:
    """Whether a TVM type name is a floating-point one."""
    return dtype.startswith(("float", "bfloat"))


def eq(x: Expr, y: Expr) -> Expr:
    """``x == y``; false when either is NaN."""
    return tirx.EQ(x, y)


def ne(x: Expr, y: Expr) -> Expr:
    """``x != y``; true when either is NaN."""
    if dtype_of(x) == "bool":
        return tirx.NE(tirx.Cast("int8", x), tirx.Cast("int8", y))
    if not is_float(dtype_of(x)):
        return tirx.NE(x, y)
    return tirx.Or(tirx.NE(x, y), tirx.Or(is_nan(x), is_nan(y)))


def is_nan(x: Expr) -> Expr:
    """Whether a float32 or float64 is NaN: its magnitude bits are above those of infinity."""
    integer, mask, infinity = _MAGNITUDE[dtype_of(x)]
    return (tirx.reinterpret(integer, x) & tirx.const(mask, integer)) > tirx.const(infinity, integer)


def is_nonzero(x: Expr) -> Expr:
    """Truth of a value of any type; NaN is true."""
    dtype = dtype_of(x)
    if dtype == "bool":
        return x
    if not is_float(dtype):
        return tirx.NE(x, tirx.const(0, dtype))
    return tirx.Or(tirx.NE(x, tirx.const(0, dtype)), is_nan(x))


def sort_key(x: Expr) -> Expr:
    """An integer that orders values as torch sorts them: NaN above everything, and both zeros equal."""
    dtype = dtype_of(x)
    if not is_float(dtype):
        key = {"bool": "int32", "int8": "int32", "uint8": "int32", "int16": "int32", "uint16": "int32"}.get(dtype)
        key = "int64" if dtype == "uint32" else key or dtype
        return x if key == dtype else tirx.Cast(key, x)
    integer, mask, infinity = _MAGNITUDE[dtype]
    bits = tirx.reinterpret(integer, x)
    magnitude = bits & tirx.const(mask, integer)
    zero = tirx.const(0, integer)
    signed = tirx.Select(bits < zero, zero - magnitude, magnitude)
    return tirx.Select(magnitude > tirx.const(infinity, integer), tirx.max_value(integer), signed)


def larger(x: Expr, y: Expr) -> Expr:
    """The larger of two values; NaN when either is."""
    if not is_float(dtype_of(x)):
        return tirx.max(x, y)
    return tirx.Select(tirx.Or(x >= y, is_nan(x)), x, y)


def smaller(x: Expr, y: Expr) -> Expr:
    """The smaller of two values; NaN when either is."""
    if not is_float(dtype_of(x)):
        return tirx.min(x, y)
    return tirx.Select(tirx.Or(x <= y, is_nan(x)), x, y)
