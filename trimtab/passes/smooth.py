"""SmoothQuant: outliers of activations into weights, where they are easier to quantize."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from trimtab.errors import UsageError
from trimtab.ir.core import Module
from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.norm_scales.links import Link, linear_links, norm_links, value_links
from trimtab.passes.norm_scales.migration import Migration
from trimtab.passes.norm_scales.statistics import Statistics, gather_statistics

_SMALLEST, _LARGEST = 1e-5, 1e5
"""Bounds of a scale: the numbers stay far from the ends of float32."""
_GRID = tuple(step / 20 for step in range(21))
_ROWS = 512
"""Rows of each input that alphas are tried on."""


@dataclass(frozen=True)
class Smooth(Pass):
    """Divide the channels of what linear layers read by a scale each, and multiply the columns of their weights by it.

    SmoothQuant (Xiao et al., arXiv 2211.10438): channel j gets the scale ``max|X_j|^alpha / max|W_ij|^(1 - alpha)``,
    X on the calibration data and W of all layers that read it, so that outliers in few channels are shared with the
    weights. The division goes into the norm before the layers, which gets a weight and a bias if it has none; into the
    projection of values, where attention is between; or into the layer before, where a rectifier, a factor or nothing
    is between. Only layers may read the value, and no weight may have another reader. Nothing changes before rounding.
    ``fold-norm-affine``, a part of ``fuse``, takes the scale of norms back: it runs before this pass.

    - ``alpha``: from 0, all of the difficulty in the activations, to 1, all of it in the weights; ``auto`` for each
      value the one of 21 with the least error of its layers in 8 bits, simulated on rows of the calibration data.
    - ``activations``: what ``auto`` simulates: one scale for a whole ``tensor``, or one for each ``token``.
    - ``attention``: also between the projections of values and of outputs.
    - ``linear``: also between linear layers.
    """

    name: ClassVar[str] = "smooth"
    contract: ClassVar[Contract] = Exact(rounding=True)
    grows_weights: ClassVar[bool] = True  # by the weight of each norm that has none

    alpha: float | Literal["auto"] = 0.5
    activations: Literal["tensor", "token"] = "tensor"
    attention: bool = True
    linear: bool = True

    def __post_init__(self) -> None:
        if self.alpha != "auto" and not 0 <= self.alpha <= 1:
            raise UsageError("smooth got a wrong alpha", values={"alpha": self.alpha}, rule="alpha is from 0 to 1")

    def run(self, module: Module, ctx: Context) -> Changed:
        links: list[tuple[str, Link]] = []
        # What changes rows of weights comes before what looks at their columns.
        if self.attention:
            links += [("values", link) for link in value_links(module, ctx.rewrites.of("values"))]
        if self.linear:
            links += [("linear", link) for link in linear_links(module, ctx.rewrites.of("linear"))]
        links += [("norms", link) for link in norm_links(module, ctx.rewrites.of("norms"))]
        if not links:
            return False
        rows = _ROWS if self.alpha == "auto" else 0
        statistics = gather_statistics(module, [link for _, link in links], ctx, self.name, rows)
        migration = Migration(module, self.name)
        chosen: list[float] = []
        for (kind, link), found in zip(links, statistics, strict=True):
            if not ctx.rewrites.permit(kind, link.at):
                break
            weights = [migration.weight(reader) for reader in link.readers]
            alpha = self._best(link, found, weights) if self.alpha == "auto" else self.alpha
            chosen.append(alpha)
            migration.divide(link, smoothing_scale(link, found.largest, weights, alpha))
        if not chosen:
            return False
        migration.apply()
        if self.alpha == "auto":
            ctx.note(f"alpha from {min(chosen):g} to {max(chosen):g}, {sum(chosen) / len(chosen):.2f} on average")
        return True

    def _best(self, link: Link, found: Statistics, weights: list[torch.Tensor]) -> float:
        """The alpha with the least squared error of the layers' results in 8 bits; of equal ones the middle most."""
        rows = found.rows.double()
        exact = [rows[:, reader.channels] @ w.T for reader, w in zip(link.readers, weights, strict=True)]

        def error(alpha: float) -> float:
            scale = smoothing_scale(link, found.largest, weights, alpha)
            low, high = (None, None) if self.activations == "token" else (found.low / scale, found.high / scale)
            x = _rounded_rows(rows / scale, low, high)
            return sum(
                float((x[:, reader.channels] @ _rounded_weight(w * scale[reader.channels]).T - y).square().sum())
                for reader, w, y in zip(link.readers, weights, exact, strict=True)
            )

        return min(_GRID, key=lambda alpha: (error(alpha), abs(alpha - 0.5)))


def smoothing_scale(link: Link, largest: torch.Tensor, weights: list[torch.Tensor], alpha: float) -> torch.Tensor:
    """The scales f64 ``[C]`` of ``link``.

    Channels that are zero on all data, or that all weights multiply by zero, are left as they are: there is nothing to
    share, and a scale from a bound would blow up the first number that is not zero.

    Args:
        link: the place, with C channels.
        largest: f64 ``[C]``, the largest magnitude of each channel.
        weights: f64 ``[N, K]`` of each reader.
        alpha: how much of the difficulty goes to the weights.
    """
    columns = torch.zeros(link.width, dtype=torch.float64)
    for reader, weight in zip(link.readers, weights, strict=True):
        columns.scatter_reduce_(0, reader.channels, weight.abs().amax(0), "amax")
    largest, columns = link.tied(largest), link.tied(columns)
    scale = largest.pow(alpha) / columns.pow(1 - alpha)
    return torch.where((largest > 0) & (columns > 0), scale.clamp(_SMALLEST, _LARGEST), 1.0)


def _rounded_rows(x: torch.Tensor, low: torch.Tensor | None, high: torch.Tensor | None) -> torch.Tensor:
    """x ``[n, C]`` through 8 bits: unsigned between the ends of all channels, or signed with a scale for each row."""
    if low is None or high is None:
        step = x.abs().amax(1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) / 127
        return torch.round(x / step) * step
    least, most = low.min().clamp(max=0), high.max().clamp(min=0)
    step = (most - least).clamp(min=torch.finfo(x.dtype).tiny) / 255
    zero = torch.round(-least / step)
    return (torch.clamp(torch.round(x / step) + zero, 0, 255) - zero) * step


def _rounded_weight(weight: torch.Tensor) -> torch.Tensor:
    """A weight ``[N, K]`` through signed 8 bits with a scale for each row."""
    step = weight.abs().amax(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / 127
    return torch.round(weight / step) * step
