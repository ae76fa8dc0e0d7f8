"""Gathers, scatters and searches of token pruning and merging: how near they come to a copy of the same bytes.

    python benchmarks/token_selection.py [--shapes 1x197x384 ...] [--cases gather scatter-add ...] [--threads 2]
                                         [--json FILE]

A shape is batch x tokens x channels; half of the tokens are taken, or written to the other half.  Printed are the least
time of all kernels of a case and, where rows move, the bytes read and written per second, beside what ``memcpy`` of as
many bytes reaches on as many threads.  Operands stay in the caches where they fit.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import trimtab
from trimtab import TrimtabError
from trimtab.cores import usable_cores

SHAPES = ("1x197x384", "8x197x384", "8x577x768")


def _rows(indices: Tensor, x: Tensor) -> Tensor:
    """Indices of rows as torch's gather and scatter take them."""
    return indices.unsqueeze(-1).expand(-1, -1, x.shape[2])


def _in_batch(indices: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(indices.shape[0])[:, None], indices


# Each takes x [B, N, C], indices [B, N / 2], updates [B, N / 2, C] and scores [B, N].
CASES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Any]] = {
    "gather": lambda x, i, u, s: x.gather(1, _rows(i, x)),
    "gather-add": lambda x, i, u, s: x.gather(1, _rows(i, x)) + u,
    "gather-twice": lambda x, i, u, s: (x.gather(1, _rows(i, x)), (x + 1).gather(1, _rows(i, x))),
    "index": lambda x, i, u, s: x[_in_batch(i)],
    "index-select": lambda x, i, u, s: x[:, i[0]],
    "embedding": lambda x, i, u, s: nn.functional.embedding(i, x[0]),
    "scatter": lambda x, i, u, s: x.scatter(1, _rows(i, x), u),
    "scatter-add": lambda x, i, u, s: x.scatter_add(1, _rows(i, x), u),
    "index-put-add": lambda x, i, u, s: x.index_put(_in_batch(i), u, accumulate=True),
    "cumsum": lambda x, i, u, s: x.cumsum(1),
    "topk": lambda x, i, u, s: s.topk(s.shape[1] // 2),
    "sort": lambda x, i, u, s: s.sort(dim=-1, descending=True),
    "argmax": lambda x, i, u, s: x[:, ::2, : x.shape[1] // 2].contiguous().argmax(-1),
}


def moved(case: str, batch: int, tokens: int, channels: int) -> int:
    """Bytes of rows that a case must read and write; 0 where no rows move."""
    half, whole = 4 * batch * (tokens // 2) * channels, 4 * batch * tokens * channels
    return {
        "gather": 2 * half, "gather-add": 3 * half, "gather-twice": 4 * half, "index": 2 * half,
        "index-select": 2 * half, "embedding": 2 * half, "scatter": 2 * whole, "scatter-add": 2 * whole + half,
        "index-put-add": 2 * whole + half, "cumsum": 2 * whole,
    }.get(case, 0)  # fmt: skip


class Case(nn.Module):
    """One case as a model."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor, indices: Tensor, updates: Tensor, scores: Tensor) -> Any:
        return CASES[self.name](x, indices, updates, scores)


def measure(case: str, shape: tuple[int, int, int], threads: int) -> float:
    """Seconds of all kernels of a case together, the least time of each."""
    batch, tokens, _ = shape
    random = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=random)
    order = torch.stack([torch.randperm(tokens, generator=random)[: tokens // 2] for _ in range(batch)])
    updates, scores = x[:, : tokens // 2] + 1, torch.rand(batch, tokens, generator=random)
    inputs = (x, order, updates, scores)
    module = trimtab.trace(Case(case).eval(), inputs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.trim"
        trimtab.compile(module, target="native", threads=threads).save(path)
        with trimtab.load(path, threads=threads) as session:
            profile = session.profile(*(value.numpy() for value in inputs), repeat=50)
    return sum(event.seconds for event in profile.events if not event.name.startswith(("vm.", "runtime.")))


def copy_rate(size: int, threads: int) -> float:
    """Bytes read and written per second by a copy of ``size`` bytes in all, half of them read."""
    torch.set_num_threads(threads)
    source = torch.ones(max(1, size // 8))
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(100):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return size / best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="BxNxC")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    try:
        print(f"{'':12} {'case':14} {'us':>8} {'GB/s':>7} {'memcpy':>7}")
        for text in args.shapes:
            batch, tokens, channels = map(int, text.split("x"))
            for case in args.cases:
                seconds = measure(case, (batch, tokens, channels), args.threads)
                size = moved(case, batch, tokens, channels)
                rate, copy = size / seconds, copy_rate(size, args.threads) if size else 0.0
                cells = f"{rate / 1e9:7.1f} {copy / 1e9:7.1f}" if size else ""
                print(f"{text:12} {case:14} {seconds * 1e6:8.1f} {cells}", flush=True)
                results.append({"shape": text, "case": case, "seconds": seconds, "bytes": size, "copy": copy})
    except TrimtabError as error:
        print(error, file=sys.stderr)
        return 1
    if args.json:
        args.json.write_text(json.dumps({"threads": args.threads, "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
