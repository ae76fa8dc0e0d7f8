"""Attention and rotary embedding."""

from __future__ import annotations

import math
from typing import Any

from trimtab.backends.mlir.rules.contraction import contract
from trimtab.backends.mlir.rules.normalization import exponentials
from trimtab.backends.mlir.rules.registry import lowers
from trimtab.backends.mlir.scalar import Scalar, cast, constant, select, work_type
from trimtab.backends.mlir.tensors import Code, Tensor
from trimtab.ir import ops
from trimtab.ir.dims import product
from trimtab.ir.dtypes import DType


@lowers(ops.Attention)
def _attention(op: Any, code: Code, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Scores, powers and their product with the values. Axes: batch, key head, query head of it, query, channel."""
    *leading, heads, queries, width = q.shape
    groups, keys, out = k.shape[-3], k.shape[-2], v.shape[-1]
    batch, shared = product(leading), heads // groups
    work = work_type(q.dtype)
    grouped = code.reshape(q, (batch, groups, shared, queries, width))
    key, value = code.reshape(k, (batch, groups, keys, width)), code.reshape(v, (batch, groups, keys, out))
    scores_type = grouped.type.with_shape(batch, groups, shared, queries, keys).with_dtype(work)
    scores = contract(code, scores_type, [(grouped, "bghqd"), (key, "bgkd")], "bghqk")
    scores = _masked(op, code, scores, mask, (*leading, heads, queries, keys))
    powers, total = exponentials(code, scores, 4, empty_rows=mask is not None)
    result = q.type.with_shape(batch, groups, shared, queries, out)
    made = contract(code, result.with_dtype(work), [(powers, "bghqk"), (value, "bgkd")], "bghqd")

    def divided(e: Scalar, t: Scalar) -> Scalar:
        return select(t > 0, e / t, constant(0, e.dtype)) if mask is not None else e / t

    return code.reshape(code.elementwise(result, [made, total], divided), op.result.type.shape)


def _masked(op: Any, code: Code, scores: Tensor, mask: Tensor | None, shape: tuple[Any, ...]) -> Tensor:
    operands = [code.reshape(scores, shape)]
    if mask is not None:
        operands.append(mask)
    type = operands[0].type
    lowest = -math.inf

    def at_places(*elements: Scalar) -> Scalar:
        value = elements[0] * op.scale
        if mask is not None:
            value = (
                select(elements[1], value, lowest)
                if mask.dtype is DType.BOOL
                else value + cast(elements[1], value.dtype)
            )
        if op.causal:
            value = select(code.place(-1, type.rank) <= code.place(-2, type.rank), value, lowest)
        return value

    return code.reshape(code.elementwise(type, operands, at_places), scores.shape)


@lowers(ops.RotaryEmbedding)
def _rotary(op: Any, code: Code, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = int(cos.shape[-1])  # type: ignore[arg-type]
    half = width // 2
    leading = (*x.shape[:-1], width)

    def element(at: Any) -> Scalar:
        channel = at[-1]
        own = cast(code.load(x, at), work_type(x.dtype))
        if op.interleaved:
            first = (channel % 2).equals(0)
            partner = select(first, channel + 1, channel - 1)
        else:
            first = channel < half
            partner = select(first, channel + half, channel - half)
        inside = channel < width
        other = cast(code.load(x, [*at[:-1], select(inside, partner, channel)]), own.dtype)
        angle = [*at[:-1], select(inside, channel, channel * 0)]

        def table(t: Tensor) -> Scalar:
            return cast(code.load_broadcast(t, angle, leading), own.dtype)

        turned = own * table(cos) + select(first, -other, other) * table(sin)
        return select(inside, turned, own)

    return code.compute(op.result.type, element)
