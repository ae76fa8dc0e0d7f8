"""Quantized models beside those of ONNX Runtime and of OpenVINO with NNCF: speed and error, in one run.

    python benchmarks/quantization.py [--only speed digits text decode] [--models deit-s bert-base] [--runs 20]
                                      [--threads 2] [--json FILE]

speed: every system quantizes the same model on the same calibration batches, and computes the same fresh batch with the
same number of threads; each is in a process of its own, and they take turns (cpu_peers.py). Printed are the median and
the best of all calls, what the median is of Trimtab's in float32, and the distance of the outputs to those of the float
model in float64, relative to their length.

digits: the accuracy of a small vision transformer trained on scikit-learn's digits, for bits from 8 down to 4.

text: the mean cosine of quantized sentence embeddings of MiniLM to the original's, on 200 sentences.

decode: one token of GPT-2 small and of a Llama of 1.1 billion parameters with weights of 4 bits, against the bandwidth
of memory; needs 12 GB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmark_models import BENCHMARK_MODELS, TINY_MODELS
from cpu_peers import find_versions
from cpu_peers_job import Job, find_model
from cpu_peers_report import geometric_mean
from cpu_peers_worker import Worker, WorkerError
from machine_peaks import processor_name
from measuring import take_turns
from quantization_accuracy import digits_lines, text_lines
from quantization_decode import decode_lines
from quantization_inputs import batches, write_batches, write_expected
from quantization_systems import SYSTEMS
from trimtab.cores import usable_cores

MODELS = ("deit-s", "deit-s-b8", "vit-b", "bert-base", "minilm-l6")
OURS, OURS_F32 = "trimtab int8+bf16", "trimtab f32"
PARTS = ("speed", "digits", "text", "decode")


@dataclass(frozen=True)
class Row:
    """One system on one model.

    Attributes:
        system: its label.
        distance: of the outputs to those of the float model in float64, relative to their length (L2).
        compile_seconds: to quantize, compile and load.
        reason: why there are no figures.
    """

    model: str
    system: str
    median_ms: float = 0.0
    best_ms: float = 0.0
    distance: float = 0.0
    compile_seconds: float = 0.0
    reason: str = ""


def measure(job: Job, runs: int, limit: float) -> list[Row]:
    """One model in every system, which take turns."""
    Worker(job, None, limit).close()
    entry = find_model(job.model)
    calibration, fresh = batches(entry)
    write_batches(job.folder / "calibration", calibration)
    np.savez(job.folder / "inputs.npz", **fresh)
    write_expected(job.folder / "expected.npz", entry, fresh)
    workers: dict[str, Worker] = {}
    rows: dict[str, Row] = {}
    try:
        for system in SYSTEMS:
            reason = system.unavailable() or ""
            if not reason:
                try:
                    workers[system.label] = Worker(job, system.label, limit)
                except WorkerError as error:
                    reason = str(error)
            rows[system.label] = Row(job.model, system.label, reason=reason)
        times = take_turns({label: worker.block for label, worker in workers.items()}, runs)
    finally:
        for worker in workers.values():
            worker.close()
    for label, found in times.items():
        report = workers[label].report
        rows[label] = Row(
            job.model, label, statistics.median(found), min(found), report["distance"], report["compile_seconds"]
        )
    return list(rows.values())


def speed_lines(rows: Sequence[Row]) -> Iterator[str]:
    """The table of one model."""
    medians = {row.system: row.median_ms for row in rows if not row.reason}
    yield f"{rows[0].model}"
    yield f"{'system':24s} {'median ms':>9s} {'best ms':>8s} {'of our f32':>10s} {'distance':>9s} {'compile s':>9s}"
    for row in rows:
        if row.reason:
            yield f"{row.system:24s} {row.reason}"
            continue
        share = f"{row.median_ms / medians[OURS_F32]:10.1%}" if OURS_F32 in medians else f"{'':10s}"
        yield (
            f"{row.system:24s} {row.median_ms:9.2f} {row.best_ms:8.2f} {share} {row.distance:9.2e} "
            f"{row.compile_seconds:9.1f}"
        )


def summary_lines(rows: Sequence[Row]) -> Iterator[str]:
    """How many times as fast as the others, as geometric means; of OpenVINO's two hints the faster one counts."""
    by_model: dict[str, dict[str, Row]] = {}
    for row in rows:
        if not row.reason:
            by_model.setdefault(row.model, {})[row.system] = row
    for peer in ("openvino", "onnxruntime"):
        for kind in ("median_ms", "best_ms"):
            ratios = {
                model: min(getattr(row, kind) for row in theirs) / getattr(found[OURS], kind)
                for model, found in by_model.items()
                if OURS in found and (theirs := [row for label, row in found.items() if label.startswith(peer)])
            }
            if ratios:
                each = ", ".join(f"{model} {ratio:.2f}" for model, ratio in ratios.items())
                yield f"{peer} int8 / {OURS}, {kind[:-3]}s: {geometric_mean([*ratios.values()]):.2f} ({each})"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--models", nargs="+", choices=[*BENCHMARK_MODELS, *TINY_MODELS], default=MODELS,
                        metavar="MODEL", help=f"of {', '.join(BENCHMARK_MODELS)}")  # fmt: skip
    parser.add_argument("--runs", type=int, default=20, help="calls of each system that are counted, at least")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--target", default="native", help="target of Trimtab's code, e.g. x86-64-v3")
    parser.add_argument("--limit", type=float, default=900, metavar="SECONDS", help="for quantizing one model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures of speed to this file")
    args = parser.parse_args(arguments)
    print(f"{processor_name()}, {args.threads} threads; {find_versions(SYSTEMS)}", flush=True)
    rows: list[Row] = []
    for model in args.models if "speed" in args.only else ():
        with tempfile.TemporaryDirectory(prefix="trimtab-quantization-") as folder:
            found = measure(Job(Path(folder), model, args.threads, args.target), args.runs, args.limit)
        rows += found
        print("", *speed_lines(found), sep="\n", flush=True)
        if args.json:
            args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print("", *summary_lines(rows), sep="\n", flush=True)
    parts: Mapping[str, Iterator[str]] = {
        "digits": digits_lines(),
        "text": text_lines(),
        "decode": decode_lines(args.threads, args.runs),
    }
    for name, lines in parts.items():
        if name in args.only:
            print()
            for line in lines:
                print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
