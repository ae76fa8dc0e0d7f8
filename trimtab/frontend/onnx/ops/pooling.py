"""Pooling. What torch's two-dimensional pools express is kept whole; the rest is padded or summed by a convolution."""

from __future__ import annotations

import json

import torch

from trimtab.frontend.onnx.node import Node
from trimtab.frontend.onnx.ops.windows import Window, pad_spatial, read_window
from trimtab.frontend.onnx.registry import onnx_op
from trimtab.ir import ops
from trimtab.ir.core import Value
from trimtab.ir.dims import Dim, product
from trimtab.ir.dtypes import DType

_CONVOLUTIONS = {1: ops.Conv1d, 2: ops.Conv2d, 3: ops.Conv3d}


@onnx_op("MaxPool", since=1)
def max_pool(node: Node) -> Value:
    x = node.input(0)
    if any(node.outputs[1:]):
        node.refuse("the Indices output", "export the model without it", rule="the IR's max pool returns values only")
    window = read_window(node, x, node.ints_attr("kernel_shape"))
    node.ignore("storage_order")
    dtype = x.type.dtype
    if not dtype.is_floating:
        x = node.cast(x, DType.F32 if dtype.bits <= 16 else DType.F64)
    spatial = len(window.kernel)
    ceil = node.flag("ceil_mode")
    plain = window.is_symmetric and all(2 * p <= k for p, k in zip(window.before, window.kernel, strict=True))
    if not plain or (ceil and spatial != 2):
        before, after = _full_padding(node, x, window, ceil)
        x = pad_spatial(node, x, before, after, float("-inf"))
        window = Window(window.kernel, window.stride, window.dilation, (0,) * spatial, (0,) * spatial)
        ceil = False
    if spatial == 2:
        y = _max_pool_2d(node, x, window, ceil)
    elif spatial == 1:
        flat = node.reshape(x, (*x.type.shape[:2], 1, x.type.shape[2]))
        two = Window(*((fill, *part) for fill, part in zip((1, 1, 1, 0, 0), _parts(window), strict=True)))
        y = _max_pool_2d(node, flat, two, ceil)
        y = node.reshape(y, (*y.type.shape[:2], y.type.shape[3]))
    elif spatial == 3:
        call = [{"operand": 0}, *map(list, (window.kernel, window.stride, window.before, window.dilation)), ceil]
        y = node.emit(ops.Opaque((x,), target="aten.max_pool3d.default", call=json.dumps(call)))
    else:
        node.refuse("more than three spatial axes", axes=spatial)
    return node.cast(y, dtype)


def _parts(window: Window) -> tuple[tuple[int, ...], ...]:
    return window.kernel, window.stride, window.dilation, window.before, window.after


def _max_pool_2d(node: Node, x: Value, window: Window, ceil: bool) -> Value:
    return node.emit(
        ops.MaxPool2d(x, kernel=window.kernel, stride=window.stride, padding=window.before, dilation=window.dilation,
                      ceil_mode=ceil)
    )  # fmt: skip


def _full_padding(node: Node, x: Value, window: Window, ceil: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Padding under which rounding down gives the output size that rounding up would give with the stated padding.

    A last window that would start in the padding behind the data is left out, as in torch and ONNX.
    """
    if not ceil:
        return window.before, window.after
    after = []
    for axis, size in enumerate(x.type.shape[2:]):
        stride, extent = window.stride[axis], window.extents[axis]
        low, high = window.before[axis], window.after[axis]
        if not isinstance(size, int):
            node.refuse("ceil_mode along a dynamic axis", "fix its size with from_onnx(..., dims={...})", size=size)
        count = -((size + low + high - extent) // -stride) + 1
        if (count - 1) * stride >= size + low:
            count -= 1
        after.append(max((count - 1) * stride + extent - size - low, high))
    return window.before, tuple(after)


@onnx_op("AveragePool", since=1)
def average_pool(node: Node) -> Value:
    x = node.input(0)
    window = read_window(node, x, node.ints_attr("kernel_shape"))
    include_pad, ceil = node.flag("count_include_pad"), node.flag("ceil_mode")
    ones = (1,) * len(window.kernel)
    plain = window.is_symmetric and all(0 <= 2 * p <= k for p, k in zip(window.before, window.kernel, strict=True))
    if len(window.kernel) == 2 and window.dilation == ones and plain:
        return node.emit(
            ops.AvgPool2d(x, kernel=window.kernel, stride=window.stride, padding=window.before, ceil_mode=ceil,
                          count_include_pad=include_pad)
        )  # fmt: skip
    total, counts = _window_sums(node, x, window, ceil, include_pad)
    return node.emit(ops.Div(total, counts))


@onnx_op("LpPool", since=1)
def lp_pool(node: Node) -> Value:
    x, p = node.input(0), float(node.int_attr("p", 2))
    window = read_window(node, x, node.ints_attr("kernel_shape"))
    powers = node.emit(ops.Pow(node.emit(ops.Abs(x)), node.scalar(p, x)))
    total, _ = _window_sums(node, powers, window, node.flag("ceil_mode"), True)
    return node.emit(ops.Pow(total, node.scalar(1.0 / p, x)))


def _window_sums(node: Node, x: Value, window: Window, ceil: bool, include_pad: bool) -> tuple[Value, Value]:
    """The sum over each window, and the number of elements that count in it."""
    spatial = len(window.kernel)
    make = _CONVOLUTIONS.get(spatial)
    if make is None:
        node.refuse("more than three spatial axes", axes=spatial)
    before, after = _full_padding(node, x, window, ceil)
    sizes: tuple[Dim, ...] = x.type.shape[2:]

    def sums(value: Value) -> Value:
        ones = node.emitter.known(torch.ones((1, 1, *window.kernel), dtype=x.type.dtype.to_torch()))
        return node.emit(make(value, ones, stride=window.stride, padding=(0,) * spatial, dilation=window.dilation))

    counted = node.emit(ops.Full(value=1.0, dtype=x.type.dtype, shape=(1, 1, *sizes)))
    if include_pad:
        counted = pad_spatial(node, counted, window.before, window.after, 1.0)
        counted = pad_spatial(
            node, counted, (0,) * spatial, tuple(a - b for a, b in zip(after, window.after, strict=True)), 0.0
        )
    else:
        counted = pad_spatial(node, counted, before, after, 0.0)
    one_channel = node.reshape(x, (product(x.type.shape[:2]), 1, *sizes))
    total = sums(pad_spatial(node, one_channel, before, after, 0.0))
    return node.reshape(total, (*x.type.shape[:2], *total.type.shape[2:])), sums(counted)


@onnx_op("GlobalAveragePool", since=1)
def global_average_pool(node: Node) -> Value:
    x = node.input(0)
    return node.emit(ops.Mean(x, dims=tuple(range(2, x.type.rank)), keepdim=True))


@onnx_op("GlobalMaxPool", since=1)
def global_max_pool(node: Node) -> Value:
    x = node.input(0)
    return node.emit(ops.Amax(x, dims=tuple(range(2, x.type.rank)), keepdim=True))
