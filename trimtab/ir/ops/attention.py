"""Scaled dot-product attention, kept whole."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.errors import VerificationError
from trimtab.ir.core import Value
from trimtab.ir.dims import Dim, mod
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op


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
