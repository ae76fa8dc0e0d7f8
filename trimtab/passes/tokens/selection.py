"""The results of dropping tokens: which are kept, and what becomes of the others."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.dtypes import DType
from trimtab.ir.ops import Full, Mul
from trimtab.passes.tokens.assignment import Assignment
from trimtab.passes.tokens.rows import numbers, put, take


@dataclass(frozen=True)
class Selection:
    """K of N tokens are kept: ``rows``, i64 ``[B, K]``, are their positions, of which none repeats."""

    rows: Value
    tokens: int

    @property
    def count(self) -> int:
        """K."""
        size = self.rows.type.shape[1]
        assert isinstance(size, int)
        return size

    def select(self, build: Builder, x: Value) -> Value:
        """The kept tokens of x ``[B, N, C]`` (or ``[B, N]``): ``[B, K, C]``."""
        return take(build, x, self.rows)

    def restore(self, build: Builder, y: Value, x: Value) -> Value:
        """x ``[B, N, C]`` with the kept tokens replaced by y ``[B, K, C]``; dropped tokens stay as they were."""
        return put(build, x, self.rows, y)

    def target(self, build: Builder) -> Value:
        """The new row of each token, i64 ``[B, N]``; -1 for those that were dropped."""
        batch = self.rows.type.shape[0]
        nowhere = build(Full(-1, DType.I64, (batch, self.tokens)))
        return put(build, nowhere, self.rows, numbers(build, self.rows, self.count))


@dataclass(frozen=True)
class WeightedAssignment:
    """Tokens that are added up with weights ``[B, N, 1]``: kept ones with 1, fused ones with their scores."""

    assignment: Assignment
    weights: Value

    def fuse(self, build: Builder, x: Value) -> Value:
        """x ``[B, N, C]`` with the tokens of each new row added, each times its weight: ``[B, count, C]``."""
        return self.assignment.sum(build, build(Mul(x, self.weights)))
