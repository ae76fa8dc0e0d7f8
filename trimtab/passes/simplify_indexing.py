"""Clean-up of gathers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from trimtab.ir import ops
from trimtab.ir.analysis.index_maps import IndexMap, index_map, sum_of_maps
from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.dims import product
from trimtab.ir.rewrite import Attr, Match, Pattern, Rule, Var, one_of, op, repeated
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.rewrite_pass import RewritePass


@dataclass(frozen=True)
class SimplifyIndexing(RewritePass):
    """Make a gather of all positions in their order a reshape, and read an element of a stack where it came from.

    Masks of Hugging Face models are gathered by ``arange``.  Indices are taken to be in range, as an op requires.
    """

    name: ClassVar[str] = "simplify-indexing"
    contract: ClassVar[Contract] = Exact()

    def rules(self) -> Sequence[Rule]:
        return (AllPositions(), PartOfStack())


class AllPositions(Rule):
    """``x[arange(n)[:, None], arange(m)]``, and the same with one index into merged axes"""

    private = False

    def pattern(self, x: Var, indices: Var, dim: Attr) -> Pattern:
        one = op.index_select(x, indices, dim=dim)
        return one_of(op.index(x, repeated(indices), dim=dim), one)

    def check(self, m: Match) -> str | None:
        indices = m.indices if isinstance(m.indices, list) else [m.indices]
        sizes = m.x.type.shape[m.dim : m.dim + len(indices)]
        rank = m.root.type.rank - (m.x.type.rank - len(indices))
        shape = m.root.type.shape[m.dim : m.dim + rank]
        flat = IndexMap((), 0, ())
        for value, size in zip(indices, sizes, strict=True):
            found = index_map(m.module, value)
            if found is None:
                return f"the index {value.type} is not known to be affine"
            flat = sum_of_maps(flat.scaled(size), found, shape)
        expected = [0 if n == 1 else product(shape[axis + 1 :]) for axis, n in enumerate(shape)]
        if flat.offset != 0 or flat.strides != tuple(expected) or product(shape) != product(sizes):
            return "the indices are not all positions in their order"
        return None

    def rewrite(self, m: Match, build: Builder) -> Value:
        return build(ops.Reshape(m.x, shape=m.root.type.shape))


class PartOfStack(Rule):
    """``select(concat(values))`` along the axis of the concat, where each value has size 1"""

    private = False

    def pattern(self, values: Var, dim: Attr, index: Attr) -> Pattern:
        return op.select(op.concat(repeated(values), dim=dim), dim=dim, index=index)

    def check(self, m: Match) -> str | None:
        odd = next((value for value in m.values if value.type.shape[m.dim] != 1), None)
        if odd is not None:
            return f"the value {odd.type} has not size 1 along axis {m.dim}"
        return None if isinstance(m.index, int) else f"the index {m.index} is not a number"

    def rewrite(self, m: Match, build: Builder) -> Value:
        return build(ops.Reshape(m.values[m.index], shape=m.root.type.shape))
