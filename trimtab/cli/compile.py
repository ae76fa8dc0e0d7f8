"""``trimtab compile``: a model in, one file out that runs without its framework."""

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
    ThreadsOption,
    require_directory,
)
from trimtab.cli.report_option import ReportOption, reporting
from trimtab.errors import UsageError

if TYPE_CHECKING:
    from trimtab.artifact import Artifact


def compile_command(
    model: ModelArgument,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The file to write; by default MODEL's name with .trim."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="TARGET",
            help="`native` for this machine, or a name such as x86-64-v3 (trimtab doctor lists them); by default the "
            "portable baseline of this machine's architecture. Several with commas between them: one file for all.",
        ),
    ] = None,
    passes: Annotated[
        str | None, typer.Option(metavar="PIPELINE", help='Passes to run first, by default cleanup,fuse; "" for none.')
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="`f32`; `bf16` for matrix products in bfloat16; `f16-storage` for their weights in float16.",
        ),
    ] = "f32",
    calibration: CalibrationOption = None,
    calibration_batch: CalibrationBatchOption = None,
    threads: ThreadsOption = None,
    backend: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Code generator: `tvm`, `mlir`, both with a comma between them, or `auto` for the faster one here.",
        ),
    ] = "tvm",
    runtime_library: Annotated[
        bool,
        typer.Option(
            "--runtime-library/--no-runtime-library",
            help="Carry the backend's runtime library in the file; without it the device needs the backend installed.",
        ),
    ] = True,
    report: ReportOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compile MODEL to one file, and check in a fresh process that it runs and gives the right results."""
    from trimtab.cli.model_argument import load_model, model_name
    from trimtab.cli.progress import Stages, part, progress_bar

    path = output if output is not None else Path(f"{model_name(model)}.trim")
    require_directory(path, "--output")
    if path.exists() and path.absolute() == Path(model).absolute():
        raise UsageError("the output would replace the model", values={"path": path}, fix="give another name with -o")
    import trimtab
    from trimtab.compiler import DEFAULT_PIPELINE

    pipeline = DEFAULT_PIPELINE if passes is None else passes
    if report is not None and not pipeline and precision == "f32":
        raise UsageError("there is nothing to report", rule="no passes run", fix="leave out --report, or name --passes")
    seconds: dict[str, float] = {}
    if calibration and not pipeline:
        raise UsageError("there is nothing to calibrate", rule="no passes run", fix="leave --calibration out")
    with progress_bar("compile") as bar, reporting(report, model) as recorders:
        update = Stages(bar)
        start = time.perf_counter()
        update("import the model", 0.0)
        module = load_model(model)
        batches = calibration_files(module, calibration, calibration_batch, update.detail)
        seconds["import the model"] = time.perf_counter() - start
        artifact = trimtab.compile(
            module,
            target=target,
            backend=backend,
            threads=threads,
            pipeline=pipeline,
            calibration=batches,
            precision=precision,
            include_runtime=runtime_library,
            name=model_name(model),
            progress=part(update, 0.15, 0.85),
            observers=recorders,
        )
        seconds |= artifact.seconds
        update("write and check", 0.85)
        start = time.perf_counter()
        artifact.save(path)
        seconds["write and check"] = time.perf_counter() - start
    document = _describe(path, artifact, target, seconds)
    document["report_page"] = str(report) if report is not None else None
    document["calibration"] = {"batches": len(batches), "notes": batches.notes} if batches is not None else None
    if json:
        from trimtab.cli.output import print_json

        print_json(document)
    else:
        _print(document)


def _describe(path: Path, artifact: Artifact, target: str | None, seconds: dict[str, float]) -> dict[str, Any]:
    manifest = artifact.manifest
    variant = manifest.variants[0]
    size = path.stat().st_size
    return {
        "artifact": str(path),
        "bytes": size,
        "weight_bytes": artifact.module.weight_bytes,
        "target": target or "portable baseline",
        "triple": variant.target,
        "features": list(variant.features),
        "backend": variant.backend,
        "variants": [{"triple": v.target, "backend": v.backend} for v in manifest.variants],
        "measured": artifact.measured,
        "pipeline": manifest.pipeline,
        "precision": manifest.precision,
        "inputs": [str(spec) for spec in manifest.inputs],
        "outputs": [str(spec) for spec in manifest.outputs],
        "symbols": [str(symbol) for symbol in manifest.symbols],
        "versions": manifest.versions,
        "memory": manifest.memory,
        "seconds": seconds,
        "report": artifact.report,
    }


def _print(document: dict[str, Any]) -> None:
    from trimtab.cli.output import console, text_bytes, text_seconds

    to = console()
    where = f"{document['artifact']} ({text_bytes(document['bytes'])}, weights {text_bytes(document['weight_bytes'])})"
    to.print(f"compiled {where} for {document['triple']}, {document['target']}")
    for other in document["variants"][1:]:
        to.print(f"  also     {other['triple']} by {other['backend']}")
    if document["measured"]:
        times = ", ".join(f"{name} {text_seconds(value)}" for name, value in document["measured"].items())
        to.print(f"  backend  {document['backend']}, a call took {times}")
    to.print(f"  inputs   {', '.join(document['inputs'])}")
    to.print(f"  outputs  {', '.join(document['outputs'])}")
    if document["symbols"]:
        to.print(f"  sizes    {', '.join(document['symbols'])}")
    to.print(f"  passes   {document['pipeline'] or 'none'}")
    to.print(f"  precision {document['precision']}")
    stages = ", ".join(f"{stage} {text_seconds(value)}" for stage, value in document["seconds"].items())
    to.print(f"  time     {stages}")
    if document["calibration"]:
        to.print(f"  data     {document['calibration']['batches']} calibration batches")
        for note in document["calibration"]["notes"]:
            to.print(f"  note     {note}")
    if document["report_page"]:
        to.print(f"  report   {document['report_page']}")
