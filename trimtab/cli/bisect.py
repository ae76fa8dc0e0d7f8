"""``trimtab bisect``: find the pass and the rewrite that break a check, and write a small module that shows it."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.cli.calibration_files import CalibrationBatchOption, CalibrationOption, calibration_files
from trimtab.cli.command_options import DebugOption, JsonOption, ModelArgument

if TYPE_CHECKING:
    from trimtab.debug import Bisection, Reproducer


def bisect_command(
    model: ModelArgument,
    passes: Annotated[
        str | None,
        typer.Option(metavar="PIPELINE", help="Passes and groups, by default cleanup,fuse; see trimtab passes."),
    ] = None,
    check: Annotated[
        str,
        typer.Option(
            metavar="CHECK",
            help="rtol=1e-3[,atol=1e-8], exact, rounding or lossy, compared with MODEL; or check.py:function, which "
            "takes a module and returns whether it is right.",
        ),
    ] = "rtol=1e-3",
    inputs: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE.npz", help="Inputs to check on, one array per input (repeatable)."),
    ] = None,
    calibration: CalibrationOption = None,
    calibration_batch: CalibrationBatchOption = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Folder of the reproducer, by default reproducer-PASS."),
    ] = None,
    no_reproducer: Annotated[bool, typer.Option("--no-reproducer", help="Search only; write nothing.")] = False,
    evaluations: Annotated[
        int, typer.Option(min=0, metavar="N", help="Candidates to look at when reducing; 0 does not reduce.")
    ] = 400,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Look at every state instead of searching by halves.")
    ] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of everything random.")] = 0,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Find the pass, and the rewrite in it, after which MODEL is no longer right; write a small module that shows it.

    Exit code 0: nothing is wrong. 5: a pass is at fault.
    """
    from trimtab.atomic_file import check_new_folder
    from trimtab.cli.model_argument import load_model
    from trimtab.cli.progress import Stages, part, progress_bar
    from trimtab.errors import PassError

    if out is not None:
        check_new_folder(out)
    import trimtab
    from trimtab.debug import make_reproducer, write_reproducer
    from trimtab.passes.optimize import DEFAULT_PIPELINE

    with progress_bar("bisect") as bar:
        update = Stages(bar)
        update("import the model", 0.0)
        module = load_model(model)
        found = trimtab.bisect(
            module,
            DEFAULT_PIPELINE if passes is None else passes,
            check,
            inputs=_read_batches(inputs),
            calibration=calibration_files(module, calibration, calibration_batch, update.detail),
            seed=seed,
            thorough=thorough,
            progress=part(update, 0.1, 0.5),
        )
        reproducer = folder = None
        if found.culprit is not None and not no_reproducer:
            reduce = part(update, 0.5, 0.95)
            reproducer = make_reproducer(
                found, evaluations=evaluations, progress=lambda ops, done: reduce(f"reduce {ops}", done)
            )
            folder = out or _fresh_folder(found.culprit.application.pass_.name)
            write_reproducer(reproducer, folder)
    if json:
        from trimtab.cli.output import print_json

        print_json(_document(model, found, reproducer, folder))
    else:
        _print(found, reproducer, folder)
    if found.culprit is not None:
        raise typer.Exit(PassError.exit_code)


def _read_batches(paths: list[Path] | None) -> list[Any] | None:
    from trimtab.cli.input_files import read_arrays

    return [read_arrays(path) for path in paths or ()] or None


def _fresh_folder(name: str) -> Path:
    wish = Path(f"reproducer-{name}")
    return next(path for n in count(1) if not (path := wish if n == 1 else Path(f"{wish}-{n}")).exists())


def _document(model: str, found: Bisection, reproducer: Reproducer | None, folder: Path | None) -> dict[str, Any]:
    written = None if reproducer is None else {"folder": folder, **reproducer.to_dict()}
    return {"model": model, **found.to_dict(), "reproducer": written}


def _print(found: Bisection, reproducer: Reproducer | None, folder: Path | None) -> None:
    from trimtab.cli.output import console

    to = console()
    to.print(str(found), soft_wrap=True)
    if reproducer is None:
        return
    size = f"{len(reproducer.module.main.ops)} of {reproducer.ops_before} ops"
    to.print(f"reproducer {folder}: {size}, after {reproducer.evaluations} candidates", soft_wrap=True)
    for note in reproducer.notes:
        to.print(f"note      {note}", soft_wrap=True)
    if folder is not None and (folder / "reproduce.py").exists():
        to.print(f"run       python {folder / 'reproduce.py'}", soft_wrap=True)
