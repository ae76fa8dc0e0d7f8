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


def sensitivities(module: Module, sample: Sample, unit: float, trials: int = 3) -> list[float]:
    """How far each output of ``module`` moves, in float64, when inputs and weights change by up to ``unit`` of
    themselves at random: the largest element of several trials."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def changed(data: torch.Tensor) -> torch.Tensor:
        if not data.dtype.is_floating_point:
            return data
        wide = data.double()
        return wide * (1 + unit * (2 * torch.rand(wide.shape, generator=generator, dtype=wide.dtype) - 1))

    def run(inputs: Sequence[torch.Tensor], weights: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return interpret(module, inputs, precision=torch.float64, weights=weights)

    with _threads_for(sample):
        still = run(sample.inputs, {})
        largest = [0.0] * len(still)
        for _ in range(trials):
            inputs = [changed(tensor).to(tensor.dtype) for tensor in sample.inputs]
            weights = {id: changed(weight.tensor()) for id, weight in module.weights.items()}
            drifts = map(measure, still, run(inputs, weights))
            largest = [max(far, drift.absolute) for far, drift in zip(largest, drifts, strict=True)]
    return largest


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
