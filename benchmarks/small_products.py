"""Linear layers on one to eight rows: how much of the memory's bandwidth they reach.

    python benchmarks/small_products.py [--shapes 768x2304 ...] [--rows 1 2 4 8] [--threads 2] [--megabytes 256]
                                        [--precisions f32 bf16 f16-storage i8 i4 i4-g32] [--json FILE]

So few rows need every weight once and compute little with it, so reading the weights takes all the time.  A shape is
K x N; layers of one shape, each with weights of its own, are computed one after the other until the weights are more
than a cache holds.  Printed are the bytes that a kernel reads and writes per second, from the least time of each call,
and their share of what a streaming read of memory reaches.  That is measured before and after each line, of which the
larger counts: on a shared machine it changes by a factor of two from one minute to the next.
``i8`` and ``i4`` are weights in groups of 128 with a scale for each, ``i4-g32`` in groups of 32.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import trimtab
from trimtab import TrimtabError
from trimtab.backends.tvm.peaks import measure_peaks
from trimtab.cores import usable_cores

SHAPES = ("768x768", "768x2304", "768x3072", "3072x768", "4096x4096")
_GROUPS = {
    "i8": "quantize-weights{bits=8,group=128}",
    "i4": "quantize-weights{bits=4,group=128}",
    "i4-g32": "quantize-weights{bits=4,group=32}",
}
"""Passes behind `cleanup` that make weights smaller than any precision does."""
PRECISIONS = ("f32", "bf16", "f16-storage", *_GROUPS)
_WEIGHT_BYTES = {"f32": 4, "bf16": 2, "f16-storage": 2, "i8": 1, "i4": 0.5, "i4-g32": 0.625}


class Layers(nn.Module):
    """Every input through every layer."""

    def __init__(self, depth: int, columns: int, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(depth, columns) for _ in range(count))

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for x in inputs for layer in self.layers]


def measure(
    shape: str, precision: str, rows: list[int], threads: int, megabytes: int
) -> tuple[dict[int, float], float]:
    """Bytes per second by number of rows, and those of a streaming read at that time."""
    depth, columns = map(int, shape.split("x"))
    count = max(2, round(megabytes * 1e6 / (depth * columns * _WEIGHT_BYTES[precision])))
    inputs = [torch.randn(m, depth, generator=torch.Generator().manual_seed(m)) for m in rows]
    module = trimtab.trace(Layers(depth, columns, count).eval(), tuple(inputs))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layers.trim"
        options = {"precision": precision}
        if precision in _GROUPS:
            options = {"pipeline": f"cleanup,{_GROUPS[precision]}"}
        trimtab.compile(module, target="native", threads=threads, **options).save(path, check=False)
        with trimtab.load(path, threads=threads) as session:
            before = measure_peaks(threads).read_bandwidth
            profile = session.profile(*(x.numpy() for x in inputs), repeat=7)
            bandwidth = max(before, measure_peaks(threads).read_bandwidth)
    # Casts of inputs and outputs are kernels of their own, or parts of the product.
    products = [event for event in profile.events if event.macs]
    found: dict[int, float] = {}
    for m in rows:
        own = [event for event in products if event.macs == m * depth * columns]
        if len(own) != count:
            raise RuntimeError(f"{shape}, {precision}: expected {count} products of {m} rows, found {len(own)}")
        found[m] = sum(event.bytes for event in own) / sum(event.seconds for event in own)
    return found, bandwidth


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="KxN")
    parser.add_argument("--rows", nargs="+", type=int, default=list(range(1, 9)))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--megabytes", type=int, default=256, help="of weights in all layers of a shape")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args()
    try:
        print(f"{args.threads} threads; GB/s of a streaming read, and by number of rows (share of that)\n")
        print(" ".join([f"{'K x N':>10}  {'weights':11} {'read':>5}", *(f"{m:>12}" for m in args.rows)]), flush=True)
        results: list[dict[str, Any]] = []
        for precision in args.precisions:
            for shape in args.shapes:
                found, bandwidth = measure(shape, precision, args.rows, args.threads, args.megabytes)
                cells = [f"{found[m] / 1e9:5.1f} ({found[m] / bandwidth:4.0%})" for m in args.rows]
                print(" ".join([f"{shape:>10}  {precision:11} {bandwidth / 1e9:5.1f}", *cells]), flush=True)
                results += [
                    {"shape": shape, "precision": precision, "rows": m, "bytes_per_second": found[m], "read": bandwidth}
                    for m in args.rows
                ]
    except TrimtabError as error:
        print(error, file=sys.stderr)
        return 1
    if args.json:
        figures = {"threads": args.threads, "results": results}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
