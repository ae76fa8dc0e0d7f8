"""Computing one token with weights of few bits: how much of the memory's bandwidth it reaches."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

import trimtab
from benchmark_models import BENCHMARK_MODELS, LARGE_MODELS, TINY_MODELS, BenchmarkModel
from trimtab import TrimtabError
from trimtab.backends.tvm.peaks import measure_peaks

MODELS = ("gpt2-decode", "llama-1b-decode")
WEIGHTS = {
    "f32": "",
    "i4, group 128": "quantize-weights{bits=4,group=128,tied=true}",
    "i4, group 32": "quantize-weights{bits=4,group=32,tied=true}",
}
"""Passes behind `cleanup,fuse`."""


def decode_lines(threads: int, runs: int, models: Sequence[str] = MODELS) -> Iterator[str]:
    """Milliseconds per token, and bytes per second of the products and of the whole call.

    The bandwidth is that of a streaming read, measured before and after; the larger counts. Bytes of a product are
    those of its weights, scales, inputs and result. For the whole call, the first figure counts those of all products
    alone; the second also what the caller gives and gets, which is the cache, once each.
    """
    yield f"one token with 128 in the cache, {threads} threads; GB/s, and share of a streaming read at that time"
    heads = ("products", "whole call", "with cache")
    yield f"{'model':16s} {'weights':14s} {'ms':>8s} {'best':>8s} {'read':>5s}" + "".join(f" {h:>13s}" for h in heads)
    known = {**BENCHMARK_MODELS, **LARGE_MODELS, **TINY_MODELS}
    for name in models:
        entry = known[name]
        module = trimtab.trace(entry.build(), tuple(entry.inputs().values()))
        for label, passes in WEIGHTS.items():
            try:
                yield _line(module, entry, label, passes, threads, runs)
            except TrimtabError as error:
                yield f"{name:16s} {label:14s} {str(error).splitlines()[0]}"


def _line(module: trimtab.Module, entry: BenchmarkModel, label: str, passes: str, threads: int, runs: int) -> str:
    inputs = _fresh(entry)
    pipeline = ",".join(filter(None, ("cleanup", "fuse", passes)))
    with tempfile.TemporaryDirectory(prefix="trimtab-decode-") as folder:
        made = trimtab.optimize(module, pipeline, check="never").module
        code = trimtab.compile(made, target="native", threads=threads, pipeline="cleanup")
        path = code.save(Path(folder) / "decode.trim", check=False)
        del made, code
        with trimtab.load(path, threads=threads) as session:
            before = measure_peaks(threads).read_bandwidth
            seconds = []
            for _ in range(runs + 2):
                begin = time.perf_counter()
                outputs = session(*inputs)
                seconds.append(time.perf_counter() - begin)
            events = session.profile(*inputs, repeat=runs).events
            products = [event for event in events if any(op.startswith("linear") for op in event.ops)]
            read = max(before, measure_peaks(threads).read_bandwidth)
    size = sum(event.bytes for event in products)
    whole = statistics.median(seconds[2:])
    given = sum(value.nbytes for value in (*inputs, *outputs))
    rates = [size / sum(event.seconds for event in products), size / whole, (size + given) / whole]
    cells = [f"{rate / 1e9:5.1f} ({rate / read:4.0%})" for rate in rates]
    return (
        f"{entry.name:16s} {label:14s} {whole * 1e3:8.2f} {min(seconds) * 1e3:8.2f} "
        f"{read / 1e9:5.1f} {cells[0]:>13s} {cells[1]:>13s} {cells[2]:>13s}"
    )


def _fresh(entry: BenchmarkModel) -> list[np.ndarray]:
    """Inputs that the model was not traced with."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(value.shape, generator=generator) if value.dtype.is_floating_point else value).numpy()
        for value in entry.inputs().values()
    ]
