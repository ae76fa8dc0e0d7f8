"""Reading constants: what a rule may know about a value without running the model."""

from __future__ import annotations

import math

from trimtab.ir.core import Module, Value
from trimtab.ir.dtypes import DType
from trimtab.ir.ops import Full

_RESOLUTION = {DType.F32: 1.2e-7, DType.F16: 1e-3, DType.BF16: 8e-3}
"""How far rounding to the type moves a number, relatively."""


def is_constant(value: Value) -> bool:
    """Whether ``value`` is a weight or filled with one number."""
    return value.is_weight or isinstance(value.producer, Full)


def scalar(module: Module, value: Value) -> float | None:
    """The number that ``value`` holds everywhere: a ``full``, or a weight of one element. None for other values."""
    if isinstance(value.producer, Full):
        return float(value.producer.value)
    if value.is_weight and value.type.elements == 1 and value.weight in module.weights:
        return float(module.weights[value.weight].tensor().reshape(-1)[0])
    return None


def close(found: float, wanted: float, dtype: DType, tolerance: float) -> bool:
    """Whether a constant of element type ``dtype`` stands for ``wanted``, within a relative ``tolerance``."""
    if not dtype.is_floating:
        return found == wanted
    return math.isclose(found, wanted, rel_tol=max(tolerance, _RESOLUTION.get(dtype, 0.0)))


def same(left: Value, right: Value, depth: int = 4) -> bool:
    """Whether two values are one, or are computed by equal ops from the same values, up to ``depth`` ops back."""
    if left is right:
        return True
    a, b = left.producer, right.producer
    return (
        depth > 0 and a is not None and b is not None and type(a) is type(b) and left.index == right.index
        and not a.regions and a.attributes == b.attributes and len(a.operands) == len(b.operands)
        and all(same(x, y, depth - 1) for x, y in zip(a.operands, b.operands, strict=True))
    )  # fmt: skip
