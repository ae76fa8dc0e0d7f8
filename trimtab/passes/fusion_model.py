"""Which ops fit in one kernel, and what a kernel costs: the two questions of fusion grouping.

docs/design/fusion-groups.md derives the rules and the numbers.  Neither knows a code generator: a backend that cannot
make one kernel of a group inlines it again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

from trimtab.ir import ops
from trimtab.ir.core import Value
from trimtab.ir.dims import Dim, Symbol, evaluate
from trimtab.ir.fused import is_constant
from trimtab.ir.op import Op

CONTRACTIONS = (
    ops.Linear, ops.Matmul, ops.Einsum, ops.Conv1d, ops.Conv2d, ops.Conv3d, ops.LinearInteger, ops.MatmulInteger,
    ops.ConvInteger, ops.LinearGroupwise,
)  # fmt: skip
_REDUCTIONS = (ops.Sum, ops.Mean, ops.Prod, ops.Amax, ops.Amin, ops.Any, ops.All)
_ROW_OPS = (*_REDUCTIONS, ops.Softmax, ops.LogSoftmax, ops.LayerNorm, ops.RmsNorm)
# Each element of the result is one element of the first operand, and no element is read twice.
_INJECTIVE = (ops.Permute, ops.Slice, ops.Select, ops.Flip, ops.Roll)
# Each element of the result is one element of an operand, which may be read many times.
_GATHERS = (ops.Expand, ops.Tile, ops.Pad, ops.Embedding, ops.IndexSelect, ops.Gather, ops.Index)
_MOVES = (*_INJECTIVE, *_GATHERS)
# Tens of instructions for an element instead of one.
_COSTLY = (
    ops.Exp, ops.Expm1, ops.Log, ops.Log1p, ops.Tanh, ops.Sigmoid, ops.Silu, ops.Gelu, ops.Erf, ops.Elu, ops.Mish,
    ops.Softplus, ops.Pow, ops.Sin, ops.Cos, ops.Softmax, ops.LogSoftmax, ops.LayerNorm, ops.RmsNorm,
)  # fmt: skip
_COSTLY_WEIGHT = 10

Shape: TypeAlias = "tuple[Dim, ...]"


def can_join(op: Op) -> bool:
    """Whether ``op`` can share a kernel with others at all. What nobody reads is left to dead-code elimination."""
    known = is_pointwise(op) or isinstance(op, (*CONTRACTIONS, *_ROW_OPS, *_MOVES))
    return known and bool(op.result.uses)


def is_pointwise(op: Op) -> bool:
    """Whether each element of the result depends on the elements at its own index."""
    return op.elementwise or isinstance(op, ops.BatchNorm | ops.Tril | ops.Triu)


@dataclass(frozen=True)
class Kernel:
    """Ops of one graph, in order of execution, as one kernel."""

    ops: tuple[Op, ...]

    @cached_property
    def members(self) -> frozenset[Op]:
        return frozenset(self.ops)

    @cached_property
    def kept(self) -> frozenset[Value]:
        """Results that somebody outside reads."""
        return frozenset(v for op in self.ops for v in op.results if any(u.user not in self.members for u in v.uses))

    @cached_property
    def reads(self) -> tuple[tuple[Op, Value], ...]:
        """Each reading of a result of a member by a member."""
        return tuple((op, value) for op in self.ops for value in op.operands if value.producer in self.members)

    @cached_property
    def outside(self) -> tuple[tuple[Op, Value], ...]:
        """Each reading of anything else but constants."""
        return tuple(
            (op, v) for op in self.ops for v in op.operands if v.producer not in self.members and not is_constant(v)
        )

    @cached_property
    def row_ops(self) -> tuple[Op, ...]:
        return tuple(op for op in self.ops if isinstance(op, _ROW_OPS))

    @cached_property
    def rows(self) -> Shape:
        """The leading axes that all of a row kernel's ops share; empty for other kernels."""
        return _leading_axes(self.row_ops[0]) if self.row_ops and all(map(_leading_axes, self.row_ops)) else ()

    def refusal(self) -> str:
        """Why the ops do not fit in one kernel, or the empty text."""
        if any(isinstance(op, CONTRACTIONS) for op in self.ops):
            return self._refuses_tiles()
        if self.rows:
            return self._refuses_rows()
        return self._refuses_reduction() if self.row_ops else self._refuses_elements(self.ops, None)

    def _refuses_tiles(self) -> str:
        """A contraction makes its result by tiles, and what follows is applied to each tile."""
        core, *epilogue = self.ops
        if any(isinstance(op, CONTRACTIONS) for op in epilogue):
            return "a kernel has one contraction, and it comes first"
        last = self.ops[-1]
        if isinstance(last, ops.Permute):
            if last.dims[-1] != len(last.dims) - 1:
                return "a permute of the innermost axis would scatter a tile"
            epilogue = epilogue[:-1]
        shape = core.result.type.shape
        for op in epilogue:
            read = [value for value in op.operands if value.producer in self.members]
            if not is_pointwise(op) or op.result.type.shape != shape or not read:
                return "an epilogue is pointwise on the contraction's result"
            if not all(_reads_at_own_index(op, value) for value in read):
                return "an epilogue reads a tile at its own index"
        return "" if self.kept == {last.result} else "a value that an epilogue consumes is read elsewhere"

    def _refuses_rows(self) -> str:
        """Reductions over trailing axes and pointwise ops, row after row, with the row in cache."""
        leading = self.rows
        if any(_leading_axes(op) != leading for op in self.row_ops):
            return "two reductions run over different rows"
        if any(op.result.type.shape[: len(leading)] != leading for op in self.ops):
            return "an op has other rows than the reduction"
        for op, value in self.reads:
            if isinstance(op, _ROW_OPS):
                if value is not op.operands[0]:
                    return "the parameters of a reduction are computed beforehand"
            elif isinstance(op, _MOVES):
                return "an op moves elements between rows"
            elif not _reads_at_own_index(op, value) and not _is_one_per_row(op, value, len(leading)):
                return _REPEATED
        return ""

    def _refuses_reduction(self) -> str:
        """A reduction over any axes computes its operand on the way, and pointwise ops go over its result."""
        core, *others = self.row_ops
        if others or not isinstance(core, _REDUCTIONS):
            return "a reduction that is not over the trailing axes is the only one of its kernel"
        before = self._ancestors(core)
        if any(op.result in self.kept for op in before):
            return "a value that such a reduction consumes is read elsewhere"
        for op in self.ops:
            if op is core or op in before:
                continue
            read = [value for value in op.operands if value.producer in self.members]
            if op.result.type.shape != core.result.type.shape or not all(_reads_at_own_index(op, v) for v in read):
                return "what follows a reduction is pointwise on its result"
        return self._refuses_elements([op for op in self.ops if op in before], core) if before else ""

    def _ancestors(self, op: Op) -> set[Op]:
        """The members that ``op`` depends on."""
        found: set[Op] = set()
        for other in reversed(self.ops):
            if any(user is op or user in found for user in other.result.users):
                found.add(other)
        return found

    def _refuses_elements(self, chain: Sequence[Op], reader: Op | None) -> str:
        """Pointwise ops and moves as one loop over elements: those of the results, or those that ``reader`` reads.

        A value read at the loop's index is computed once, however often it is read.  Any other value is computed where
        it is read: that must be one place, which reads each element once.
        """
        domain = chain[-1].result.type.shape
        if reader is None and any(value.type.shape != domain for value in self.kept):
            return "the results have different shapes"
        aligned: set[Op] = set()  # ops whose result is at the loop's index
        for op in reversed(chain):
            readers = list(dict.fromkeys(other for other, value in self.reads if value is op.result))
            if readers == [reader] or all(
                other in aligned and _reads_at_own_index(other, op.result) for other in readers
            ):
                aligned.add(op)
            elif op.result in self.kept or len(readers) != 1:
                return "a value that is read several times is read at different indices"
            elif not _reads_once(readers[0], op.result) and not self._only_moves(op):
                return _REPEATED
        return ""

    def _only_moves(self, op: Op) -> bool:
        """Whether ``op`` and the members before it compute nothing, so that an element may be fetched twice."""
        return isinstance(op, _MOVES) and all(
            self._only_moves(value.producer) for value in op.operands if value.producer in self.members
        )


