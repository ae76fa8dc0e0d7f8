"""Weights of linear layers in 8, 4, 3 or 2 bits, with a scale for each group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from trimtab.errors import UsageError
from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Module
from trimtab.ir.dtypes import DType
from trimtab.ir.rewrite.log import RuleLog
from trimtab.ir.types import TensorType
from trimtab.ir.weights import TorchSource, Weight
from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.contracts import Contract, Lossy
from trimtab.passes.drop import Drop
from trimtab.passes.weight_only.awq import find_places, scale_inputs
from trimtab.passes.weight_only.choice import FLOAT, choose
from trimtab.passes.weight_only.gptq import inverse_factor, round_with_feedback
from trimtab.passes.weight_only.grouping import Grid, Quantized, round_to_nearest
from trimtab.passes.weight_only.layers import Layer, find_layers
from trimtab.passes.weight_only.moments import Moments, in_order
from trimtab.passes.weight_only.report import Tally

if TYPE_CHECKING:
    import torch

_BITS = (2, 3, 4, 8)
_SCALING = "scale-inputs"
"""Rule under which the log has the places where AWQ scales."""


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Store the weights of linear layers as integers, with a scale for each group of input channels.

    Activations and sums stay in float32. A weight ``[N, K]`` becomes integers, two in a byte for 4 bits and fewer, and
    a scale for each ``group`` neighbours along K, of which K must be a multiple; with ``symmetric=false`` also a zero
    point.

    - ``method=round``: each weight to the nearest integer.
    - ``method=awq``: input channels with large activations are scaled up before rounding, where what makes them can
      be scaled down for nothing (Lin et al., arXiv 2306.00978). Needs calibration data.
    - ``method=gptq``: the error of each column is made up for by the columns after it (Frantar et al., arXiv
      2210.17323), layer by layer, with the inputs that the quantized layers before it make. Needs calibration data.
    - ``clip``: search for the clipping range of each group, for the least error of the weights or, with calibration
      data, of the layer's results.
    - ``max_drop``: lose at most this much of the metric or, where there is none, move the outputs by at most this much
      on the calibration data, relatively: the layers that mind most take 8 bits, or stay in float.

    A weight that several linear layers read stays one; a weight that anything else reads stays in float. With ``tied``
    the table of an embedding does for the embedding only, and the linear layers that read it too, as the last one of
    a language model often does, get integers beside it: more to store, but less to read for each token.
    """

    name: ClassVar[str] = "quantize-weights"
    contract: ClassVar[Contract] = Lossy()
    grows_weights: ClassVar[bool] = True  # with tied
    bits: int = 4
    group: int = 32
    method: Literal["round", "awq", "gptq"] = "round"
    symmetric: bool = True
    clip: bool = False
    tied: bool = False
    max_drop: float = 0.0

    def __post_init__(self) -> None:
        if self.bits not in _BITS or self.group < 2:
            raise UsageError(
                f"{self.name} got options that it does not know",
                values={"bits": self.bits, "group": self.group},
                rule="weights have 2, 3, 4 or 8 bits, and a group has at least 2, or scales would take more than it",
                fix="for example bits=4 and group=32",
            )
        if self.max_drop < 0:
            raise UsageError(f"{self.name} got a negative max_drop", values={"max_drop": self.max_drop})

    def run(self, module: Module, ctx: Context) -> Changed:
        if self.method != "round" and not ctx.calibration:
            raise UsageError(
                f"{self.name} cannot use the method {self.method}",
                values={"calibration batches": 0},
                rule="it weighs errors by the inputs of the layers",
                fix="give optimize() calibration batches, or take method=round",
            )
        log = ctx.rewrites.of(self.name)
        layers = find_layers(module, log, self._unfit, with_tied=self.tied)
        log.matched += len(layers)
        layers = [layer for layer in layers if ctx.rewrites.permit(self.name, layer.linears[0])]
        if not layers:
            return False
        drop = Drop(module, ctx, self.name) if self.max_drop else None
        scaled = self._scale_inputs(module, layers, ctx) if self.method == "awq" else 0
        bits = [self.bits] * len(layers)
        if drop is not None:
            bits = self._within_drop(module, [layer.weight.id for layer in layers], drop, ctx)
        chosen = {layer.weight.id: count for layer, count in zip(layers, bits, strict=True) if count != FLOAT}
        if not chosen:
            return bool(scaled)
        tally = self._quantize(module, chosen, ctx)
        floats = len(layers) - len(chosen)
        ctx.note(f"{tally}" + (f"; {floats} in float" if floats else ""))
        return True

    def _unfit(self, weight: Weight) -> str:
        columns = weight.type.shape[1]
        if columns % self.group:
            return f"the {columns} input channels of @{weight.id} are no multiple of the group of {self.group}"
        return ""

    def _scale_inputs(self, module: Module, layers: Sequence[Layer], ctx: Context) -> int:
        """The exact half of AWQ; returns how many inputs are scaled."""
        own = [layer for layer in layers if not layer.tied]
        places = find_places(module, own, ctx.rewrites.of(_SCALING))
        places = [place for place in places if ctx.rewrites.permit(_SCALING, place.linears[0])]
        scale_inputs(module, places, ctx.calibration, self._grid(self.bits), self.name)
        ctx.note(f"the inputs of {sum(len(place.linears) for place in places)} linear layers are scaled")
        return len(places)

    def _within_drop(self, module: Module, ids: Sequence[str], drop: Drop, ctx: Context) -> list[int]:
        """Bits for each weight with which no more than ``max_drop`` is lost."""

        def measure(pass_: QuantizeWeights, bits: Sequence[int]) -> float:
            copy = module.copy()
            pass_._quantize(copy, {id: count for id, count in zip(ids, bits, strict=True) if count != FLOAT}, ctx)
            return drop(copy)

        # The order of layers hardly depends on the method, and rounding takes one pass over the data for each.
        quick = replace(self, method="round", clip=False)
        sizes = [module.weights[id].nbytes for id in ids]
        choice = choose(
            sizes, self.bits, self.max_drop, lambda bits: measure(quick, bits), lambda bits: measure(self, bits)
        )
        worst = sorted(zip(choice.alone, ids, strict=True), reverse=True)[:5]
        ctx.note("drop when a layer alone is quantized: " + ", ".join(f"@{id} {value:.3g}" for value, id in worst))
        ctx.note(f"drop {choice.drop:.3g}, at most {self.max_drop:g} allowed")
        return list(choice.bits)

    def _quantize(self, module: Module, chosen: dict[str, int], ctx: Context) -> Tally:
        """Replace the weights with these ids by integers of so many bits."""
        found = find_layers(module, RuleLog(self.name), self._unfit, with_tied=self.tied)
        layers = [layer for layer in found if layer.weight.id in chosen]
        tally = Tally()
        for layer, quantized in self._rounded(module, layers, chosen, ctx):
            weights = self._replace(module, layer, quantized)
            after = sum(weight.nbytes for weight in weights) + layer.tied * layer.weight.nbytes
            bits = chosen[layer.weight.id]
            tally.add(bits, layer.weight.nbytes, after, layer.weight.tensor().double(), quantized.values())
        module.drop_unused_weights()
        return tally

    def _rounded(
        self, module: Module, layers: Sequence[Layer], chosen: dict[str, int], ctx: Context
    ) -> Iterator[tuple[Layer, Quantized]]:
        """Each layer with its weight rounded, lazily: the caller replaces one before it asks for the next."""
        if self.method == "round" and not (self.clip and ctx.calibration):
            for layer in layers:
                data = layer.weight.tensor().double()
                yield layer, round_to_nearest(data, self._grid(chosen[layer.weight.id]), clip=self.clip)
            return
        if self.method == "awq" and not self.clip:
            yield from replace(self, method="round")._rounded(module, layers, chosen, ctx)
            return
        last: tuple[Moments, torch.Tensor] | None = None
        for layer, moments in in_order(module, layers, ctx.calibration):
            data, grid = layer.weight.tensor().double(), self._grid(chosen[layer.weight.id])
            products = moments.blocks(self.group) if self.clip else None
            if self.method != "gptq":
                yield layer, round_to_nearest(data, grid, clip=self.clip, products=products)
                continue
            if last is None or last[0] is not moments:  # queries, keys and values read one input
                last = moments, inverse_factor(moments)
            yield layer, round_with_feedback(data, grid, last[1], clip=self.clip, products=products)

    def _grid(self, bits: int) -> Grid:
        return Grid(bits, self.group, self.symmetric)

    def _replace(self, module: Module, layer: Layer, quantized: Quantized) -> list[Weight]:
        """Let the linear layers read integers; returns the new weights."""
        codes, grid = quantized.codes, quantized.grid
        kind = grid.dtype
        weights = [
            _add(module, f"{layer.weight.id}.{kind}", kind, codes),
            _add(module, f"{layer.weight.id}.scale", DType.F32, quantized.scales.scale),
        ]
        if not grid.symmetric:
            weights.append(_add(module, f"{layer.weight.id}.zero", kind, quantized.scales.zero))
        for linear in layer.linears:
            assert linear.graph is not None
            weight, scale, *zero = (linear.graph.weight(added) for added in weights)
            build = Builder(module, linear.graph, made_by=self.name)
            parts = {"x": linear.x, "weight": weight, "scale": scale, "bias": linear.bias}
            parts |= {"zero": zero[0]} if zero else {}
            build.replace(linear, ops.LinearGroupwise(**parts, group=grid.group))
        return weights


def _add(module: Module, id: str, dtype: DType, data: torch.Tensor) -> Weight:
    """A new weight of the module with numbers that the type holds exactly."""
    type = TensorType(dtype, tuple(data.shape))
    return module.add_weight(Weight(module.fresh_weight_id(id), type, TorchSource(data.to(dtype.to_torch()))))
