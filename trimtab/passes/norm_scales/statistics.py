"""What the channels of links hold on calibration data: their ranges, and a sample of rows, in constant memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trimtab.errors import CalibrationError, UsageError
from trimtab.ir.core import Module, Value
from trimtab.ir.interpreter import interpret
from trimtab.ir.op import Op
from trimtab.passes.base import Context
from trimtab.passes.norm_scales.links import Link


@dataclass
class Statistics:
    """What the channels of one link held.

    Attributes:
        low, high: f64 ``[C]``, the smallest and largest number of each channel.
        rows: f32 or f64 ``[n, C]``, a uniform sample of all rows without replacement; empty when none was asked for.
    """

    low: torch.Tensor
    high: torch.Tensor
    rows: torch.Tensor

    @property
    def largest(self) -> torch.Tensor:
        """The largest magnitude of each channel, f64 ``[C]``."""
        return torch.maximum(self.low.abs(), self.high.abs())


def gather_statistics(
    module: Module, links: Sequence[Link], ctx: Context, name: str, rows: int = 0
) -> list[Statistics]:
    """The statistics of each link, of one evaluation of ``module`` on each calibration batch.

    Args:
        module: as the links were found in it.
        links: the places.
        ctx: with calibration batches.
        name: of the pass, for messages and its random numbers.
        rows: the largest number of rows to keep of each link.

    Raises:
        UsageError: there is no calibration batch.
        CalibrationError: a value holds NaN or infinities, or none at all; the message names batch and value.
    """
    if not ctx.calibration:
        raise UsageError(
            f"{name} needs calibration data",
            values={"calibration batches": 0},
            rule="how large each channel gets is measured on real inputs",
            fix="give optimize() calibration batches, or the command line --calibration data.npz",
        )
    gathered = {link.value: _Gathered(link, rows, ctx.generator(f"{name} {i}")) for i, link in enumerate(links)}
    for number, batch in enumerate(ctx.calibration):

        def observe(op: Op, results: Sequence[Any], number: int = number) -> None:
            for value, data in zip(op.results, results, strict=True):
                if value in gathered:
                    gathered[value].add(data, number)

        interpret(module, batch, observer=observe)
    return [gathered[link.value].result() for link in links]


class _Gathered:
    """Running statistics of a link. A row is in the sample while its random key is among the smallest."""

    def __init__(self, link: Link, rows: int, generator: torch.Generator) -> None:
        self._link = link
        self._count = rows
        self._generator = generator
        self._low = torch.full((link.width,), float("inf"), dtype=torch.float64)
        self._high = -self._low
        self._rows = torch.empty(0, link.width)
        self._keys = torch.empty(0, dtype=torch.float64)

    def add(self, data: torch.Tensor, batch: int) -> None:
        table = self._link.by_channel(data)
        if not len(table):
            return
        low, high = (x.double() for x in torch.aminmax(table, dim=0))
        if not bool((low.isfinite() & high.isfinite()).all()):
            raise CalibrationError(
                "a value is NaN or infinite on calibration data",
                values={"value": _text(self._link.value), "elements": int((~table.isfinite()).sum())},
                rule="statistics of such data are meaningless",
                fix="look at the batch, and at whether the model can be evaluated on it",
                where=f"calibration batch {batch}",
                location=self._link.at.location,
            )
        self._low, self._high = torch.minimum(self._low, low), torch.maximum(self._high, high)
        if self._count:
            keys = torch.rand(len(table), generator=self._generator, dtype=torch.float64)
            near = torch.argsort(keys)[: self._count]
            rows, keys = torch.cat((self._rows.to(table.dtype), table[near])), torch.cat((self._keys, keys[near]))
            kept = torch.argsort(keys)[: self._count]
            self._rows, self._keys = rows[kept], keys[kept]

    def result(self) -> Statistics:
        if not bool(self._low.isfinite().all()):
            raise CalibrationError(
                "a value has no elements on calibration data",
                values={"value": _text(self._link.value)},
                fix="give batches that are not empty",
            )
        return Statistics(self._low, self._high, self._rows)


def _text(value: Value) -> str:
    return repr(value)
