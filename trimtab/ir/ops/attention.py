"""Scaled dot-product attention and rotary position embedding, kept whole."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.errors import VerificationError
from trimtab.ir.core import Value
from trimtab.ir.dims import Dim, bounds, mod
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op
from trimtab.ir.types import TensorType


class Attention(Op):
    """``softmax(scale * Q K^T + mask) V`` per head (Vaswani et al., arXiv 1706.03762).

    q ``[..., H, N, D]``, k ``[..., G, M, D]``, v ``[..., G, M, E]``, result ``[..., H, N, E]``. H is a multiple of G:
    query head h reads key head ``h // (H / G)`` (grouped-query attention, arXiv 2305.13245).  ``mask`` broadcasts to
    ``[..., H, N, M]``: bool means "may attend", floating is added.  ``causal`` lets query i see keys 0..i.  A row
    that may attend to nothing gives zeros.
    """

    q: Value
    k: Value
    v: Value
    mask: Value | None = None
    scale: float
    causal: bool = False

    @staticmethod
    def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float, causal: bool) -> Tensor:
        if causal and mask is not None:
            triangle = q.new_ones((q.shape[-2], k.shape[-2])).tril().bool()
            if mask.dtype != triangle.dtype:
                mask = mask.masked_fill(~triangle, float("-inf"))
            else:
                mask = mask & triangle
            causal = False
        grouped = q.dim() >= 3 and bool(q.shape[-3] != k.shape[-3])
        result = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
        )
        if mask is None:
            return result
        # torch's kernels differ on rows that may attend to nothing (zeros, NaN or a mean), so the rule is applied here.
        allowed = mask if mask.dtype == torch.bool else mask != float("-inf")
        return torch.where(allowed.any(-1, keepdim=True), result, 0)

    def macs(self) -> Dim:
        pairs = self.q.type.elements * self.k.type.shape[-2]
        return pairs + self.result.type.elements * self.k.type.shape[-2]

    def verify(self) -> None:
        problem = ""
        if min(value.type.rank for value in (self.q, self.k, self.v)) < 3:
            problem = "q, k and v have a head axis: rank 3 or more"
        elif mod(self.q.type.shape[-3], self.k.type.shape[-3]) != 0:
            problem = "the number of query heads is a multiple of the number of key heads"
        elif self.mask is not None and self.mask.type.dtype not in (DType.BOOL, self.q.type.dtype):
            problem = "the mask is bool or has the dtype of q"
        if problem:
            raise VerificationError(
                "attention has wrong operands",
                values={"q": self.q.type, "k": self.k.type, "v": self.v.type, "mask": self.mask and self.mask.type},
                rule=problem,
                location=self.location,
            )


class RotaryEmbedding(Op):
    """Rotary position embedding (Su et al., arXiv 2104.09864): pairs of channels turned by an angle each.

    x ``[..., N, D]``, ``cos`` and ``sin`` broadcast to ``[..., N, R]`` where R, even and at most D, is their last axis.
    The first R channels become ``x * cos + rotate(x) * sin``, where ``rotate`` turns a pair (a, b) into (-b, a); the
    others stay as they are (partial rotary).  The pairs are channels i and i + R/2, or, ``interleaved``, 2i and 2i + 1.
    """

    x: Value
    cos: Value
    sin: Value
    interleaved: bool = False

    @staticmethod
    def reference(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
        width = cos.shape[-1]
        turned, rest = x[..., :width], x[..., width:]
        if interleaved:
            rotated = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
        else:
            rotated = torch.cat((-turned[..., width // 2 :], turned[..., : width // 2]), -1)
        return torch.cat((turned * cos + rotated * sin, rest), -1)

    def infer(self) -> tuple[TensorType, ...]:
        x, cos, sin = self.x.type, self.cos.type, self.sin.type
        rule = self.refusal(x, cos, sin)
        if rule:
            raise VerificationError(
                "rotary_embedding has wrong operands",
                values={"x": x, "cos": cos, "sin": sin},
                rule=rule,
                location=self.location,
            )
        return (x,)

    @staticmethod
    def refusal(x: TensorType, cos: TensorType, sin: TensorType) -> str:
        """The rule that operands of these types break, or ""."""
        width = cos.shape[-1] if cos.rank and x.rank else 0
        if not isinstance(width, int) or not width or width % 2 or bounds(x.shape[-1] - width)[0] < 0:
            return "the last axis of cos has a known, even size, at most that of the last axis of x"
        if not x.dtype.is_floating or {cos.dtype, sin.dtype} != {x.dtype}:
            return "x, cos and sin have one floating dtype"
        if sin.shape[-1:] != (width,) or not all(_broadcasts(t.shape, x.shape[:-1]) for t in (cos, sin)):
            return "cos and sin have one last axis and broadcast to the leading axes of x"
        return ""


def _broadcasts(shape: tuple[Dim, ...], leading: tuple[Dim, ...]) -> bool:
    """Whether the axes of ``shape`` but for the last broadcast to ``leading`` without enlarging it."""
    own = shape[:-1]
    return len(own) <= len(leading) and all(
        size in (1, whole) for size, whole in zip(reversed(own), reversed(leading), strict=False)
    )
