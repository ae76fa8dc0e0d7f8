"""What share of the processor's peak matrix products reach: linear layers of compiled code, and micro-kernels alone.

    python benchmarks/matrix_products.py [--threads 1 2] [--precisions f32 bf16 int8] [--rows 128 197] [--json FILE]

Each shape is a model of equal linear layers, every one with weights of its own.  ``other weights`` has as many of them
as exceed the caches of a core several times, as in a model; ``same weights`` has one layer, called again and again.  A
figure is the least time of a kernel over many calls.  ``kernel alone`` is a micro-kernel without anything around it, on
one thread: a panel of B against a few tiles of A, in the caches.  For int8 there is no other figure, because no pass
makes integers yet.  The peak is the best of three measurements, because one that is too low makes every share too high.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import trimtab
from machine_peaks import describe, processor_name
from trimtab.backends.tvm.microkernels import MicroKernel, microkernel, preferred_tiles
from trimtab.backends.tvm.microkernels.products import BITS
from trimtab.backends.tvm.peaks import Peaks, compile_probes, measure_peaks
from trimtab.backends.tvm.targets import find_target
from trimtab.cores import usable_cores

ROWS = (128, 197, 256, 512)
MATRICES = ((384, 384), (384, 1536), (1536, 384), (768, 768), (768, 3072), (3072, 768))
"""(depth, columns) of the weights."""

OTHER_BYTES = 24 << 20
"""Weights of a model whose layers find none of theirs in the second-level cache."""

PRODUCTS = {"f32": "f32", "bf16": "bf16", "int8": "u8*s8"}
_TYPES = {"u8": np.uint8, "s8": np.int8, "f32": np.float32, "bf16": np.uint16}
_ROW_TILES = 4
_DEPTHS = (256, 512, 768, 3072)
_PEAK_RUNS = 3
_SECONDS = 0.2


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        what: ``other weights``, ``same weights`` or ``kernel alone``.
        shape: rows, depth and columns.
        ops: operations per second.
        share: of the peak for this precision and number of threads.
    """

    what: str
    precision: str
    threads: int
    shape: tuple[int, int, int]
    ops: float
    share: float

    def __str__(self) -> str:
        rows, depth, columns = self.shape
        size = f"{rows:4} x {depth:4} x {columns:4}"
        speed = f"{self.ops / 1e9:7.0f} GOP/s  {self.share:6.1%}"
        return f"{self.precision:5} {self.threads} thread(s)  {size}  {self.what:13}  {speed}"


class Layers(nn.Module):
    """``count`` linear layers that read the same rows."""

    def __init__(self, depth: int, columns: int, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(depth, columns) for _ in range(count))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


def layer_speed(precision: str, threads: int, shape: tuple[int, int, int], layers: int) -> float:
    """Operations per second of the linear layers of a compiled model."""
    rows, depth, columns = shape
    x = torch.randn(rows, depth)
    module = trimtab.trace(Layers(depth, columns, layers).eval(), (x,))
    artifact = trimtab.compile(module, target="native", threads=threads, precision=precision, pipeline="cleanup")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layers.trim"
        artifact.save(path)
        session = trimtab.load(path, threads=threads)
        calls, begin = 0, time.perf_counter()
        best: list[float] = []
        flops = 0
        while calls < 3 or time.perf_counter() < begin + _SECONDS:
            events = [event for event in session.profile(x.numpy(), repeat=10).events if event.flops]
            times = [event.seconds for event in events]
            best = [min(pair) for pair in zip(best, times, strict=True)] if best else times
            flops, calls = sum(event.flops for event in events), calls + 1
        session.close()
    return flops / sum(best)


def repeating_text(kernel: MicroKernel, depth: int) -> str:
    """An LLVM module with ``void loop(i64 address, i64 times)``: a panel against ``_ROW_TILES`` tiles of A, repeated.

    A, the panel and C lie behind each other from ``address`` on, as :func:`kernel_speed` makes them.
    """
    a_size, b_size = _operand_bytes(kernel, depth)
    prepare, release = (f"call i32 @{name}()" if name else "" for name in (kernel.setup, kernel.teardown))
    arguments = f"ptr %rows, i64 {depth}, ptr %b, ptr %c, i64 {kernel.columns}, i64 {depth}, i32 0, ptr %b"
    return f"""{kernel.text}
define void @loop(i64 %address, i64 %times) {{
entry:
  {prepare}
  %a = inttoptr i64 %address to ptr
  %b = getelementptr i8, ptr %a, i64 {a_size}
  %c = getelementptr i8, ptr %b, i64 {b_size}
  br label %tile
tile:
  %done = phi i64 [ 0, %entry ], [ %next, %tile ]
  %number = urem i64 %done, {_ROW_TILES}
  %offset = mul i64 %number, {a_size // _ROW_TILES}
  %rows = getelementptr i8, ptr %a, i64 %offset
  %status = call i32 @{kernel.name}({arguments})
  %next = add i64 %done, 1
  %more = icmp slt i64 %next, %times
  br i1 %more, label %tile, label %end
end:
  {release}
  ret void
}}
"""


