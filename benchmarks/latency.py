"""Latency of compiled models against eager PyTorch and ONNX Runtime, side by side in one process.

    python benchmarks/latency.py [--model deit-s] [--runs 20] [--threads 2] [--target native] [--json FILE]

All contenders use the same number of threads and the same random inputs, and take turns in blocks of a few calls, so
that a machine whose speed drifts slows all of them.  Before a block comes a pause and a call that is not counted: the
thread pools of PyTorch and ONNX Runtime spin for a while after a call and would slow down whoever comes next.  Printed
are the median and the best of all runs, and ratios to eager of the medians.  ``floor`` is the model's
multiply-accumulates over the matrix-product rate measured in the same process: the time the matrix products alone
would take at that rate.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import trimtab
from trimtab.ir.dims import evaluate
from zoo_models import ZooModel, bert_base, deit_s, minilm_pretrained, vit_b

MODELS: dict[str, tuple[Callable[[], ZooModel], int, int]] = {
    "deit-s": (deit_s, 1, 0),
    "bert-base": (bert_base, 1, 128),
    "minilm-l6": (minilm_pretrained, 1, 128),
    "vit-b": (vit_b, 1, 0),
}
"""Builder, batch and length of each benchmark model."""

BLOCK = 5
SETTLE_SECONDS = 0.4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", action="append", choices=list(MODELS), help="only this model (may be repeated)")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--target", default="native", help="target of Trimtab's code, e.g. x86-64-v3")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine = {
        "processor": processor_name(),
        "threads": args.threads,
        "versions": {name: version(name) for name in ("torch", "onnxruntime", "apache-tvm")},
        "gflops": round(matrix_rate() / 1e9, 1),
    }
    print(f"{machine['processor']}, {args.threads} threads, {machine['versions']}")
    print(f"matrix products of torch (MKL), f32: {machine['gflops']} GFLOP/s")
    print(f"{'model':10s} {'contender':14s} {'median ms':>10s} {'best ms':>9s} {'vs eager':>9s} {'max diff':>9s}")
    rows = [row for name in args.model or MODELS for row in measure(name, args, machine["gflops"])]
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return 0


def measure(name: str, args: argparse.Namespace, gflops: float) -> list[dict[str, Any]]:
    """Time one model in every contender; prints and returns its rows."""
    build, batch, length = MODELS[name]
    runs, threads = args.runs, args.threads
    entry = build()
    model = entry.build()
    inputs = entry.inputs(batch, length or 12)
    arrays = {key: value.numpy() for key, value in inputs.items()}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        module = trimtab.trace(model, tuple(inputs.values()))
        artifact = trimtab.compile(module, target=args.target, threads=threads).save(Path(folder) / "model.trim")
        session = trimtab.load(artifact, threads=threads)
        runtime = onnx_runtime(model, inputs, Path(folder) / "model.onnx", threads)
        contenders: dict[str, Callable[[], Any]] = {
            "eager": lambda: model(*inputs.values()),
            "onnxruntime": lambda: runtime.run(None, arrays),
            "trimtab": lambda: session(*arrays.values()),
        }
        expected = first_output(contenders["eager"]())
        differences = {}
        for label, call in contenders.items():
            differences[label] = float((first_output(call()) - expected).abs().max() / expected.abs().max())
        times = take_turns(contenders, runs)
        session.close()
    macs = sum(int(evaluate(op.macs(), {})) for op in module.walk())
    rows = [
        {
            "model": name,
            "contender": label,
            "median_ms": statistics.median(values),
            "best_ms": min(values),
            "vs_eager": statistics.median(values) / statistics.median(times["eager"]),
            "difference": differences[label],
        }
        for label, values in times.items()
    ]
    for row in rows:
        print(
            f"{row['model']:10s} {row['contender']:14s} {row['median_ms']:10.2f} {row['best_ms']:9.2f} "
            f"{row['vs_eager']:9.2f} {row['difference']:9.1e}"
        )
    floor = 2 * macs / gflops / 1e6
    print(
        f"{name:10s} {'floor':14s} {floor:10.2f} {'':9s} {floor / statistics.median(times['eager']):9.2f}", flush=True
    )
    return [*rows, {"model": name, "contender": "floor", "median_ms": floor}]


def take_turns(contenders: Mapping[str, Callable[[], Any]], runs: int) -> dict[str, list[float]]:
    """Milliseconds of at least ``runs`` calls of each contender, in blocks that alternate."""
    times: dict[str, list[float]] = {label: [] for label in contenders}
    for _ in range(-(-runs // BLOCK)):
        for label, call in contenders.items():
            time.sleep(SETTLE_SECONDS)
            call()
            for _ in range(BLOCK):
                start = time.perf_counter()
                call()
                times[label].append((time.perf_counter() - start) * 1e3)
    return times


def onnx_runtime(model: torch.nn.Module, inputs: dict[str, torch.Tensor], path: Path, threads: int) -> Any:
    """The model in ONNX Runtime, through torch's exporter."""
    import onnxruntime

    torch.onnx.export(
        model,
        tuple(inputs.values()),
        str(path),
        dynamo=True,
        input_names=list(inputs),
        external_data=False,
        verbose=False,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options)


def first_output(result: Any) -> torch.Tensor:
    """The first output tensor of whatever a contender returned, in float64."""
    if isinstance(result, dict):
        result = next(iter(result.values()))
    while isinstance(result, list | tuple):
        result = result[0]
    return torch.as_tensor(result).double()


def matrix_rate(size: int = 1024) -> float:
    """Floating-point operations a second of a large f32 matrix product; the best of several."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def processor_name() -> str:
    """What the system calls the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
