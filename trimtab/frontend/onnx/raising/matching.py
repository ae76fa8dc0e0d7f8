"""What the rewrites of this package share: looking at producers, reading constants, and putting ops in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeVar

from trimtab.ir.core import Module, Value
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op
from trimtab.ir.ops import Add, Full, Mul, Pow

OpType = TypeVar("OpType", bound=Op)
READ_LIMIT = 1 << 22
"""Elements of the largest weight that a rewrite looks into."""


class Site:
    """The place of a rewrite: new ops go before ``root`` and take its location."""

    def __init__(self, module: Module, root: Op) -> None:
        self.module = module
        self.root = root

    def insert(self, op: Op) -> Value:
        """Put ``op`` before the root and return its result."""
        assert self.root.graph is not None
        op.location = self.root.location
        self.root.graph.ops.insert_before(self.root, op)
        return op.result

    def scalar(self, value: Value) -> float | None:
        """The content of a constant of one element; None when ``value`` is something else."""
        full = produced_by(value, Full)
        if full is not None and all(size == 1 for size in full.shape):
            return float(full.value)
        if value.is_weight and value.type.elements == 1:
            return float(self.module.weights[value.weight].tensor().reshape(-1)[0])
        return None


def produced_by(value: Value, kind: type[OpType]) -> OpType | None:
    """The op of class ``kind`` whose result ``value`` is; None when there is no such op."""
    return value.producer if isinstance(value.producer, kind) else None


def either_way(op: Op) -> Iterator[tuple[Value, Value]]:
    """The two operands of a commutative op, in both orders."""
    x, y = op.operands
    yield x, y
    yield y, x


def same(left: Value, right: Value) -> bool:
    """Whether two values are one, or are computed by equal ops from the same operands."""
    if left is right:
        return True
    a, b = left.producer, right.producer
    return (
        a is not None and b is not None and type(a) is type(b) and a.operands == b.operands
        and a.attributes == b.attributes and left.index == right.index and not a.regions
    )  # fmt: skip


def read_once(value: Value) -> bool:
    """Whether one op reads ``value``, at one place, and no graph returns it."""
    return len(value.uses) == 1 and not value.is_output


def close(value: float | None, wanted: float, dtype: DType) -> bool:
    """Whether a constant of element type ``dtype`` stands for ``wanted``."""
    tolerance = {DType.F64: 1e-7, DType.F32: 1e-6, DType.F16: 1e-3, DType.BF16: 8e-3}.get(dtype, 0.0)
    return value is not None and math.isclose(value, wanted, rel_tol=tolerance)


def square_of(value: Value, site: Site) -> Value | None:
    """x where ``value`` is ``x * x`` or ``x ^ 2``."""
    product = produced_by(value, Mul)
    if product is not None and same(product.x, product.y):
        return product.x
    power = produced_by(value, Pow)
    if power is not None and site.scalar(power.y) == 2.0:
        return power.x
    return None


def plus_constant(value: Value, site: Site) -> tuple[Value, float] | None:
    """x and c where ``value`` is ``x + c`` and has x's shape."""
    addition = produced_by(value, Add)
    if addition is not None:
        for x, other in either_way(addition):
            constant = site.scalar(other)
            if constant is not None and x.type == value.type:
                return x, constant
    return None