def _operand_bytes(kernel: MicroKernel, depth: int) -> tuple[int, int]:
    a_size = _ROW_TILES * kernel.rows * depth * BITS[kernel.a_dtype] // 8
    return a_size, depth * kernel.columns * BITS[kernel.b_dtype] // 8


def kernel_speed(kernel: MicroKernel, depth: int) -> float:
    """Operations per second of a micro-kernel on one thread."""
    library = compile_probes({"kernel": repeating_text(kernel, depth)}, list(kernel.features))
    a_size, b_size = _operand_bytes(kernel, depth)
    c_size = kernel.rows * kernel.columns * 4
    memory = np.zeros(a_size + b_size + c_size + 4096, np.uint8)
    start = -memory.ctypes.data % 4096
    rng = np.random.default_rng(0)
    for place, size, name in ((start, a_size, kernel.a_dtype), (start + a_size, b_size, kernel.b_dtype)):
        part = memory[place : place + size].view(_TYPES[name])
        if name == "bf16":
            part[:] = (rng.standard_normal(part.size).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        else:
            part[:] = (rng.standard_normal(part.size) * (1 if name == "f32" else 30)).astype(part.dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.so"
        path.write_bytes(library)
        function = ctypes.CDLL(str(path)).kernel
        function.argtypes, function.restype = [ctypes.c_int64, ctypes.c_int64], None
        count = max(_ROW_TILES, 4_000_000_000 // (kernel.rows * kernel.columns * depth * 100))
        address, best = memory.ctypes.data + start, float("inf")
        end = time.perf_counter() + _SECONDS
        while time.perf_counter() < end:
            begin = time.perf_counter()
            function(address, count)
            best = min(best, time.perf_counter() - begin)
    return 2.0 * kernel.rows * kernel.columns * depth * count / best


def kernels_alone(precision: str) -> Iterator[tuple[MicroKernel, int]]:
    """The best micro-kernel of this machine for a precision, and the depths to try."""
    kind = PRODUCTS[precision]
    isa = find_target("native").machine.instruction_set(kind, _DEPTHS[0], group_of(kind))
    if isa is None:
        return
    tile = preferred_tiles(isa, kind)[0]
    for depth in _DEPTHS:
        yield microkernel(isa, kind, tile.rows, tile.vectors * isa.lanes), depth


def group_of(kind: str) -> int:
    """Consecutive k that the fastest instruction for ``kind`` wants interleaved."""
    sets = find_target("native").machine.instruction_sets
    return next((isa.products[kind].group for isa in sets if kind in isa.products), 1)


def measure(args: argparse.Namespace, peaks: dict[int, Peaks]) -> Iterator[Row]:
    """The figures, one after the other."""
    for precision in args.precisions:
        for kernel, depth in kernels_alone(precision):
            speed = kernel_speed(kernel, depth)
            shape = (kernel.rows, depth, kernel.columns)
            yield Row("kernel alone", precision, 1, shape, speed, speed / peaks[1].of(precision))
        if precision == "int8":
            continue
        for threads in args.threads:
            for depth, columns in args.matrices:
                for rows in args.rows:
                    shape = (rows, depth, columns)
                    many = max(2, OTHER_BYTES // (depth * columns * (4 if precision == "f32" else 2)))
                    for what, layers in (("same weights", 1), ("other weights", many)):
                        speed = layer_speed(precision, threads, shape, layers)
                        yield Row(what, precision, threads, shape, speed, speed / peaks[threads].of(precision))


def best_peaks(threads: int) -> Peaks:
    """The highest of each rate in several measurements."""
    runs = [measure_peaks(threads) for _ in range(_PEAK_RUNS)]
    rates = {
        kind: {name: max(run.rates[kind][name] for run in runs) for name in names}
        for kind, names in runs[0].rates.items()
    }
    return Peaks(threads, rates, max(run.read_bandwidth for run in runs))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, usable_cores()}))
    parser.add_argument("--precisions", nargs="+", choices=[*PRODUCTS], default=[*PRODUCTS])
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS, help="of the linear layers; none leaves them out")
    parser.add_argument("--matrices", type=_matrix, nargs="+", default=MATRICES, metavar="DEPTHxCOLUMNS")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    return parser.parse_args(arguments)


def _matrix(text: str) -> tuple[int, int]:
    depth, columns = text.split("x")
    return int(depth), int(columns)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    peaks = {}
    try:
        for threads in sorted({1, *args.threads}):
            peaks[threads] = best_peaks(threads)
            print(f"{processor_name()}, {threads} thread(s): {describe(peaks[threads])}", flush=True)
    except trimtab.TrimtabError as error:
        print(error, file=sys.stderr)
        return 1
    rows = []
    for row in measure(args, peaks):
        rows.append(row)
        print(row, flush=True)
    if args.json:
        figures = {
            "processor": processor_name(),
            "system": platform.platform(),
            "peaks": {str(threads): asdict(found) for threads, found in peaks.items()},
            "rows": [asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
