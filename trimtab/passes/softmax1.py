"""Softmax with one more in its denominator, for models that were trained with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trimtab.errors import UsageError
from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Module, Value
from trimtab.ir.dims import Dim
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op
from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.contracts import Contract, Lossy

_MOVES = (ops.Reshape, ops.Permute, ops.Expand, ops.Slice, ops.Cast)
_PRODUCTS = (ops.Matmul, ops.Einsum)


@dataclass(frozen=True)
class Softmax1(Pass):
    """Let attention attend to nothing: ``exp(x_i) / (1 + sum exp(x_j))`` in the place of softmax.

    For models that were trained with it, and so have no outliers that only serve to attend to nothing (Miller,
    "Attention Is Off By One", 2023; OutEffHop, Hu et al., arXiv 2404.03828), when an exporter wrote plain softmax. A
    model that was trained with softmax gives other results. The rewriting itself is exact: attention gets one key of
    zeros, whose score is 0 for every query, with a value of zeros, in front of the others and always visible; a softmax
    whose result a matrix product reads gets one score of 0.

    - ``layers``: the numbers of the attentions and such softmaxes, in order of execution from 0; empty for all.
    """

    name: ClassVar[str] = "softmax1"
    contract: ClassVar[Contract] = Lossy()

    layers: tuple[int, ...] = ()

    def run(self, module: Module, ctx: Context) -> Changed:
        found = [(graph, op) for graph in module.all_graphs() for op in graph.ops if attends(op)]
        log = ctx.rewrites.of(self.name)
        log.tried = len(found)
        wrong = sorted({number for number in self.layers if not 0 <= number < len(found)})
        if wrong:
            raise UsageError(
                "softmax1 names a layer that the model does not have",
                values={"layers": ", ".join(map(str, wrong)), "attentions": len(found)},
                rule="attentions are numbered from 0 in order of execution",
                fix="run the group `raise` first where attention is still in pieces",
            )
        changed = False
        for number, (graph, op) in enumerate(found):
            if self.layers and number not in self.layers:
                continue
            log.matched += 1
            if not ctx.rewrites.permit(self.name, op):
                break
            build = Builder(module, graph, before=op, made_by=self.name)
            op.result.replace_all_uses_with(_with_one_more(build, op))
            graph.ops.remove(op)
            changed = True
        return changed


def attends(op: Op) -> bool:
    """Whether ``op`` is an attention, or a softmax whose result a matrix product reads, possibly moved."""
    return isinstance(op, ops.Attention) or (isinstance(op, ops.Softmax) and _weighs(op.result))


def _weighs(value: Value) -> bool:
    return any(
        isinstance(user, _PRODUCTS) or (isinstance(user, _MOVES) and _weighs(user.result)) for user in value.users
    )


def _with_one_more(build: Builder, op: Op) -> Value:
    if isinstance(op, ops.Attention):
        return _attention(build, op)
    assert isinstance(op, ops.Softmax)
    return _softmax(build, op)


def _attention(build: Builder, op: ops.Attention) -> Value:
    """Attention with a key and a value of zeros in front.

    A causal query sees the keys up to its own number. The new key, in front of them, takes the place of the first,
    so a query of zeros goes in front as well, and its row is dropped: no mask of all pairs is needed.
    """
    keys: Dim = op.k.type.shape[-2]
    k, v = (_behind_zeros(build, x, x.type.rank - 2) for x in (op.k, op.v))
    q = _behind_zeros(build, op.q, op.q.type.rank - 2) if op.causal else op.q
    mask = op.mask
    if mask is not None:
        shape = mask.type.shape
        if shape[-1] != keys:
            mask = build(ops.Expand(mask, shape=(*shape[:-1], keys)))
        mask = _behind_zeros(build, mask, mask.type.rank - 1)
        rows = mask.type.shape[-2] if mask.type.rank > 1 else 1
        if op.causal and rows != 1:
            mask = _behind_zeros(build, mask, mask.type.rank - 2)
    result = build(ops.Attention(q, k, v, mask, scale=op.scale, causal=op.causal))
    return _without_first(build, result, result.type.rank - 2) if op.causal else result


def _softmax(build: Builder, op: ops.Softmax) -> Value:
    shares = build(ops.Softmax(_behind_zeros(build, op.x, op.dim), dim=op.dim))
    return _without_first(build, shares, op.dim)


def _behind_zeros(build: Builder, x: Value, dim: int) -> Value:
    """x with one more row along ``dim`` in front: of zeros, or, in a mask of truth values, of what may be seen."""
    shape = tuple(1 if axis == dim else size for axis, size in enumerate(x.type.shape))
    filling = True if x.type.dtype is DType.BOOL else 0.0
    return build(ops.Concat((build(ops.Full(filling, x.type.dtype, shape)), x), dim=dim))


def _without_first(build: Builder, x: Value, dim: int) -> Value:
    return build(ops.Slice(x, dim=dim, start=1, stop=x.type.shape[dim]))
