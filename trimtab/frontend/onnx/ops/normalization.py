"""Normalisations."""

from __future__ import annotations

from trimtab.frontend.onnx.node import Node
from trimtab.frontend.onnx.registry import onnx_op
from trimtab.ir import ops
from trimtab.ir.core import Value
from trimtab.ir.dims import Dim
from trimtab.ir.dtypes import DType


@onnx_op("LayerNormalization", since=17)
def layer_normalization(node: Node) -> tuple[Value, ...]:
    x = node.input(0)
    axis = node.axis_in(node.int_attr("axis", -1), x.type.rank)
    eps = node.float_attr("epsilon", 1e-5)
    node.ignore("stash_type")
    tail = x.type.shape[axis:]
    weight, bias = (_of_shape(node, node.optional(i), tail) for i in (1, 2))
    y = node.emit(ops.LayerNorm(x, weight, bias, axes=len(tail), eps=eps))
    if not any(node.outputs[1:]):
        return (y,)
    wide = node.cast(x, DType.F32) if node.int_attr("stash_type", 1) == 1 else x
    dims = tuple(range(axis, x.type.rank))
    mean = node.emit(ops.Mean(wide, dims=dims, keepdim=True))
    centred = node.emit(ops.Sub(wide, mean))
    variance = node.emit(ops.Mean(node.emit(ops.Mul(centred, centred)), dims=dims, keepdim=True))
    inverse = node.emit(ops.Rsqrt(node.emit(ops.Add(variance, node.scalar(eps, variance)))))
    return (y, mean, inverse)


@onnx_op("RMSNormalization", since=23)
def rms_normalization(node: Node) -> Value:
    x = node.input(0)
    axis = node.axis_in(node.int_attr("axis", -1), x.type.rank)
    tail = x.type.shape[axis:]
    node.ignore("stash_type")
    weight = _of_shape(node, node.input(1), tail)
    return node.emit(ops.RmsNorm(x, weight, axes=len(tail), eps=node.float_attr("epsilon", 1e-5)))


def _of_shape(node: Node, weight: Value | None, shape: tuple[Dim, ...]) -> Value | None:
    """``weight`` with exactly ``shape``, to which it broadcasts."""
    if weight is None or weight.type.shape == shape:
        return weight
    if weight.type.rank > len(shape):
        extra = weight.type.rank - len(shape)
        if any(size != 1 for size in weight.type.shape[:extra]):
            node.use_definition("a scale that varies along other axes than the normalised ones")
        weight = node.reshape(weight, weight.type.shape[extra:])
    return node.emit(ops.Expand(weight, shape=shape))


@onnx_op("BatchNormalization", since=9)
def batch_normalization(node: Node) -> Value:
    if node.flag("training_mode") or any(node.outputs[1:]):
        node.refuse("training mode", "export the model in evaluation mode")
    x = node.input(0)
    node.ignore("momentum")
    weight, bias, mean, variance = (_as(node, node.input(i), x) for i in (1, 2, 3, 4))
    return node.emit(ops.BatchNorm(x, mean, variance, weight, bias, eps=node.float_attr("epsilon", 1e-5)))


def _as(node: Node, value: Value, like: Value) -> Value:
    return node.cast(value, like.type.dtype)


@onnx_op("InstanceNormalization", since=6)
def instance_normalization(node: Node) -> Value:
    x = node.input(0)
    channels = x.type.shape[1] if x.type.rank > 1 else None
    if not isinstance(channels, int):
        node.refuse("a dynamic number of channels", "fix it with from_onnx(..., dims={...})")
    eps = node.float_attr("epsilon", 1e-5)
    return node.emit(ops.GroupNorm(x, node.input(1), node.input(2), groups=channels, eps=eps))


@onnx_op("GroupNormalization", since=21)
def group_normalization(node: Node) -> Value:
    x = node.input(0)
    eps = node.float_attr("epsilon", 1e-5)
    node.ignore("stash_type")
    return node.emit(ops.GroupNorm(x, node.input(1), node.input(2), groups=node.int_attr("num_groups"), eps=eps))


@onnx_op("LpNormalization", since=1)
def lp_normalization(node: Node) -> Value:
    """``x / norm``, zero where the norm is zero."""
    x, p = node.input(0), node.int_attr("p", 2)
    dim = (node.axis_in(node.int_attr("axis", -1), x.type.rank),)
    if p == 1:
        norm = node.emit(ops.Sum(node.emit(ops.Abs(x)), dims=dim, keepdim=True))
    elif p == 2:
        norm = node.emit(ops.Sqrt(node.emit(ops.Sum(node.emit(ops.Mul(x, x)), dims=dim, keepdim=True))))
    else:
        node.inconsistent("p is 1 or 2", p=p)
    zero = node.emit(ops.Eq(norm, node.scalar(0.0, x)))
    safe = node.emit(ops.Where(zero, node.scalar(1.0, x), norm))
    return node.emit(ops.Div(x, safe))


@onnx_op("LRN", since=1)
def local_response_normalization(node: Node) -> Value:
    """``x / (bias + alpha / size * sum of squares over neighbouring channels)^beta``."""
    x, size = node.input(0), node.int_attr("size")
    alpha, beta, bias = node.float_attr("alpha", 1e-4), node.float_attr("beta", 0.75), node.float_attr("bias", 1.0)
    if not 1 <= size <= 1024 or x.type.rank < 2:
        node.inconsistent("size is a small positive number of channels", size=size)
    channels = x.type.shape[1]
    before, after = [0] * x.type.rank, [0] * x.type.rank
    before[1], after[1] = (size - 1) // 2, size // 2
    squares = node.emit(ops.Mul(x, x))
    padded = node.emit(ops.Pad(squares, before=tuple(before), after=tuple(after), value=0.0))
    total = node.emit(ops.Slice(padded, dim=1, start=0, stop=channels))
    for shift in range(1, size):
        total = node.emit(ops.Add(total, node.emit(ops.Slice(padded, dim=1, start=shift, stop=channels + shift))))
    inner = node.emit(ops.Add(node.emit(ops.Mul(total, node.scalar(alpha / size, x))), node.scalar(bias, x)))
    return node.emit(ops.Div(x, node.emit(ops.Pow(inner, node.scalar(beta, x)))))
