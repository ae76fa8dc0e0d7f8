"""Where the integers, scales and zero points of a layer lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trimtab.backends.tvm.codegen.contraction import Contraction
from trimtab.backends.tvm.codegen.expression import loads_of


@dataclass(frozen=True)
class ScaledPanels:
    """The second factor of a contraction, ``(weight - zero) * scale``, in memory.

    Attributes:
        kind: of data, e.g. ``f32*i4``.
        weight: the load of an integer, of panels ``[panels, depth, columns]`` or ``[panels, depth / 4, columns, 4]``.
            With 4 bits an element of the panels is a byte with two integers, and the second axis half as long.
        scales: the buffer of their scales, ``[panels, depth / group, columns]``.
        zeros: the buffer of their zero points, of that shape; None where they are 0.
        zero_kind: ``s8`` or ``u8``, the type of the zero points; empty for none.
        columns: of a panel.
        group: consecutive k that share a scale.
    """

    kind: str
    weight: Any
    scales: Any
    zeros: Any
    zero_kind: str
    columns: int
    group: int

    @property
    def by_quads(self) -> bool:
        """Whether four consecutive k of a column are neighbours."""
        return len(self.weight.source.shape) == 4


def scaled_panels(contraction: Contraction) -> ScaledPanels:
    """The panels of a contraction whose stage names a kind of data; the rule wrote ``(weight - zero) * scale``."""
    kind, _, zero_kind = contraction.stage.scaled.partition("-")
    scale = loads_of(contraction.b.b)[0].source
    integers = contraction.b.a
    zeros = loads_of(integers.b)[0].source if zero_kind else None
    weight = loads_of(integers.a if zero_kind else integers)[0]
    groups, columns = (int(extent) for extent in scale.shape[1:])
    return ScaledPanels(kind, weight, scale, zeros, zero_kind, columns, int(contraction.depth) // groups)
