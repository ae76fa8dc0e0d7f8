"""What quantization does to each layer, measured on one batch: range, share clipped, and the error of the result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from trimtab.ir.core import Module, Value
from trimtab.passes.quantization.bits import FLOAT, Bits
from trimtab.passes.quantization.scales import LEAST_SCALE, Affine, Integers, quantized_rows, row_scales
from trimtab.passes.quantization.sites import Site
from trimtab.passes.quantization.statistics import observe


@dataclass(frozen=True)
class LayerFacts:
    """One layer.

    Attributes:
        number: of the site.
        layer: its weight and place in the user's code.
        scheme: for example ``W8A8`` or ``float``.
        low, high: the range of its input; NaN when scales are computed for each row.
        clipped: share of the input outside of it, on the batch.
        sqnr_db: signal to quantization noise of the layer's result in decibels, when its input is exact.
    """

    number: int
    layer: str
    scheme: str
    low: float
    high: float
    clipped: float
    sqnr_db: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def layer_facts(
    module: Module,
    sites: Sequence[Site],
    chosen: Sequence[Bits],
    inputs: Mapping[tuple[int, int], Affine | Integers],
    batches: Any,
) -> list[LayerFacts]:
    """The facts of each site, measured on the first of ``batches``; none without one."""
    batch = next(iter(batches), None)
    if batch is None:
        return []
    watched: dict[Value, _Layers] = {}
    for number, (site, bits) in enumerate(zip(sites, chosen, strict=True)):
        weight = module.weights[site.weight].tensor()
        watched.setdefault(site.x, _Layers()).add(number, site.label, bits, weight, inputs.get((number, bits.inputs)))
    observe(module, watched, [batch])
    return sorted((facts for layers in watched.values() for facts in layers.facts), key=lambda facts: facts.number)


class _Layers:
    """The layers that read one value; they are measured when it is seen."""

    def __init__(self) -> None:
        self._layers: list[tuple[int, str, Bits, torch.Tensor, Affine | Integers | None]] = []
        self.facts: list[LayerFacts] = []

    def add(self, number: int, label: str, bits: Bits, weight: torch.Tensor, how: Affine | Integers | None) -> None:
        self._layers.append((number, label, bits, weight, how))

    def update(self, tensor: torch.Tensor) -> None:
        self.facts = [_measured(tensor.double(), *layer) for layer in self._layers]


def _measured(
    x: torch.Tensor, number: int, label: str, bits: Bits, weight: torch.Tensor, how: Affine | Integers | None
) -> LayerFacts:
    if bits == FLOAT or how is None:
        return LayerFacts(number, label, str(FLOAT), math.nan, math.nan, 0.0, math.inf)
    integers = Integers.symmetric(bits.weights)
    scales = row_scales(weight, integers, bits.weights < 8)
    stored = quantized_rows(weight, scales, integers).double() * scales.double()[:, None]
    if isinstance(how, Affine):
        low, high = ((bound - how.zero) * how.scale for bound in (how.integers.low, how.integers.high))
        clipped, rounded = how.clipped(x), how.rounded(x)
    else:
        low = high = math.nan
        unit = (x.abs().amax(-1, keepdim=True) / how.high).clamp(min=LEAST_SCALE)
        clipped, rounded = 0.0, (x / unit).round().clamp(how.low, how.high) * unit
    exact = F.linear(x, weight.double())
    noise = float((F.linear(rounded, stored) - exact).square().sum())
    signal = float(exact.square().sum())
    sqnr = math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf
    return LayerFacts(number, label, str(bits), low, high, clipped, sqnr)
