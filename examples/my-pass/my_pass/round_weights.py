"""A whole-graph pass: ``run`` gets the module and does with it what it likes."""

from dataclasses import dataclass
from typing import ClassVar

from trimtab.ir.core import Module
from trimtab.ir.dtypes import DType
from trimtab.ir.weights import ComputedSource, Weight
from trimtab.passes import Changed, Context, Contract, Lossy, Pass


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Round float32 weights of at least ``min_elements`` elements to the precision of bfloat16."""

    name: ClassVar[str] = "round-weights"
    contract: ClassVar[Contract] = Lossy()
    min_elements: int = 1024

    def run(self, module: Module, ctx: Context) -> Changed:
        large = [
            w for w in module.weights.values() if w.type.dtype is DType.F32 and w.type.elements >= self.min_elements
        ]
        for weight in large:
            if ctx.rewrites.permit(self.name):
                source = ComputedSource(lambda old=weight: old.tensor().bfloat16().float())
                module.weights[weight.id] = Weight(weight.id, weight.type, source, trainable=weight.trainable)
        ctx.note(f"{len(large)} of {len(module.weights)} weights rounded")
        return bool(large)