@dataclass(frozen=True)
class CostModel:
    """Seconds of a kernel on a machine: a launch, then memory and arithmetic one after the other.

    Attributes:
        launch: microseconds to start the threads and to wait for the last one.
        bandwidth: gigabytes a second between memory and the processor, all threads together.
        rate: billions of additions a second, all threads together.
        width: tasks that are needed to keep all threads busy.
        sizes: the sizes of symbols to estimate with.
    """

    launch: float
    bandwidth: float
    rate: float
    width: int
    sizes: Mapping[str, int]
    _elements: dict[Shape, int] = field(default_factory=dict, repr=False)

    def seconds(self, kernel: Kernel) -> float:
        """The estimate for one kernel, without the multiply-accumulates of a contraction."""
        work = self.bytes(kernel) / self.bandwidth + self.instructions(kernel) / self.rate
        return self.launch * 1e-6 + work * 1e-9 / min(1.0, self.tasks(kernel) / self.width)

    def bytes(self, kernel: Kernel) -> int:
        """Bytes read from memory and written to it; of an operand that is moved, at most those that are taken."""
        read: dict[Value, int] = {}
        for op, value in kernel.outside:
            size = self._size(value)
            taken = min(size, self._size(op.result)) if isinstance(op, _MOVES) else size
            read[value] = min(size, read.get(value, 0) + taken)
        return sum(read.values()) + sum(map(self._size, kernel.kept))

    def row_bytes(self, kernel: Kernel) -> int:
        """Bytes that a row kernel holds between its loops."""
        if not kernel.rows:
            return 0
        held = sum(self._size(op.result) for op in kernel.ops if op.result not in kernel.kept)
        return held // max(1, self.elements(kernel.rows))

    def instructions(self, kernel: Kernel) -> int:
        """Operations on elements, in units of an addition."""
        total = 0
        for op in kernel.ops:
            if not isinstance(op, CONTRACTIONS):
                touched = op.operands[0] if isinstance(op, _REDUCTIONS) else op.result
                weight = _COSTLY_WEIGHT if isinstance(op, _COSTLY) else 1
                total += weight * self.elements(touched.type.shape)
        return total

    def tasks(self, kernel: Kernel) -> int:
        """Iterations of the parallel loop; the tiles of a contraction count as enough."""
        if isinstance(kernel.ops[0], CONTRACTIONS):
            return self.width
        return max(1, self.elements(kernel.rows or kernel.ops[-1].result.type.shape))

    def elements(self, shape: Shape) -> int:
        """The product of a shape."""
        if shape not in self._elements:
            self._elements[shape] = math.prod(int(evaluate(dim, self.sizes)) for dim in shape)
        return self._elements[shape]

    def _size(self, value: Value) -> int:
        return self.elements(value.type.shape) * max(value.type.dtype.bits // 8, 1)


def typical_sizes(symbols: Iterable[Symbol]) -> dict[str, int]:
    """Sizes of symbols to estimate with: 128, or the nearest size in the symbol's range."""
    return {s.name: max(s.min, 128 if s.max is None else min(128, s.max)) for s in symbols}


_REPEATED = "an op would compute an element several times"


def _reads_at_own_index(op: Op, value: Value) -> bool:
    """Whether a pointwise ``op`` reads ``value`` without broadcasting it."""
    if isinstance(op, ops.BatchNorm) and value is not op.x:
        return False
    return is_pointwise(op) and value.type.shape == op.result.type.shape


def _is_one_per_row(op: Op, value: Value, leading: int) -> bool:
    """Whether a pointwise ``op`` reads the same element of ``value`` along a whole row."""
    shape, inner = value.type.shape, value.type.shape[leading:]
    return op.elementwise and len(shape) == op.result.type.rank and all(dim == 1 for dim in inner)


def _reads_once(op: Op, value: Value) -> bool:
    """Whether ``op`` reads each element of ``value`` at most once."""
    return isinstance(op, _INJECTIVE) or _reads_at_own_index(op, value)


def _leading_axes(op: Op) -> Shape:
    """The axes before those that a row op reduces; empty when it does not reduce exactly the trailing ones."""
    shape = op.operands[0].type.shape
    if isinstance(op, ops.LayerNorm | ops.RmsNorm):
        dims: Sequence[int] = range(len(shape) - len(shape[-op.axes :]), len(shape))
    elif isinstance(op, ops.Softmax | ops.LogSoftmax):
        dims = (op.dim,)
    else:
        dims = sorted(op.attributes["dims"])
    count = len(shape) - len(dims)
    return shape[:count] if dims and list(dims) == list(range(count, len(shape))) else ()
