"""Integer tensors that are affine functions of their own indices: ``arange``, its reshapes, sums and multiples.

Masks and gathers are computed from them. What is known of them decides whether a comparison always holds, and which
positions a gather reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.ir import ops
from trimtab.ir.core import Module, Value
from trimtab.ir.dims import Dim, bounds
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op

if TYPE_CHECKING:
    import torch

READ_LIMIT = 1 << 20
"""Elements of the largest weight whose content is looked at."""
_WIDE = (DType.I32, DType.I64)
_AFFINE = (
    ops.Add, ops.Cast, ops.Expand, ops.Mul, ops.Neg, ops.Permute, ops.Reshape, ops.Select, ops.Slice, ops.Sub,
)  # fmt: skip


@dataclass(frozen=True)
class IndexMap:
    """A tensor whose element at ``[i, j, ...]`` is ``offset + strides[0]*i + strides[1]*j + ...``.

    Attributes:
        shape: the shape of the tensor.
        offset: the element at index 0.
        strides: a number for each axis; 0 for an axis of size 1.
    """

    shape: tuple[Dim, ...]
    offset: Dim
    strides: tuple[Dim, ...]

    @property
    def is_constant(self) -> bool:
        """Whether all elements are the same."""
        return all(stride == 0 for stride in self.strides)

    def range(self) -> tuple[float, float]:
        """Numbers that no element falls below nor exceeds, for all values of the symbols."""
        low = high = self.offset
        for stride, size in zip(self.strides, self.shape, strict=True):
            least, most = bounds(stride)
            if least < 0 < most:
                return -float("inf"), float("inf")
            low, high = (low, high + stride * (size - 1)) if least >= 0 else (low + stride * (size - 1), high)
        return bounds(low)[0], bounds(high)[1]

    def on_diagonal(self) -> IndexMap | None:
        """The map where the last two indices are equal; None when the axes are not of one size."""
        if len(self.shape) < 2 or self.shape[-1] != self.shape[-2]:
            return None
        return IndexMap(self.shape[:-1], self.offset, (*self.strides[:-2], self.strides[-2] + self.strides[-1]))

    def scaled(self, factor: Dim, plus: Dim = 0) -> IndexMap:
        """All elements times ``factor``, then ``plus``."""
        return IndexMap(self.shape, self.offset * factor + plus, tuple(stride * factor for stride in self.strides))


def index_map(module: Module, value: Value) -> IndexMap | None:
    """The map of an integer value; None when it is not affine or nothing is known of it."""
    return _map(module, value, {})


def sum_of_maps(left: IndexMap, right: IndexMap, shape: tuple[Dim, ...]) -> IndexMap:
    """The map of the sum of two values that broadcast to ``shape``."""
    strides = (_aligned(left.strides, shape), _aligned(right.strides, shape))
    return IndexMap(shape, left.offset + right.offset, tuple(a + b for a, b in zip(*strides, strict=True)))


def _aligned(strides: tuple[Dim, ...], shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
    return (*(0,) * (len(shape) - len(strides)), *strides)


def _map(module: Module, value: Value, known: dict[Value, IndexMap | None]) -> IndexMap | None:
    if value.type.dtype not in _WIDE:
        return None
    if value.is_weight:
        return _of_weight(module, value)
    op = value.producer
    if op is not None and value not in known:
        operands = [_map(module, operand, known) for operand in op.operands] if isinstance(op, _AFFINE) else []
        known[value] = _of_op(op, operands, value.type.shape)
    return known.get(value)


def _of_op(op: Op, operands: Sequence[IndexMap | None], shape: tuple[Dim, ...]) -> IndexMap | None:
    maps = [operand for operand in operands if operand is not None]
    if len(maps) < len(operands):
        return None
    match op, maps:
        case ops.Arange(start=int(start), step=int(step)), _:
            return _made(shape, start, (step,))
        case ops.Full(value=int(number)), _:
            return _made(shape, number, (0,) * len(shape))
        case ops.DimValue(), _:
            return _made(shape, op.dim, ())
        case ops.Neg(), [x]:
            return x.scaled(-1)
        case ops.Add(), [x, y]:
            return sum_of_maps(x, y, shape)
        case ops.Sub(), [x, y]:
            return sum_of_maps(x, y.scaled(-1), shape)
        case ops.Mul(), [x, y] if x.is_constant or y.is_constant:
            factor, other = (x, y) if x.is_constant else (y, x)
            return sum_of_maps(other.scaled(factor.offset), IndexMap((), 0, ()), shape)
        case _, [x]:
            return _moved(op, x, shape)
    return None


def _made(shape: tuple[Dim, ...], offset: Dim, strides: Sequence[Dim]) -> IndexMap:
    return IndexMap(shape, offset, tuple(0 if n == 1 else stride for n, stride in zip(shape, strides, strict=True)))


def _moved(op: Op, inner: IndexMap, shape: tuple[Dim, ...]) -> IndexMap | None:
    strides = list(inner.strides)
    match op:
        case ops.Cast():
            return inner
        case ops.Permute():
            return _made(shape, inner.offset, [strides[axis] for axis in op.dims])
        case ops.Expand():
            return _made(shape, inner.offset, _aligned(inner.strides, shape))
        case ops.Slice():
            offset = inner.offset + strides[op.dim] * op.start
            strides[op.dim] *= op.step
            return _made(shape, offset, strides)
        case ops.Select():
            return _made(shape, inner.offset + strides.pop(op.dim) * op.index, strides)
        case ops.Reshape() if [n for n in inner.shape if n != 1] == [n for n in shape if n != 1]:
            rest = iter([stride for n, stride in zip(inner.shape, strides, strict=True) if n != 1])
            return _made(shape, inner.offset, [0 if n == 1 else next(rest) for n in shape])
        case _:
            return None


def _of_weight(module: Module, value: Value) -> IndexMap | None:
    """The map of a stored tensor, a buffer of positions for one."""
    data = content(module, value)
    if data is None or not data.numel():
        return None
    shape = tuple(data.shape)
    first = [0] * data.dim()
    offset = int(data[tuple(first)])
    strides = []
    for axis, size in enumerate(shape):
        second = [*first[:axis], 1, *first[axis + 1 :]]
        strides.append(int(data[tuple(second)]) - offset if size > 1 else 0)
    expected = data.new_tensor(offset)
    for axis, (size, stride) in enumerate(zip(shape, strides, strict=True)):
        steps = data.new_tensor(range(size)) * stride
        expected = expected + steps.reshape([-1 if axis == own else 1 for own in range(len(shape))])
    return IndexMap(shape, offset, tuple(strides)) if bool((data == expected).all()) else None


def content(module: Module, value: Value) -> torch.Tensor | None:
    """The data of a weight that is small enough to be looked at; None for other values."""
    size = value.type.elements
    if not value.is_weight or value.weight not in module.weights or not isinstance(size, int) or size > READ_LIMIT:
        return None
    return module.weights[value.weight].tensor()
