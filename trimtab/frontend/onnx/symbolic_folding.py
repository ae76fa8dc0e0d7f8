"""Computes ops on arrays of dimensions, so that shape arithmetic disappears during import."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from trimtab.ir import ops
from trimtab.ir.dims import Dim, DimExpr, bounds, dim_max, dim_min, floordiv, mod
from trimtab.ir.op import Op

if TYPE_CHECKING:
    import torch

Item: TypeAlias = Dim | bool


@dataclass(frozen=True)
class SymbolicArray:
    """A small array of dimensions (or truth values) in row-major order."""

    items: list[Item]
    shape: tuple[int, ...]

    @property
    def is_concrete(self) -> bool:
        return not any(isinstance(item, DimExpr) for item in self.items)


MAX_DEGREE = 16
"""Highest degree of a dimension that is followed, as a polynomial in the symbols."""


class _Undecided(Exception):
    """The result depends on the values of symbols in a way dimensions cannot say."""


MOVING_OPS = (
    ops.Reshape, ops.Permute, ops.Expand, ops.Slice, ops.Select, ops.Concat, ops.Split, ops.Tile, ops.Flip, ops.Roll,
    ops.IndexSelect, ops.Gather, ops.Index, ops.Scatter,
)  # fmt: skip
"""Ops that only move elements; the operands after the first of indexing ops are positions."""
_WITH_POSITIONS = (ops.IndexSelect, ops.Gather, ops.Index)


def fold_symbolically(op: Op, contents: Sequence[Any]) -> list[SymbolicArray] | None:
    """The contents of ``op``'s results given those of its operands (torch tensors or arrays of dimensions).

    Returns None when they cannot be told without the values of the symbols.
    """
    try:
        if isinstance(op, MOVING_OPS):
            return _move(op, contents)
        arrays = [_as_array(content) for content in contents]
        if isinstance(op, ops.Sum | ops.Prod | ops.Amax | ops.Amin):
            return [_reduce(op, arrays[0])]
        function = _elementwise(op)
        if function is None:
            return None
        shape = _static(op.results[0].type.shape)
        columns = [_broadcast(array, shape) for array in arrays]
        return [SymbolicArray([_checked(function(*row)) for row in zip(*columns, strict=True)], shape)]
    except _Undecided:
        return None


def _static(shape: tuple[Dim, ...]) -> tuple[int, ...]:
    sizes = tuple(size for size in shape if isinstance(size, int))
    if len(sizes) != len(shape):
        raise _Undecided
    return sizes


def _checked(item: Item) -> Item:
    """``item`` where it is a sensible size; a hostile chain of products would grow without end."""
    if isinstance(item, DimExpr):
        degree = max(sum(power for _, power in monomial) for monomial, _ in item.terms)
        if degree > MAX_DEGREE or any(abs(coefficient) >= 2**63 for _, coefficient in item.terms):
            raise _Undecided
    elif abs(item) >= 2**63:
        raise _Undecided
    return item


def _as_array(content: Any) -> SymbolicArray:
    if isinstance(content, SymbolicArray):
        return content
    items = content.reshape(-1).tolist()
    if any(isinstance(item, float) and item != int(item) if _finite(item) else True for item in items):
        raise _Undecided
    return SymbolicArray([item if isinstance(item, bool) else int(item) for item in items], tuple(content.shape))


def _finite(item: float) -> bool:
    return isinstance(item, bool | int) or abs(item) < 2**53


def _broadcast(array: SymbolicArray, shape: tuple[int, ...]) -> list[Item]:
    import torch

    numbers = torch.arange(len(array.items)).reshape(array.shape).expand(shape).reshape(-1)
    return [array.items[number] for number in numbers.tolist()]


def _move(op: Op, contents: Sequence[Any]) -> list[SymbolicArray] | None:
    """Run the op's reference on the numbers of the elements, then look the elements up."""
    import torch

    from trimtab.ir.interpreter import evaluate_op

    table: list[Item] = []
    numbered: list[torch.Tensor] = []
    for index, content in enumerate(contents):
        if (index > 0 and isinstance(op, _WITH_POSITIONS)) or (index == 1 and isinstance(op, ops.Scatter)):
            if isinstance(content, SymbolicArray):
                return None
            numbered.append(content)
            continue
        array = _as_array(content)
        numbered.append(torch.arange(len(table), len(table) + len(array.items)).reshape(array.shape))
        table.extend(array.items)
    if isinstance(op, ops.Scatter) and op.reduce != "none":
        return None
    return [
        SymbolicArray([table[number] for number in result.reshape(-1).tolist()], tuple(result.shape))
        for result in evaluate_op(op, numbered)
    ]


