"""Deduplication of weights by content."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

from trimtab.errors import ParseError
from trimtab.ir.core import Module
from trimtab.ir.weights import ComputedSource, Weight
from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.contracts import Contract, Exact

_PROBES = 64


@dataclass(frozen=True)
class DedupWeights(Pass):
    """Keep one of several weights that have the same type and the same bytes.

    Only weights whose type and a few probed elements agree are hashed whole, so that a large model is not read for
    nothing. ``trainable=false`` keeps parameters apart that merely start out equal, for a module that will be trained.
    """

    name: ClassVar[str] = "dedup-weights"
    contract: ClassVar[Contract] = Exact()
    trainable: bool = True

    def run(self, module: Module, ctx: Context) -> Changed:
        alike: dict[Hashable, list[Weight]] = defaultdict(list)
        for weight in module.weights.values():
            if self.trainable or not weight.trainable:
                alike[(weight.type, weight.trainable)].append(weight)
        replaced: dict[str, Weight] = {}
        for candidates in alike.values():
            replaced |= _equal_weights(candidates) if len(candidates) > 1 else {}
        replaced = {id: keeper for id, keeper in replaced.items() if ctx.rewrites.permit(self.name)}
        for graph in module.all_graphs():
            for value in graph.weights:
                if value.weight in replaced:
                    value.replace_all_uses_with(graph.weight(replaced[value.weight]))
        for id in replaced:
            del module.weights[id]
        return bool(replaced)


def _equal_weights(weights: list[Weight]) -> dict[str, Weight]:
    """For each weight that equals an earlier one: the earlier one, by the id of the later."""
    similar: dict[Hashable, list[Weight]] = defaultdict(list)
    for weight in weights:
        # What is computed on demand would be computed for this comparison alone.
        if not isinstance(weight.source, ComputedSource):
            similar[_probe(weight)].append(weight)
    replaced = {}
    for group in similar.values():
        first: dict[Hashable, Weight] = {}
        for weight in group:
            keeper = first.setdefault(_content(weight) if len(group) > 1 else None, weight)
            if keeper is not weight:
                replaced[weight.id] = keeper
    return replaced


def _probe(weight: Weight) -> Hashable:
    """The bytes of a few elements; nothing for a module read without its data, whose weights have known hashes."""
    import torch

    try:
        flat = weight.tensor().reshape(-1)
    except ParseError:
        return None
    places = torch.linspace(0, max(flat.numel() - 1, 0), min(_PROBES, flat.numel()), dtype=torch.float64).long()
    return hashlib.sha256(flat[places].contiguous().view(torch.uint8).numpy().tobytes()).digest()


def _content(weight: Weight) -> Hashable:
    try:
        return weight.sha256
    except ParseError:
        return weight.id  # neither data nor hash: equal to nothing but itself
