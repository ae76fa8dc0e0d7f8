"""Peak memory and time of large modules: ViT-L/16 through trace, clean-up and write; 3 GB of weights through the disk.

    python benchmarks/memory_bounds.py [--json FILE] [--gigabytes 3]

Every step runs in a process of its own, whose peak resident memory the kernel reports. ``ratio`` is that peak over the
bytes of the module's weights; it includes the packages (``import torch`` alone takes about 0.25 GB), and pages of
mapped files that were read count as resident, although the kernel may drop them at any time.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def vit_l16(folder: Path, _: float) -> dict[str, Any]:
    """Trace, clean up and write ViT-L/16 with random weights (300 M parameters)."""
    import trimtab
    from zoo_models import vit_l16

    entry = vit_l16()
    model = entry.build()
    inputs = entry.inputs(1, 1)
    start = time.perf_counter()
    module = trimtab.trace(model, tuple(inputs.values()), dynamic_shapes=entry.dynamic_shapes())
    traced = time.perf_counter()
    module = trimtab.optimize(module, "cleanup").module
    cleaned = time.perf_counter()
    trimtab.write(module, folder / "vit_l16.ttir")
    written = time.perf_counter()
    seconds = {"trace": traced - start, "clean up": cleaned - traced, "write": written - cleaned}
    return {"weight_bytes": module.weight_bytes, "seconds": seconds}


def make_large(folder: Path, gigabytes: float) -> dict[str, Any]:
    """Write a chain of linear layers of the wanted size, whose weights are made one at a time."""
    import torch

    import trimtab
    from trimtab.ir import Builder, DType, TensorType, Weight, symbol
    from trimtab.ir.ops import Linear
    from trimtab.ir.weights import ComputedSource

    width = 4096
    layers = max(1, round(gigabytes * 1e9 / (4 * width * width)))
    builder = Builder()
    value = builder.input("x", TensorType(DType.F32, (symbol("batch", 1, 64), width)))
    for index in range(layers):

        def draw(seed: int = index) -> torch.Tensor:
            return torch.randn(width, width, generator=torch.Generator().manual_seed(seed)) / width**0.5

        type = TensorType(DType.F32, (width, width))
        weight = builder.module.add_weight(Weight(f"layer.{index}", type, ComputedSource(draw)))
        value = builder(Linear(value, builder.graph.weight(weight)))
    builder.output(value)
    start = time.perf_counter()
    trimtab.write(builder.module, folder / "large.ttir")
    return {"weight_bytes": builder.module.weight_bytes, "seconds": {"write": time.perf_counter() - start}}


def copy_large(folder: Path, _: float) -> dict[str, Any]:
    """Read the large module and write it again."""
    import trimtab

    start = time.perf_counter()
    module = trimtab.read(folder / "large.ttir")
    read = time.perf_counter()
    trimtab.write(module, folder / "copy.ttir")
    seconds = {"read": read - start, "write": time.perf_counter() - read}
    return {"weight_bytes": module.weight_bytes, "seconds": seconds}


def compile_large(folder: Path, _: float) -> dict[str, Any]:
    """Read the large module and compile it to an artifact, self-check included."""
    import trimtab

    start = time.perf_counter()
    module = trimtab.read(folder / "large.ttir")
    artifact = trimtab.compile(module, target="native")
    compiled = time.perf_counter()
    artifact.save(folder / "large.trim")
    seconds = {"compile": compiled - start, "save": time.perf_counter() - compiled}
    return {"weight_bytes": module.weight_bytes, "seconds": seconds}


STEPS: dict[str, Callable[[Path, float], dict[str, Any]]] = {
    function.__name__: function for function in (vit_l16, make_large, copy_large, compile_large)
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="also write the rows to this file")
    parser.add_argument("--gigabytes", type=float, default=3.0, help="weights of the large module")
    parser.add_argument("--folder", help="where the large files go (default: a temporary directory)")
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        row = STEPS[args.step](Path(args.folder), args.gigabytes)
        row["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(row))
        return 0
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        print(f"{'step':14s} {'weights GB':>10s} {'peak GB':>8s} {'ratio':>6s}  seconds")
        for step in STEPS:
            command = [sys.executable, __file__, "--step", step, "--folder", folder, "--gigabytes", str(args.gigabytes)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = {"step": step, **json.loads(done.stdout.splitlines()[-1])}
            rows.append(row)
            parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row["seconds"].items())
            weights, peak = row["weight_bytes"], row["peak_bytes"]
            print(f"{step:14s} {weights / 1e9:10.2f} {peak / 1e9:8.2f} {peak / weights:6.2f}  {parts}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
