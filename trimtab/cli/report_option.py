"""The option ``--report``: a page about a run of passes, written also when the run fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from trimtab.cli.command_options import require_directory
from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    from trimtab.passes.observers import Observer

ReportOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE.html",
        help="Write a page that shows what each pass did and the graph before and after it, also when a pass fails.",
    ),
]


@contextmanager
def reporting(path: Path | None, title: str) -> Iterator[list[Observer]]:
    """Record the runs inside for a page that is written to ``path`` at the end.

    Args:
        path: the page; None for none.
        title: what is optimized, for people.

    Yields:
        The observers to run with.

    Raises:
        UsageError: the page cannot be written there; raised before anything runs.
        MissingDependencyError: the extra ``report`` is not installed; raised before anything runs.
    """
    if path is None:
        yield []
        return
    require_directory(path, "--report")
    from trimtab.report import ReportRecorder, require_libraries, write_page

    require_libraries()
    recorder = ReportRecorder(title)
    try:
        yield [recorder]
    except Exception as error:
        recorder.failed(error)
        if recorder.has_started:
            with suppress(TrimtabError):  # a page that cannot be written must not hide why the run failed
                write_page(path, recorder)
        raise
    write_page(path, recorder)
