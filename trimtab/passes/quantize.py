"""Post-training quantization of linear layers and convolutions to products of integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from trimtab.errors import PassError, UsageError
from trimtab.ir.core import Module
from trimtab.ir.rewrite.log import RuleLog
from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.contracts import Contract, Lossy
from trimtab.passes.drop import Drop
from trimtab.passes.quantization.bits import FLOAT, Bits, fewest_changes
from trimtab.passes.quantization.inputs import Wanted, see_inputs
from trimtab.passes.quantization.integer_layers import IntegerLayers
from trimtab.passes.quantization.layer_facts import layer_facts
from trimtab.passes.quantization.preparation import Preparation
from trimtab.passes.quantization.residual import round_residuals
from trimtab.passes.quantization.sites import Site, find_sites
from trimtab.passes.quantization.timing import Times, Timing


@dataclass(frozen=True)
class Quantize(Pass):
    """Compute linear layers and convolutions as products of 8-bit integers, with all else in float.

    Weights have a scale for each output channel, inputs one for the whole tensor with a zero point, from calibration
    data (``inputs=tensor``), or one for each row that is computed as it comes and needs no data (``inputs=row``, which
    leaves convolutions in float). The residual stream, norms, softmax, attention and convolutions with groups stay in
    float; an input that several layers read is rounded once, and a weight that several read stays one.

    ``bits`` and ``input_bits`` (0: as ``bits``) may be fewer than 8; the products are still those of bytes. Layers that
    read the module's input or make its output keep ``edge_bits``. ``observer`` finds the range of an input: minmax,
    moving, percentile, mse or entropy. ``factors`` moves sizes of input channels into the weights where that makes the
    product better. ``search``, which fewer bits always do, looks for clipping ranges that do. ``feedback`` rounds
    weights column by column, each making up for the errors of those before it (GPTQ), which takes longer.

    With ``max_drop``, the layers that lose most keep 8 bits or stay in float, as few as are needed to lose no more than
    that of the metric, or on calibration data of the outputs' relative distance; with ``fallback=false`` the pass
    refuses instead and says which layers these would be. ``residual=true`` rounds the residual stream as well, which
    ruins transformers: it is there to show that.

    ``statistics`` names a file that keeps the ranges of the calibration data: it is written where there is none, and
    read, instead of the data, where there is one of the same module and observer. Factors and feedback need the data.
    """

    name: ClassVar[str] = "quantize"
    contract: ClassVar[Contract] = Lossy()
    grows_weights: ClassVar[bool] = True  # by scales, where a weight is smaller than these
    bits: int = 8
    input_bits: int = 0
    edge_bits: int = 8
    inputs: Literal["tensor", "row"] = "tensor"
    observer: str = "minmax"
    search: bool = False
    factors: bool = True
    feedback: bool = False
    max_drop: float = 0.0
    fallback: bool = True
    measured: bool = False
    residual: bool = False
    statistics: str = ""

    def run(self, module: Module, ctx: Context) -> Changed:
        self._check(ctx)
        log = ctx.rewrites.of(self.name)
        sites = find_sites(module, log)
        log.matched += len(sites)
        allowed = [ctx.rewrites.permit(self.name, site.op) for site in sites]
        wanted = [self._bits(site) if its else FLOAT for site, its in zip(sites, allowed, strict=True)]
        if not any(allowed):
            return False
        inputs = self._prepare(module, sites, ctx)
        times = self._times(module, sites, inputs, ctx)
        wanted = [bits if n not in times or times[n].gains else FLOAT for n, bits in enumerate(wanted)]
        chosen, alone = self._within_drop(module, wanted, inputs, ctx) if self.max_drop else (wanted, [])
        for facts in layer_facts(module, sites, chosen, inputs, ctx.calibration):
            ctx.record(
                facts.to_dict()
                | ({"sensitivity": alone[facts.number]} if alone else {})
                | (times[facts.number].to_dict() if times else {})
            )
        self._rewrite(module, chosen, inputs)
        if self.residual:
            round_residuals(module, ctx.calibration, self.name)
        floats = sum(bits == FLOAT for bits in chosen)
        ctx.note(f"{len(sites) - floats} layers compute with integers" + (f", {floats} in float" * bool(floats)))
        return floats < len(sites) or self.residual

    def _check(self, ctx: Context) -> None:
        for option in ("bits", "input_bits", "edge_bits"):
            value = getattr(self, option)
            if not (2 <= value <= 8 or (option == "input_bits" and value == 0)):
                raise UsageError(f"quantize takes from 2 to 8 {option}", values={option: value})
        known = self.statistics and Path(self.statistics).exists()
        if self.inputs == "tensor" and not known and not ctx.calibration:
            raise UsageError(
                "quantize has no data to find the ranges of inputs from",
                values={"inputs": self.inputs, "calibration batches": 0},
                rule="a scale for a whole tensor is chosen beforehand, from real inputs",
                fix="give calibration data (`--calibration data.npz`), or scales for each row: quantize{inputs=row}",
            )

    def _bits(self, site: Site) -> Bits:
        if site.is_convolution and self.inputs == "row":
            return FLOAT  # a window has elements of many rows
        least = self.edge_bits if site.is_edge else 0
        return Bits(max(least, self.bits), max(least, self.input_bits or self.bits))

    def _times(self, module: Module, sites: Sequence[Site], inputs: Preparation, ctx: Context) -> dict[int, Times]:
        """How long each site takes, by its number; nothing when that is not asked for."""
        if not self.measured:
            return {}
        if ctx.seconds is None:
            raise UsageError(
                "quantize cannot measure layers here",
                values={"measured": True},
                rule="they are compiled for the target and timed, which trimtab.compile offers where its code can run",
                fix="compile on such a machine, or leave measured out",
            )
        timing = Timing(module, ctx.seconds)
        return {
            n: timing.of(site, inputs.rounding(n, bits), inputs.weight(n, bits))
            for n, site in enumerate(sites)
            for bits in [self._bits(site)]
            if bits != FLOAT
        }

    def _prepare(self, module: Module, sites: Sequence[Site], ctx: Context) -> Preparation:
        by_tensor, has_data = self.inputs == "tensor", bool(ctx.calibration)
        wanted = Wanted(
            self.observer if by_tensor else "", by_tensor and self.factors and has_data, self.feedback and has_data,
            self.statistics if by_tensor else "",
        )  # fmt: skip
        of_linear = {site.x for site in sites} - {site.x for site in sites if site.is_convolution}
        seen = see_inputs(module, list(dict.fromkeys(site.x for site in sites)), of_linear, wanted, ctx, self.name)
        return Preparation(module, sites, seen, self.search or self.bits < 8)

    def _rewrite(self, module: Module, chosen: Sequence[Bits], preparation: Preparation) -> Module:
        """Replace the sites of ``module``, which have ``chosen`` bits in their order."""
        layers = IntegerLayers(module, self.name)
        for number, (site, bits) in enumerate(zip(find_sites(module, RuleLog(self.name)), chosen, strict=True)):
            if bits != FLOAT:
                layers.replace(site, preparation.rounding(number, bits), preparation.weight(number, bits))
        module.drop_unused_weights()
        return module

    def _within_drop(
        self, module: Module, wanted: Sequence[Bits], inputs: Preparation, ctx: Context
    ) -> tuple[Sequence[Bits], Sequence[float]]:
        """Bits for each site with which no more than ``max_drop`` is lost, and what each loses alone.

        Raises:
            PassError: there must be other bits than those that are wanted, and no fallback is allowed.
        """
        drop = Drop(module, ctx, self.name)
        found = fewest_changes(wanted, lambda trial: drop(self._rewrite(module.copy(), trial, inputs)), self.max_drop)
        changed = [n for n, (before, after) in enumerate(zip(wanted, found.bits, strict=True)) if before != after]
        if changed and not self.fallback:
            sites = find_sites(module, RuleLog(self.name))
            raise PassError(
                "quantize loses more than max_drop",
                values={"lost": round(found.lost_at_first, 6), "max_drop": self.max_drop},
                rule=f"{len(changed)} of {len(sites)} layers would have to keep more bits: "
                + ", ".join(f"{sites[n].label}: {found.bits[n]}" for n in changed[:8]) + ", ..." * (len(changed) > 8),
                fix="allow that with fallback=true, or give a larger max_drop",
            )  # fmt: skip
        ctx.note(f"loses {found.lost:.3g} of {self.max_drop:g}; {found.lost_at_first:.3g} with all layers as wanted")
        return found.bits, found.alone
