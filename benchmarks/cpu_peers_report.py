"""The figures of a run of cpu_peers.py: ratios, means, efficiency, the printed table, the JSON file and the chart."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cpu_peers_job import Facts
from machine_peaks import last_level_cache_bytes
from trimtab.backends.tvm.peaks import Peaks

OURS = "trimtab"
BYTES = {"f32": 4, "bf16": 2}
"""Of one weight."""


@dataclass(frozen=True)
class Row:
    """One system on one model.

    Attributes:
        error: largest difference from the outputs in float64, relative to the largest element of the output.
        efficiency: the least time the machine's limits allow over the median; None where no limit was measured.
        compile_seconds: until the model can be called; None for a system that does not compile.
        compile_peak_bytes: resident memory of the process at most, packages and the model itself included.
        note: what readers should know about how the model was compiled.
    """

    model: str
    system: str
    precision: str
    median_ms: float
    best_ms: float
    error: float
    efficiency: float | None = None
    compile_seconds: float | None = None
    compile_peak_bytes: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Missing:
    """A system without figures for a model, and why."""

    model: str
    system: str
    precision: str
    reason: str


@dataclass
class Results:
    """All of one run.

    Attributes:
        machine: processor, threads and measured peaks.
        versions: of the packages.
        command: the command line.
        models: facts about each model, by name.
    """

    machine: dict[str, Any]
    versions: dict[str, str]
    command: str
    models: dict[str, Facts] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Results:
        fields = json.loads(path.read_text())
        fields["models"] = {name: Facts(**facts) for name, facts in fields["models"].items()}
        fields["rows"] = [Row(**row) for row in fields["rows"]]
        fields["missing"] = [Missing(**row) for row in fields["missing"]]
        return cls(**fields)

    def ratio(self, row: Row) -> float | None:
        """How many times as long as Trimtab at the same precision; None where Trimtab has no row."""
        for other in self.rows:
            if (other.model, other.system, other.precision) == (row.model, OURS, row.precision):
                return row.median_ms / other.median_ms
        return None

    def ratios(self, system: str, precision: str, kind: str) -> dict[str, float]:
        """The ratio of a system on every model of ``kind`` that it and Trimtab have both run."""
        found = {}
        for row in self.rows:
            ratio = self.ratio(row)
            same_kind = self.models[row.model].kind == kind
            if same_kind and (row.system, row.precision) == (system, precision) and ratio is not None:
                found[row.model] = ratio
        return found

    def best_peer(self, model: str, precision: str) -> Row | None:
        """The peer with the smallest median."""
        peers = [r for r in self.rows if (r.model, r.precision) == (model, precision) and r.system != OURS]
        return min(peers, key=lambda row: row.median_ms, default=None)


def least_seconds(facts: Facts, precision: str, peaks: Peaks) -> tuple[float, str] | None:
    """The least time one evaluation can take on this machine, and what limits it: ``compute`` or ``memory``.

    Weights count against memory only where they are larger than a quarter of the last-level cache, which programs and
    virtual machines on other cores share: smaller ones stay there between the calls of a benchmark.
    """
    rate = peaks.of(precision)
    if not rate:
        return None
    compute = 2 * facts.macs / rate
    weights = facts.weight_bytes * BYTES[precision] // BYTES["f32"]
    memory = (weights + facts.cache_bytes) / peaks.read_bandwidth if 4 * weights > last_level_cache_bytes() else 0.0
    return max((compute, "compute"), (memory, "memory"))


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))


LONGEST_BAR = 4.0
"""Where the chart cuts off bars, so that one slow system does not flatten the others; the number beside it is whole."""

HEADER = (
    f"{'system':13s} {'':4s} {'median ms':>10s} {'best ms':>9s} {'/ Trimtab':>9s} {'of limit':>8s} {'error':>8s} "
    f"{'compile s':>9s} {'peak GB':>7s}"
)


def model_lines(results: Results, model: str) -> Iterator[str]:
    """The table of one model."""
    facts = results.models[model]
    yield f"{model}: {facts.macs / 1e9:.2f} G multiply-accumulates, {facts.weight_bytes / 1e6:.0f} MB of weights in f32"
    yield HEADER
    for row in results.rows:
        if row.model == model:
            ratio = results.ratio(row)
            yield (
                f"{row.system:13s} {row.precision:4s} {row.median_ms:10.2f} {row.best_ms:9.2f} {_text(ratio, '9.2f')} "
                f"{_text(row.efficiency, '8.1%')} {row.error:8.1e} {_text(row.compile_seconds, '9.1f')} "
                f"{_text(row.compile_peak_bytes and row.compile_peak_bytes / 1e9, '7.2f')}"
            )
    for row in results.rows:
        if row.model == model and row.note:
            yield f"{row.system:13s} {row.precision:4s} note: {row.note}"
    for gap in results.missing:
        if gap.model == model:
            yield f"{gap.system:13s} {gap.precision:4s} missing: {gap.reason}"


def summary_lines(results: Results) -> Iterator[str]:
    """Geometric means of the ratios to Trimtab, and the best peer of every model."""
    yield "median of the peer / median of Trimtab, geometric mean (models that both ran)"
    peers = dict.fromkeys((row.system, row.precision) for row in results.rows if row.system != OURS)
    for system, precision in peers:
        means = []
        for kind in ("transformer", "convolution"):
            ratios = results.ratios(system, precision, kind)
            if ratios:
                means.append(f"{kind}s {geometric_mean(list(ratios.values())):.2f} ({len(ratios)})")
        if means:
            yield f"{system:13s} {precision:4s} {', '.join(means)}"
    yield "best peer of each model / Trimtab"
    for model in results.models:
        for precision in BYTES:
            best = results.best_peer(model, precision)
            ratio = best and results.ratio(best)
            if best and ratio:
                yield f"{model:13s} {precision:4s} {best.system:13s} {ratio:.2f}{'  Trimtab is slower' * (ratio < 1)}"


def _text(value: float | None, form: str) -> str:
    """``value`` in the format ``form``, or a dash as wide."""
    return format(value, form) if value is not None else format("-", ">" + form.split(".")[0])


def draw_chart(results: Results, path: Path) -> None:
    """Write an SVG: for each model the time of every peer over Trimtab's, float32 beside bf16.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "trimtab"  # the same figures give the same file
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text: smaller than outlines, and can be searched
    from matplotlib import pyplot

    panels = [p for p in BYTES if any((r.system, r.precision) == (OURS, p) for r in results.rows)]
    models = list(results.models)
    peers = list(dict.fromkeys(row.system for row in results.rows if row.system != OURS))
    width = 0.8 / max(1, len(peers))
    height = 1.2 + (0.2 + 0.14 * len(peers)) * len(models)
    figure, axes = pyplot.subplots(
        1, max(1, len(panels)), figsize=(5 * max(1, len(panels)), height), sharey=True, squeeze=False,
        layout="constrained", facecolor="white",
    )  # fmt: skip
    handles: dict[str, Any] = {}
    for axis, precision in zip(axes[0], panels, strict=False):
        for index, system in enumerate(peers):
            rows = [row for row in results.rows if (row.system, row.precision) == (system, precision)]
            bars = [(models.index(row.model), ratio) for row in rows if (ratio := results.ratio(row)) is not None]
            if bars:
                places = [place + (index - (len(peers) - 1) / 2) * width for place, _ in bars]
                lengths = [min(ratio, LONGEST_BAR) for _, ratio in bars]
                handles[system] = axis.barh(places, lengths, width, label=system, color=f"C{index}")
                for place, length, (_, ratio) in zip(places, lengths, bars, strict=True):
                    # On white where the line at 1 would cross the number.
                    ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.3} if length < 1 else None
                    axis.text(length + 0.04, place, f"{ratio:.2f}", va="center", fontsize=6, bbox=ground)
        axis.axvline(1.0, color="black", linewidth=1)
        axis.set_xlim(0, LONGEST_BAR * 1.1)
        axis.set_title(f"{precision}, {results.machine['threads']} threads")
        axis.set_xlabel("time / time of Trimtab; above 1 Trimtab is faster")
        axis.set_yticks(range(len(models)), models)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].invert_yaxis()
    if handles:
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)
