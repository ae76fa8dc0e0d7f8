"""RepQ: a scale and zero point for each channel behind a norm become one for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from trimtab.errors import UsageError
from trimtab.ir import ops
from trimtab.ir.core import Module
from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.norm_scales.clipping import clipped_ranges
from trimtab.passes.norm_scales.links import norm_links
from trimtab.passes.norm_scales.migration import Migration
from trimtab.passes.norm_scales.statistics import gather_statistics

_ROWS = 512
"""Rows of each norm's result that clipping is tried on."""
_NARROWEST = 1e-3
"""The step of a channel, at least, as a share of the mean one."""


@dataclass(frozen=True)
class ReparameterizeScales(Pass):
    """Give all channels behind a norm one range, by its weight and bias, and take that back in the layers after it.

    RepQ-ViT (Li et al., arXiv 2212.08254): channels that a quantizer of 2^bits levels would give a step and a zero
    point each are scaled and shifted so that one step and one zero point serve all of them, which costs nothing when
    the model runs. The range of a channel is that of the calibration data, or with ``clip`` the part of it with the
    least squared error: the dual clipping of RepQuant (arXiv 2402.05628), by a search on a grid. An RMS norm has no
    bias: its channels are scaled alone, to one largest magnitude. Only linear layers may read the norm, and no weight
    may have another reader. Nothing changes before rounding. ``fold-norm-affine``, a part of ``fuse``, takes this back:
    it runs before this pass.

    - ``bits``: of the quantizer that follows.
    - ``clip``: search for the bounds. Numbers outside of them stay as they are, so the quantizer that follows has to
      choose its own range by an error, too, and not by the largest number: ``quantize{observer=mse}``.
    """

    name: ClassVar[str] = "reparameterize-scales"
    contract: ClassVar[Contract] = Exact(rounding=True)
    grows_weights: ClassVar[bool] = True  # by the weight and bias of norms that have none, and a bias of linear layers

    bits: int = 8
    clip: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UsageError(f"{self.name} got wrong bits", values={"bits": self.bits}, rule="bits is from 2 to 8")

    def run(self, module: Module, ctx: Context) -> Changed:
        links = list(norm_links(module, ctx.rewrites.of("norms")))
        if not links:
            return False
        statistics = gather_statistics(module, links, ctx, self.name, _ROWS if self.clip else 0)
        migration = Migration(module, self.name)
        spreads: list[float] = []
        for link, found in zip(links, statistics, strict=True):
            if not ctx.rewrites.permit("norms", link.at):
                break
            low, high = clipped_ranges(found, self.bits) if self.clip else (found.low, found.high)
            if isinstance(link.norm, ops.RmsNorm):
                high = torch.maximum(low.abs(), high.abs())
                low = -high
            steps, scale, shift = one_range(low, high, self.bits)
            spreads.append(float(steps.max() / steps.min()))
            migration.divide(link, scale, None if isinstance(link.norm, ops.RmsNorm) else shift)
        if not spreads:
            return False
        migration.apply()
        ctx.note(f"the steps of channels were up to {max(spreads):.3g} times apart behind one norm")
        return True


def one_range(low: torch.Tensor, high: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The step of each channel, and the scale r and shift b that put all of them between the same two numbers.

    With the steps d and zero points z of the channels, ``z = -low / d``, and one step D, the mean of d, and zero
    point Z, the mean of z as an integer of the quantizer, a channel x becomes ``x / r - b``: ``r = d / D`` and
    ``b = D (Z - z)``. All channels then lie between ``-Z D`` and ``(2^bits - 1 - Z) D``. A channel without spread, or
    next to none, gets a larger step with its numbers in the middle: what it holds on other inputs would otherwise be
    blown up with it.

    Args:
        low, high: f64 ``[C]``, the ranges.
        bits: of the quantizer.

    Returns:
        d, r and b, f64 ``[C]``.
    """
    levels = 2**bits - 1
    steps = (high - low) / levels
    spread = steps > 0
    mean = steps[spread].mean() if bool(spread.any()) else torch.ones((), dtype=steps.dtype)
    wider = torch.where(spread, steps.clamp(min=_NARROWEST * float(mean)), mean)
    low = (low + high) / 2 - wider * levels / 2
    step = wider.mean()
    zeros = -low / wider
    zero = torch.round(zeros.mean()).clamp(0, levels)
    return wider, wider / step, step * (zero - zeros)
