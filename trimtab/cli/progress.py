"""Progress of long work: a bar with the stage and the time left, on standard error and only when that is a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

Update: TypeAlias = Callable[[str, float], None]
"""Called with the name of the stage that begins and the fraction of all work done before it."""


@contextmanager
def progress_bar(title: str) -> Iterator[Update]:
    """A bar called ``title``; the value is the function to report progress with.

    Nothing is shown when standard error is not a terminal.
    """
    if not sys.stderr.isatty():
        yield lambda stage, fraction: None
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from trimtab.cli.output import console

    columns: list[Any] = [
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f}%", markup=False),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}", markup=False),
    ]
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=1.0, left="")
        started = time.monotonic()

        def update(stage: str, fraction: float) -> None:
            left = time_left(time.monotonic() - started, fraction)
            bar.update(task, description=f"{title}: {stage}", completed=fraction, left=left)

        yield update


class Stages:
    """Progress that knows its stage, so that work inside of a stage can say more and need not know of the rest."""

    def __init__(self, update: Update) -> None:
        self._update = update
        self._stage, self._fraction = "", 0.0

    def __call__(self, stage: str, fraction: float) -> None:
        self._stage, self._fraction = stage, fraction
        self._update(stage, fraction)

    def detail(self, text: str) -> None:
        """Say what is done inside of the stage."""
        self._update(f"{self._stage}, {text}" if self._stage else text, self._fraction)


def time_left(elapsed: float, fraction: float) -> str:
    """How long the rest takes at the pace so far, in words; empty while that is unknown."""
    if fraction <= 0.02:
        return ""
    seconds = elapsed * (1 - min(fraction, 1.0)) / fraction
    return f"about {seconds:.0f} s left" if seconds < 90 else f"about {seconds / 60:.0f} min left"


def part(update: Update, start: float, end: float) -> Update:
    """Progress of a piece of work that is the part from ``start`` to ``end`` of the whole."""
    return lambda stage, fraction: update(stage, start + fraction * (end - start))
