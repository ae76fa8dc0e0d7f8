"""Memory plans of the zoo and of the benchmarks' models: bytes of the arena beside the least that any plan needs.

    python benchmarks/memory_plan.py [--model NAME]

The zoo is compiled for all sizes, and the bytes are those of the inputs it is traced with.  ``ratio`` is the arena over
the most bytes of intermediate tensors that are needed at one time.  ``scratch`` is what a thread takes for itself.  The
exit code is 1 when a ratio is over 1.1.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch

import trimtab
from benchmark_models import BENCHMARK_MODELS
from trimtab.backends.tvm.emit import emit
from trimtab.backends.tvm.pipeline import lower
from trimtab.backends.tvm.targets import find_target
from trimtab.ir.dims import evaluate
from trimtab.passes.samples import sizes_of
from zoo_models import zoo

LARGEST_RATIO = 1.1


def models() -> Iterator[tuple[str, Any, dict[str, torch.Tensor], Any]]:
    """Name, model, inputs and dynamic shapes."""
    for entry in zoo():
        yield entry.name, entry.build, entry.inputs(), entry.dynamic_shapes()
    for name, benchmark in BENCHMARK_MODELS.items():
        yield name, benchmark.build, benchmark.inputs(), None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", action="append", help="only this model")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    spec = find_target("native", 2)
    worst = 0.0
    print(f"{'model':24s} {'arena KB':>10s} {'live KB':>10s} {'ratio':>7s} {'scratch KB':>10s}")
    for name, build, inputs, dynamic_shapes in models():
        if args.model and name not in args.model:
            continue
        with torch.no_grad():
            module = trimtab.trace(build(), tuple(inputs.values()), dynamic_shapes=dynamic_shapes)
        module = trimtab.optimize(module, "cleanup,fuse,group-fusions").module
        sizes = sizes_of(module.main, tuple(inputs.values()))
        lowered = lower(emit(module, spec.machine).relax, spec.tvm_target(), spec.machine, module.symbols())
        found = (lowered.arena_bytes, lowered.live_bytes, lowered.scratch_bytes)
        arena, live, scratch = (int(evaluate(nbytes, sizes)) for nbytes in found)
        ratio = arena / max(live, 1)
        worst = max(worst, ratio)
        print(f"{name:24s} {arena / 1e3:10.1f} {live / 1e3:10.1f} {ratio:7.4f} {scratch / 1e3:10.1f}", flush=True)
    print(f"worst ratio {worst:.4f}")
    return int(worst > LARGEST_RATIO)


if __name__ == "__main__":
    sys.exit(main())
