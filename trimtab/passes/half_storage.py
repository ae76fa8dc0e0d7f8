"""Weights in a 16-bit type: which ones lose nothing but digits by it, and their rounded form.

bfloat16 has 8 significant bits and the range of float32; float16 has 11, between 6e-8 and 65504.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.errors import ParseError
from trimtab.ir.core import Module
from trimtab.ir.dtypes import DType
from trimtab.ir.types import TensorType
from trimtab.ir.weights import ComputedSource, Weight

if TYPE_CHECKING:
    import torch


def refusal(weight: Weight, dtype: DType) -> str:
    """Why ``weight`` is not to be stored as ``dtype``; "" when each element keeps the digits of the type.

    An element is allowed to move by half a unit in the last place of the largest one, which is what rounding costs
    where neither end of the range is in the way.  Only float16 has such ends: see :func:`rounded` for bfloat16.
    """
    import torch

    if dtype is DType.BF16:
        return ""
    try:
        data = weight.tensor()
    except ParseError:
        return f"@{weight.id} has no data to look at"
    largest = float(data.abs().max()) if data.numel() else 0.0
    limits = torch.finfo(dtype.to_torch())
    if not largest <= limits.max:
        return f"an element of @{weight.id} is {largest:.3g}, and {dtype} ends at {limits.max:.0f}"
    lost = float((data - data.to(dtype.to_torch()).to(data.dtype)).abs().max()) if data.numel() else 0.0
    if lost > limits.eps / 2 * largest:
        return f"the elements of @{weight.id}, at most {largest:.3g}, are too small for the digits of {dtype}"
    return ""


def rounded(data: torch.Tensor, dtype: DType) -> torch.Tensor:
    """``data`` rounded to nearest.  What is finite stays finite: the last half step of float32's range, where masks
    have their lowest number, goes to the largest number of bfloat16."""
    half = data.to(dtype.to_torch())
    overflowed = half.isinf() & data.isfinite()
    return half.where(~overflowed, half.nan_to_num()) if bool(overflowed.any()) else half


def store(module: Module, weight: Weight, dtype: DType) -> Weight:
    """``weight`` rounded to ``dtype`` when its data is asked for, as a new weight of the module."""
    return module.add_weight(
        Weight(
            module.fresh_weight_id(f"{weight.id}.{dtype}"),
            TensorType(dtype, weight.type.shape),
            ComputedSource(lambda: rounded(weight.tensor(), dtype)),
            trainable=weight.trainable,
        )
    )
