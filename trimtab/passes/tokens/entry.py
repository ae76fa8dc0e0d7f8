"""Reductions that are made before a layer, at its residual, instead of between attention and MLP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from trimtab.ir.core import Value
from trimtab.ir.ops import Full
from trimtab.passes.tokens.assignment import made_up
from trimtab.passes.tokens.reduction import TokenReduction
from trimtab.passes.tokens.rows import joined, span
from trimtab.passes.tokens.schedules import Removals
from trimtab.passes.tokens.shortening import Place, Plan
from trimtab.passes.tokens.stream import Blocker, Layer, Stream


@dataclass(frozen=True)
class EntryReduction(TokenReduction):
    """Base of passes that reduce tokens before layers: the layer itself already computes with what is left."""

    def plan(self, stream: Stream, removals: Removals, layers: Sequence[int]) -> Plan:
        """Where to reduce: at the residuals of ``layers``."""
        return Plan(
            {
                stream.layers[number].residual: (number, partial(self.reduce, removed=removed))
                for number, removed in zip(layers, removals, strict=True)
                if removed
            },
            {},
            self.unmerge,
        )

    def blockers(self, layer: Layer) -> tuple[Blocker, ...]:
        """What needs the tokens that the layer begins with."""
        return layer.entry_blockers


def at_shares(layers: int, *shares: float) -> list[int]:
    """Numbers of layers before which about ``shares`` of ``layers`` lie: not the first, unless there is no other."""
    found = {min(int(layers * share + 0.5), layers - 1) for share in shares}
    return sorted(found - {0}) or [0]


def sizes_for_all(place: Place, count: int, kept: Value | None = None) -> Value:
    """``[B, protected + count, 1]``: sizes of the tokens that are left, which count for all that there were.

    Args:
        place: where; the protected tokens keep their sizes.
        count: how many tokens are left of the others.
        kept: ``[B, count, 1]``, their sizes, which are scaled; None for equal parts.
    """
    build, batch = place.build, place.x.type.shape[0]
    if place.sizes is None:
        dtype = place.x.type.dtype
        ones = build(Full(1.0, dtype, (batch, place.protected, 1)))
        return joined(build, ones, build(Full((place.tokens - place.protected) / count, dtype, (batch, count, 1))))
    dtype = place.sizes.type.dtype
    first = span(build, place.sizes, 0, place.protected)
    parts = kept if kept is not None else build(Full(1.0, dtype, (batch, count, 1)))
    return made_up(build, joined(build, first, parts), place.sizes, place.protected)
