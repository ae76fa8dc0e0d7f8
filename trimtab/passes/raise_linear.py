"""Raising of matrix products with a weight to ``linear``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Graph, Use, Value
from trimtab.ir.op import Op
from trimtab.ir.printer import value_in_words
from trimtab.ir.rewrite import Constant, Match, Pattern, Rule, Var, maybe, one_of, op, optional, shared
from trimtab.ir.weights import ComputedSource
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.rewrite_pass import RewritePass

_TRANSPOSE = (1, 0)


@dataclass(frozen=True)
class RaiseLinear(RewritePass):
    """Write a matrix product with a weight as linear, and take a bias that is added afterwards into it.

    ``x @ W^T`` reads W directly. For ``x @ W`` the transposed weight takes W's place, where every reader of W
    multiplies by it in this way. A product of flattened rows, as ``addmm`` asks for, becomes one of x as it was. The
    results may be rounded differently, because the bias joins the sum.
    """

    name: ClassVar[str] = "raise-linear"
    contract: ClassVar[Contract] = Exact(rounding=True)

    def rules(self) -> Sequence[Rule]:
        return (ProductWithWeight(), AddedBias(), FlattenedRows())


class ProductWithWeight(Rule):
    """``x @ W^T`` or ``x @ W`` with a weight W."""

    def pattern(self, x: Var, w: Constant) -> Pattern:
        return x @ shared(one_of(op.permute(w, dims=_TRANSPOSE).bind("transpose"), w))

    def check(self, m: Match) -> str | None:
        if not m.w.is_weight or m.w.type.rank != 2:
            return f"{value_in_words(m.w)} is not one matrix for all rows of x"
        if not _multiplies_rows(m.root.producer):
            return f"x is not a matrix for each of the products, from {m.x.type} to {m.root.type}"
        for use in m.module.readers(m.w.weight) if m.transpose is None else ():
            if not _can_transpose(use, m.graph):
                reader = "the graph's outputs" if isinstance(use.user, Graph) else use.user.name
                return f"the weight @{m.w.weight} is also read by {reader}: its transpose would be a second weight"
        return None

    def rewrite(self, m: Match, build: Builder) -> Value:
        return build(ops.Linear(m.x, m.w if m.transpose is not None else _transposed(m, build)))


def _transposed(m: Match, build: Builder) -> Value:
    """The transpose of the weight: a permute while other products still read the weight, after the last of them a
    weight in its place."""
    permute = next((user for user in m.w.users if _is_transpose(user) and user.is_before(m.ops[0])), None)
    if any(user not in (m.ops[0], permute) for user in m.w.users):
        return permute.result if permute is not None else build(ops.Permute(m.w, dims=_TRANSPOSE))
    weight = m.weight(m.w)
    source = ComputedSource(lambda: weight.tensor().t())
    type = weight.type.with_shape(*reversed(weight.type.shape))
    transposed = m.add_weight(f"{weight.id}.T", type, source, trainable=weight.trainable)
    if permute is not None:
        permute.result.replace_all_uses_with(transposed)
        m.graph.ops.remove(permute)
    return transposed


def _can_transpose(use: Use, graph: Graph) -> bool:
    """Whether a reader of a weight in ``graph`` multiplies by it from the right, and so would read its transpose as a
    linear."""
    reader = use.user
    if isinstance(reader, Graph) or reader.graph is not graph:
        return False
    if _is_transpose(reader):
        return all(isinstance(inner.user, ops.Linear) and inner.index == 1 for inner in reader.result.uses)
    return use.index == 1 and _multiplies_rows(reader)


def _is_transpose(op: Op) -> bool:
    return isinstance(op, ops.Permute) and op.dims == _TRANSPOSE


def _multiplies_rows(op: object) -> bool:
    """Whether ``op`` is a product that multiplies each row of x once."""
    return isinstance(op, ops.Matmul) and op.x.type.rank > 1 and op.result.type.shape[:-1] == op.x.type.shape[:-1]


class AddedBias(Rule):
    """``linear(x) + b`` with a weight b of one element per output, the rows perhaps arranged otherwise in between."""

    def pattern(self, x: Var, w: Var, b: Constant) -> Pattern:
        return optional(op.reshape(op.linear(x, w))).bind("product") + b

    def check(self, m: Match) -> str | None:
        outputs = m.w.type.shape[0]
        if m.product.type != m.root.type:
            return f"the sum repeats the product from {m.product.type} to {m.root.type}"
        if m.product.type.shape[-1:] != (outputs,):
            return f"the outputs of the product are not the last axis of {m.product.type}"
        if not m.b.is_weight or m.b.type.shape[-1:] != (outputs,) or m.b.type.elements != outputs:
            return f"{value_in_words(m.b)} does not have one element for each of the {outputs} outputs"
        if m.b.type.rank > 1 and sum(1 for _ in m.module.readers(m.b.weight)) > 1:
            return f"the weight @{m.b.weight} has other readers: reshaped it would be a second one"
        return None

    def rewrite(self, m: Match, build: Builder) -> Value:
        bias = m.b
        if bias.type.rank > 1:
            weight = m.weight(bias)
            type = bias.type.with_shape(m.w.type.shape[0])
            source = ComputedSource(lambda: weight.tensor().reshape(-1))
            bias = m.add_weight(f"{weight.id}.flat", type, source, trainable=weight.trainable)
        total = build(ops.Linear(m.x, m.w, bias))
        return total if total.type == m.root.type else build(ops.Reshape(total, shape=m.root.type.shape))


class FlattenedRows(Rule):
    """``linear(x)`` of a tensor x that is made a matrix for it, as ``addmm`` asks."""

    def pattern(self, x: Var, w: Var, b: Var) -> Pattern:
        matrix = op.reshape(x, shape=lambda shape: len(shape) == 2)
        return op.linear(shared(matrix).bind("rows"), w, maybe(b))

    def check(self, m: Match) -> str | None:
        if m.x.type.rank < 3 or m.x.type.shape[-1] != m.rows.type.shape[-1]:
            return f"the rows of {m.x.type} are not those of {m.rows.type}"
        return None

    def rewrite(self, m: Match, build: Builder) -> Value:
        return build(ops.Reshape(build(ops.Linear(m.x, m.w, m.b)), shape=m.root.type.shape))
