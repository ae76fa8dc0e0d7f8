"""What is seen of the inputs of layers on calibration data, in one walk: ranges, and if wanted samples and moments."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from trimtab.errors import CalibrationError
from trimtab.ir.core import Module, Value
from trimtab.passes.base import Context
from trimtab.passes.quantization.observers import Observer, make_observer
from trimtab.passes.quantization.samples import InputSample
from trimtab.passes.quantization.statistics import Watcher, observe
from trimtab.passes.quantization.statistics_file import load_statistics, save_statistics
from trimtab.passes.weight_only.moments import Moments


@dataclass(frozen=True)
class Wanted:
    """What to see.

    Attributes:
        observer: the kind that finds ranges; empty for no ranges.
        samples: keep rows, to choose factors of channels by.
        moments: sum products of channels, to round weights with feedback.
        statistics: a file that keeps the observers; empty for none.
    """

    observer: str
    samples: bool
    moments: bool
    statistics: str


@dataclass
class SeenInputs:
    """What was seen of each input.

    Attributes:
        observers: of the ranges; empty when none were wanted.
        samples, moments: the same of these.
    """

    observers: dict[Value, Observer] = field(default_factory=dict)
    samples: dict[Value, InputSample] = field(default_factory=dict)
    moments: dict[Value, Moments] = field(default_factory=dict)

    def range(self, x: Value, bits: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Low and high of an input for integers of ``bits``; None when there are no ranges."""
        if not self.observers:
            return None
        seen = self.observers[x]
        same = make_observer(seen.kind, **{**seen.options, "bits": bits})
        same.load(seen.state())
        return same.range()


def see_inputs(
    module: Module, inputs: Sequence[Value], rows: Collection[Value], wanted: Wanted, ctx: Context, what: str
) -> SeenInputs:
    """Run ``module`` on the calibration data, if there is any need to, and see ``inputs``.

    Samples and moments are of those in ``rows``, whose last axis is that of the channels.

    Raises:
        CalibrationError: there is no data but need for it, it is not finite, or the file of statistics does not fit.
    """
    known = bool(wanted.statistics) and Path(wanted.statistics).exists()
    seen = SeenInputs()
    if known:
        seen.observers = load_statistics(wanted.statistics, module)
        _check_kinds(seen.observers, wanted)
    elif wanted.observer:
        seen.observers = {x: make_observer(wanted.observer) for x in inputs}
    if wanted.samples:
        seen.samples = {x: InputSample(ctx.generator(f"{what} {n}")) for n, x in enumerate(inputs) if x in rows}
    if wanted.moments:
        seen.moments = {x: Moments(_channels(x)) for x in inputs if x in rows}
    watched = {x: _All(_watchers(seen, x, known)) for x in inputs}
    if any(its.watchers for its in watched.values()):
        observe(module, watched, ctx.calibration, what=what)
    if wanted.statistics and not known:
        save_statistics(wanted.statistics, module, seen.observers)
    return seen


def _check_kinds(observers: Mapping[Value, Observer], wanted: Wanted) -> None:
    kinds = {observer.kind for observer in observers.values()}
    if kinds != {wanted.observer}:
        raise CalibrationError(
            "a file of statistics is of another observer",
            values={"file": wanted.statistics, "observer": ", ".join(sorted(kinds)), "wanted": wanted.observer},
            fix="ask for that observer, or remove the file",
        )


def _watchers(seen: SeenInputs, x: Value, known: bool) -> list[Watcher]:
    found: list[Watcher | None] = [seen.samples.get(x), seen.moments.get(x), None if known else seen.observers.get(x)]
    return [watcher for watcher in found if watcher is not None]


def _channels(x: Value) -> int:
    size = x.type.shape[-1]
    assert isinstance(size, int)  # it meets a weight
    return size


class _All:
    """Several watchers of one value."""

    def __init__(self, watchers: Sequence[Watcher]) -> None:
        self.watchers = watchers

    def update(self, tensor: torch.Tensor) -> None:
        for watcher in self.watchers:
            watcher.update(tensor)
