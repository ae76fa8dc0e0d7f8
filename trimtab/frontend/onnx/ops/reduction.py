"""Reductions and running sums."""

from __future__ import annotations

from collections.abc import Callable

import torch

from trimtab.frontend.onnx.node import Node
from trimtab.frontend.onnx.ops.unsigned import WIDENED
from trimtab.frontend.onnx.registry import onnx_op
from trimtab.ir import ops
from trimtab.ir.core import Value
from trimtab.ir.dims import product
from trimtab.ir.dtypes import DType
from trimtab.ir.ops.opaque import encode_call

Reduce = Callable[[Node, Value, tuple[int, ...], bool], Value]


def _axes(node: Node, x: Value) -> tuple[int, ...] | None:
    """The axes to reduce; None when nothing is to be done."""
    if node.version >= 18 or (node.op == "ReduceSum" and node.version >= 13):
        given = node.ints_input(1, "axes")
        if not given:
            return None if node.flag("noop_with_empty_axes") else tuple(range(x.type.rank))
    else:
        given = node.ints_attr("axes", None)
        if given is None:
            return tuple(range(x.type.rank))
    return tuple(sorted(node.axes_in(given, x.type.rank)))


def _sum(node: Node, x: Value, dims: tuple[int, ...], keepdim: bool) -> Value:
    return node.emit(ops.Sum(x, dims=dims, keepdim=keepdim)) if dims else x


def _mean(node: Node, x: Value, dims: tuple[int, ...], keepdim: bool) -> Value:
    if x.type.dtype.is_floating:
        return node.emit(ops.Mean(x, dims=dims, keepdim=keepdim))
    count = node.emitter.dims((product(x.type.shape[dim] for dim in dims),), x.type.dtype, scalar=True)
    return node.emit(ops.Div(_sum(node, x, dims, keepdim), count, rounding="trunc"))


def _prod(node: Node, x: Value, dims: tuple[int, ...], keepdim: bool) -> Value:
    return node.emit(ops.Prod(x, dims=dims, keepdim=keepdim))


def _extremum(node: Node, x: Value, dims: tuple[int, ...], keepdim: bool) -> Value:
    largest = node.op == "ReduceMax"
    if any(x.type.shape[dim] == 0 for dim in dims):
        shape = tuple(1 if d in dims else size for d, size in enumerate(x.type.shape) if keepdim or d not in dims)
        return node.emit(ops.Full(value=_neutral(x.type.dtype, largest), dtype=x.type.dtype, shape=shape))
    if x.type.dtype is DType.BOOL:
        return node.emit((ops.Any if largest else ops.All)(x, dims=dims, keepdim=keepdim))
    return node.emit((ops.Amax if largest else ops.Amin)(x, dims=dims, keepdim=keepdim))


def _neutral(dtype: DType, largest: bool) -> float | int | bool:
    """What the maximum (or minimum) of no elements is."""
    if dtype is DType.BOOL:
        return not largest
    if dtype.is_floating:
        return float("-inf") if largest else float("inf")
    info = torch.iinfo(dtype.to_torch())
    return info.min if largest else info.max


def _l1(node: Node, x: Value, dims: tuple[int, ...], keepdim: bool) -> Value:
    return _sum(node, node.emit(ops.Abs(x)), dims, keepdim)


def _square(node: Node, x: Value, dims: tuple[int, ...], keepdim: bool) -> Value:
    return _sum(node, node.emit(ops.Mul(x, x)), dims, keepdim)


def _l2(node: Node, x: Value, dims: tuple[int, ...], keepdim: bool) -> Value:
    dtype = x.type.dtype
    wide = x if dtype.is_floating else node.cast(x, DType.F64)
    return node.cast(node.emit(ops.Sqrt(_square(node, wide, dims, keepdim))), dtype)


def _log_sum(node: Node, x: Value, dims: tuple[int, ...], keepdim: bool) -> Value:
    dtype = x.type.dtype
    wide = x if dtype.is_floating else node.cast(x, DType.F64)
    return node.cast(node.emit(ops.Log(_sum(node, wide, dims, keepdim))), dtype)


