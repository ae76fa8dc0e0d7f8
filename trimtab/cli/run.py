"""``trimtab run``: run an artifact on arrays from files or on random ones. Needs no torch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.cli.command_options import (
    ArtifactArgument,
    DebugOption,
    InputOption,
    JsonOption,
    RandomOption,
    SizeOption,
    ThreadsOption,
    check_input_options,
    require_directory,
)

if TYPE_CHECKING:
    import numpy as np

    from trimtab.runtime import Session

    Array = np.ndarray[Any, Any]


def run_command(
    artifact: ArtifactArgument,
    input: InputOption = None,
    random: RandomOption = None,
    size: SizeOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the outputs to this .npz file.")
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, metavar="N", help="Timed calls, after one that is not timed.")] = 5,
    threads: ThreadsOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run a compiled model and show its outputs and how long a call takes. Works without torch."""
    check_input_options("run", input, random, size)
    if output is not None:
        require_directory(output, "--output")
    from trimtab.cli.input_files import inputs_for
    from trimtab.runtime import load

    with load(artifact, threads) as session:
        arrays = inputs_for(session, input or (), random, size or ())
        outputs, seconds = _measure(session, arrays, repeat)
        document = {
            "artifact": str(artifact),
            "threads": session.threads,
            "inputs": [_describe(spec.name, spec.dtype, arrays[spec.name]) for spec in session.signature.inputs],
            "outputs": [_describe(spec.name, spec.dtype, outputs[spec.name]) for spec in session.signature.outputs],
            "latency": {
                "calls": len(seconds),
                "median_seconds": statistics.median(seconds),
                "best_seconds": min(seconds),
            },
            "output_file": str(output) if output is not None else None,
        }
    if output is not None:
        _write(output, outputs)
    if json:
        from trimtab.cli.output import print_json

        print_json(document)
    else:
        _print(document)


def _measure(session: Session, arrays: Mapping[str, Array], repeat: int) -> tuple[dict[str, Array], list[float]]:
    """The outputs by name, and the seconds of each of ``repeat`` calls after a first one."""
    result = session(**arrays)
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        session(**arrays)
        seconds.append(time.perf_counter() - start)
    names = [spec.name for spec in session.signature.outputs]
    return dict(zip(names, [result] if len(names) == 1 else result, strict=True)), seconds


def _describe(name: str, dtype: str, array: Array) -> dict[str, Any]:
    """Name, dtype, shape and a summary of the finite elements of an array (``bf16`` as raw ``uint16`` bits)."""
    import numpy as np

    values = np.asarray(array)
    if dtype == "bf16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    described: dict[str, Any] = {"name": name, "dtype": dtype, "shape": list(values.shape)}
    finite = values[np.isfinite(values)] if values.dtype.kind in "fc" else values
    if finite.size and values.dtype.kind != "c":
        kind = float if values.dtype.kind == "f" else int
        described |= {
            "min": kind(finite.min()),
            "mean": float(finite.mean(dtype=np.float64)),
            "max": kind(finite.max()),
        }
    if finite.size != values.size:
        described["not_finite"] = int(values.size - finite.size)
    return described


def _write(path: Path, outputs: Mapping[str, Array]) -> None:
    import numpy as np

    from trimtab.atomic_file import atomic_writer

    with atomic_writer(path) as file:
        np.savez(file, **outputs)  # type: ignore[arg-type]


def _print(document: Mapping[str, Any]) -> None:
    from trimtab.cli.output import console, table, text_seconds

    shown = table("", ["", "name", "dtype", "shape", "min", "mean", "max", "NaN or inf"], ["min", "mean", "max"])
    for kind in ("input", "output"):
        for row in document[f"{kind}s"]:
            numbers = [f"{row[key]:.4g}" if key in row else "" for key in ("min", "mean", "max")]
            shape = ", ".join(map(str, row["shape"]))
            shown.add_row(kind, row["name"], row["dtype"], f"[{shape}]", *numbers, str(row.get("not_finite", "")))
    to = console()
    to.print(shown)
    latency = document["latency"]
    median, best = text_seconds(latency["median_seconds"]), text_seconds(latency["best_seconds"])
    to.print(f"latency: median {median}, best {best} of {latency['calls']} calls on {document['threads']} thread(s)")
    if document["output_file"]:
        to.print(f"outputs written to {document['output_file']}")
