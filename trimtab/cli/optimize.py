"""``trimtab optimize``: run passes on a model and write the result as a module."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.cli.calibration_files import CalibrationBatchOption, CalibrationOption, calibration_files
from trimtab.cli.command_options import (
    DebugOption,
    JsonOption,
    ModelArgument,
    require_directory,
    split_counts,
)
from trimtab.cli.report_option import ReportOption, reporting
from trimtab.errors import UsageError

if TYPE_CHECKING:
    from trimtab.passes.observers import Observer


def optimize_command(
    model: ModelArgument,
    passes: Annotated[
        str | None,
        typer.Option(metavar="PIPELINE", help="Passes and groups, by default cleanup,fuse; see trimtab passes."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE.ttir", help="Write the module here, its weights beside it."),
    ] = None,
    dump: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the module's text before the first and after every pass.")
    ] = None,
    expect: Annotated[
        list[str] | None,
        typer.Option(metavar="OP=N", help="Fail unless the result has N ops of this kind (repeatable)."),
    ] = None,
    calibration: CalibrationOption = None,
    calibration_batch: CalibrationBatchOption = None,
    report: ReportOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run a pipeline on MODEL, show what each pass did and how far results moved, and write the module."""
    from trimtab.cli.model_argument import load_model
    from trimtab.cli.progress import Stages, progress_bar

    if output is not None:
        if output.suffix != ".ttir":
            raise UsageError("a module is written to a .ttir file", values={"output": output}, fix="-o out.ttir")
        require_directory(output, "--output")
    counts = split_counts("--expect", expect or (), "attention=12")
    import trimtab
    from trimtab.passes.optimize import DEFAULT_PIPELINE

    pipeline = DEFAULT_PIPELINE if passes is None else passes
    with progress_bar("optimize") as bar, reporting(report, model) as recorders:
        update = Stages(bar)
        update("import the model", 0.0)
        module = load_model(model)
        batches = calibration_files(module, calibration, calibration_batch, update.detail)
        observers = [*_observers(dump, update, pipeline), *recorders]
        result = trimtab.optimize(module, pipeline, calibration=batches, expect=counts or None, observers=observers)
        if output is not None:
            update("write", 0.95)
            start = time.perf_counter()
            trimtab.write(result.module, output)
            written = time.perf_counter() - start
    document = {
        "model": model,
        "output": str(output) if output is not None else None,
        "ops": sum(1 for _ in result.module.walk()),
        "weight_bytes": result.module.weight_bytes,
        "write_seconds": written if output is not None else 0.0,
        "calibration": {"batches": len(batches), "notes": batches.notes} if batches is not None else None,
        "report": result.report.to_dict(),
        "report_page": str(report) if report is not None else None,
    }
    if json:
        from trimtab.cli.output import print_json

        print_json(document)
    else:
        _print(document)


def _observers(dump: Path | None, update: Any, pipeline: str) -> list[Observer]:
    from trimtab.passes.observers import Dump, Observer, Step
    from trimtab.passes.pipeline import parse_pipeline

    total = max(1, sum(1 for _ in parse_pipeline(pipeline).passes))

    class ShowProgress(Observer):
        """Moves the bar at every pass; further rounds of a group share what is left."""

        def before_pass(self, step: Step) -> None:
            done = len(step.report.rows) - 1
            update(step.pass_.name, 0.1 + 0.85 * done / (done + total))

    return [ShowProgress(), *([Dump(dump)] if dump is not None else [])]


def _drift_text(drift: dict[str, Any] | None) -> str:
    if drift is None:
        return "not measured"
    return f"{drift['relative']:.2g} relative" if drift["differing"] else "none"


def _print(document: dict[str, Any]) -> None:
    from trimtab.cli.output import console, table, text_bytes, text_seconds

    report = document["report"]
    rows = table(
        f"Pipeline {report['pipeline']}",
        ["pass", "contract", "ops", "weights", "largest drift", "time", "checks"],
        ["ops", "weights", "time", "checks"],
    )
    unchanged = []
    for row in report["passes"]:
        if not row["changed"]:
            unchanged.append(row["text"])
            continue
        rows.add_row(
            row["text"],
            row["contract"],
            f"{row['ops_before']} -> {row['ops_after']}",
            text_bytes(row["weight_bytes_after"]),
            _drift_text(row["drift"]),
            text_seconds(row["seconds"]),
            text_seconds(row["check_seconds"]),
        )
    to = console()
    if rows.row_count:
        to.print(rows)
    else:
        to.print(rows.title)
    if unchanged:
        to.print(f"changed nothing: {', '.join(dict.fromkeys(unchanged))}")
    notes = [*(document["calibration"] or {"notes": []})["notes"], *report["notes"]]
    for note in [*notes, *(f"{row['text']}: {note}" for row in report["passes"] for note in row["notes"])]:
        to.print(f"note: {note}")
    checks = text_seconds(report["check_seconds"])
    to.print(
        f"{document['ops']} ops, {text_bytes(document['weight_bytes'])} of weights; "
        f"{text_seconds(report['seconds'])} in all, of which {checks} for checks"
    )
    if document["output"]:
        to.print(f"written to {document['output']}")
    if document["report_page"]:
        to.print(f"report in {document['report_page']}")
