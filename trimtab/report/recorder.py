"""The observer that collects what a report shows: the rows of the passes and the graph before and after each."""

from __future__ import annotations

from typing import Any

from trimtab.errors import TrimtabError, UsageError
from trimtab.ir.core import Module
from trimtab.passes.base import Context
from trimtab.passes.observers import Observer, Step
from trimtab.passes.report import OptimizeReport
from trimtab.report.history import History


class ReportRecorder(Observer):
    """Records a run for :func:`~trimtab.report.page.write_page`. It keeps tables of numbers and texts, not modules.

    Args:
        title: what was optimized, for people.
    """

    def __init__(self, title: str = "") -> None:
        self.title = title
        self._report: OptimizeReport | None = None
        self._failure: dict[str, Any] | None = None
        self._failed_row: int | None = None
        self._history = History()
        self._snapshots: list[int] = []

    @property
    def has_started(self) -> bool:
        """Whether there is anything to show."""
        return bool(self._snapshots)

    def pipeline_started(self, module: Module, report: OptimizeReport, ctx: Context) -> None:
        self._report, self._history, self._snapshots = report, History(), []
        self._failure = self._failed_row = None

    def before_pass(self, step: Step) -> None:
        if not self._snapshots:  # not earlier: the module is verified when the pipeline starts
            self._snapshots.append(self._history.take(step.before))
        self._history.follow(step.before, step.after)

    def after_pass(self, step: Step) -> None:
        changed = step.row.changed
        self._snapshots.append(self._history.take(step.after) if changed else self._snapshots[-1])

    def pass_failed(self, step: Step, error: Exception) -> None:
        self.failed(error)
        self._failed_row = len(step.report.rows) - 1
        if self._snapshots:
            del self._snapshots[len(step.report.rows) :]  # an observer failed after this one had seen the pass
            self._snapshots.append(self._history.take(step.after, sound=False))

    def pipeline_finished(self, module: Module, report: OptimizeReport) -> None:
        if not self._snapshots:
            self._snapshots.append(self._history.take(module))

    def failed(self, error: BaseException) -> None:
        """Show ``error``, raised by the run, on the page; the first one given counts."""
        if self._failure is None:
            self._failure = (
                error.to_dict()
                if isinstance(error, TrimtabError)
                else {"code": type(error).__name__, "what": str(error) or type(error).__name__}
            )

    def to_dict(self) -> dict[str, Any]:
        """Everything that the page shows, as plain data.

        ``steps`` are the positions in ``snapshots`` of the module at the start and after each row of the report.

        Raises:
            UsageError: no pass has run yet.
        """
        if self._report is None or not self._snapshots:
            raise UsageError(
                "there is nothing to report yet",
                rule="a recorder collects while a pipeline runs",
                fix="give it to trimtab.optimize(..., observers=[recorder]) first",
            )
        return {
            "title": self.title,
            "report": self._report.to_dict(),
            "failure": self._failure,
            "failed_row": self._failed_row,
            "steps": list(self._snapshots),
            **self._history.to_dict(),
        }
