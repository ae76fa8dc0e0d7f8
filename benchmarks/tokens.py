"""Token reduction: how much work, accuracy and time each pass leaves, on a trained vision transformer and MiniLM.

    python benchmarks/tokens.py [--only macs digits distil minilm latency] [--threads 2] [--runs 20] [--seconds 120]
                                [--best 2] [--json FILE] [--chart FILE.svg] [--quick]

- macs: the multiply-accumulates of DeiT-S and ViT-B beside those expected from the papers.
- digits: a small vision transformer trained on the digits of scikit-learn, in about a minute; then every pass at 0.8,
  0.65 and 0.5 of the multiply-accumulates: accuracy on held-out digits, and the latency of the compiled models.
- distil: the best passes at the least budget after ``--seconds`` of training on the answers of the unreduced model.
- minilm: how near sentence embeddings stay to those of the whole model at 0.7 of the multiply-accumulates.
- latency: DeiT-S with ToMe at 13 and 16 tokens a layer beside all tokens, at batch 1 and 8.

Contenders take turns in one process (measuring.py), so that a machine whose speed drifts slows all of them.
``--quick`` trains and measures briefly, to try the benchmark itself; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from machine_peaks import processor_name
from token_digits import BUDGETS, DigitsModel, DigitsRow, distil_all, reduce_all, time_all
from token_macs import EXPECTED, count, time_deit
from token_text import BUDGET, LENGTH, SETS, compare, find_sentences, tokenized, traced_embedding
from tokens_report import digits_lines, distilled_lines, draw_chart, latency_lines, macs_lines, text_lines
from trimtab.cores import usable_cores

SECTIONS = ("macs", "digits", "distil", "minilm", "latency")
_IMAGES = 64
"""In a call of the digits model; one alone takes a fraction of a millisecond."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="the parts to run")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of compiled models")
    parser.add_argument("--runs", type=int, default=20, help="calls of each model that are counted, at least")
    parser.add_argument("--seconds", type=float, default=120, help="of distillation, for each pass")
    parser.add_argument("--best", type=int, default=2, metavar="N", help="how many passes to distil")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    parser.add_argument(
        "--chart", type=Path, metavar="FILE", help="also draw those of digits, as SVG; needs matplotlib"
    )
    parser.add_argument("--quick", action="store_true", help="little of everything, to try the benchmark")
    args = parser.parse_args(arguments)
    if args.chart:
        try:
            import matplotlib  # noqa: F401  before minutes of measuring, not after
        except ImportError:
            parser.error("--chart needs matplotlib: make peers")
    command = shlex.join(["python", "benchmarks/tokens.py", *(sys.argv[1:] if arguments is None else arguments)])
    results: dict[str, Any] = {"command": command, "processor": processor_name(), "threads": args.threads}
    print(f"{results['processor']}, {args.threads} threads")
    torch.set_num_threads(1)
    if "macs" in args.only:
        measure_macs(args, results)
    if "digits" in args.only or "distil" in args.only:
        rows = measure_digits(args, results)
        if args.chart:
            draw_chart(rows, args.chart)
    if "minilm" in args.only:
        measure_text(args, results)
    if "latency" in args.only:
        measure_latency(args, results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def measure_macs(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """The table of multiply-accumulates."""
    rows = count("deit-s", 3) if args.quick else [row for model in EXPECTED for row in count(model)]
    show("Multiply-accumulates for one image", macs_lines(rows))
    results["macs"] = [asdict(row) for row in rows]


def measure_digits(args: argparse.Namespace, results: dict[str, Any]) -> list[DigitsRow]:
    """Every pass on the digits model; and the best ones distilled."""
    model = DigitsModel(epochs=1, held_out=100) if args.quick else DigitsModel()
    made = list(reduce_all(model, BUDGETS if "digits" in args.only and not args.quick else BUDGETS[-1:]))
    rows = [row for row, _ in made]
    if "digits" in args.only:
        time_all(made, model.digits.held_out_images[:_IMAGES], args.threads, 5 if args.quick else args.runs)
        show(f"Digits: {len(model.digits.held_out_images)} held out, latency of {_IMAGES} images", digits_lines(rows))
    if "distil" in args.only:
        least = [(row, module) for row, module in made if row.budget == BUDGETS[-1] and row.accuracy is not None]
        best = sorted(least, key=lambda pair: -(pair[0].accuracy or 0))[: 1 if args.quick else args.best]
        distil_all(model, best, args.seconds, most_steps=2 if args.quick else 100_000)
        show(f"Digits, {args.seconds:g} seconds of distillation", distilled_lines(rows, model.accuracy))
    results["digits"] = [asdict(row) for row in rows]
    return rows


def measure_text(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """The embeddings of MiniLM."""
    sentences, module = find_sentences(), traced_embedding()
    results["minilm"] = []
    for shortest in SETS:
        ids, mask = tokenized(sentences, 20 if args.quick else 200, shortest)
        rows = list(compare(module, ids, mask))
        padding = 1 - float(mask.float().mean())
        title = f"MiniLM: {len(ids)} sentences of {shortest} to {LENGTH} tokens, {padding:.0%} padding"
        show(f"{title}, {BUDGET:g} of the multiply-accumulates", text_lines(rows))
        results["minilm"].append({"shortest": shortest, "padding": padding, "rows": [asdict(row) for row in rows]})


def measure_latency(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """DeiT-S with fewer tokens."""
    rows = time_deit((1,) if args.quick else (1, 8), args.threads, 5 if args.quick else args.runs)
    show("DeiT-S, float32", latency_lines(rows))
    results["latency"] = [asdict(row) for row in rows]


def show(title: str, lines: Any) -> None:
    """Print a table below its title."""
    print("", title, *lines, sep="\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
