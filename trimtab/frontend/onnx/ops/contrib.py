"""Operators of ONNX Runtime (domain com.microsoft) that its graph optimizer leaves in transformer models."""

from __future__ import annotations

from trimtab.frontend.onnx.node import Node
from trimtab.frontend.onnx.registry import CONTRIB, onnx_op
from trimtab.ir import ops
from trimtab.ir.core import Value
from trimtab.ir.dtypes import DType


@onnx_op("Gelu", since=1, domain=CONTRIB)
def gelu(node: Node) -> Value:
    return node.emit(ops.Gelu(node.input(0)))


@onnx_op("BiasGelu", since=1, domain=CONTRIB)
def bias_gelu(node: Node) -> Value:
    return node.emit(ops.Gelu(node.emit(ops.Add(node.input(0), node.input(1)))))


@onnx_op("FastGelu", since=1, domain=CONTRIB)
def fast_gelu(node: Node) -> Value:
    x, bias = node.input(0), node.optional(1)
    return node.emit(ops.Gelu(x if bias is None else node.emit(ops.Add(x, bias)), approximate="tanh"))


@onnx_op("QuickGelu", since=1, domain=CONTRIB)
def quick_gelu(node: Node) -> Value:
    x = node.input(0)
    scaled = node.emit(ops.Mul(x, node.scalar(node.float_attr("alpha", 1.702), x)))
    return node.emit(ops.Mul(x, node.emit(ops.Sigmoid(scaled))))


@onnx_op("FusedMatMul", since=1, domain=CONTRIB)
def fused_matmul(node: Node) -> Value:
    if node.flag("transBatchA") or node.flag("transBatchB"):
        node.refuse("transposed batches", "disable ONNX Runtime's fusion of matrix products")
    x, y = node.input(0), node.input(1)
    x, y = (_swapped(node, v) if node.flag(flag) else v for v, flag in ((x, "transA"), (y, "transB")))
    alpha = node.float_attr("alpha", 1.0)
    product = node.emit(ops.Matmul(x, y))
    return product if alpha == 1.0 else node.emit(ops.Mul(product, node.scalar(alpha, product)))


def _swapped(node: Node, x: Value) -> Value:
    rank = x.type.rank
    return x if rank < 2 else node.emit(ops.Permute(x, dims=(*range(rank - 2), rank - 1, rank - 2)))


@onnx_op("SkipLayerNormalization", since=1, domain=CONTRIB)
def skip_layer_normalization(node: Node) -> tuple[Value | None, ...]:
    """Layer norm of ``input + skip (+ bias)``; the fourth output is that sum."""
    if any(node.outputs[1:3]):
        node.refuse("the mean and variance outputs", "disable ONNX Runtime's training fusions")
    total = _residual(node, node.optional(4))
    y = node.emit(ops.LayerNorm(total, node.input(2), node.optional(3), eps=node.float_attr("epsilon", 1e-12)))
    return (y, None, None, total)[: len(node.outputs)]


@onnx_op("SkipSimplifiedLayerNormalization", since=1, domain=CONTRIB)
def skip_rms_normalization(node: Node) -> tuple[Value | None, ...]:
    if any(node.outputs[1:3]):
        node.refuse("the mean and variance outputs", "disable ONNX Runtime's training fusions")
    total = _residual(node, node.optional(3))
    y = node.emit(ops.RmsNorm(total, node.input(2), eps=node.float_attr("epsilon", 1e-12)))
    return (y, None, None, total)[: len(node.outputs)]


@onnx_op("SimplifiedLayerNormalization", since=1, domain=CONTRIB)
def rms_normalization(node: Node) -> Value:
    x = node.input(0)
    axis = node.axis_in(node.int_attr("axis", -1), x.type.rank)
    return node.emit(ops.RmsNorm(x, node.input(1), axes=x.type.rank - axis, eps=node.float_attr("epsilon", 1e-5)))


def _residual(node: Node, bias: Value | None) -> Value:
    total = node.emit(ops.Add(node.input(0), node.input(1)))
    return total if bias is None else node.emit(ops.Add(total, bias))


@onnx_op("EmbedLayerNormalization", since=1, domain=CONTRIB)
def embed_layer_normalization(node: Node) -> tuple[Value | None, ...]:
    """Layer norm of the sum of word, position and segment embeddings."""
    if any(node.outputs[1:2]):
        node.refuse("the mask index output", "disable ONNX Runtime's attention fusion")
    tokens, segments = node.input(0), node.optional(1)
    words, positions, segment_table = node.input(2), node.input(3), node.optional(4)
    places = node.optional(8)
    if places is None:
        places = node.emit(ops.Arange(length=tokens.type.shape[1], dtype=DType.I64))
    total = node.emit(ops.Add(node.emit(ops.Embedding(words, tokens)), node.emit(ops.Embedding(positions, places))))
    if segments is not None and segment_table is not None:
        total = node.emit(ops.Add(total, node.emit(ops.Embedding(segment_table, segments))))
    y = node.emit(ops.LayerNorm(total, node.input(5), node.input(6), eps=node.float_attr("epsilon", 1e-12)))
    return (y, None, total)[: len(node.outputs)]
