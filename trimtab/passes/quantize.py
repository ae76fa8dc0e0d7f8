"""Post-training quantization of linear layers to products of integers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from trimtab.errors import PassError, UsageError
from trimtab.ir.core import Module, Value
from trimtab.ir.rewrite.log import RuleLog
from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.contracts import Contract, Lossy
from trimtab.passes.drop import Drop
from trimtab.passes.quantization.bits import FLOAT, Bits, fewest_changes
from trimtab.passes.quantization.integer_layers import IntegerLayers
from trimtab.passes.quantization.layer_facts import layer_facts
from trimtab.passes.quantization.observers import Observer, make_observer
from trimtab.passes.quantization.residual import round_residuals
from trimtab.passes.quantization.scales import Affine, Integers
from trimtab.passes.quantization.sites import Site, find_sites
from trimtab.passes.quantization.statistics import observe
from trimtab.passes.quantization.statistics_file import load_statistics, save_statistics

Inputs = dict[tuple[int, int], "Affine | Integers"]
"""How inputs become integers, by the number of the site and the bits."""


@dataclass(frozen=True)
class Quantize(Pass):
    """Compute linear layers as products of 8-bit integers, with all else in float.

    Weights have a scale for each output channel, inputs one for the whole tensor with a zero point, from calibration
    data (``inputs=tensor``), or one for each row that is computed as it comes and needs no data (``inputs=row``). The
    residual stream, norms, softmax and attention stay in float; an input that several layers read is rounded once, and
    a weight that several read stays one.

    ``bits`` and ``input_bits`` (0: as ``bits``) may be fewer than 8; the products are still those of bytes. Layers that
    read the module's input or make its output keep ``edge_bits``. ``observer`` finds the range of an input: minmax,
    moving, percentile, mse or entropy. ``search`` looks for the clipping range of each row of a weight with the least
    squared error.

    With ``max_drop``, the layers that lose most keep 8 bits or stay in float, as few as are needed to lose no more than
    that of the metric, or on calibration data of the outputs' relative distance; with ``fallback=false`` the pass
    refuses instead and says which layers these would be. ``residual=true`` rounds the residual stream as well, which
    ruins transformers: it is there to show that.

    ``statistics`` names a file that keeps what was seen of the calibration data: it is written where there is none, and
    read, instead of the data, where there is one of the same module and observer.
    """

    name: ClassVar[str] = "quantize"
    contract: ClassVar[Contract] = Lossy()
    bits: int = 8
    input_bits: int = 0
    edge_bits: int = 8
    inputs: Literal["tensor", "row"] = "tensor"
    observer: str = "minmax"
    search: bool = False
    max_drop: float = 0.0
    fallback: bool = True
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
        inputs = self._inputs(module, sites, ctx)
        chosen, alone = self._within_drop(module, wanted, inputs, ctx) if self.max_drop else (wanted, [])
        for facts in layer_facts(module, sites, chosen, inputs, ctx.calibration):
            ctx.record(facts.to_dict() | ({"sensitivity": alone[facts.number]} if alone else {}))
        self._rewrite(module, chosen, inputs)
        if self.residual:
            round_residuals(module, ctx.calibration, self.name)
        floats = sum(bits is FLOAT for bits in chosen)
        ctx.note(f"{len(sites) - floats} linear layers compute with integers" + (f", {floats} in float" * bool(floats)))
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
        least = self.edge_bits if site.is_edge else 0
        return Bits(max(least, self.bits), max(least, self.input_bits or self.bits))

    def _inputs(self, module: Module, sites: Sequence[Site], ctx: Context) -> Inputs:
        """How the input of each site becomes integers, with the bits it is to have and with 8."""
        wanted = [(n, bits) for n, site in enumerate(sites) for bits in sorted({8, self._bits(site).inputs})]
        if self.inputs == "row":
            return {(n, bits): Integers.symmetric(bits) for n, bits in wanted}
        seen = self._statistics(module, dict.fromkeys(site.x for site in sites), ctx)
        how: dict[tuple[Value, int], Affine] = {}
        for n, bits in wanted:
            x = sites[n].x
            if (x, bits) not in how:
                observer = make_observer(self.observer, bits=bits)
                observer.load(seen[x].state())
                how[x, bits] = Affine.of_range(*observer.range(), Integers.affine(bits))
        return {(n, bits): how[sites[n].x, bits] for n, bits in wanted}

    def _statistics(self, module: Module, values: Iterable[Value], ctx: Context) -> Mapping[Value, Observer]:
        """What observers saw of ``values``: in the file of an earlier run, or on the calibration data."""
        path = Path(self.statistics)
        if self.statistics and path.exists():
            return load_statistics(path, module)
        watched = {value: make_observer(self.observer) for value in values}
        observe(module, watched, ctx.calibration, what=self.name)
        if self.statistics:
            save_statistics(path, module, watched)
        return watched

    def _rewrite(self, module: Module, chosen: Sequence[Bits], inputs: Inputs) -> Module:
        """Replace the sites of ``module``, which have ``chosen`` bits in their order."""
        layers = IntegerLayers(module, self.name, self.search or self.bits < 8)
        for number, (site, bits) in enumerate(zip(find_sites(module, RuleLog(self.name)), chosen, strict=True)):
            if bits is not FLOAT:
                layers.replace(site, bits.weights, inputs[number, bits.inputs])
        module.drop_unused_weights()
        return module

    def _within_drop(
        self, module: Module, wanted: Sequence[Bits], inputs: Inputs, ctx: Context
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
