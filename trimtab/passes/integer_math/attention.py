"""Attention as two products of bytes, with the softmax between them in float.

``softmax(s_q s_k scale (q_q q_k^T) + mask)`` is rounded to u8, in steps of one 255th or as codes of a logarithm, and
multiplied with the values in i8. Queries, keys and values have no zero points, so that sums need no corrections.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.dims import Dim
from trimtab.ir.dtypes import DType
from trimtab.passes.integer_math.log_codes import LogCodes
from trimtab.passes.quantization.scales import Integers

if TYPE_CHECKING:
    import torch

LOWEST = -1e30
"""A score that has no weight: finite, so that the differences of two of them are numbers."""


@dataclass(frozen=True)
class Scheme:
    """How an attention becomes integers.

    Attributes:
        q, k, v: scales, f32 [] or, one for each head, [H, 1, 1] and twice [G, 1, 1].
        integers: what queries, keys and values become; symmetric.
        probabilities: codes of a logarithm, or the number of bits of uniform steps.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    integers: Integers
    probabilities: LogCodes | int


def refusal(op: ops.Attention) -> str:
    """Why an attention cannot be computed with integers; "" when it can."""
    dtypes = {value.type.dtype for value in (op.q, op.k, op.v)}
    if dtypes != {DType.F32}:
        return f"it reads {', '.join(sorted(map(str, dtypes)))}, not f32"
    heads, groups = op.q.type.shape[-3], op.k.type.shape[-3]
    if heads != groups and not (isinstance(heads, int) and isinstance(groups, int)):
        return f"how many query heads share one of {groups} key heads is not known: there are {heads}"
    depth = op.q.type.shape[-1]
    if not isinstance(depth, int) or depth > 1 << 16:
        return f"sums of {depth} products of bytes may not fit in 32 bits"
    return ""


class IntegerAttention:
    """Builds one attention in integers.

    Args:
        build: where the ops go.
        op: the attention; its operands, scale and causality are read.
        scheme: scales and bits.
        mask: the data of a constant mask, where it is one: a mask without minus infinity hides no key.
    """

    def __init__(self, build: Builder, op: ops.Attention, scheme: Scheme, mask: torch.Tensor | None = None) -> None:
        self._build = build
        self._op = op
        self._scheme = scheme
        self._mask = mask
        self._shared = 1
        heads, groups = op.q.type.shape[-3], op.k.type.shape[-3]
        if heads != groups:
            assert isinstance(heads, int)
            assert isinstance(groups, int)
            self._shared = heads // groups

    def result(self) -> Value:
        """f32 of the shape of the attention's result."""
        build, op, scheme = self._build, self._op, self._scheme
        q = self._by_key_head(self._rounded(op.q, scheme.q, "query"))
        k = self._rounded(op.k, scheme.k, "key")
        v = self._rounded(op.v, scheme.v, "value")
        rank = op.k.type.rank
        turned = build(ops.Permute(k, dims=(*range(rank - 2), rank - 1, rank - 2)))
        unit = scheme.q.double() * self._of_query_heads(scheme.k) * op.scale
        sums = self._by_query_head(build(ops.MatmulInteger(q, turned)))
        scores = build(ops.Dequantize(sums, build.weight("scores.scale", unit.float())))
        p = self._probabilities(scores)
        if isinstance(scheme.probabilities, LogCodes):
            codes = scheme.probabilities.of_probabilities(build, p)
            planes = scheme.probabilities.planes(build, codes)
        else:
            steps = 2**scheme.probabilities - 1
            step = build.scalar(1 / steps, DType.F32)
            planes = [(build(ops.Quantize(p, step, dtype=DType.U8, low=0, high=steps)), 1 / steps)]
        parts = [self._times_values(plane, v, factor) for plane, factor in planes]
        total = parts[0]
        for part in parts[1:]:
            total = build(ops.Add(total, part))
        return total

    def _rounded(self, x: Value, scale: torch.Tensor, what: str) -> Value:
        integers = self._scheme.integers
        unit = self._build.weight(f"{what}.scale", scale)
        return self._build(
            ops.Quantize(x, unit, dtype=integers.dtype, low=integers.low, high=integers.high)
        )  # fmt: skip

    def _probabilities(self, scores: Value) -> Value:
        """Softmax of the scores, zero where a key may not be attended to."""
        build = self._build
        last = scores.type.rank - 1
        scores, allowed = self._masked(scores)
        if allowed is None:
            return build(ops.Softmax(scores, dim=last))
        hidden = build(ops.Where(allowed, scores, build.scalar(LOWEST, DType.F32)))
        # A row without any key has the same weight for all of them, which becomes zero here.
        return build(ops.Where(allowed, build(ops.Softmax(hidden, dim=last)), build.scalar(0.0, DType.F32)))

    def _masked(self, scores: Value) -> tuple[Value, Value | None]:
        """The scores with a floating mask added, and which keys each query may attend to, if not all."""
        build, mask = self._build, self._op.mask
        allowed: Value | None = None
        if mask is not None and mask.type.dtype is DType.BOOL:
            allowed = mask
        elif mask is not None:
            if self._mask is None or bool((self._mask == -math.inf).any()):
                allowed = build(ops.Gt(mask, build.scalar(-math.inf, mask.type.dtype)))
            scores = build(ops.Add(scores, mask))
        if self._op.causal:
            n, m = scores.type.shape[-2:]
            rows = build(ops.Reshape(build(ops.Arange(length=n, dtype=DType.I64)), shape=(n, 1)))
            triangle = build(ops.Ge(rows, build(ops.Arange(length=m, dtype=DType.I64))))
            allowed = triangle if allowed is None else build(ops.LogicalAnd(allowed, triangle))
        return scores, allowed

    def _times_values(self, p: Value, v: Value, factor: float) -> Value:
        build = self._build
        sums = self._by_query_head(build(ops.MatmulInteger(self._by_key_head(p), v)))
        unit = self._of_query_heads(self._scheme.v) * factor
        return build(ops.Dequantize(sums, build.weight("attention.scale", unit.float())))

    def _by_key_head(self, x: Value) -> Value:
        """[..., H, N, D] as [..., G, (H / G) N, D], so that the queries of one key head are one matrix."""
        if self._shared == 1:
            return x
        *batch, _, n, d = x.type.shape
        shape: tuple[Dim, ...] = (*batch, self._op.k.type.shape[-3], n * self._shared, d)
        return self._build(ops.Reshape(x, shape=shape))

    def _by_query_head(self, x: Value) -> Value:
        """The reverse of :meth:`_by_key_head`."""
        if self._shared == 1:
            return x
        *batch, _, _, d = x.type.shape
        *_, heads, n, _ = self._op.q.type.shape
        return self._build(ops.Reshape(x, shape=(*batch, heads, n, d)))

    def _of_query_heads(self, scale: torch.Tensor) -> torch.Tensor:
        """Scales of key heads as float64, repeated for the query heads that read them."""
        wide = scale.double()
        return wide.repeat_interleave(self._shared, 0) if wide.dim() else wide