def _reduce(op: Any, array: SymbolicArray) -> SymbolicArray:
    import torch

    numbers = torch.arange(len(array.items)).reshape(array.shape)
    kept = [dim for dim in range(len(array.shape)) if dim not in op.dims]
    rows = numbers.permute(*kept, *op.dims).reshape(*[array.shape[dim] for dim in kept], -1)
    combine: dict[type, Callable[[Any, Any], Any]] = {
        ops.Sum: lambda a, b: a + b,
        ops.Prod: lambda a, b: a * b,
        ops.Amax: dim_max,
        ops.Amin: dim_min,
    }
    items: list[Item] = []
    for row in rows.reshape(-1, rows.shape[-1]).tolist():
        if not row:
            raise _Undecided
        total = array.items[row[0]]
        for number in row[1:]:
            total = _checked(combine[type(op)](total, array.items[number]))
        items.append(total)
    return SymbolicArray([_checked(item) for item in items], _static(op.results[0].type.shape))


def _truth(item: Item) -> bool:
    if isinstance(item, bool | int):
        return bool(item)
    low, high = bounds(item)
    if low > 0 or high < 0:
        return True
    raise _Undecided


def _compare(test: Callable[[float, float], bool]) -> Callable[[Any, Any], bool]:
    """Decide ``test(a, b)`` from the range of ``a - b``."""

    def compare(a: Any, b: Any) -> bool:
        low, high = bounds(a - b)
        answers = {test(low, 0), test(high, 0)} | ({test(0, 0)} if low <= 0 <= high else set())
        if low < 0 < high:
            answers |= {test(-1, 0), test(1, 0)}
        if len(answers) != 1:
            raise _Undecided
        return answers.pop()

    return compare


def _trunc_div(a: Any, b: Any) -> Dim:
    if bounds(a)[0] >= 0 and bounds(b)[0] > 0:
        return floordiv(a, b)
    if isinstance(a, int) and isinstance(b, int) and b:
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    raise _Undecided


def _floor_div(a: Any, b: Any) -> Dim:
    if bounds(b)[0] <= 0:
        raise _Undecided
    return floordiv(a, b)


def _exact_div(a: Any, b: Any) -> Dim:
    if bounds(b)[0] <= 0 or mod(a, b) != 0:
        raise _Undecided
    return floordiv(a, b)


def _mod(a: Any, b: Any) -> Dim:
    if bounds(a)[0] < 0 or bounds(b)[0] <= 0:
        raise _Undecided
    return mod(a, b)


def _absolute(a: Any) -> Dim:
    if bounds(a)[0] < 0:
        raise _Undecided
    return a


def _clamp(op: Any) -> Callable[[Any], Dim]:
    def clamp(a: Any) -> Dim:
        for limit, pick in ((op.min, dim_max), (op.max, dim_min)):
            if limit is not None:
                if limit != int(limit):
                    raise _Undecided
                a = pick(a, int(limit))
        return a

    return clamp


def _elementwise(op: Op) -> Callable[..., Item] | None:
    if isinstance(op, ops.Div):
        return {"trunc": _trunc_div, "floor": _floor_div, "none": _exact_div}[op.rounding]
    if isinstance(op, ops.Clamp):
        return _clamp(op)
    if isinstance(op, ops.Cast):
        return _truth if str(op.dtype) == "bool" else lambda a: int(a) if isinstance(a, bool) else a
    return _FUNCTIONS.get(type(op))


_FUNCTIONS: dict[type[Op], Callable[..., Item]] = {
    ops.Add: lambda a, b: a + b,
    ops.Sub: lambda a, b: a - b,
    ops.Mul: lambda a, b: a * b,
    ops.Remainder: _mod,
    ops.Fmod: _mod,
    ops.Maximum: dim_max,
    ops.Minimum: dim_min,
    ops.Neg: lambda a: a * -1,
    ops.Abs: _absolute,
    ops.Floor: lambda a: a,
    ops.Ceil: lambda a: a,
    ops.Round: lambda a: a,
    ops.Trunc: lambda a: a,
    ops.Eq: _compare(lambda a, b: a == b),
    ops.Ne: _compare(lambda a, b: a != b),
    ops.Lt: _compare(lambda a, b: a < b),
    ops.Le: _compare(lambda a, b: a <= b),
    ops.Gt: _compare(lambda a, b: a > b),
    ops.Ge: _compare(lambda a, b: a >= b),
    ops.Where: lambda c, a, b: a if _truth(c) else b,
    ops.LogicalAnd: lambda a, b: _truth(a) and _truth(b),
    ops.LogicalOr: lambda a, b: _truth(a) or _truth(b),
    ops.LogicalNot: lambda a: not _truth(a),
}
