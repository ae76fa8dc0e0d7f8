"""``trimtab run``: run an artifact on arrays from files or on random ones. Needs no torch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.cli.command_options import DebugOption, JsonOption, ThreadsOption, require_directory, split_counts
from trimtab.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from trimtab.runtime import Session
    from trimtab.runtime.samples import Sample

    Array = np.ndarray[Any, Any]


def run_command(
    artifact: Annotated[Path, typer.Argument(metavar="FILE.trim", help="A compiled model.", show_default=False)],
    input: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            "-i",
            metavar="FILE",
            help="An .npz file with one array per input, or name=file.npy (repeatable).",
        ),
    ] = None,
    random: Annotated[
        int | None, typer.Option(metavar="SEED", help="Run on random inputs instead, made with this seed.")
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=N", help="With --random: a dynamic size, such as batch=8 (repeatable)."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the outputs to this .npz file.")
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, metavar="N", help="Timed calls, after one that is not timed.")] = 5,
    threads: ThreadsOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run a compiled model and show its outputs and how long a call takes. Works without torch."""
    if (random is None) == (not input):
        raise UsageError(
            "run needs inputs" if not input else "--input and --random exclude each other",
            fix="give --input x.npz, or --random 0",
        )
    if size and random is None:
        raise UsageError("--size belongs to --random", fix="the sizes of --input are those of its arrays")
    if output is not None:
        require_directory(output, "--output")
    from trimtab.runtime import load

    with load(artifact, threads) as session:
        names = [spec.name for spec in session.signature.inputs]
        if random is not None:
            from trimtab.cli.input_files import random_inputs

            sizes = split_counts("--size", size or (), "batch=8")
            arrays = random_inputs(session.manifest, random, sizes, _carried_sample(artifact))
        else:
            from trimtab.cli.input_files import read_inputs

            arrays = read_inputs(input or (), names)
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


def _carried_sample(artifact: Path) -> Sample | None:
    from trimtab.runtime.container import ArtifactReader
    from trimtab.runtime.manifest import CHECK_ENTRY
    from trimtab.runtime.samples import decode_samples

    reader = ArtifactReader(artifact, verify="code")
    if CHECK_ENTRY not in reader:
        return None
    samples = decode_samples(reader.view(CHECK_ENTRY), reader.manifest, f"{artifact}/{CHECK_ENTRY}")
    return samples[0] if samples else None


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
