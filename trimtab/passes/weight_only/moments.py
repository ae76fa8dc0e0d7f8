"""What the calibration data looks like where it enters a layer: sums over its rows, in memory that does not grow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from trimtab.errors import CalibrationError
from trimtab.ir import ops
from trimtab.ir.core import Module, Value
from trimtab.ir.dtypes import DType
from trimtab.ir.interpreter import interpret
from trimtab.ir.op import Op
from trimtab.passes.weight_only.layers import Layer, levels

_ROWS = 4096
"""Rows that are widened to float64 at a time."""


class Moments:
    """Sums over the rows of X ``[rows, K]``.

    Attributes:
        rows: their number.
        products: ``X^T X`` f64 ``[K, K]``.
        magnitudes: the sums of ``|X|``, f64 ``[K]``.
    """

    def __init__(self, size: int) -> None:
        self.rows = 0
        self.products = torch.zeros(size, size, dtype=torch.float64)
        self.magnitudes = torch.zeros(size, dtype=torch.float64)

    def update(self, tensor: torch.Tensor) -> None:
        """Take in rows ``[..., K]``."""
        rows = tensor.reshape(-1, tensor.shape[-1])
        self.rows += len(rows)
        for piece in rows.split(_ROWS):
            wide = piece.double()
            self.products.addmm_(wide.T, wide)
            self.magnitudes += wide.abs().sum(0)

    def __add__(self, other: Moments) -> Moments:
        total = Moments(len(self.magnitudes))
        total.rows = self.rows + other.rows
        total.products = self.products + other.products
        total.magnitudes = self.magnitudes + other.magnitudes
        return total

    def divided(self, divisor: torch.Tensor) -> Moments:
        """The sums of the rows whose channels are divided by ``divisor``, f64 ``[K]`` and positive."""
        made = Moments(len(divisor))
        made.rows = self.rows
        made.products = self.products / divisor / divisor[:, None]
        made.magnitudes = self.magnitudes / divisor
        return made

    def blocks(self, size: int) -> torch.Tensor:
        """The blocks of ``size`` on the diagonal of ``X^T X``: f64 ``[K / size, size, size]``."""
        count = len(self.magnitudes) // size
        grid = self.products.reshape(count, size, count, size)
        return grid.diagonal(dim1=0, dim2=2).permute(2, 0, 1)

    def error(self, difference: torch.Tensor) -> torch.Tensor:
        """``|X D^T|^2`` of each row of D f64 ``[N, K]``: f64 ``[N]``."""
        return ((difference @ self.products) * difference).sum(-1)


def gather(module: Module, linears: Sequence[ops.Linear], batches: Iterable[Sequence[torch.Tensor]]) -> list[Moments]:
    """The moments of the inputs of ``linears``, those of one value the same object, over all ``batches``.

    The module is evaluated up to the last of them. Where one is in a region, all iterations count.

    Raises:
        CalibrationError: an input holds NaN or infinities.
    """
    moments = {linear.x: Moments(_columns(linear)) for linear in linears}
    copy, watched = _tapped(module, linears)

    def observe(op: Op, results: Sequence[torch.Tensor]) -> None:
        for value, result in zip(op.results, results, strict=True):
            if value in watched:
                moments[watched[value]].update(result)

    for batch in batches:
        interpret(copy, batch, observer=observe)
    for linear in linears:
        if not bool(moments[linear.x].products.isfinite().all()):
            raise CalibrationError(
                "the input of a layer cannot be used for calibration",
                values={"weight": f"@{linear.weight.weight}"},
                rule="on the calibration data it holds NaN, infinities or numbers whose squares are infinite",
                fix="look at the model's outputs on this data",
                location=linear.location,
            )
    return [moments[linear.x] for linear in linears]


def in_order(
    module: Module, layers: Iterable[Layer], batches: Sequence[Sequence[torch.Tensor]]
) -> Iterator[tuple[Layer, Moments]]:
    """Each layer with the moments of its input, in order of execution.

    The caller replaces a layer before it asks for the next one: the inputs are then those that the layers before it
    make as they are by now. Layers that do not depend on each other share one pass over the data. A weight that is read
    several times has the sum of the moments.
    """
    for level in levels(module, layers):
        linears = list({linear.x: linear for layer in level for linear in layer.linears}.values())
        inputs = [linear.x for linear in linears]
        found = dict(zip(inputs, gather(module, linears, batches), strict=True))
        for layer in level:
            first, *others = (found[value] for value in layer.inputs)
            yield layer, sum(others, first)


def _columns(linear: ops.Linear) -> int:
    size = linear.weight.type.shape[-1]
    assert isinstance(size, int)  # weights have static types
    return size


def _tapped(module: Module, linears: Sequence[ops.Linear]) -> tuple[Module, dict[Value, Value]]:
    """A copy of ``module`` up to the last of ``linears``, and which of its results are their inputs.

    An input that no op makes, of a graph or of a region, is made the result of a cast to its own type.
    """
    copy = module.copy()
    twins = dict(zip(module.walk(), list(copy.walk()), strict=True))
    watched: dict[Value, Value] = {}
    makers: set[Op] = set()
    for linear in linears:
        twin = twins[linear]
        maker = twins[linear.x.producer] if linear.x.producer is not None else None
        if maker is None:
            assert twin.graph is not None
            maker = twin.graph.ops.insert_before(twin, ops.Cast(twin.operands[0], DType.F32))
        watched.setdefault(maker.results[linear.x.index if linear.x.producer is not None else 0], linear.x)
        makers.add(maker)
    copy.main.set_outputs([])
    for op in reversed(list(copy.main.ops)):
        if op in makers or any(inner in makers for region in op.regions for inner in region.walk()):
            break
        copy.main.ops.remove(op)
    return copy, watched
