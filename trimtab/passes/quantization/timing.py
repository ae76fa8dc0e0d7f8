"""How long a layer takes in float and with integers on the target, each compiled and run by itself."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from trimtab.ir.builder import Builder
from trimtab.ir.core import Module
from trimtab.ir.rewrite.log import RuleLog
from trimtab.passes.base import Seconds
from trimtab.passes.quantization.integer_layers import IntegerLayers
from trimtab.passes.quantization.preparation import Rounding, Stored
from trimtab.passes.quantization.sites import Site, find_sites


@dataclass(frozen=True)
class Times:
    """Seconds of one layer, the rounding of its input included."""

    in_float: float
    in_integers: float

    @property
    def gains(self) -> bool:
        """Whether integers are faster."""
        return self.in_integers < self.in_float

    def to_dict(self) -> dict[str, float]:
        return {"float_ms": 1e3 * self.in_float, "integer_ms": 1e3 * self.in_integers}


class Timing:
    """Times layers, those of equal shapes once.

    Args:
        module: that the layers are in.
        seconds: compiles a module for the target and times it.
    """

    def __init__(self, module: Module, seconds: Seconds) -> None:
        self._module = module
        self._seconds = seconds
        self._known: dict[Hashable, Times] = {}

    def of(self, site: Site, rounding: Rounding, weight: Stored) -> Times:
        """The times of a layer."""
        op = site.op
        per_channel, bias = rounding.factors is not None, op.bias is not None
        window = tuple(op.attributes.items())
        key = (site.x.type, op.weight.type, window, bias, type(rounding.how), per_channel)
        if key not in self._known:
            alone = self._alone(site)
            in_float = self._seconds(alone)
            (twin,) = find_sites(alone, RuleLog(""))
            IntegerLayers(alone, "").replace(twin, rounding, weight)
            alone.drop_unused_weights()
            self._known[key] = Times(in_float, self._seconds(alone))
        return self._known[key]

    def _alone(self, site: Site) -> Module:
        """A module of this layer only."""
        build, op = Builder(), site.op
        data = [self._module.weights[value.weight].tensor() for value in op.operands[1:] if value.is_weight]
        weight, *bias = [build.weight(f"w{n}", tensor) for n, tensor in enumerate(data)]
        build.output(build(op.rebuilt([build.input("x", site.x.type), weight, *bias])))
        return build.module
