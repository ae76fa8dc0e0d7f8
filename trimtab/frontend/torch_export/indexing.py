"""Converters of gathers, scatters and advanced indexing."""

from __future__ import annotations

from typing import Any

from trimtab.frontend.torch_export.call import Call
from trimtab.frontend.torch_export.registry import Refusal, converts
from trimtab.ir import ops
from trimtab.ir.core import Value
from trimtab.ir.dtypes import DType


@converts("aten.embedding.default")
def embedding(call: Call, weight: Value, indices: Value, **_: Any) -> Value:
    return call(ops.Embedding(weight, indices))


@converts("aten.index_select.default")
def index_select(call: Call, x: Value, dim: int, index: Value) -> Value:
    return call(ops.IndexSelect(x, index, dim=call.axis(dim, x)))


@converts("aten.gather.default")
def gather(call: Call, x: Value, dim: int, index: Value, sparse_grad: bool) -> Value:
    return call(ops.Gather(x, index, dim=call.axis(dim, x)))


@converts("aten.index.Tensor")
def index(call: Call, x: Value, indices: list[Value | None]) -> Value:
    axes = [axis for axis, value in enumerate(indices) if value is not None]
    given = tuple(value for value in indices if value is not None)
    if any(value.type.dtype is DType.BOOL for value in given):
        raise Refusal("indexing by a bool mask, whose result's shape depends on data")
    if len(given) == 1:
        return call(ops.IndexSelect(x, given[0], dim=axes[0]))
    if axes != list(range(axes[0], axes[0] + len(axes))):
        # Indices on axes that are not neighbours: their axes come first in the result, as in numpy.
        x = call(ops.Permute(x, dims=(*axes, *(axis for axis in range(x.type.rank) if axis not in axes))))
        axes = list(range(len(axes)))
    return call(ops.Index(x, given, dim=axes[0]))


@converts("aten.index_put.default")
def index_put(call: Call, x: Value, indices: list[Value | None], values: Value, accumulate: bool) -> Value:
    given = [value for value in indices if value is not None]
    if any(value is None for value in indices[: len(given)]):
        raise Refusal("index_put that skips a leading axis")
    if len(given) == 1 and given[0].type.dtype is DType.BOOL and not accumulate and values.type.rank == 0:
        mask = given[0]
        shape = (*mask.type.shape, *(1,) * (x.type.rank - mask.type.rank))
        return call(ops.Where(call(ops.Reshape(mask, shape=shape)), call.cast(values, x.type.dtype), x))
    if any(value.type.dtype is DType.BOOL for value in given):
        raise Refusal("writing by a bool mask, whose number of elements depends on data")
    return call(ops.IndexPut(x, tuple(given), call.cast(values, x.type.dtype), accumulate=accumulate))


@converts("aten.scatter.src", "aten.scatter.value", "aten.scatter_add.default")
def scatter(call: Call, x: Value, dim: int, index: Value, src: Value | None = None, value: Any = None) -> Value:
    reduce = "add" if "scatter_add" in str(call.node.target) else "none"
    if src is None:
        src = call(ops.Expand(call.operand(value, x.type.dtype), shape=index.type.shape))
    return call(ops.Scatter(x, index, src, dim=call.axis(dim, x), reduce=reduce))


@converts("aten.scatter_reduce.two")
def scatter_reduce(call: Call, x: Value, dim: int, index: Value, src: Value, reduce: str, include_self: bool) -> Value:
    kinds = {"sum": "add", "prod": "mul", "amax": "amax", "amin": "amin"}
    if reduce not in kinds or not include_self:
        raise Refusal("scatter_reduce by mean, or without the original values")
    return call(ops.Scatter(x, index, src, dim=call.axis(dim, x), reduce=kinds[reduce]))
