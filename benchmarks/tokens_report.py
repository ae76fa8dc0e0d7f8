"""Tables and the chart of benchmarks/tokens.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from token_digits import DigitsRow
from token_macs import LatencyRow, MacsRow
from token_text import TextRow


def macs_lines(rows: Sequence[MacsRow]) -> Iterator[str]:
    """The multiply-accumulates of each pipeline beside those expected."""
    yield f"{'':8s} {'':36s} {'expected':>9s} {'counted':>9s} {'differ':>7s}"
    for row in rows:
        name = f"{row.model:8s} {row.pipeline or 'all tokens':36s} {row.expected:7.2f} G"
        if row.counted is None or row.difference is None:
            yield f"{name} missing: {row.reason}"
        else:
            yield f"{name} {row.counted:7.3f} G {row.difference:+7.2%}"


def digits_lines(rows: Sequence[DigitsRow]) -> Iterator[str]:
    """Accuracy and work of each pass, and what was measured beside."""
    yield f"{'':58s} {'MACs':>6s} {'accuracy':>8s} {'median':>9s} {'best':>9s} {'speed':>6s} {'(best)':>7s}"
    for row in rows:
        name = row.pipeline or "all tokens"
        if row.share is None or row.accuracy is None:
            yield f"{name:58s} missing: {row.reason}"
            continue
        times = ""
        if row.median_ms is not None:
            times = f" {row.median_ms:6.3f} ms {row.best_ms:6.3f} ms {row.speed:5.2f}x ({row.best_speed:4.2f}x)"
        yield f"{name:58s} {row.share:6.1%} {row.accuracy:8.2%}{times}"


def distilled_lines(rows: Sequence[DigitsRow], whole: float) -> Iterator[str]:
    """Accuracy before and after distillation, and what is lost against the unreduced model, in points."""
    for row in rows:
        if row.reason and row.budget == min(other.budget for other in rows):
            yield f"{row.pipeline:58s} missing: {row.reason}"
        if row.distilled is not None and row.accuracy is not None:
            lost = 100 * (whole - row.accuracy), 100 * (whole - row.distilled)
            yield (f"{row.pipeline:58s} {row.accuracy:.2%} ({lost[0]:.2f} points lost), after {row.steps} steps "
                   f"{row.distilled:.2%} ({lost[1]:.2f} points lost)")  # fmt: skip


def text_lines(rows: Sequence[TextRow]) -> Iterator[str]:
    """Cosines of embeddings to those of the whole model."""
    yield f"{'':96s} {'MACs':>6s} {'cosine':>7s} {'least':>6s}"
    for row in rows:
        if row.share is None:
            yield f"{row.pipeline:96s} missing: {row.reason}"
        else:
            yield f"{row.pipeline:96s} {row.share:6.1%} {row.mean_cosine:7.4f} {row.least_cosine:6.3f}"


def latency_lines(rows: Sequence[LatencyRow]) -> Iterator[str]:
    """Times of DeiT-S."""
    yield f"{'batch':5s} {'':24s} {'median':>10s} {'best':>10s} {'speed':>6s} {'(best)':>7s}"
    for row in rows:
        times = f"{row.median_ms:7.2f} ms {row.best_ms:7.2f} ms {row.speed:5.2f}x ({row.best_speed:4.2f}x)"
        yield f"{row.batch:5d} {row.pipeline or 'all tokens':24s} {times}"


def draw_chart(rows: Sequence[DigitsRow], path: Path) -> None:
    """Write an SVG: the accuracy and the measured speed of each pass over the share of multiply-accumulates.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "trimtab"  # the same figures give the same file
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained", facecolor="white")
    whole = next((row for row in rows if not row.label), None)
    handles: dict[str, Any] = {}
    for number, name in enumerate(dict.fromkeys(row.label for row in rows if row.label)):
        found = [row for row in rows if row.label == name and row.share is not None]
        style = {"color": f"C{number}", "marker": "o", "markersize": 4, "label": name}
        if found:
            (handles[name],) = left.plot([row.share for row in found], [row.accuracy for row in found], **style)
        for row in found:
            if row.distilled is not None:
                left.plot(row.share, row.distilled, marker="*", markersize=11, color=f"C{number}")
        timed = [row for row in found if row.speed is not None]
        if timed:
            right.plot([row.share for row in timed], [row.speed for row in timed], **style)
    if whole is not None and whole.accuracy is not None:
        left.axhline(whole.accuracy, color="black", linewidth=0.8, linestyle="--")
    left.set_ylabel("accuracy on held-out digits; stars: distilled")
    right.set_ylabel("times as fast as with all tokens")
    for axis in (left, right):
        axis.set_xlabel("share of multiply-accumulates")
        axis.invert_xaxis()
        axis.spines[["top", "right"]].set_visible(False)
    if handles:
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False)
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)
