"""Trimtab beside PyTorch, torch.compile, ONNX Runtime, OpenVINO and IREE on this machine's CPU, in one run.

    python benchmarks/cpu_peers.py [--models deit-s bert-base] [--systems trimtab openvino] [--runs 20] [--threads 2]
                                   [--target native] [--json FILE] [--chart FILE.svg]
    python benchmarks/cpu_peers.py --read FILE [--chart FILE.svg]       # the tables and the chart of an earlier run

Every system runs the same model on the same random inputs with the same number of threads.  Each is in a process of
its own, so that the OpenMP library, allocator and environment of one do not touch another, and compile time and memory
are its own; the processes take turns in blocks of a few calls (measuring.py), so that a machine whose speed drifts
slows all of them.

Printed are the median and the best of all calls; the median over Trimtab's at the same precision; the least time that
the machine's limits allow (machine_peaks.py, measured in the same run) over the median; the error against the model in
float64; compile time and the peak memory of the process that compiles.  A system that is not installed or fails is
listed with the reason.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmark_models import BENCHMARK_MODELS, TINY_MODELS
from cpu_peers_job import Job
from cpu_peers_report import Missing, Results, Row, draw_chart, least_seconds, model_lines, summary_lines
from cpu_peers_systems import SYSTEMS, System
from cpu_peers_worker import Worker, WorkerError
from machine_peaks import describe, processor_name
from measuring import take_turns
from trimtab import TrimtabError
from trimtab.backends.tvm.peaks import Peaks, measure_peaks
from trimtab.cores import usable_cores


def main(arguments: Sequence[str] | None = None) -> int:
    names = list(dict.fromkeys(system.name for system in SYSTEMS))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=[*BENCHMARK_MODELS, *TINY_MODELS], default=[*BENCHMARK_MODELS],
                        metavar="MODEL", help=f"of {', '.join(BENCHMARK_MODELS)}")  # fmt: skip
    parser.add_argument("--systems", nargs="+", choices=names, default=names, metavar="SYSTEM", help=", ".join(names))
    parser.add_argument("--runs", type=int, default=20, help="calls of each system that are counted, at least")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--target", default="native", help="target of Trimtab's code, e.g. x86-64-v3")
    parser.add_argument("--limit", type=float, default=900, metavar="SECONDS", help="for compiling one model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="also draw them, as SVG; needs matplotlib")
    parser.add_argument("--read", type=Path, metavar="FILE", help="measure nothing, take the figures from this file")
    args = parser.parse_args(arguments)
    if args.chart:
        try:
            import matplotlib  # noqa: F401  before hours of measuring, not after
        except ImportError:
            parser.error("--chart needs matplotlib: make peers")
    results = Results.read(args.read) if args.read else measure(args)
    if args.read:
        for model in results.models:
            print("", *model_lines(results, model), sep="\n")
    print("", *summary_lines(results), sep="\n")
    if args.chart:
        draw_chart(results, args.chart)
    return 0


def measure(args: argparse.Namespace) -> Results:
    """Run everything, print the tables as they come, and write the JSON file after each model."""
    systems = [system for system in SYSTEMS if system.name in args.systems]
    machine = {"processor": processor_name(), "threads": args.threads}
    try:
        peaks = measure_peaks(args.threads)
        machine["peaks"] = asdict(peaks)
    except TrimtabError as error:
        peaks = None
        machine["peaks_missing"] = str(error)
    command = shlex.join(["python", "benchmarks/cpu_peers.py", *sys.argv[1:]])
    results = Results(machine, find_versions(systems), command)
    print(f"{machine['processor']}, {args.threads} threads; {results.versions}")
    print(describe(peaks) if peaks else f"no peaks: {machine['peaks_missing']}", flush=True)
    for model in args.models:
        print(flush=True)
        with tempfile.TemporaryDirectory() as folder:
            measure_model(Job(Path(folder), model, args.threads, args.target), systems, results, peaks, args)
        print(*model_lines(results, model), sep="\n", flush=True)
        if args.json:
            results.write(args.json)
    return results


def measure_model(
    job: Job, systems: Sequence[System], results: Results, peaks: Peaks | None, args: argparse.Namespace
) -> None:
    """Compile one model in every system, one after the other, and let them take turns; adds to ``results``."""
    Worker(job, None, args.limit).close()
    results.models[job.model] = job.facts
    workers: dict[str, Worker] = {}
    by_label = {system.label: system for system in systems}
    try:
        for label, system in by_label.items():
            reason = system.unavailable()
            if reason is None:
                try:
                    workers[label] = Worker(job, label, args.limit)
                except WorkerError as error:
                    reason = str(error)
            if reason is not None:
                results.missing.append(Missing(job.model, system.name, system.precision, reason))
        times = take_turns({label: worker.block for label, worker in workers.items()}, args.runs)
    finally:
        for worker in workers.values():
            worker.close()
    for label, values in times.items():
        results.rows.append(make_row(job, by_label[label], values, workers[label].report, peaks))


def make_row(job: Job, system: System, times: Sequence[float], report: dict[str, Any], peaks: Peaks | None) -> Row:
    """The figures of one system from the milliseconds of its calls."""
    median = statistics.median(times)
    least = least_seconds(job.facts, system.precision, peaks) if peaks else None
    return Row(
        model=job.model,
        system=system.name,
        precision=system.precision,
        median_ms=median,
        best_ms=min(times),
        error=report["error"],
        efficiency=least[0] * 1e3 / median if least else None,
        compile_seconds=report["compile_seconds"] if system.compiles else None,
        compile_peak_bytes=int(report["peak_bytes"]) if system.compiles else None,
        note=report["note"],
    )


def find_versions(systems: Sequence[System]) -> dict[str, str]:
    """Versions of Python, Trimtab and the packages of ``systems`` that are installed."""
    found = {"python": platform.python_version()}
    for package in dict.fromkeys(("trimtab", *(name for system in systems for name in system.packages))):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
