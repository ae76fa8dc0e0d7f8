"""Pooling: reductions over windows, and averages over windows of unequal size as products with weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch_mlir import ir

from trimtab.backends.mlir.rules.contraction import contract
from trimtab.backends.mlir.rules.convolution import channels_second, result_type
from trimtab.backends.mlir.rules.registry import lowers
from trimtab.backends.mlir.scalar import Scalar, cast, constant, maximum, minimum, select, work_type
from trimtab.backends.mlir.tensors import Code, Tensor
from trimtab.ir import ops
from trimtab.ir.dims import Dim, dim_max
from trimtab.ir.types import TensorType


def _windows(
    op: Any, code: Code, x: Tensor, outside: float, dilation: Sequence[int], body: Callable[[Scalar, Scalar], Scalar]
) -> Tensor:
    """``body(element, so far)`` over the windows of x, whose border is filled with ``outside``."""
    type = result_type(op).with_dtype(work_type(x.dtype))
    places = type.shape[2:]
    needed = [
        (count - 1) * stride + (size - 1) * step + 1
        for count, stride, size, step in zip(places, op.stride, op.kernel, dilation, strict=True)
    ]
    after = [dim_max(0, need - size - low) for need, size, low in zip(needed, x.shape[2:], op.padding, strict=True)]
    if any(op.padding) or any(after):
        x = code.pad(x, (0, 0, *op.padding), (0, 0, *after), outside)
    output = Tensor(code.filled(type, outside), type)
    window = TensorType(x.dtype, tuple(op.kernel))
    b, c, i, j, u, v = (ir.AffineExpr.get_dim(axis) for axis in range(6))
    rows = i * op.stride[0] + u * dilation[0]
    columns = j * op.stride[1] + v * dilation[1]
    maps = [ir.AffineMap.get(6, 0, places) for places in ([b, c, rows, columns], [u, v], [b, c, i, j])]
    return code.generic(
        [(x, maps[0]), (Tensor(code.empty(window), window), maps[1])],
        [(output, maps[2])],
        [False] * 4 + [True] * 2,
        lambda e, _, so_far: body(cast(e, type.dtype), so_far),
    )[0]


@lowers(ops.MaxPool2d)
def _max_pool(op: Any, code: Code, x: Tensor) -> Tensor:
    with_channels_second, restored = channels_second(op, code)
    made = _windows(op, code, with_channels_second(x), -math.inf, op.dilation, maximum)
    return restored(code.elementwise(result_type(op), [made], lambda e: e))


@lowers(ops.AvgPool2d)
def _avg_pool(op: Any, code: Code, x: Tensor) -> Tensor:
    with_channels_second, restored = channels_second(op, code)
    x = with_channels_second(x)
    total = _windows(op, code, x, 0, (1, 1), lambda e, so_far: so_far + e)
    sizes = [Scalar(code.size(size), None) for size in x.shape[2:]]

    def mean(e: Scalar) -> Scalar:
        count = constant(1, None)
        for axis, size in enumerate(sizes):
            pad = op.padding[axis]
            start = code.place(2 + axis, 4) * op.stride[axis] - pad
            end = minimum(start + op.kernel[axis], size + pad)
            if not op.count_include_pad:
                start, end = maximum(start, 0), minimum(end, size)
            count = count * (end - start)
        return e / cast(count, e.dtype)

    return restored(code.elementwise(result_type(op), [total], mean))


@lowers(ops.AdaptiveAvgPool2d)
def _adaptive_avg_pool(op: Any, code: Code, x: Tensor) -> Tensor:
    with_channels_second, restored = channels_second(op, code)
    x = with_channels_second(x)

    def shares(count: int, size: Dim) -> Tensor:
        extent = Scalar(code.size(size), None)
        work = work_type(x.dtype)

        def element(at: Sequence[Scalar]) -> Scalar:
            start, end = at[0] * extent / count, ((at[0] + 1) * extent + (count - 1)) / count
            inside = (at[1] >= start) & (at[1] < end)
            return select(inside, 1 / cast(end - start, work), constant(0, work))

        return code.compute(TensorType(work, (count, size)), element)

    weights = [shares(n, size) for n, size in zip(op.size, x.shape[2:], strict=True)]
    return restored(separable(code, result_type(op), x, weights))


def separable(code: Code, type: TensorType, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """x ``[B, C, H, W]`` resampled by a matrix an axis, ``[H', H]`` and ``[W', W]``."""
    work = work_type(type.dtype)
    rows = TensorType(work, (*x.shape[:2], type.shape[2], x.shape[3]))
    made = contract(code, rows, [(x, "bchw"), (weights[0], "ih")], "bciw")
    return contract(code, type, [(made, "bciw"), (weights[1], "jw")], "bcij")
