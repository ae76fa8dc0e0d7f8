"""Sizes between the two worlds: expressions of TVM over variables, and dimensions of the IR over symbols."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm import tirx

from trimtab.errors import InternalError
from trimtab.ir.dims import Dim, Symbol, dim_max, dim_min, evaluate, floordiv, mod, symbol

_OPERATIONS: dict[type, Any] = {
    tirx.Add: lambda a, b: a + b,
    tirx.Sub: lambda a, b: a - b,
    tirx.Mul: lambda a, b: a * b,
    tirx.FloorDiv: floordiv,
    tirx.FloorMod: mod,
    tirx.Min: dim_min,
    tirx.Max: dim_max,
}


def dim_of(extent: Any, symbols: Mapping[str, Symbol]) -> Dim:
    """``extent``, in variables named like ``symbols``, as a dimension.

    Raises:
        InternalError: it has a variable that is no symbol, or an operation that dimensions do not have.
    """
    if isinstance(extent, int | tirx.IntImm):
        return int(extent)
    if isinstance(extent, tirx.Var) and extent.name in symbols:
        found = symbols[extent.name]
        return symbol(found.name, found.min, found.max)
    if isinstance(extent, tirx.Cast):
        return dim_of(extent.value, symbols)
    if type(extent) not in _OPERATIONS:
        raise InternalError("a size is no expression over symbols", values={"size": extent, "symbols": list(symbols)})
    return _OPERATIONS[type(extent)](dim_of(extent.a, symbols), dim_of(extent.b, symbols))


def expression_of(dim: Dim, variables: Mapping[str, Any]) -> Any:
    """``dim`` as an int64 expression over ``variables``, which are named like its symbols."""
    value = evaluate(dim, variables, {"min": tirx.min, "max": tirx.max})
    return tirx.const(value, "int64") if isinstance(value, int) else value
