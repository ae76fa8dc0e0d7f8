"""Matrix products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.ir.core import Value
from trimtab.ir.dims import Dim, product
from trimtab.ir.op import Op


class Linear(Op):
    """``y = x W^T + b`` over the last axis: x ``[..., K]``, weight ``[N, K]``, bias ``[N]``, result ``[..., N]``."""

    x: Value
    weight: Value
    bias: Value | None = None

    @staticmethod
    def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def macs(self) -> Dim:
        return self.x.type.elements * self.weight.type.shape[0]


class Matmul(Op):
    """Matrix product of the last two axes, the others broadcast: ``[..., M, K] @ [..., K, N]``; a one-dimensional
    operand is a row on the left or a column on the right, as in ``torch.matmul``."""

    x: Value
    y: Value

    @staticmethod
    def reference(x: Tensor, y: Tensor) -> Tensor:
        return torch.matmul(x, y)

    def macs(self) -> Dim:
        return self.result.type.elements * self.x.type.shape[-1]


class Einsum(Op):
    """A sum of products in Einstein notation, as ``torch.einsum`` with lower-case letters and at most one ellipsis."""

    operands_list: tuple[Value, ...]
    equation: str

    @staticmethod
    def reference(operands: list[Tensor], *, equation: str) -> Tensor:
        return torch.einsum(equation, *operands)

    def macs(self) -> Dim:
        sizes: dict[str, Dim] = {}
        for term, value in zip(self.equation.split("->")[0].split(","), self.operands_list, strict=True):
            letters = term.strip()
            head, _, tail = letters.partition("...")
            shape = value.type.shape
            sizes.update(zip(head, shape, strict=False))
            sizes.update(zip(reversed(tail), reversed(shape), strict=False))
            if "..." in letters:
                spread = shape[len(head) : len(shape) - len(tail)]
                sizes["..."] = product(spread)
        return product(sizes.values()) if len(self.operands_list) > 1 else 0
