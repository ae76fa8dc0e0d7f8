"""Multiply-accumulates of reduced models beside those expected, and the latency of DeiT-S with fewer tokens.

Expected figures are computed from the schedules of the papers, the embedding of patches and the classifier included and
the matching of tokens left out; they agree with the published ones (4.6 G for DeiT-S, 2.7 G for ToMe with r = 13, 3.0 G
for EViT keeping 0.7).
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trimtab
from measuring import Block, take_turns, time_calls
from trimtab import TrimtabError
from trimtab.ir import Module
from trimtab.passes.samples import count_macs, smallest_sizes
from zoo_models import ZooModel, deit_s, vit_b

EXPECTED: dict[str, tuple[tuple[str, float], ...]] = {
    "deit-s": (
        ("", 4.60),
        ("merge-tokens{r=8}", 3.42),
        ("merge-tokens{r=13}", 2.70),
        ("merge-tokens{r=16}", 2.29),
        ("prune-tokens{keep=0.9}", 4.02),
        ("prune-tokens{keep=0.7}", 3.03),
        ("prune-tokens{keep=0.5}", 2.31),
        ("merge-tokens-spectral{keep=0.95}", 3.44),
        ("merge-tokens-spectral{keep=0.925}", 2.99),
        ("merge-tokens-spectral{keep=0.9}", 2.59),
    ),
    "vit-b": (("", 17.56), ("merge-tokens{r=13}", 10.37)),
}
"""For each model pipelines with the billions of multiply-accumulates for one image that they should leave."""
MODELS: dict[str, Callable[[], ZooModel]] = {"deit-s": deit_s, "vit-b": vit_b}
FASTER = ("", "merge-tokens{r=13}", "merge-tokens{r=16}")
"""What is timed, the unreduced model first."""


@dataclass(frozen=True)
class MacsRow:
    """Billions of multiply-accumulates of ``model`` after ``pipeline``; ``counted`` is None where a pass failed."""

    model: str
    pipeline: str
    expected: float
    counted: float | None
    reason: str = ""

    @property
    def difference(self) -> float | None:
        """Of the expected figure."""
        return None if self.counted is None else self.counted / self.expected - 1


@dataclass(frozen=True)
class LatencyRow:
    """Milliseconds of calls of DeiT-S, and how many times as fast as the unreduced model the median is."""

    pipeline: str
    batch: int
    median_ms: float
    best_ms: float
    speed: float
    best_speed: float


def traced(entry: ZooModel, batch: int | None = None, length: int = 12) -> Module:
    """A model of the zoo with a fixed number of tokens, and a symbolic batch where ``batch`` is None."""
    axes = {name: {0: dims[0]} for name, dims in entry.dynamic_shapes().items()} if batch is None else None
    return trimtab.trace(entry.build(), tuple(entry.inputs(batch or 2, length).values()), dynamic_shapes=axes)


def reduced(module: Module, pipeline: str) -> Module:
    """``module`` cleaned up, and under ``pipeline``, which may be empty."""
    return trimtab.optimize(module, ",".join(filter(None, ("cleanup", pipeline))), check="never").module


def macs(module: Module) -> int:
    """Multiply-accumulates of one call with symbols at their smallest sizes: a batch of one."""
    return count_macs(module, smallest_sizes(module.main))


def first_line(error: TrimtabError) -> str:
    """What an error says, in a line."""
    return str(error).strip().splitlines()[0]


def count(model: str, most: int | None = None) -> list[MacsRow]:
    """The table of one model, or its first rows."""
    module = reduced(traced(MODELS[model]()), "")
    rows = []
    for pipeline, expected in EXPECTED[model][:most]:
        try:
            rows.append(MacsRow(model, pipeline, expected, macs(reduced(module, pipeline)) / 1e9))
        except TrimtabError as error:
            rows.append(MacsRow(model, pipeline, expected, None, first_line(error)))
    return rows


def time_models(
    modules: dict[str, Module], inputs: Sequence[object], threads: int, runs: int
) -> dict[str, list[float]]:
    """Milliseconds of calls of the compiled ``modules``, which take turns in one process."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        contenders: dict[str, Block] = {}
        for number, (name, module) in enumerate(modules.items()):
            artifact = trimtab.compile(module, target="native", threads=threads)
            path = artifact.save(folder / f"{number}.trim", check=False)
            session = stack.enter_context(trimtab.load(path, threads=threads))
            contenders[name] = partial(time_calls, partial(session, *inputs))
        return take_turns(contenders, runs)


def time_deit(
    batches: Sequence[int], threads: int, runs: int, model: Callable[[], ZooModel] = deit_s
) -> list[LatencyRow]:
    """DeiT-S, or ``model``, with fewer tokens beside itself, for each batch."""
    rows = []
    entry = model()
    for batch in batches:
        module = traced(entry, batch)
        inputs = [value.numpy() for value in entry.inputs(batch).values()]
        times = time_models({pipeline: reduced(module, pipeline) for pipeline in FASTER}, inputs, threads, runs)
        whole = times[""]
        rows += [
            LatencyRow(
                pipeline, batch, statistics.median(found), min(found),
                statistics.median(whole) / statistics.median(found), min(whole) / min(found),
            )
            for pipeline, found in times.items()
        ]  # fmt: skip
    return rows
