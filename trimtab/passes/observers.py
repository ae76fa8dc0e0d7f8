"""Observers: everything that watches a pipeline run. Passes themselves neither print, time nor verify.

Observers nest like context managers: the last one in the manager's list is told last before a pass and first after
it.  An observer that raises fails the pass.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trimtab.errors import PassError, UsageError, VerificationError
from trimtab.ir.core import Module
from trimtab.ir.printer import print_module
from trimtab.ir.verifier import verify
from trimtab.passes.base import Context, Pass
from trimtab.passes.report import OptimizeReport, PassRow


@dataclass(frozen=True)
class Step:
    """One application of a pass, as observers see it.

    Attributes:
        pass_: the pass.
        before: the module before it; observers only read it.
        after: the working copy that the pass edits.
        row: the pass's row of the report, the last of its rows.
        report: the report so far.
        ctx: what the passes of this run share.
    """

    pass_: Pass
    before: Module
    after: Module
    row: PassRow
    report: OptimizeReport
    ctx: Context

    @property
    def place(self) -> str:
        """Where the run stood: the pass and the ones that ran before it."""
        index = next(i for i, row in enumerate(self.report.rows) if row is self.row)
        earlier = ", ".join(row.text for row in self.report.rows[:index])
        return f"pass {self.row.text}, " + (f"after {earlier}" if earlier else "the first to run")


class Observer:
    """Base of observers: every method may be overridden, none must be."""

    def pipeline_started(self, module: Module, report: OptimizeReport, ctx: Context) -> None:
        """Before the first pass; ``module`` is what the pipeline will run on."""

    def before_pass(self, step: Step) -> None:
        """Before each application of a pass."""

    def after_pass(self, step: Step) -> None:
        """After a pass returned; ``step.row.changed`` says whether it changed the module."""

    def pass_failed(self, step: Step, error: Exception) -> None:
        """After a pass or an observer of it raised; ``step.after`` is the module as the pass left it."""

    def pipeline_finished(self, module: Module, report: OptimizeReport) -> None:
        """After the last pass, when none failed."""


@contextmanager
def counted(row: PassRow) -> Iterator[None]:
    """Add the time spent inside to the row's ``check_seconds``."""
    started = time.perf_counter()
    try:
        yield
    finally:
        row.check_seconds += time.perf_counter() - started


class Timing(Observer):
    """Fills ``seconds`` of each row. Last in the list, so that it measures the pass alone."""

    def __init__(self) -> None:
        self._started = 0.0

    def before_pass(self, step: Step) -> None:
        self._started = time.perf_counter()

    def after_pass(self, step: Step) -> None:
        step.row.seconds = time.perf_counter() - self._started


class Verify(Observer):
    """Verifies the module at the start and after every pass that changed it."""

    def pipeline_started(self, module: Module, report: OptimizeReport, ctx: Context) -> None:
        verify(module)

    def after_pass(self, step: Step) -> None:
        if not step.row.changed:
            return
        with counted(step.row):
            try:
                verify(step.after)
            except VerificationError as error:
                raise PassError(
                    f"the pass {step.pass_.name} left a module that does not verify: {error.what}",
                    values=error.values,
                    rule=error.rule,
                    fix="the module before the pass was correct, so the fault is in the pass",
                    where=f"{error.where}\n  in {step.place}" if error.where else step.place,
                    location=error.location,
                ) from error


class Dump(Observer):
    """Writes the IR's text into a folder: the input, the module after each pass that changed it, and after a failure.

    Files are numbered in the order of passes: ``000-input.ttir``, ``003-cse.ttir``, ``004-mine-failed.ttir``.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)

    def pipeline_started(self, module: Module, report: OptimizeReport, ctx: Context) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                "cannot make the folder for dumps", values={"folder": self._folder}, rule=str(error)
            ) from error
        self._write("000-input", module)

    def after_pass(self, step: Step) -> None:
        if step.row.changed:
            self._write(f"{len(step.report.rows):03}-{step.pass_.name}", step.after)

    def pass_failed(self, step: Step, error: Exception) -> None:
        self._write(f"{len(step.report.rows):03}-{step.pass_.name}-failed", step.after)

    def _write(self, name: str, module: Module) -> None:
        path = self._folder / f"{name}.ttir"
        try:
            # Without hashes: the text is for people, and hashing would read every weight.
            path.write_text(print_module(module, hashes=False), encoding="utf-8")
        except OSError as error:
            raise UsageError("cannot write a dump", values={"file": path}, rule=str(error)) from error
