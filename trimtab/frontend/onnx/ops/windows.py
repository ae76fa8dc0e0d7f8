"""Windows that slide over spatial axes: the kernel, strides, dilations and padding of convolutions and poolings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.frontend.onnx.node import Node
from trimtab.ir import ops
from trimtab.ir.core import Value
from trimtab.ir.dims import Dim


@dataclass(frozen=True)
class Window:
    """A sliding window over ``len(kernel)`` spatial axes; ``before`` and ``after`` are the elements padded."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def is_symmetric(self) -> bool:
        return self.before == self.after

    @property
    def extents(self) -> tuple[int, ...]:
        """Elements from the first to the last tap, per axis."""
        return tuple(d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True))


def read_window(node: Node, x: Value, kernel: Sequence[int]) -> Window:
    """The window a node describes over the spatial axes of x ``[B, C, spatial...]``."""
    spatial = x.type.rank - 2
    kernel = tuple(kernel)
    ones = (1,) * spatial
    stride = node.ints_attr("strides", ones)
    dilation = node.ints_attr("dilations", ones)
    pads = node.ints_attr("pads", (0,) * 2 * spatial)
    if spatial < 1 or not len(kernel) == len(stride) == len(dilation) == spatial or len(pads) != 2 * spatial:
        node.inconsistent("kernel, strides, dilations and pads fit the spatial axes", spatial=spatial, kernel=kernel)
    if min(*kernel, *stride, *dilation) < 1:
        node.inconsistent(
            "kernel, strides and dilations are positive", kernel=kernel, strides=stride, dilations=dilation
        )
    if max(*kernel, *stride, *dilation, *map(abs, pads)) > 1 << 20:
        node.inconsistent("absurdly large numbers", kernel=kernel, strides=stride, dilations=dilation, pads=pads)
    if math.prod(kernel) > 1 << 20:
        node.inconsistent("an absurdly large kernel", kernel=kernel)
    before, after = tuple(pads[:spatial]), tuple(pads[spatial:])
    node.ignore("kernel_shape", "pads")
    mode = node.string_attr("auto_pad", "NOTSET")
    if mode == "VALID":
        before = after = (0,) * spatial
    elif mode in ("SAME_UPPER", "SAME_LOWER"):
        extents = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))
        pairs = [_same(node, size, e, s, mode) for size, e, s in zip(x.type.shape[2:], extents, stride, strict=True)]
        before, after = tuple(low for low, _ in pairs), tuple(high for _, high in pairs)
    elif mode != "NOTSET":
        node.inconsistent("unknown auto_pad", auto_pad=mode)
    return Window(kernel, stride, dilation, before, after)


def _same(node: Node, size: Dim, extent: int, stride: int, mode: str) -> tuple[int, int]:
    """Padding for which the output has ``ceil(size / stride)`` elements."""
    if stride == 1:
        total = extent - 1
    elif isinstance(size, int):
        total = max((-(-size // stride) - 1) * stride + extent - size, 0)
    else:
        node.refuse("auto_pad along a dynamic axis", "fix its size with from_onnx(..., dims={...})", size=size)
    low = total // 2 if mode == "SAME_UPPER" else total - total // 2
    return low, total - low


def pad_spatial(node: Node, x: Value, before: Sequence[int], after: Sequence[int], value: float | int = 0) -> Value:
    """x ``[B, C, spatial...]`` with elements added (or, where negative, cut off) around its spatial axes."""
    for axis, (low, high) in enumerate(zip(before, after, strict=True), 2):
        if low < 0 or high < 0:
            x = node.emit(ops.Slice(x, dim=axis, start=max(-low, 0), stop=x.type.shape[axis] - max(-high, 0)))
    low_all, high_all = (0, 0, *(max(n, 0) for n in before)), (0, 0, *(max(n, 0) for n in after))
    if not any(low_all) and not any(high_all):
        return x
    return node.emit(ops.Pad(x, before=low_all, after=high_all, value=value))
