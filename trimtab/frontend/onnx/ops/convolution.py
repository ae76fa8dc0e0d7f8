"""Convolutions, plain and transposed."""

from __future__ import annotations

import json

from trimtab.frontend.onnx.node import Node
from trimtab.frontend.onnx.ops.windows import Window, pad_spatial, read_window
from trimtab.frontend.onnx.registry import onnx_op
from trimtab.ir import ops
from trimtab.ir.core import Value

_CONVOLUTIONS = {1: ops.Conv1d, 2: ops.Conv2d, 3: ops.Conv3d}


@onnx_op("Conv", since=1)
def conv(node: Node) -> Value:
    return convolve(node, node.input(0), node.input(1), node.optional(2))


def convolve(node: Node, x: Value, weight: Value, bias: Value | None) -> Value:
    """The convolution a node describes, of given operands; uneven padding becomes a pad of its own."""
    window = read_window(node, x, kernel_sizes(node, x, weight))
    make = _CONVOLUTIONS.get(len(window.kernel))
    if make is None:
        node.refuse("more than three spatial axes", axes=len(window.kernel))
    padding = window.before
    if not window.is_symmetric or min(padding) < 0:
        x, padding = pad_spatial(node, x, window.before, window.after), (0,) * len(padding)
    return node.emit(
        make(x, weight, bias, stride=window.stride, padding=padding, dilation=window.dilation,
             groups=node.int_attr("group", 1))
    )  # fmt: skip


def kernel_sizes(node: Node, x: Value, weight: Value) -> tuple[int, ...]:
    """The kernel that a weight ``[O, C, spatial...]`` has, checked against what the node says."""
    if x.type.rank != weight.type.rank or x.type.rank < 3:
        node.inconsistent("input and weight have one rank, 3 or more")
    kernel = tuple(size for size in weight.type.shape[2:] if isinstance(size, int))
    stated = node.ints_attr("kernel_shape", kernel)
    if stated != kernel:
        node.inconsistent("kernel_shape contradicts the weight", kernel_shape=stated)
    return kernel


@onnx_op("ConvTranspose", since=1)
def conv_transpose(node: Node) -> Value:
    """Computed without padding, then cut (or extended by zeros) at the borders to what padding would leave."""
    x, weight, bias = node.input(0), node.input(1), node.optional(2)
    window = read_window(node, x, kernel_sizes(node, x, weight))
    spatial = len(window.kernel)
    node.ignore("output_shape", "output_padding")
    extra = node.ints_attr("output_padding", (0,) * spatial)
    before, after = window.before, window.after
    wanted = node.ints_attr("output_shape", None)
    mode = node.string_attr("auto_pad", "NOTSET")
    if wanted is not None or mode.startswith("SAME"):
        before, after = _borders(node, x, window, extra, None if wanted is None else wanted[-spatial:], mode)
    groups = node.int_attr("group", 1)
    even = before == after and min(before) >= 0
    padding = before if even else (0,) * spatial
    # torch adds output_padding only below the stride; elsewhere, and with uneven borders, zeros of our own follow.
    inside = even and all(e < max(s, d) for e, s, d in zip(extra, window.stride, window.dilation, strict=True))
    late = (0,) * spatial if inside else extra
    y = _transposed(
        node, x, weight, None if any(late) else bias, window, padding, extra if inside else (0,) * spatial, groups
    )
    cut_low = (0,) * spatial if even else tuple(-n for n in before)
    cut_high = tuple(e if even else e - n for n, e in zip(after, late, strict=True))
    y = pad_spatial(node, y, cut_low, cut_high)
    if any(late) and bias is not None:
        y = node.emit(ops.Add(y, node.reshape(bias, (*bias.type.shape, *[1] * spatial))))
    return y


def _borders(
    node: Node, x: Value, window: Window, extra: tuple[int, ...], wanted: tuple[int, ...] | None, mode: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Padding for which the output has a given shape, or ``size * stride`` elements."""
    before, after = [], []
    for axis, size in enumerate(x.type.shape[2:]):
        stride, extent = window.stride[axis], window.extents[axis]
        if wanted is None:
            total = extent + extra[axis] - stride
        elif isinstance(size, int):
            total = stride * (size - 1) + extra[axis] + extent - wanted[axis]
        else:
            node.refuse("output_shape along a dynamic axis", "fix its size with from_onnx(..., dims={...})")
        half = total // 2
        low, high = (half, total - half) if mode == "SAME_UPPER" else (total - half, half)
        before.append(low)
        after.append(high)
    return tuple(before), tuple(after)


def _transposed(
    node: Node, x: Value, weight: Value, bias: Value | None, window: Window, padding: tuple[int, ...],
    extra: tuple[int, ...], groups: int,
) -> Value:  # fmt: skip
    spatial = len(window.kernel)
    if spatial <= 2:
        make = ops.ConvTranspose1d if spatial == 1 else ops.ConvTranspose2d
        return node.emit(
            make(x, weight, bias, stride=window.stride, padding=padding, output_padding=extra,
                 dilation=window.dilation, groups=groups)
        )  # fmt: skip
    if spatial > 3:
        node.refuse("more than three spatial axes", axes=spatial)
    tensors = [x, weight] if bias is None else [x, weight, bias]
    call = [{"operand": 0}, {"operand": 1}, None if bias is None else {"operand": 2}, list(window.stride),
            list(padding), list(extra), groups, list(window.dilation)]  # fmt: skip
    return node.emit(ops.Opaque(tensors, target="aten.conv_transpose3d.input", call=json.dumps(call)))


@onnx_op("Col2Im", since=18)
def col2im(node: Node) -> Value:
    """Two spatial axes with even padding: torch's fold."""
    x = node.input(0)
    size, block = node.ints_input(1, "image_shape") or (), node.ints_input(2, "block_shape") or ()
    ones = (1,) * len(size)
    dilation, stride = node.ints_attr("dilations", ones), node.ints_attr("strides", ones)
    pads = node.ints_attr("pads", (0,) * 2 * len(size))
    if len(size) != 2 or pads[:2] != pads[2:]:
        node.refuse("other than two spatial axes with even padding", image_shape=size, pads=pads)
    call = [{"operand": 0}, *map(list, (size, block, dilation, pads[:2], stride))]
    return node.emit(ops.Opaque((x,), target="aten.col2im.default", call=json.dumps(call)))