def _log_sum_exp(node: Node, x: Value, dims: tuple[int, ...], keepdim: bool) -> Value:
    """With the maximum taken out, so that large inputs do not overflow."""
    dtype = x.type.dtype
    wide = x if dtype.is_floating else node.cast(x, DType.F64)
    if not dims or any(x.type.shape[dim] == 0 for dim in dims):
        return node.cast(_log_sum(node, node.emit(ops.Exp(wide)), dims, keepdim), dtype)
    peak = node.emit(ops.Amax(wide, dims=dims, keepdim=True))
    finite = node.emit(ops.Where(node.emit(ops.IsInf(peak)), node.scalar(0.0, wide), peak))
    total = _sum(node, node.emit(ops.Exp(node.emit(ops.Sub(wide, finite)))), dims, True)
    result = node.emit(ops.Add(node.emit(ops.Log(total)), finite))
    if not keepdim:
        result = node.reshape(result, tuple(s for d, s in enumerate(result.type.shape) if d not in dims))
    return node.cast(result, dtype)


_KINDS: dict[str, Reduce] = {
    "ReduceSum": _sum, "ReduceMean": _mean, "ReduceProd": _prod, "ReduceMax": _extremum, "ReduceMin": _extremum,
    "ReduceL1": _l1, "ReduceL2": _l2, "ReduceSumSquare": _square, "ReduceLogSum": _log_sum,
    "ReduceLogSumExp": _log_sum_exp,
}  # fmt: skip


@onnx_op(*_KINDS, since=1)
def reduce(node: Node) -> Value:
    x = node.input(0)
    axes = _axes(node, x)
    node.ignore("noop_with_empty_axes")
    dtype = x.type.dtype
    if dtype is DType.U64 and node.op in ("ReduceMax", "ReduceMin", "ReduceMean", "ReduceL2", "ReduceLogSum"):
        node.refuse("unsigned 64-bit integers", "use int64")
    if axes is None:
        # No axes and the no-op flag: the reduction is skipped, what is done to each element is not.
        if node.op in ("ReduceSum", "ReduceMean", "ReduceProd", "ReduceMax", "ReduceMin"):
            return x
        axes = ()
    wide = node.cast(x, DType.I64) if dtype in WIDENED else x
    return node.cast(_KINDS[node.op](node, wide, axes, node.flag("keepdims", True)), dtype)


@onnx_op("CumSum", since=11)
def cumsum(node: Node) -> Value:
    x = node.input(0)
    axis = _scan_axis(node, x)
    return _scan(node, x, axis, lambda v: node.emit(ops.Cumsum(v, dim=axis, dtype=x.type.dtype)), 0)


@onnx_op("CumProd", since=26)
def cumprod(node: Node) -> Value:
    x = node.input(0)
    axis = _scan_axis(node, x)
    call = encode_call((x, axis), [x])
    scan = lambda v: node.cast(node.emit(ops.Opaque((v,), target="aten.cumprod.default", call=call)), x.type.dtype)  # noqa: E731
    return _scan(node, x, axis, scan, 1)


def _scan_axis(node: Node, x: Value) -> int:
    (axis,) = node.ints_input(1, "axis") or (0,)
    return node.axis_in(axis, x.type.rank)


def _scan(node: Node, x: Value, axis: int, scan: Callable[[Value], Value], neutral: int) -> Value:
    """``exclusive`` leaves the element itself out, ``reverse`` runs from the end."""
    if node.flag("reverse"):
        x = node.emit(ops.Flip(x, dims=(axis,)))
    if node.flag("exclusive"):
        size = x.type.shape[axis]
        before = tuple(1 if dim == axis else 0 for dim in range(x.type.rank))
        x = node.emit(ops.Pad(x, before=before, after=(0,) * x.type.rank, value=neutral))
        x = node.emit(ops.Slice(x, dim=axis, start=0, stop=size))
    x = scan(x)
    return node.emit(ops.Flip(x, dims=(axis,))) if node.flag("reverse") else x
