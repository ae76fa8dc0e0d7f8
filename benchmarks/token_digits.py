"""Every pass that reduces tokens, on a vision transformer trained on digits: accuracy, work, latency, distillation."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import trimtab
from token_macs import first_line, macs, time_models
from trimtab import TrimtabError
from trimtab.ir import Module, interpret
from trimtab.passes.registry import pass_names

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "distil-tokens"))
from distil import EPOCHS, accuracy_of, distil, traced, train_original

from trimtab.cli.demo_training import Digits, accuracy, load_digits

BUDGETS = (0.8, 0.65, 0.5)
PIPELINES: tuple[str, ...] = (
    "merge-tokens{budget=BUDGET}",
    "merge-tokens{budget=BUDGET,proportional=false}",
    "merge-tokens{budget=BUDGET,schedule=linear,inflect=-0.5,proportional=false}",
    "merge-tokens-spectral{budget=BUDGET}",
    "prune-tokens{budget=BUDGET}",
    "prune-tokens{budget=BUDGET,layers=[0,1,2,3,4],fuse=drop}",
    "sample-tokens{budget=BUDGET,layers=[0,1,2,3,4]}",
    "cluster-tokens{budget=BUDGET,after=0}",
    "slim-tokens{budget=BUDGET,after=[0,1,2]}",
    "gate-tokens{budget=BUDGET}",
    "gate-tokens{budget=BUDGET,layers=[0,1,3]}",
)
"""Every pass that reduces tokens of images, with the share of multiply-accumulates to leave. By themselves some choose
fewer layers, in which half of the work cannot be saved."""
_CALIBRATION = 64


@dataclass
class DigitsRow:
    """One pass at one budget.

    Attributes:
        label: the pass with its options, but for the budget; empty for the unreduced model.
        pipeline: the same with the budget.
        share: of the multiply-accumulates of the unreduced model.
        accuracy: on the held-out digits.
        median_ms, best_ms: of calls of the compiled model.
        speed, best_speed: how many times as fast as the unreduced model, by medians and by the best calls.
        distilled: accuracy after training on the answers of the unreduced model.
        steps: of that training.
        reason: why there are no figures.
    """

    label: str
    pipeline: str
    budget: float
    share: float | None = None
    accuracy: float | None = None
    median_ms: float | None = None
    best_ms: float | None = None
    speed: float | None = None
    best_speed: float | None = None
    distilled: float | None = None
    steps: int | None = None
    reason: str = ""


class DigitsModel:
    """The unreduced model, trained, with its data.

    Args:
        epochs: of the training.
        held_out: how many of the held-out digits to use; None for all.
    """

    def __init__(self, epochs: int = EPOCHS, held_out: int | None = None) -> None:
        data = load_digits()
        self.digits = Digits(
            data.train_images, data.train_labels, data.held_out_images[:held_out], data.held_out_labels[:held_out]
        )
        self.network = train_original(self.digits, epochs)
        self.module = trimtab.optimize(traced(self.network), "cleanup", check="never").module
        self.accuracy = accuracy_of(self.network, self.digits)

    def reduce(self, pipeline: str) -> Module:
        """The model under ``pipeline``; some of the training images serve as calibration data."""
        calibration = [self.digits.train_images[:_CALIBRATION]]
        return trimtab.optimize(self.module, pipeline, calibration=calibration, check="never").module

    def accuracy_of(self, module: Module) -> float:
        """Of ``module``, interpreted, on the held-out digits."""
        with torch.no_grad():
            logits = interpret(module, [torch.from_numpy(self.digits.held_out_images)])[0]
        return accuracy(np.asarray(logits), self.digits.held_out_labels)


def reduce_all(
    model: DigitsModel, budgets: Sequence[float] = BUDGETS, pipelines: Sequence[str] = PIPELINES
) -> Iterator[tuple[DigitsRow, Module | None]]:
    """Accuracy and work of every pass at every budget, with the reduced modules; the unreduced model first."""
    whole = macs(model.module)
    yield DigitsRow("", "", 1.0, 1.0, model.accuracy_of(model.module)), model.module
    for template in pipelines:
        name = template.partition("{")[0]
        label = template.replace("budget=BUDGET,", "").replace("{budget=BUDGET}", "")
        for budget in budgets:
            row = DigitsRow(label, template.replace("BUDGET", f"{budget:g}"), budget)
            module = None
            if name not in pass_names():
                row.reason = "there is no such pass"
            else:
                try:
                    module = model.reduce(row.pipeline)
                    row.share, row.accuracy = macs(module) / whole, model.accuracy_of(module)
                except TrimtabError as error:
                    module, row.reason = None, first_line(error)
            yield row, module


def time_all(rows: Sequence[tuple[DigitsRow, Module | None]], images: np.ndarray, threads: int, runs: int) -> None:
    """Fill in how long a call with ``images`` takes; the unreduced model, which comes first, takes turns with all."""
    found = {row.pipeline: (row, module) for row, module in rows if module is not None}
    times = time_models({pipeline: module for pipeline, (_, module) in found.items()}, [images], threads, runs)
    whole = times[""]
    for pipeline, (row, _) in found.items():
        row.median_ms, row.best_ms = statistics.median(times[pipeline]), min(times[pipeline])
        row.speed = statistics.median(whole) / row.median_ms
        row.best_speed = min(whole) / row.best_ms


def distil_all(
    model: DigitsModel, rows: Sequence[tuple[DigitsRow, Module | None]], seconds: float, most_steps: int = 100_000
) -> None:
    """Train each reduced module of ``rows`` on the answers of the original, and fill in its accuracy then."""
    images = torch.from_numpy(model.digits.train_images)
    for row, module in rows:
        if module is None:
            continue
        network = trimtab.to_torch(module)
        row.steps = distil(network, model.network, images, seconds, most_steps=most_steps)
        trimtab.update(module, network)
        row.distilled = model.accuracy_of(module)
