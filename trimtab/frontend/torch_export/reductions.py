"""Converters of reductions, softmax, scans and sorting."""

from __future__ import annotations

import math
from typing import Any

from trimtab.frontend.torch_export.call import Call
from trimtab.frontend.torch_export.registry import Refusal, converts
from trimtab.frontend.torch_export.shapes import reshape_to
from trimtab.ir import ops
from trimtab.ir.core import Value
from trimtab.ir.dims import product
from trimtab.ir.op import Op

_REDUCTIONS: dict[str, type[Op]] = {
    "sum": ops.Sum,
    "mean": ops.Mean,
    "prod": ops.Prod,
    "amax": ops.Amax,
    "amin": ops.Amin,
    "any": ops.Any,
    "all": ops.All,
}


def _register(name: str, cls: type[Op]) -> None:
    @converts(*(f"aten.{name}.{overload}" for overload in ("default", "dim", "dims", "dim_IntList", "dim_int")))
    def convert(call: Call, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
        operand = x if name in ("any", "all") else call.cast(x, call.dtype)
        return call(cls(operand, dims=call.axes(dim, x), keepdim=keepdim))


for _name, _cls in _REDUCTIONS.items():
    _register(_name, _cls)


@converts("aten.max.default", "aten.min.default")
def extreme_of_all(call: Call, x: Value) -> Value:
    cls = ops.Amax if "max" in str(call.node.target) else ops.Amin
    return call(cls(x, dims=call.axes(None, x)))


@converts("aten.max.dim", "aten.min.dim")
def extreme_with_index(call: Call, x: Value, dim: int, keepdim: bool) -> tuple[Value, Value]:
    value, index = (ops.Amax, ops.Argmax) if "max" in str(call.node.target) else (ops.Amin, ops.Argmin)
    axis = call.axis(dim, x)
    return call(value(x, dims=(axis,), keepdim=keepdim)), call(index(x, dim=axis, keepdim=keepdim))


@converts("aten.argmax.default", "aten.argmin.default")
def arg_extreme(call: Call, x: Value, dim: int | None, keepdim: bool) -> Value:
    cls = ops.Argmax if "argmax" in str(call.node.target) else ops.Argmin
    if dim is None:
        flat = reshape_to(call, x, (x.type.elements,))
        return reshape_to(call, call(cls(flat, dim=0)), call.shape)
    return call(cls(x, dim=call.axis(dim, x), keepdim=keepdim))


@converts("aten.softmax.int", "aten._softmax.default", "aten.log_softmax.int", "aten._log_softmax.default")
def softmax(call: Call, x: Value, dim: int, dtype: Any = None, half_to_float: bool = False) -> Value:
    cls = ops.LogSoftmax if "log" in str(call.node.target) else ops.Softmax
    return call(cls(call.cast(x, call.dtype), dim=call.axis(dim, x)))


@converts("aten.cumsum.default")
def cumsum(call: Call, x: Value, dim: int, dtype: Any) -> Value:
    return call(ops.Cumsum(x, dim=call.axis(dim, x), dtype=call.dtype))


@converts("aten.linalg_vector_norm.default")
def vector_norm(call: Call, x: Value, ord: float, dim: Any, keepdim: bool, dtype: Any) -> Value:
    x, dims = call.cast(x, call.dtype), call.axes(dim, x)
    if ord == 2:
        return call(ops.Sqrt(call(ops.Sum(call(ops.Mul(x, x)), dims=dims, keepdim=keepdim))))
    magnitude = call(ops.Abs(x))
    if ord == 1:
        return call(ops.Sum(magnitude, dims=dims, keepdim=keepdim))
    if math.isinf(ord):
        return call((ops.Amax if ord > 0 else ops.Amin)(magnitude, dims=dims, keepdim=keepdim))
    raise Refusal("a vector norm of an order other than 1, 2 or infinity")


@converts("aten.var.correction", "aten.std.correction")
def variance(call: Call, x: Value, dim: Any, correction: Any, keepdim: bool) -> Value:
    result = _variance(call, x, call.axes(dim, x), correction, keepdim)
    return call(ops.Sqrt(result)) if "std" in str(call.node.target) else result


@converts("aten.var_mean.correction")
def variance_and_mean(call: Call, x: Value, dim: Any, correction: Any, keepdim: bool) -> tuple[Value, Value]:
    dims = call.axes(dim, x)
    return _variance(call, x, dims, correction, keepdim), call(ops.Mean(x, dims=dims, keepdim=keepdim))


def _variance(call: Call, x: Value, dims: tuple[int, ...], correction: Any, keepdim: bool) -> Value:
    """The mean square of the deviations from the mean; ``correction`` (None: 1) is subtracted from their number."""
    spread = call(ops.Sub(x, call(ops.Mean(x, dims=dims, keepdim=True))))
    squares = call(ops.Mul(spread, spread))
    if correction == 0:
        return call(ops.Mean(squares, dims=dims, keepdim=keepdim))
    count = product(x.type.shape[axis] for axis in dims)
    divisor = call.operand(count - (1 if correction is None else correction), x.type.dtype)
    return call(ops.Div(call(ops.Sum(squares, dims=dims, keepdim=keepdim)), divisor))


@converts("aten.topk.default")
def topk(call: Call, x: Value, k: Any, dim: int, largest: bool, sorted: bool) -> tuple[Value, ...]:
    if not isinstance(k, int):
        raise Refusal("a topk whose k depends on a size")
    return call.add(ops.Topk(x, dim=call.axis(dim, x), k=k, largest=largest))


@converts("aten.sort.default", "aten.sort.stable")
def sort(call: Call, x: Value, dim: int, descending: bool, stable: bool | None = None) -> tuple[Value, ...]:
    return call.add(ops.Sort(x, dim=call.axis(dim, x), descending=descending))


@converts("aten.argsort.default", "aten.argsort.stable")
def argsort(call: Call, x: Value, dim: int, descending: bool, stable: bool = False) -> Value:
    return call.add(ops.Sort(x, dim=call.axis(dim, x), descending=descending))[1]
