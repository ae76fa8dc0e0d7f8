"""Latency before and after every pass that changes a model, side by side in one process.

    python benchmarks/passes.py [--model deit-s] [--passes cleanup,fuse] [--runs 15] [--threads 2] [--json FILE]

The module before a pass and the module after it are both compiled as they are, and their calls take turns on the same
random inputs.  A ratio below 1 means that the pass made the model faster.  The last row compares the first module with
the last one.  Fusion by the backend is at work in every row, so that a pass is measured by what it adds to that.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import trimtab
from benchmark_models import BENCHMARK_MODELS
from machine_peaks import processor_name
from measuring import as_arrays, largest_error, take_turns, time_calls
from trimtab.ir import Module
from trimtab.ir.analysis.statistics import count_ops
from trimtab.passes import Observer, Step
from trimtab.passes.samples import count_macs


@dataclass(frozen=True)
class Row:
    """A pass and what it did to one model: ops, multiply-accumulates, milliseconds, and ratios after to before."""

    model: str
    text: str
    ops_before: int
    ops_after: int
    macs_before: int
    macs_after: int
    median_before: float
    median_after: float
    median_ratio: float
    best_ratio: float
    difference: float


class Snapshots(Observer):
    """Keeps the module after every pass that changed it; weights are shared."""

    def __init__(self) -> None:
        self.modules: list[tuple[str, Module]] = []

    def pipeline_started(self, module: Module, report: Any, ctx: Any) -> None:
        self.modules = [("", module)]

    def after_pass(self, step: Step) -> None:
        if step.row.changed:
            self.modules.append((step.row.text, step.after))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", action="append", choices=[*BENCHMARK_MODELS], help="may be repeated")
    parser.add_argument("--passes", default="cleanup,fuse", metavar="PIPELINE")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--target", default="native")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    versions = {name: version(name) for name in ("torch", "apache-tvm")}
    print(f"{processor_name()}, {args.threads} threads, {versions}")
    print(f"{'model':10s} {'pass':34s} {'ops':>11s} {'Mmacs':>15s} {'median ms':>15s} {'ratio':>6s} {'best':>6s}")
    rows = [row for name in args.model or ("deit-s", "bert-base") for row in measure(name, args)]
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0


def measure(name: str, args: argparse.Namespace) -> list[Row]:
    """The rows of one model, printed as they come."""
    entry = BENCHMARK_MODELS[name]
    model, inputs = entry.build(), entry.inputs()
    snapshots = Snapshots()
    with torch.no_grad():
        module = trimtab.trace(model, tuple(inputs.values()))
    result = trimtab.optimize(module, args.passes, observers=[snapshots])
    rows = []
    pairs = list(zip(snapshots.modules, snapshots.modules[1:], strict=False))
    pairs.append((("", module), (f"whole of {args.passes}", result.module)))
    with tempfile.TemporaryDirectory() as folder:
        for (_, before), (text, after) in pairs:
            rows.append(compare(name, text, before, after, list(inputs.values()), args, Path(folder)))
            row = rows[-1]
            print(
                f"{name:10s} {text[:34]:34s} {row.ops_before:5d}>{row.ops_after:5d} "
                f"{row.macs_before / 1e6:7.0f}>{row.macs_after / 1e6:7.0f} "
                f"{row.median_before:7.2f}>{row.median_after:7.2f} {row.median_ratio:6.3f} {row.best_ratio:6.3f}",
                flush=True,
            )
    counts = dict(sorted(count_ops(result.module).items(), key=lambda item: -item[1]))
    print(f"{name:10s} ops after the pipeline: {counts}")
    return rows


def compare(
    name: str, text: str, before: Module, after: Module, inputs: Sequence[torch.Tensor], args: Any, folder: Path
) -> Row:
    """Compile two modules as they are and let their calls take turns."""
    sessions = {}
    for label, module in (("before", before), ("after", after)):
        path = folder / f"{label}.trim"
        trimtab.compile(module, target=args.target, threads=args.threads, pipeline="").save(path, check=False)
        sessions[label] = trimtab.load(path, threads=args.threads)
    arrays = [value.numpy() for value in inputs]
    results = {label: as_arrays(session(*arrays)) for label, session in sessions.items()}
    calls = {label: lambda s=session: s(*arrays) for label, session in sessions.items()}
    times = take_turns({label: partial(time_calls, call) for label, call in calls.items()}, args.runs)
    for session in sessions.values():
        session.close()
    medians = {label: statistics.median(values) for label, values in times.items()}
    return Row(
        model=name, text=text,
        ops_before=sum(1 for _ in before.walk()), ops_after=sum(1 for _ in after.walk()),
        macs_before=count_macs(before, {}), macs_after=count_macs(after, {}),
        median_before=medians["before"], median_after=medians["after"],
        median_ratio=medians["after"] / medians["before"],
        best_ratio=min(times["after"]) / min(times["before"]),
        difference=largest_error(results["after"], results["before"]),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
