"""Operators that make tensors from nothing but attributes and shapes, and those that pass their input on."""

from __future__ import annotations

import math

import torch

from trimtab.frontend.onnx.element_types import dtype_of, name_of
from trimtab.frontend.onnx.node import Node
from trimtab.frontend.onnx.registry import onnx_op
from trimtab.frontend.onnx.symbolic_folding import SymbolicArray
from trimtab.ir import ops
from trimtab.ir.core import Value
from trimtab.ir.dims import Dim, bounds, dim_max, floordiv
from trimtab.ir.dtypes import DType


@onnx_op("Constant", since=1)
def constant(node: Node) -> Value:
    if node.has("value"):
        return node.emitter.stored(node.tensor_attr("value"))
    if node.has("value_float"):
        return node.emitter.known(torch.tensor(node.float_attr("value_float"), dtype=torch.float32))
    if node.has("value_floats"):
        return node.emitter.known(torch.tensor(node.floats_attr("value_floats"), dtype=torch.float32))
    if node.has("value_int"):
        return node.emitter.known(torch.tensor(node.int_attr("value_int")))
    if node.has("value_ints"):
        return node.emitter.known(torch.tensor(node.ints_attr("value_ints"), dtype=torch.int64))
    node.refuse("constants that are sparse or strings", "store the constant as a dense tensor")


@onnx_op("ConstantOfShape", since=9)
def constant_of_shape(node: Node) -> Value:
    shape = node.dims(0, "the shape")
    value, dtype = 0.0, DType.F32
    if node.has("value"):
        stored = node.tensor_attr("value")
        if stored.elements != 1:
            node.inconsistent("value has one element", value=stored.type)
        value, dtype = stored.tensor().reshape(-1)[0].item(), stored.type.dtype
    if any(bounds(dim)[0] < 0 for dim in shape):
        node.inconsistent("the shape has a negative size", shape=list(map(str, shape)))
    return node.emit(ops.Full(value=value, dtype=dtype, shape=shape))


@onnx_op("Range", since=11)
def arange(node: Node) -> Value:
    dtype = node.input(0).type.dtype
    if dtype.is_floating:
        start, limit, delta = (node.tensor(i, role).item() for i, role in enumerate(("start", "limit", "delta")))
        if not delta or not math.isfinite((limit - start) / delta):
            node.inconsistent("the range is not finite", start=start, limit=limit, delta=delta)
        length: Dim = max(math.ceil((limit - start) / delta), 0)
        return node.emit(ops.Arange(length=length, dtype=dtype, start=start, step=delta))
    (first,), (last,), (step,) = (node.dims(i, role) for i, role in enumerate(("start", "limit", "delta")))
    if not isinstance(step, int) or step == 0:
        node.refuse("a step that is zero or not constant", delta=step)
    span = last - first if step > 0 else first - last
    length = floordiv(span + (abs(step) - 1), abs(step))
    if bounds(length)[0] < 0:
        length = dim_max(length, 0)
    if isinstance(first, int):
        return node.emit(ops.Arange(length=length, dtype=dtype, start=first, step=step))
    counted = node.emit(ops.Arange(length=length, dtype=dtype, step=step))
    return node.emit(ops.Add(counted, node.emitter.dims((first,), dtype, scalar=True)))


@onnx_op("EyeLike", since=9)
def eye_like(node: Node) -> Value:
    x = node.input(0)
    code = node.int_attr("dtype", None)
    dtype = x.type.dtype if code is None else dtype_of(code)
    if dtype is None:
        node.refuse("element type", dtype=name_of(code))
    if x.type.rank != 2:
        node.inconsistent("the input has two axes")
    rows, columns = x.type.shape
    down = node.reshape(node.emit(ops.Arange(length=rows, dtype=DType.I64, start=node.int_attr("k", 0))), (rows, 1))
    across = node.emit(ops.Arange(length=columns, dtype=DType.I64))
    return node.cast(node.emit(ops.Eq(down, across)), dtype)


@onnx_op("OneHot", since=9)
def one_hot(node: Node) -> Value:
    """``values`` is [off, on]; an index outside ``-depth .. depth - 1`` gives a row of off."""
    indices, values = node.input(0), node.input(2)
    depth = _depth(node)
    rank = indices.type.rank
    axis = node.axis_in(node.int_attr("axis", -1), rank + 1)
    wide = node.cast(indices, DType.I64)
    negative = node.emit(ops.Lt(wide, node.scalar(0, DType.I64)))
    size = node.emitter.dims((depth,), DType.I64, scalar=True)
    wide = node.emit(ops.Where(negative, node.emit(ops.Add(wide, size)), wide))
    shape = list(indices.type.shape)
    wide = node.reshape(wide, (*shape[:axis], 1, *shape[axis:]))
    places = node.emit(ops.Arange(length=depth, dtype=DType.I64))
    places = node.reshape(places, tuple(depth if dim == axis else 1 for dim in range(rank + 1)))
    hit = node.emit(ops.Eq(wide, places))
    off, on = (node.emit(ops.Select(values, dim=0, index=index)) for index in (0, 1))
    return node.emit(ops.Where(hit, on, off))


def _depth(node: Node) -> Dim:
    found = node.content(1)
    if isinstance(found, SymbolicArray):
        return node.dims(1, "depth")[0]
    return int(node.tensor(1, "depth").reshape(-1)[0].item())  # it may be stored as a float


@onnx_op("Identity", since=1)
def identity(node: Node) -> Value:
    return node.input(0)


@onnx_op("Dropout", since=7)
def dropout(node: Node) -> tuple[Value, ...]:
    """Dropout does nothing in inference; its mask is all true."""
    x = node.input(0)
    node.ignore("ratio", "seed")
    if node.optional(2) is not None and bool(node.tensor(2, "training_mode").item()):
        ratio = node.tensor(1, "ratio").item() if node.optional(1) is not None else 0.5
        if ratio:
            node.refuse("training mode", "export the model in evaluation mode", ratio=ratio)
    mask = (
        (node.emit(ops.Full(value=True, dtype=DType.BOOL, shape=x.type.shape)),) if node.outputs[1:2] == (True,) else ()
    )
    return (x, *mask)
