"""What is known about a mask without running the model: whether it hides nothing, the future, or whole rows.

A mask is a bool tensor ``[..., N, M]``, true where query i may attend to key j, or the floating tensor that is added
to the scores.
"""

from __future__ import annotations

import math

from trimtab.ir import ops
from trimtab.ir.analysis.index_maps import IndexMap, content, index_map, sum_of_maps
from trimtab.ir.core import Module, Value
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op
from trimtab.ir.rewrite.constants import scalar

MASKING = -1e4
"""A score that is at most this has no weight beside one that is not masked: scores are smaller than half of it."""
ABSORBING = -1e30
"""At most this, even the sum with a score is this number: a row that is masked everywhere has equal weights."""

_MOVES = (ops.Reshape, ops.Permute, ops.Expand, ops.Slice, ops.Select, ops.Index, ops.IndexSelect, ops.Gather)
_AND, _OR = (ops.LogicalAnd, ops.BitwiseAnd), (ops.LogicalOr, ops.BitwiseOr)
_NOT = (ops.LogicalNot, ops.BitwiseNot)


class MaskFacts:
    """Facts about the masks of a module, which must stay as it is meanwhile."""

    def __init__(self, module: Module) -> None:
        self._module = module
        self._truth: dict[Value, bool | None] = {}
        self._diagonal: dict[Value, bool] = {}

    def truth(self, value: Value) -> bool | None:
        """The bool that ``value`` holds everywhere; None when it is not known to hold one."""
        if value not in self._truth:
            self._truth[value] = self._find_truth(value) if value.type.dtype is DType.BOOL else None
        return self._truth[value]

    def _find_truth(self, value: Value) -> bool | None:
        data = content(self._module, value)
        if data is not None:
            return True if bool(data.all()) else None if bool(data.any()) else False
        op = value.producer
        if isinstance(op, ops.Full):
            return bool(op.value)
        if isinstance(op, _MOVES):
            return self.truth(op.operands[0])
        if isinstance(op, _NOT):
            inner = self.truth(op.operands[0])
            return None if inner is None else not inner
        if isinstance(op, (*_AND, *_OR)):
            sides = [self.truth(operand) for operand in op.operands]
            decisive = isinstance(op, _OR)
            return decisive if decisive in sides else None if None in sides else not decisive
        margin = self._margin(op)
        low, high = margin.range() if margin is not None else (-math.inf, math.inf)
        return True if low >= 0 else False if high < 0 else None

    def uniform(self, value: Value) -> float | None:
        """The number that ``value`` holds everywhere; None when it is not known to hold one."""
        number = scalar(self._module, value)
        if number is not None:
            return number
        data = content(self._module, value)
        if data is not None and data.numel() and bool((data == data.reshape(-1)[0]).all()):
            return float(data.reshape(-1)[0])
        op = value.producer
        if isinstance(op, ops.Cast):
            number = self.truth(op.x) if op.x.type.dtype is DType.BOOL else self.uniform(op.x)
            exact = number is not None and (op.dtype.is_floating or number in (0, 1))
            return float(number) if number is not None and exact else None
        return self.uniform(op.operands[0]) if isinstance(op, _MOVES) else None

    def is_causal(self, value: Value, hidden: bool = False) -> bool:
        """Whether ``value`` is nonzero exactly where ``j <= i`` or, ``hidden``, exactly where ``j > i``."""
        if value.type.rank < 2:
            return False
        data = content(self._module, value)
        if data is not None:
            visible = (data == 0) if hidden else (data != 0)
            return bool((visible == visible.new_ones(visible.shape[-2:]).tril()).all())
        op = value.producer
        kept = value.type.rank - 2
        match op:
            case ops.LogicalNot() | ops.BitwiseNot() if op.x.type.dtype is DType.BOOL:
                return self.is_causal(op.x, not hidden)
            case ops.Eq() | ops.Ne():
                x, zero = (op.x, op.y) if scalar(self._module, op.y) is not None else (op.y, op.x)
                if scalar(self._module, zero) != 0 or x.type.shape != value.type.shape:
                    return False
                return self.is_causal(x, hidden != isinstance(op, ops.Eq))
            case ops.Cast():
                return self.is_causal(op.x, hidden)
            case ops.Reshape() | ops.Expand():
                return op.x.type.shape[-2:] == value.type.shape[-2:] and self.is_causal(op.x, hidden)
            case ops.Slice():
                return (op.dim < kept or (op.start == 0 and op.step == 1)) and self.is_causal(op.x, hidden)
            case ops.Tril():
                return not hidden and op.diagonal == 0 and self.uniform(op.x) not in (0, None)
            case ops.Triu():
                return hidden and op.diagonal == 1 and self.uniform(op.x) not in (0, None)
        margin = self._margin(op)
        if margin is None:
            return False
        margin = margin.scaled(-1, -1) if hidden else margin
        return margin.offset == 0 and margin.strides == (*(0,) * kept, 1, -1)

    def hides_the_future(self, value: Value) -> bool:
        """Whether the floating mask ``value`` is 0 where ``j <= i``, and elsewhere low enough to hide a score."""
        largest = self._largest_nonzero(value)
        return largest is not None and largest <= MASKING and self.is_causal(value, hidden=True)

    def _largest_nonzero(self, value: Value) -> float | None:
        data = content(self._module, value)
        if data is not None:
            return float(data[data != 0].max()) if bool((data != 0).any()) else None
        op = value.producer
        if isinstance(op, ops.Triu):
            return self.uniform(op.x)
        return self._largest_nonzero(op.operands[0]) if isinstance(op, (ops.Cast, *_MOVES)) else None

    def rows_have_a_key(self, value: Value) -> bool:
        """Whether every row of the bool mask ``value`` is known to have an element that is true."""
        data = content(self._module, value)
        if data is not None:
            return bool(data.any(-1).all())
        if isinstance(value.producer, ops.Expand) and value.producer.x.type.rank:
            return self.rows_have_a_key(value.producer.x)
        return self.truth(value) is True or self.is_causal(value) or self._holds_on_diagonal(value)

    def _holds_on_diagonal(self, value: Value) -> bool:
        """Whether it is known that a query of self-attention may attend to itself."""
        if value not in self._diagonal:
            self._diagonal[value] = self.truth(value) is True or self._find_diagonal(value)
        return self._diagonal[value]

    def _find_diagonal(self, value: Value) -> bool:
        op = value.producer
        if value.type.rank < 2 or value.type.shape[-1] != value.type.shape[-2]:
            return False
        if isinstance(op, _AND):
            return all(self._holds_on_diagonal(operand) for operand in op.operands)
        margin = self._margin(op)
        diagonal = margin.on_diagonal() if margin is not None else None
        return self.is_causal(value) or (diagonal is not None and diagonal.range()[0] >= 0)

    def _margin(self, op: Op | None) -> IndexMap | None:
        """The map that is at least 0 exactly where the comparison ``op`` of integers holds."""
        if not isinstance(op, ops.Le | ops.Lt | ops.Ge | ops.Gt):
            return None
        left, right = index_map(self._module, op.x), index_map(self._module, op.y)
        if left is None or right is None:
            return None
        if isinstance(op, ops.Le | ops.Lt):
            left, right = right, left
        strict = isinstance(op, ops.Lt | ops.Gt)
        return sum_of_maps(left, right.scaled(-1, -1 if strict else 0), op.result.type.shape)
