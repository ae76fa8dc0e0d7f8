"""Removal of ops that give back their operand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Module, Value
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op
from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.local_rewrite import rewrite_each


@dataclass(frozen=True)
class SimplifyIdentities(Pass):
    """Remove ops that give back their operand bit for bit: x * 1, x - 0, casts to the same type, slices of everything.

    Signed zeros and NaN count, so ``x + 0.0`` stays for floats: it turns -0.0 into 0.0. ``x + -0.0`` goes.
    """

    name: ClassVar[str] = "simplify-identities"
    contract: ClassVar[Contract] = Exact()

    def run(self, module: Module, ctx: Context) -> Changed:
        return rewrite_each(module, _identity, self.name, ctx.rewrites)


def _identity(op: Op, build: Builder) -> Value | None:
    rule = _RULES.get(type(op))
    value = rule(op) if rule is not None else None
    # An identity that broadcasts or converts its operand is none, nor is a part of it.
    return value if value is not None and all(value.type == r.type for r in op.results if r.uses) else None


Rule = Callable[[Any], Value | None]


def _constant(value: Value) -> float | int | bool | None:
    """The number that a value holds everywhere, if it is made by ``full``."""
    return value.producer.value if isinstance(value.producer, ops.Full) else None


def _is(value: Value, number: float) -> bool:
    """Whether ``value`` is ``number`` everywhere; for floating types with this sign of zero."""
    constant = _constant(value)
    signed = value.type.dtype.is_floating
    return constant == number and (not signed or math.copysign(1, constant) == math.copysign(1, number))


def _neutral(number: float, *, left: bool = False) -> Rule:
    """The operation has the neutral element ``number`` on the right, and on the left if so declared."""

    def rule(op: Any) -> Value | None:
        if _is(op.y, number):
            return op.x  # type: ignore[no-any-return]
        return op.y if left and _is(op.x, number) else None

    return rule


def _inverse(op: Any) -> Value | None:
    """The operation undoes itself."""
    return op.x.producer.x if isinstance(op.x.producer, type(op)) else None


def _idempotent(op: Any) -> Value | None:
    """Doing the operation again changes nothing."""
    return op.x if isinstance(op.x.producer, type(op)) else None


def _operand_if(condition: Callable[[Any], bool]) -> Rule:
    return lambda op: op.x if condition(op) else None


def _cast(op: ops.Cast) -> Value | None:
    if op.dtype is op.x.type.dtype:
        return op.x
    inner = op.x.producer
    if isinstance(inner, ops.Cast) and (op.dtype, inner.dtype) in _LOSSLESS:
        return inner.x  # there and back through a type that holds every value; types are compared by the caller
    return None


def _add(op: ops.Add) -> Value | None:
    return _neutral(-0.0, left=True)(op)


def _where(op: ops.Where) -> Value | None:
    condition = _constant(op.condition)
    if op.x is op.y or condition is True:
        return op.x
    return op.y if condition is False else None


def _concat(op: ops.Concat) -> Value | None:
    parts = [value for value in op.values if value.type.shape[op.dim] != 0] or op.values[:1]
    return parts[0] if len(parts) == 1 else None


def _slice(op: ops.Slice) -> Value | None:
    return op.x if op.start == 0 and op.step == 1 else None  # the caller compares the sizes


_LOSSLESS = {
    (narrow, wide)
    for narrow, wides in {
        DType.F32: (DType.F64,), DType.F16: (DType.F32, DType.F64), DType.BF16: (DType.F32, DType.F64),
        DType.I32: (DType.I64, DType.F64), DType.I16: (DType.I32, DType.I64, DType.F32, DType.F64),
        DType.I8: (DType.I16, DType.I32, DType.I64, DType.F32, DType.F64),
        DType.U8: (DType.I16, DType.I32, DType.I64, DType.F32, DType.F64),
        DType.BOOL: (DType.U8, DType.I8, DType.I32, DType.I64, DType.F16, DType.F32, DType.F64),
    }.items()
    for wide in wides
}  # fmt: skip

_RULES: Mapping[type[Op], Rule] = {
    ops.Add: _add,
    ops.Sub: _neutral(0.0),
    ops.Mul: _neutral(1, left=True),
    ops.Div: _operand_if(lambda op: op.rounding == "none" and _is(op.y, 1)),
    ops.LogicalAnd: _neutral(True, left=True),
    ops.LogicalOr: _neutral(False, left=True),
    ops.LogicalXor: _neutral(False, left=True),
    ops.BitwiseOr: _neutral(0, left=True),
    ops.BitwiseXor: _neutral(0, left=True),
    ops.ShiftLeft: _neutral(0),
    ops.ShiftRight: _neutral(0),
    ops.Where: _where,
    ops.Maximum: _operand_if(lambda op: op.x is op.y),
    ops.Minimum: _operand_if(lambda op: op.x is op.y),
    ops.Neg: _inverse,
    ops.LogicalNot: _inverse,
    ops.BitwiseNot: _inverse,
    ops.Abs: _idempotent,
    ops.Relu: _idempotent,
    ops.Floor: _idempotent,
    ops.Ceil: _idempotent,
    ops.Round: _idempotent,
    ops.Trunc: _idempotent,
    ops.Cast: _cast,
    ops.Clamp: _operand_if(lambda op: op.min is None and op.max is None),
    ops.Slice: _slice,
    ops.Concat: _concat,
    ops.Split: _operand_if(lambda op: True),
    ops.Expand: _operand_if(lambda op: True),
    ops.Reshape: _operand_if(lambda op: True),
    ops.Permute: _operand_if(lambda op: op.dims == tuple(range(len(op.dims)))),
    ops.Tile: _operand_if(lambda op: all(n == 1 for n in op.repeats)),
    ops.Pad: _operand_if(lambda op: not any(op.before) and not any(op.after)),
    ops.Flip: _operand_if(lambda op: not op.dims),
    ops.Roll: _operand_if(lambda op: not any(op.shifts)),
    ops.Sum: _operand_if(lambda op: not op.dims),
    ops.Mean: _operand_if(lambda op: not op.dims),
    ops.Prod: _operand_if(lambda op: not op.dims),
    ops.Amax: _operand_if(lambda op: not op.dims),
    ops.Amin: _operand_if(lambda op: not op.dims),
}
