"""The numbers of each quantized layer: how its input is rounded, and its weights as integers with their scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trimtab.ir.core import Module, Value
from trimtab.passes.quantization.bits import Bits
from trimtab.passes.quantization.inputs import SeenInputs
from trimtab.passes.quantization.migration import choose
from trimtab.passes.quantization.scales import Affine, Integers, quantized_rows, row_scales
from trimtab.passes.quantization.sites import Site
from trimtab.passes.weight_only.gptq import inverse_factor, round_with_feedback
from trimtab.passes.weight_only.grouping import Grid


@dataclass(frozen=True, eq=False)
class Rounding:
    """How an input becomes integers. Layers that read the same value with the same bits share one.

    Attributes:
        how: one scale for the whole tensor, or symmetric integers for scales that are computed for each row.
        factors: whose reciprocals each channel is multiplied by before, f32 [K]; None for ones.
    """

    how: Affine | Integers
    factors: torch.Tensor | None = None

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """The numbers that the integers of x ``[..., K]`` stand for, with the scale of x."""
        scaled = x if self.factors is None else x * (1 / self.factors)
        if isinstance(self.how, Affine):
            scaled = self.how.rounded(scaled)
        else:
            unit = self.how.unit(scaled)
            scaled = (scaled / unit).round().clamp(self.how.low, self.how.high) * unit
        return scaled if self.factors is None else scaled * self.factors


@dataclass(frozen=True, eq=False)
class Stored:
    """A weight as integers. Layers of one weight and equal factors share one.

    Attributes:
        integers: i8 [N, K], of a convolution [N, K, kh, kw].
        scales: f32 [N].
    """

    integers: torch.Tensor
    scales: torch.Tensor

    @property
    def values(self) -> torch.Tensor:
        """What the integers stand for, times the factors of the input: f64, as `integers`."""
        return self.integers.double() * self.scales.double().reshape(-1, *[1] * (self.integers.dim() - 1))


class Preparation:
    """Makes the numbers of layers from what was seen of their inputs, once for each layer and number of bits.

    Args:
        module: the module, whose weights are read.
        sites: its layers.
        seen: what was seen of their inputs.
        search: look for the clipping range of each row of the weights.
    """

    def __init__(self, module: Module, sites: Sequence[Site], seen: SeenInputs, search: bool) -> None:
        self._module = module
        self._sites = sites
        self._seen = seen
        self._search = search
        self._roundings: dict[tuple[Value, Bits], Rounding] = {}
        self._weights: dict[tuple[str, Value | None, Bits], Stored] = {}

    def rounding(self, number: int, bits: Bits) -> Rounding:
        """How the input of site ``number`` is rounded."""
        x = self._sites[number].x
        if (x, bits) not in self._roundings:
            self._roundings[x, bits] = self._make_rounding(x, bits)
        return self._roundings[x, bits]

    def weight(self, number: int, bits: Bits) -> Stored:
        """The weight of site ``number``."""
        site = self._sites[number]
        rounding = self.rounding(number, bits)
        depends_on_x = rounding.factors is not None or site.x in self._seen.moments
        key = (site.weight, site.x if depends_on_x else None, bits)
        if key not in self._weights:
            self._weights[key] = self._make_weight(site, rounding, bits)
        return self._weights[key]

    def _make_rounding(self, x: Value, bits: Bits) -> Rounding:
        found = self._seen.range(x, bits.inputs)
        if found is None:
            return Rounding(Integers.symmetric(bits.inputs))
        how = Affine.of_range(*found, Integers.affine(bits.inputs))
        readers = [site for site in self._sites if site.x is x]
        if x not in self._seen.samples or any(self._is_shared(site) for site in readers):
            return Rounding(how)
        weight = torch.cat([self._module.weights[site.weight].tensor() for site in readers])
        factors, how = choose(self._seen.samples[x], weight, how, Integers.symmetric(bits.weights), self._search)
        return Rounding(how, factors)

    def _is_shared(self, site: Site) -> bool:
        """Whether layers with another input read the weight too: with factors it would have to be stored twice."""
        return any(other.weight == site.weight and other.x is not site.x for other in self._sites)

    def _make_weight(self, site: Site, rounding: Rounding, bits: Bits) -> Stored:
        data = self._module.weights[site.weight].tensor()
        weight = data if rounding.factors is None else data * rounding.factors
        integers = Integers.symmetric(bits.weights)
        if site.x not in self._seen.moments:
            scales = row_scales(weight, integers, self._search)
            return Stored(quantized_rows(weight, scales, integers), scales)
        moments = self._seen.moments[site.x]
        if rounding.factors is not None:
            moments = moments.divided(rounding.factors.double())
        grid = Grid(bits.weights, weight.shape[1], symmetric=True)
        made = round_with_feedback(
            weight.double(), grid, inverse_factor(moments), clip=self._search, products=moments.products[None]
        )
        return Stored(made.codes.to(torch.int8), made.scales.scale[:, 0].float())
