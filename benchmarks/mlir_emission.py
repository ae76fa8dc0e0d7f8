"""What emitting MLIR ourselves is worth, and what it costs to compile a large model for another machine.

    python benchmarks/mlir_emission.py [--runs 20] [--threads 2] [--json FILE]
    python benchmarks/mlir_emission.py --large aarch64 [--backend tvm --backend mlir]

The first form compiles DeiT-S with float32 weights in two ways: the linalg that torch-mlir's exporter writes, compiled
by IREE for this processor, and ``trimtab.compile(backend="mlir")``. Both are checked against eager PyTorch and called
in turns. The second form compiles ViT-L/16 for a target with each backend, each in a process of its own, and prints
the seconds and the most memory that the process and those that it started had.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

import trimtab
from measuring import as_arrays, largest_error, take_turns, time_calls
from trimtab.compiler import BACKENDS
from zoo_models import deit_s, vit_l16

HOST = (
    "--iree-hal-target-device=local",
    "--iree-hal-local-target-device-backends=llvm-cpu",
    "--iree-llvmcpu-target-cpu=host",
)


def torch_mlir_export(model: torch.nn.Module, x: torch.Tensor, folder: Path, threads: int) -> Callable[[], Any]:
    """The model as torch-mlir writes it, in ``linalg`` on tensors, compiled by IREE."""
    import iree.runtime as runtime
    from iree.compiler import tools
    from iree.runtime import flags
    from torch_mlir import fx

    # The exporter takes no buffers that are not part of the state; they are small.
    for module in model.modules():
        module._non_persistent_buffers_set.clear()
    exported = fx.export_and_import(model, x, output_type="linalg-on-tensors", func_name="main")
    source = folder / "exported.mlir"
    source.write_text(str(exported))
    code = tools.compile_file(str(source), input_type="auto", extra_args=list(HOST))
    flags.parse_flags(f"--task_topology_group_count={threads}")
    config = runtime.Config("local-task")
    loaded = runtime.load_vm_module(runtime.VmModule.copy_buffer(config.vm_instance, code), config)
    data = runtime.asdevicearray(config.device, x.numpy())
    return lambda: np.asarray(loaded.main(data).to_host())


def compare(runs: int, threads: int) -> list[dict[str, Any]]:
    """Times of both ways, and the first over the second."""
    entry = deit_s()
    model = entry.build()
    x = entry.inputs(1, 1)["pixel_values"]
    torch.set_num_threads(threads)
    with torch.no_grad():
        expected = as_arrays(model(x))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = trimtab.compile(trimtab.trace(model, (x,)), target="native", backend="mlir", threads=threads)
        session = trimtab.load(made.save(folder / "ours.trim", check=False), threads=threads)
        calls: dict[str, Callable[[], Any]] = {
            "torch-mlir and IREE": torch_mlir_export(model, x, folder, threads),
            "trimtab, backend mlir": lambda: session(x.numpy()),
        }
        errors = {label: largest_error(as_arrays(call()), expected) for label, call in calls.items()}
        times = take_turns({label: (lambda n, call=call: time_calls(call, n)) for label, call in calls.items()}, runs)
    rows = [
        {"way": label, "median_ms": statistics.median(of), "best_ms": min(of), "error": errors[label]}
        for label, of in times.items()
    ]
    for row in rows:
        median, best, error = (row[name] for name in ("median_ms", "best_ms", "error"))
        print(f"{row['way']:24s} median {median:7.1f} ms, best {best:7.1f} ms, error {error:.1e}")
    first, second = rows
    print(f"ratio: {first['median_ms'] / second['median_ms']:.2f} (best {first['best_ms'] / second['best_ms']:.2f})")
    return rows


def compile_large(target: str, backend: str) -> dict[str, Any]:
    """Compile ViT-L/16 in this process."""
    entry = vit_l16()
    inputs = entry.inputs(1, 1)
    module = trimtab.trace(entry.build(), tuple(inputs.values()))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        made = trimtab.compile(module, target=target, backend=backend)
        compiled = time.perf_counter() - start
        size = made.save(Path(folder) / "large.trim", check=False).stat().st_size
    peaks = [resource.getrusage(who).ru_maxrss * 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "backend": backend,
        "target": target,
        "weight_bytes": module.weight_bytes,
        "compile_seconds": compiled,
        "seconds": time.perf_counter() - start,
        "file_bytes": size,
        "peak_bytes": max(peaks),
    }


def large(target: str, backends: list[str]) -> list[dict[str, Any]]:
    """The costs of each backend, from a process each."""
    rows = []
    for backend in backends:
        command = [sys.executable, __file__, "--large", target, "--backend", backend, "--here"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(
            f"{backend:5s} {target}: compile {row['compile_seconds']:.1f} s, with the file {row['seconds']:.1f} s, "
            f"peak {row['peak_bytes'] / 2**30:.2f} GiB for {row['weight_bytes'] / 2**30:.2f} GiB of weights",
            flush=True,
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=20, help="calls of each way that are counted, at least")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--large", metavar="TARGET", help="compile ViT-L/16 for this target instead")
    parser.add_argument("--backend", choices=list(BACKENDS), action="append", help="only this one, with --large")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(compile_large(args.large, args.backend[0])))
        return 0
    rows = large(args.large, args.backend or list(BACKENDS)) if args.large else compare(args.runs, args.threads)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
