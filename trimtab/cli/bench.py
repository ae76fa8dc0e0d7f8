"""``trimtab bench``: how long an artifact takes, and with ``--profile`` where the time goes. Needs no torch."""

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
from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    from trimtab.runtime import Profile, Roofs, Session


def bench_command(
    artifact: ArtifactArgument,
    input: InputOption = None,
    random: RandomOption = None,
    size: SizeOption = None,
    repeat: Annotated[int, typer.Option(min=1, metavar="N", help="Timed calls, after one that is not timed.")] = 50,
    profile: Annotated[
        bool, typer.Option("--profile", help="Time each kernel too, and compare with what this machine can do.")
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Profile, and write a call for chrome://tracing or Perfetto to this file (JSON)."
        ),
    ] = None,
    threads: ThreadsOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Time a compiled model; with --profile, its kernels. Inputs are random (seed 0) unless --input gives some."""
    random = 0 if random is None and not input else random
    check_input_options("bench", input, random, size)
    if trace is not None:
        require_directory(trace, "--trace")
    from trimtab.cli.input_files import inputs_for
    from trimtab.runtime import load

    with load(artifact, threads) as session:
        arrays = inputs_for(session, input or (), random, size or ())
        document: dict[str, Any] = {
            "artifact": str(artifact),
            "threads": session.threads,
            "inputs": {name: list(array.shape) for name, array in arrays.items()},
        }
        measured: Profile | None = None
        if profile or trace is not None:
            roofs, why_not = _measure_roofs(session.threads)
            measured = session.profile(repeat=repeat, roofs=roofs, **arrays)
            document |= {"latency": _latency(measured.calls), "profile": measured.to_dict(), "no_peaks": why_not}
            if trace is not None:
                measured.write_trace(trace)
        else:
            document["latency"] = _latency(_time_calls(session, arrays, repeat))
        document["trace"] = str(trace) if trace is not None else None
    if json:
        from trimtab.cli.output import print_json

        print_json(document)
    else:
        _print(document, measured)


def _measure_roofs(threads: int) -> tuple[Roofs | None, str]:
    """What this machine can do at most with as many threads; or None and why it could not be measured."""
    from trimtab.cli.error_report import missing_dependency
    from trimtab.runtime import Roofs

    try:
        from trimtab.backends.tvm.peaks import measure_peaks

        peaks = measure_peaks(threads)
    except ImportError as error:  # on a machine that only runs artifacts
        return None, missing_dependency(error).message
    except TrimtabError as error:
        return None, error.message
    flops = {"f32": peaks.f32_flops, "bf16": peaks.bf16_flops, "i8": peaks.int8_ops, "u8": peaks.int8_ops}
    return Roofs(flops, peaks.read_bandwidth), ""


def _time_calls(session: Session, arrays: Mapping[str, Any], repeat: int) -> tuple[float, ...]:
    session(**arrays)
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        session(**arrays)
        seconds.append(time.perf_counter() - start)
    return tuple(seconds)


def _latency(seconds: tuple[float, ...]) -> dict[str, Any]:
    ordered = sorted(seconds)
    return {
        "calls": len(ordered),
        "median_seconds": statistics.median(ordered),
        "best_seconds": ordered[0],
        "p90_seconds": ordered[int(0.9 * (len(ordered) - 1))],
        "worst_seconds": ordered[-1],
    }


def _print(document: Mapping[str, Any], profile: Profile | None) -> None:
    from trimtab.cli.output import console, table, text_seconds

    to = console()
    latency = document["latency"]
    names = {"median": "median_seconds", "best": "best_seconds", "90 %": "p90_seconds", "worst": "worst_seconds"}
    times = ", ".join(f"{name} {text_seconds(latency[key])}" for name, key in names.items())
    to.print(f"{latency['calls']} calls on {document['threads']} thread(s): {times}")
    if profile is None:
        return
    if profile.roofs is not None:
        peaks = [
            f"{kind} {rate / 1e9:.0f} GFLOP/s" for kind, rate in profile.roofs.flops.items() if rate and kind != "u8"
        ]
        to.print(f"this machine: {', '.join(peaks)}; memory {profile.roofs.bandwidth / 1e9:.1f} GB/s")
    else:
        to.print(f"no percentages of this machine's peak: {document['no_peaks']}")
    if profile.events:
        columns = ["time", "share", "calls", "GFLOP/s", "GB/s", "of peak"]
        shown = table(
            "kernels of one call, each in its fastest of the timed calls", [*columns, "kernel", "ops"], columns
        )
        for row in profile.rows():
            shown.add_row(*row.values())
        to.print(shown)
        assert profile.outside_kernels is not None
        to.print(f"outside kernels, of the best call: {text_seconds(profile.outside_kernels)}")
    else:
        to.print("no kernels: this code does not call them through the virtual machine")
    if document["trace"]:
        to.print(f"trace written to {document['trace']}")
