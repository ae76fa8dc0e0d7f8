"""Rounding of the residual stream, which shows why it is left alone.

After a few layers of a transformer a handful of channels of the residual stream is a hundred times larger than the
others, so one scale for all of it leaves nothing of these (Y. Bondarenko et al., "Understanding and Overcoming the
Challenges of Efficient Transformer Quantization", 2021).
"""

from __future__ import annotations

from typing import Any

import torch

from trimtab.ir import ops
from trimtab.ir.core import Module, Value
from trimtab.ir.dtypes import DType
from trimtab.passes.quantization.observers import make_observer
from trimtab.passes.quantization.scales import Affine, Integers
from trimtab.passes.quantization.statistics import observe


def round_residuals(module: Module, batches: Any, made_by: str) -> int:
    """Round every sum that a norm and another sum read to 8 bits with one scale; how many there are."""
    found = [op.result for op in module.main.ops if isinstance(op, ops.Add) and _is_residual(op.result)]
    watched = {value: make_observer("minmax") for value in found}
    observe(module, watched, batches, what=made_by)
    for value, seen in watched.items():
        _round(module, value, Affine.of_range(*seen.range(), Integers.affine(8)), made_by)
    return len(found)


def _is_residual(value: Value) -> bool:
    readers = value.users
    return any(isinstance(op, ops.LayerNorm | ops.RmsNorm) for op in readers) and any(
        isinstance(op, ops.Add) for op in readers
    )


def _round(module: Module, value: Value, how: Affine, made_by: str) -> None:
    from trimtab.ir.builder import Builder

    graph, maker = module.main, value.producer
    assert maker is not None
    build = Builder(module, graph, made_by=made_by)
    scale = build.weight("residual.scale", torch.tensor(how.scale, dtype=torch.float32))
    zero = build.weight("residual.zero", torch.tensor(how.zero, dtype=how.integers.dtype.to_torch()))
    rounded = ops.Quantize(value, scale, zero, dtype=DType.U8, low=how.integers.low, high=how.integers.high)
    back = ops.Dequantize(rounded.result, scale, zero)
    readers = [use for use in value.uses if use.user is not rounded]
    rounded.made_by = back.made_by = made_by
    graph.ops.insert_after(maker, rounded)
    graph.ops.insert_after(rounded, back)
    for use in readers:
        use.user.set_operand(use.index, back.result)  # type: ignore[union-attr]
