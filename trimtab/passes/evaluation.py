"""Evaluating a module on a sample, and how far its outputs moved: what contracts and bisection are checked with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from trimtab.ir.core import Module
from trimtab.ir.interpreter import interpret
from trimtab.passes.contracts import Contract, Drift, Exact, measure
from trimtab.passes.samples import SMALL_MACS, Sample

if TYPE_CHECKING:
    import torch


def evaluate(module: Module, sample: Sample, precision: str = "") -> tuple[torch.Tensor, ...]:
    """The outputs of ``module`` on ``sample``, in a floating type such as ``float64`` or, for "", as declared.

    Raises:
        TrimtabError: the inputs do not fit, or an op refuses the values it gets.
    """
    import torch

    wide = getattr(torch, precision) if precision else None
    with _threads_for(sample):
        return interpret(module, sample.inputs, precision=wide, row_major=True)


def suits(contract: Contract, sample: Sample) -> bool:
    """Whether ``contract`` can be checked on ``sample``: infinities and NaN can only be compared bit for bit."""
    return not sample.special or (isinstance(contract, Exact) and not contract.rounding)


def output_drifts(
    names: Sequence[str],
    before: Sequence[torch.Tensor],
    after: Sequence[torch.Tensor],
    sample: Sample,
    precision: str = "",
) -> Iterator[Drift]:
    """How far each output moved; ``names`` are those of the outputs before.  A missing output is infinitely far."""
    suffix = f" on {sample.name}{f' in {precision}' if precision else ''}"
    if len(before) != len(after):
        yield Drift(math.inf, 0.0, 1, f"the number of outputs, {len(before)} and then {len(after)},{suffix}")
    for name, old, new in zip(names, before, after, strict=False):
        yield measure(old, new, f"output {name}{suffix}")


@contextmanager
def _threads_for(sample: Sample) -> Iterator[None]:
    """One thread for small samples: waking a pool for thousands of tiny ops takes longer than the ops, and a hundred
    times longer when other processes hold the cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1 if sample.macs < SMALL_MACS else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
