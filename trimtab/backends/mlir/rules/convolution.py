"""Convolutions as sums of products whose maps step over the input; the compiler tiles them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch_mlir import ir

from trimtab.backends.mlir.rules.registry import lowers
from trimtab.backends.mlir.scalar import Scalar, cast, constant, maximum, minimum, select, work_type
from trimtab.backends.mlir.tensors import Code, Tensor
from trimtab.ir import ops
from trimtab.ir.dtypes import DType
from trimtab.ir.types import TensorType


@lowers(ops.Conv1d, ops.Conv2d, ops.Conv3d)
def _convolution(op: Any, code: Code, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return window_products(op, code, x, weight, bias)


def window_products(op: Any, code: Code, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The sums of a convolution, whose attributes are those of ``op``, in the working type of its result."""
    with_channels_second, restored = channels_second(op, code)
    x = with_channels_second(x)
    if any(op.padding):
        x = code.pad(x, (0, 0, *op.padding), (0, 0, *op.padding), getattr(op, "border", 0))
    grouped = code.reshape(weight, (op.groups, weight.shape[0] // op.groups, *weight.shape[1:]))
    return restored(_grouped(code, result_type(op), x, grouped, bias, op.stride, op.dilation))


def channels_second(op: Any, code: Code) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """What brings an op's image to ``[B, C, H, W]``, and its result back, where the op has channels last."""
    if not getattr(op, "channels_last", False):
        return (lambda t: t), (lambda t: t)
    return (lambda t: code.permute(t, (0, 3, 1, 2))), (lambda t: code.permute(t, (0, 2, 3, 1)))


def result_type(op: Any) -> TensorType:
    """The type of an op's result with channels second."""
    type: TensorType = op.result.type
    if not getattr(op, "channels_last", False):
        return type
    batch, *places, channels = type.shape
    return type.with_shape(batch, channels, *places)


def _grouped(
    code: Code, type: TensorType, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    """The convolution of a padded x ``[B, C, ...]`` with weight ``[groups, channels out, channels in, taps...]``."""
    work = work_type(type.dtype)
    spatial = weight.rank - 3
    groups, outs, ins = weight.shape[:3]
    x = code.reshape(x, (x.shape[0], groups, ins, *x.shape[2:]))
    full = TensorType(work, (type.shape[0], groups, outs, *type.shape[2:]))
    # Loops: batch, group, channel out, places; then channel in and taps.
    loops = 3 + spatial + 1 + spatial
    loop = [ir.AffineExpr.get_dim(i) for i in range(loops)]
    places, inner, taps = loop[3 : 3 + spatial], loop[3 + spatial], loop[4 + spatial :]
    read = [p * s + t * d for p, s, t, d in zip(places, stride, taps, dilation, strict=True)]
    maps = [
        ir.AffineMap.get(loops, 0, exprs)
        for exprs in ([loop[0], loop[1], inner, *read], [loop[1], loop[2], inner, *taps], [*loop[:3], *places])
    ]

    def body(e: Scalar, w: Scalar, so_far: Scalar) -> Scalar:
        return so_far + cast(e, work) * cast(w, work)

    reduced = [False] * (3 + spatial) + [True] * (1 + spatial)
    output = Tensor(code.filled(full, 0), full)
    made = code.generic([(x, maps[0]), (weight, maps[1])], [(output, maps[2])], reduced, body)[0]
    operands = [code.reshape(made, type.shape)]
    if bias is not None:
        operands.append(code.reshape(bias, (bias.shape[0], *[1] * spatial)))
    return code.elementwise(type, operands, lambda e, *b: e + b[0] if b else e)


@lowers(ops.ConvTranspose1d, ops.ConvTranspose2d)
def _transposed(op: Any, code: Code, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution over the input with ``stride - 1`` zeros between elements, with the weight turned around."""
    spatial = weight.rank - 2
    taps = [int(size) for size in weight.shape[2:]]  # type: ignore[arg-type]
    low = [(k - 1) * d - p for k, d, p in zip(taps, op.dilation, op.padding, strict=True)]
    shape = [count + (k - 1) * d for count, k, d in zip(op.result.type.shape[2:], taps, op.dilation, strict=True)]
    sizes = [Scalar(code.size(size), None) for size in x.shape[2:]]

    def spread(at: Sequence[Scalar]) -> Scalar:
        inside, places = constant(True, DType.BOOL), []
        for i, before, stride, size in zip(at[2:], low, op.stride, sizes, strict=True):
            shifted = i - before
            source = shifted // stride
            inside = inside & (shifted >= 0) & (source < size) & (shifted % stride).equals(0)
            places.append(minimum(maximum(source, 0), size - 1))
        return select(inside, code.load(x, [*at[:2], *places]), constant(0, x.dtype))

    per_group = weight.shape[0] // op.groups
    by_group = code.reshape(weight, (op.groups, per_group, *weight.shape[1:]))

    def turned(at: Sequence[Scalar]) -> Scalar:
        group, out, inner, *places = at
        backwards = [size - 1 - i for i, size in zip(places, taps, strict=True)]
        return code.load(by_group, [group, inner, out, *backwards])

    wide = code.compute(x.type.with_shape(*x.shape[:2], *shape), spread)
    kernel = code.compute(by_group.type.with_shape(op.groups, weight.shape[1], per_group, *taps), turned)
    return _grouped(code, op.result.type, wide, kernel, bias, [1] * spatial, op.dilation)
