"""Permutes behind the ops that do not mind them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Module, Value
from trimtab.ir.op import Op
from trimtab.ir.rewrite.constants import is_constant
from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.local_rewrite import rewrite_each

_ALONG_AN_AXIS = (ops.Softmax, ops.LogSoftmax)


@dataclass(frozen=True)
class SinkPermutes(Pass):
    """Move permutes behind elementwise ops, softmax and matrix products where fewer are left in the end.

    That is so where two operands are permuted alike, where the moved permute meets another one, with which
    ``simplify-permutes`` joins it, and where both operands of a matrix product are transposed:
    ``x^T y^T`` becomes ``(y x)^T``. The elements that are permuted never become more.
    """

    name: ClassVar[str] = "sink-permutes"
    contract: ClassVar[Contract] = Exact(rounding=True)

    def run(self, module: Module, ctx: Context) -> Changed:
        return rewrite_each(module, _sunk, self.name, ctx.rewrites)


def _sunk(op: Op, build: Builder) -> Value | None:
    if isinstance(op, ops.Matmul):
        return _transposed_product(op, build)
    permutes = [value.producer for value in op.operands if isinstance(value.producer, ops.Permute)]
    if not permutes or not _is_carrier(op) or any(len(p.result.uses) > op.operands.count(p.result) for p in permutes):
        return None
    dims = permutes[0].dims
    if len(dims) != op.result.type.rank or any(p.dims != dims for p in permutes):
        return None
    if len(set(permutes)) == 1 and not _meets_permute(op.result):
        return None
    if isinstance(op, _ALONG_AN_AXIS):
        return build(ops.Permute(build(op.rebuilt([permutes[0].x], dim=dims[op.dim])), dims=dims))
    sources = [_before(value, dims, build) for value in op.operands]
    return build(ops.Permute(build(op.rebuilt(sources)), dims=dims))


def _is_carrier(op: Op) -> bool:
    """Whether the op computes the same on permuted operands: what else it reads is permuted too or constant."""
    if isinstance(op, _ALONG_AN_AXIS):
        return True
    return op.elementwise and all(isinstance(v.producer, ops.Permute) or is_constant(v) for v in op.operands)


def _meets_permute(value: Value) -> bool:
    """Whether the only reader of ``value`` is a permute, or an op behind which it meets one."""
    while len(value.uses) == 1 and not value.is_output:
        (reader,) = value.users
        if isinstance(reader, ops.Permute):
            return True
        others = [operand for operand in reader.operands if operand is not value]
        if not (reader.elementwise and all(map(is_constant, others))) and not isinstance(reader, _ALONG_AN_AXIS):
            return False
        value = reader.results[0]
    return False


def _before(value: Value, dims: tuple[int, ...], build: Builder) -> Value:
    """What an op reads instead of ``value`` before a permute by ``dims``."""
    if isinstance(value.producer, ops.Permute):
        return value.producer.x
    shape = value.type.shape
    if all(size == 1 for size in shape):
        return value
    missing = len(dims) - len(shape)
    full = build(ops.Reshape(value, shape=(1,) * missing + shape)) if missing else value
    back = tuple(dims.index(axis) for axis in range(len(dims)))
    return build(ops.Permute(full, dims=back))


def _transposed_product(op: ops.Matmul, build: Builder) -> Value | None:
    """``x^T y^T`` as ``(y x)^T``, where nothing else reads the transposes."""
    turned = list(_transposes(op))
    if len(turned) != 2 or any(len(value.uses) != 1 for value in op.operands):
        return None
    product = build(ops.Matmul(turned[1].x, turned[0].x))
    rank = product.type.rank
    return build(ops.Permute(product, dims=(*range(rank - 2), rank - 1, rank - 2)))


def _transposes(op: ops.Matmul) -> Iterator[ops.Permute]:
    """The operands of a product that are matrix transposes of something that is not constant."""
    for value in op.operands:
        found, rank = value.producer, value.type.rank
        swapped = (*range(rank - 2), rank - 1, rank - 2)
        if isinstance(found, ops.Permute) and found.dims == swapped and not is_constant(found.x):
            yield found
