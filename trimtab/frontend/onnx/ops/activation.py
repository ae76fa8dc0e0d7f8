"""Activation functions, softmax and its kin."""

from __future__ import annotations

from trimtab.frontend.onnx.node import Node
from trimtab.frontend.onnx.ops.unsigned import WIDENED
from trimtab.frontend.onnx.registry import onnx_op
from trimtab.ir import ops
from trimtab.ir.core import Value
from trimtab.ir.dims import product
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op

_PLAIN: dict[str, type[Op]] = {
    "Sigmoid": ops.Sigmoid, "HardSwish": ops.HardSwish, "Mish": ops.Mish, "Softplus": ops.Softplus,
}  # fmt: skip


@onnx_op(*_PLAIN, since=1)
def plain(node: Node) -> Value:
    return node.emit(_PLAIN[node.op](node.input(0)))


@onnx_op("Relu", since=6)
def relu(node: Node) -> Value:
    x = node.input(0)
    return x if x.type.dtype in WIDENED else node.emit(ops.Relu(x))


@onnx_op("LeakyRelu", since=6)
def leaky_relu(node: Node) -> Value:
    return node.emit(ops.LeakyRelu(node.input(0), negative_slope=node.float_attr("alpha", 0.01)))


@onnx_op("Elu", since=6)
def elu(node: Node) -> Value:
    return node.emit(ops.Elu(node.input(0), alpha=node.float_attr("alpha", 1.0)))


@onnx_op("Selu", since=6)
def selu(node: Node) -> Value:
    alpha = node.float_attr("alpha", 1.67326319217681884765625)
    return node.emit(ops.Elu(node.input(0), alpha=alpha, scale=node.float_attr("gamma", 1.05070102214813232421875)))


@onnx_op("Celu", since=12)
def celu(node: Node) -> Value:
    alpha = node.float_attr("alpha", 1.0)
    return node.emit(ops.Elu(node.input(0), alpha=alpha, input_scale=1.0 / alpha))


@onnx_op("ThresholdedRelu", since=10)
def thresholded_relu(node: Node) -> Value:
    x = node.input(0)
    above = node.emit(ops.Gt(x, node.scalar(node.float_attr("alpha", 1.0), x)))
    return node.emit(ops.Where(above, x, node.scalar(0.0, x)))


@onnx_op("HardSigmoid", since=6)
def hard_sigmoid(node: Node) -> Value:
    x, alpha, beta = node.input(0), node.float_attr("alpha", 0.2), node.float_attr("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-8 and beta == 0.5:
        return node.emit(ops.HardSigmoid(x))
    line = node.emit(ops.Add(node.emit(ops.Mul(x, node.scalar(alpha, x))), node.scalar(beta, x)))
    return node.emit(ops.Clamp(line, min=0.0, max=1.0))


@onnx_op("Gelu", since=20)
def gelu(node: Node) -> Value:
    approximate = node.string_attr("approximate", "none")
    if approximate not in ("none", "tanh"):
        node.inconsistent("approximate is none or tanh", approximate=approximate)
    return node.emit(ops.Gelu(node.input(0), approximate=approximate))


@onnx_op("Swish", since=24)
def swish(node: Node) -> Value:
    x, alpha = node.input(0), node.float_attr("alpha", 1.0)
    if alpha == 1.0:
        return node.emit(ops.Silu(x))
    gate = node.emit(ops.Sigmoid(node.emit(ops.Mul(x, node.scalar(alpha, x)))))
    return node.emit(ops.Mul(x, gate))


@onnx_op("Softsign", since=1)
def softsign(node: Node) -> Value:
    x = node.input(0)
    return node.emit(ops.Div(x, node.emit(ops.Add(node.emit(ops.Abs(x)), node.scalar(1.0, x)))))


@onnx_op("Softmax", "LogSoftmax", since=13)
def softmax(node: Node) -> Value:
    x = node.input(0)
    make = ops.Softmax if node.op == "Softmax" else ops.LogSoftmax
    return node.emit(make(x, dim=node.axis_in(node.int_attr("axis", -1), x.type.rank)))


@onnx_op("Softmax", "LogSoftmax", since=1)
def softmax_of_matrix(node: Node) -> Value:
    """Up to opset 12 the input is taken for a matrix: axes from ``axis`` on are its columns."""
    x = node.input(0)
    rank, make = x.type.rank, ops.Softmax if node.op == "Softmax" else ops.LogSoftmax
    axis = node.axis_in(node.int_attr("axis", 1), rank)
    if axis == rank - 1:
        return node.emit(make(x, dim=axis))
    shape = x.type.shape
    flat = node.reshape(x, (*shape[:axis], product(shape[axis:])))
    return node.reshape(node.emit(make(flat, dim=axis)), shape)


@onnx_op("Hardmax", since=13)
def hardmax(node: Node) -> Value:
    """One at the first largest element along the axis, zero elsewhere."""
    x = node.input(0)
    axis = node.axis_in(node.int_attr("axis", -1), x.type.rank)
    best = node.emit(ops.Argmax(x, dim=axis, keepdim=True))
    size = x.type.shape[axis]
    shape = tuple(size if dim == axis else 1 for dim in range(x.type.rank))
    places = node.reshape(node.emit(ops.Arange(length=size, dtype=DType.I64)), shape)
    return node.cast(node.emit(ops.Eq(best, places)), x.type.dtype)
