"""How much a lossy rewrite loses, measured on the user's data: what passes keep ``max_drop`` by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.errors import UsageError
from trimtab.ir.core import Module
from trimtab.ir.interpreter import interpret
from trimtab.passes.base import Context

if TYPE_CHECKING:
    import torch


class Drop:
    """How much worse a changed module is than the original: by the user's metric, or by how far its outputs move.

    Args:
        module: the original.
        ctx: with a metric, whose fall is the drop, or calibration batches; the drop is then the mean, over batches and
            floating outputs, of the distance to the original's output relative to its length.
        name: of the pass, for messages.
        instead: what to use in the place of ``max_drop``, for messages.

    Raises:
        UsageError: there is neither.
    """

    def __init__(self, module: Module, ctx: Context, name: str, instead: str = "or leave max_drop out") -> None:
        if ctx.metric is None and not ctx.calibration:
            raise UsageError(
                f"{name} cannot keep to max_drop",
                values={"metric": None, "calibration batches": 0},
                rule="how much a model loses is measured by a metric, or on calibration data",
                fix=f"give optimize() a metric or calibration batches, {instead}",
            )
        self._ctx = ctx
        self._score = ctx.metric(module) if ctx.metric is not None else 0.0
        self._outputs = [] if ctx.metric is not None else [interpret(module, batch) for batch in ctx.calibration]

    def __call__(self, changed: Module) -> float:
        """The drop; not negative."""
        if self._ctx.metric is not None:
            return max(0.0, self._score - self._ctx.metric(changed))
        moved = [
            _distance(before, after)
            for batch, outputs in zip(self._ctx.calibration, self._outputs, strict=True)
            for before, after in zip(outputs, interpret(changed, batch), strict=True)
            if before.dtype.is_floating_point
        ]
        return sum(moved) / len(moved) if moved else 0.0


def _distance(before: torch.Tensor, after: torch.Tensor) -> float:
    length = float(before.double().norm())
    return float((after.double() - before.double()).norm()) / length if length else 0.0
