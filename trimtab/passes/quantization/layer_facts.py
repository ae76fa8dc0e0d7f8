"""What quantization does to each layer, measured on one batch: range, share clipped, and the error of the result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from trimtab.ir.core import Module, Value
from trimtab.passes.quantization.bits import FLOAT, Bits
from trimtab.passes.quantization.preparation import Preparation, Rounding, Stored
from trimtab.passes.quantization.scales import Affine
from trimtab.passes.quantization.sites import Site
from trimtab.passes.quantization.statistics import observe


@dataclass(frozen=True)
class LayerFacts:
    """One layer.

    Attributes:
        number: of the site.
        layer: its weight and place in the user's code.
        scheme: for example ``W8A8`` or ``float``.
        has_factors: whether channels of its input have factors, see :mod:`.migration`.
        low, high: the range of its input, divided by these factors; NaN when scales are computed for each row.
        clipped: share of the input outside of it, on the batch.
        sqnr_db: signal to quantization noise of the layer's result in decibels, when its input is exact.
    """

    number: int
    layer: str
    scheme: str
    has_factors: bool = False
    low: float = math.nan
    high: float = math.nan
    clipped: float = 0.0
    sqnr_db: float = math.inf

    def to_dict(self) -> dict[str, Any]:
        return {name: fact for name, fact in asdict(self).items() if name != "number"}


def layer_facts(
    module: Module, sites: Sequence[Site], chosen: Sequence[Bits], preparation: Preparation, batches: Any
) -> list[LayerFacts]:
    """The facts of each site, measured on the first of ``batches``; none without one."""
    batch = next(iter(batches), None)
    if batch is None:
        return []
    watched: dict[Value, _Layers] = {}
    for number, (site, bits) in enumerate(zip(sites, chosen, strict=True)):
        layers = watched.setdefault(site.x, _Layers())
        if bits == FLOAT:
            layers.facts.append(LayerFacts(number, site.label, str(FLOAT)))
            continue
        weight = module.weights[site.weight].tensor()
        layers.add(number, site, bits, weight, preparation.weight(number, bits), preparation.rounding(number, bits))
    observe(module, watched, [batch])
    return sorted((facts for layers in watched.values() for facts in layers.facts), key=lambda facts: facts.number)


class _Layers:
    """The layers that read one value; they are measured when it is seen."""

    def __init__(self) -> None:
        self._layers: list[tuple[int, Site, Bits, torch.Tensor, Stored, Rounding]] = []
        self.facts: list[LayerFacts] = []

    def add(
        self, number: int, site: Site, bits: Bits, weight: torch.Tensor, stored: Stored, rounding: Rounding
    ) -> None:
        self._layers.append((number, site, bits, weight, stored, rounding))

    def update(self, tensor: torch.Tensor) -> None:
        self.facts += [_measured(tensor.double(), *layer) for layer in self._layers]


def _measured(
    x: torch.Tensor, number: int, site: Site, bits: Bits, weight: torch.Tensor, stored: Stored, rounding: Rounding
) -> LayerFacts:
    how, factors = rounding.how, rounding.factors
    low = high = math.nan
    clipped = 0.0
    if isinstance(how, Affine):
        low, high = ((bound - how.zero) * how.scale for bound in (how.integers.low, how.integers.high))
        clipped = how.clipped(x if factors is None else x / factors)
    values = stored.values if factors is None else stored.values / factors.double()
    exact = site.product(x, weight.double())
    noise = float((site.product(rounding.rounded(x), values) - exact).square().sum())
    signal = float(exact.square().sum())
    sqnr = math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf
    return LayerFacts(number, site.label, str(bits), factors is not None, low, high, clipped, sqnr)
