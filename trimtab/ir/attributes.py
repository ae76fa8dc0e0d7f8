"""Attributes of ops: which Python values they may hold, their check against the declared type, and their text.

An attribute is an int, float, bool, string, dtype, dimension, tuple of these, or None.  The text form
tells them apart without a schema: ``true``, ``none``, ``f32`` and ``inf`` are reserved words, a float always has a
point or exponent, and any other bare word is a dimension symbol.
"""

from __future__ import annotations

import json
import math
import types
import typing
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin

from trimtab.errors import UsageError
from trimtab.ir.dims import Dim, DimExpr, symbols_of
from trimtab.ir.dtypes import DType

Scalar: TypeAlias = int | float | bool
Attribute: TypeAlias = Any


def check_attribute(op: str, name: str, declared: Any, value: Any) -> Attribute:
    """``value`` in canonical form (ints become floats where a float is declared, lists tuples).

    Raises:
        UsageError: the value is not of the declared type.
    """
    result = _conform(declared, value)
    if result is _MISMATCH:
        raise UsageError(
            f"{op} got a wrong attribute",
            values={name: repr(value)},
            rule=f"{name} is declared as {_type_text(declared)}",
        )
    return result


def shortest_float(value: float) -> float:
    """The shortest decimal that rounds to the float32 ``value``: 1e-12 for 9.999999960041972e-13, its float32."""
    import numpy as np

    return value if not math.isfinite(value) else float(str(np.float32(value)))


def print_attribute(value: Attribute) -> str:
    """The text form of an attribute; :func:`trimtab.ir.parser.parse_attribute` is its inverse."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if math.isnan(value):
            return "nan"
        if math.isinf(value):
            return "inf" if value > 0 else "-inf"
        return repr(value)
    if isinstance(value, int | DimExpr | DType):
        return str(value)
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(map(print_attribute, value)) + "]"
    raise UsageError("an attribute has no text form", values={"value": repr(value)})


def attribute_symbols(value: Attribute) -> frozenset[Any]:
    """Symbols that occur in an attribute."""
    if isinstance(value, tuple):
        return frozenset().union(*map(attribute_symbols, value))
    return symbols_of(value) if isinstance(value, DimExpr) else frozenset()


_MISMATCH = object()


def _conform(declared: Any, value: Any) -> Any:
    origin = get_origin(declared)
    if origin is Literal:
        return value if value in get_args(declared) else _MISMATCH
    if origin in (Union, types.UnionType):
        options = get_args(declared)
        # Exact types first, so that `int | float` keeps an int an int and `bool` a bool.
        for option in options:
            if option is type(value):
                return value
        for option in options:
            if (result := _conform(option, value)) is not _MISMATCH:
                return result
        return _MISMATCH
    if origin is tuple:
        if not isinstance(value, tuple | list):
            return _MISMATCH
        items = get_args(declared)
        wanted = [items[0]] * len(value) if len(items) == 2 and items[1] is Ellipsis else list(items)
        if len(wanted) != len(value):
            return _MISMATCH
        converted = tuple(_conform(item, part) for item, part in zip(wanted, value, strict=True))
        return _MISMATCH if any(part is _MISMATCH for part in converted) else converted
    if declared is type(None):
        return None if value is None else _MISMATCH
    if declared is float:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else _MISMATCH
    if declared is int:
        return value if isinstance(value, int) and not isinstance(value, bool) else _MISMATCH
    if declared is typing.Any:
        return value
    if isinstance(declared, type):
        return value if isinstance(value, declared) else _MISMATCH
    return _MISMATCH


def _type_text(declared: Any) -> str:
    if declared == Dim | None or declared == Dim:
        return "a dimension"
    return declared.__name__ if isinstance(declared, type) else str(declared)
