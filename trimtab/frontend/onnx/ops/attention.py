"""Attention and rotary embedding as single operators."""

from __future__ import annotations

import math

from trimtab.frontend.onnx.node import Node
from trimtab.frontend.onnx.registry import onnx_op
from trimtab.ir import ops
from trimtab.ir.core import Value
from trimtab.ir.dims import floordiv


@onnx_op("Attention", since=23)
def attention(node: Node) -> tuple[Value | None, ...]:
    """Softmax attention with optional mask and cache; forms with a soft cap or inner results keep their definition."""
    if node.float_attr("softcap", 0.0) or any(node.outputs[3:4]) or node.optional(6) is not None:
        node.use_definition("soft cap, padded cache or inner results")
    q, k, v = node.input(0), node.input(1), node.input(2)
    mask, past_k, past_v = node.optional(3), node.optional(4), node.optional(5)
    causal = node.flag("is_causal")
    # Softmax inside the whole op is at least as precise as any that may be asked for.
    node.ignore("softmax_precision", "qk_matmul_output_mode")
    if not flat_heads(node):
        node.ignore("q_num_heads", "kv_num_heads")
    if causal and past_k is not None:
        node.use_definition("a causal mask with a cache")
    flat = flat_heads(node)
    if flat:
        heads, groups = node.int_attr("q_num_heads"), node.int_attr("kv_num_heads")
        q, k, v = split_heads(node, q, heads), split_heads(node, k, groups), split_heads(node, v, groups)
    width = q.type.shape[3]
    given = node.float_attr("scale", None)
    if not isinstance(width, int):
        node.refuse("a head size that is not fixed", "fix it with from_onnx(..., dims={...})")
    scale = given if given is not None else 1.0 / math.sqrt(width)
    if past_k is not None and past_v is not None:
        k, v = node.emit(ops.Concat((past_k, k), dim=2)), node.emit(ops.Concat((past_v, v), dim=2))
    if mask is not None and mask.type.shape[-1] not in (k.type.shape[2], 1):
        node.use_definition("a mask shorter than the keys")
    if mask is not None and mask.type.dtype != q.type.dtype and mask.type.dtype.is_floating:
        mask = node.cast(mask, q.type.dtype)
    y = node.emit(ops.Attention(q, k, v, mask, scale=scale, causal=causal))
    if flat:
        y = join_heads(node, y)
    return (y, k, v)[: max(len(node.outputs), 1)]


def flat_heads(node: Node) -> bool:
    """Whether the heads are folded into the last axis."""
    return node.input(0).type.rank == 3


def split_heads(node: Node, x: Value, heads: int) -> Value:
    """``[B, N, H * D]`` to ``[B, H, N, D]``."""
    batch, length, width = x.type.shape
    x = node.reshape(x, (batch, length, heads, floordiv(width, heads)))
    return node.emit(ops.Permute(x, dims=(0, 2, 1, 3)))


def join_heads(node: Node, x: Value) -> Value:
    """``[B, H, N, D]`` to ``[B, N, H * D]``."""
    batch, heads, length, width = x.type.shape
    return node.reshape(node.emit(ops.Permute(x, dims=(0, 2, 1, 3))), (batch, length, heads * width))
