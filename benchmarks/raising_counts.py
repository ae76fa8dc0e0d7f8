"""How many attentions, norms and activations each model has, and how many are found in what each producer makes of it.

    python benchmarks/raising_counts.py [--model NAME] [--producer NAME] [--json FILE] [--write-docs]

The architecture's own counts come from the PyTorch model (architecture_counts.py), a producer's from its module
(producers.py) after ``cleanup,raise``. They must be equal, and the raised module must agree with eager PyTorch, at
other sizes than those of the export.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch.utils._pytree import tree_leaves

from architecture_counts import Counts, count_by_configuration, count_by_running
from producers import LEGACY_OPSET, PRODUCERS, Source
from trimtab import Module, interpret, optimize
from trimtab.ir import ops
from zoo_models import ZooModel, bert_base, deit_s, zoo

PIPELINE = "cleanup,raise"
TOLERANCE = 1e-5
"""Largest difference from eager PyTorch that is allowed, relative to the largest element."""

COUNTED = ("attention", "rotary_embedding", "layer_norm", "rms_norm", "group_norm", "batch_norm", "gelu", "gelu_tanh",
           "gelu_sigmoid", "silu", "relu", "tanh", "softplus", "sigmoid", "softmax", "erf")  # fmt: skip
"""Kinds of ops that are counted; the last three are what a missed one leaves."""
FOLDED_BY_EXPORTERS = "batch_norm"
"""torch's ONNX exporters fold batch norms into the convolutions before them, and every one of the zoo follows one."""


@dataclass
class Row:
    """One model through one producer.

    Attributes:
        expected: the architecture's own counts; without the batch norms that the producer has folded.
        found: the counts after raising.
        difference: from eager PyTorch, relative to the largest element.
        error: what went wrong, empty when nothing did.
    """

    model: str
    producer: str
    expected: Counts
    found: Counts = field(default_factory=dict)
    difference: float = 0.0
    seconds: float = 0.0
    error: str = ""

    @property
    def passed(self) -> bool:
        return not self.error and self.found == self.expected and self.difference <= TOLERANCE

    def __str__(self) -> str:
        """What the table says: ``same``, or what differs."""
        if self.error:
            return self.error
        kinds = dict.fromkeys((*self.expected, *self.found))
        wrong = [kind for kind in kinds if self.expected.get(kind, 0) != self.found.get(kind, 0)]
        differs = [f"{self.found.get(kind, 0)} of {self.expected.get(kind, 0)} {kind}" for kind in wrong]
        if self.difference > TOLERANCE:
            differs.append(f"outputs differ by {self.difference:.1e}")
        return ", ".join(differs) or "same"


def count(module: Module) -> Counts:
    """The ops of a module that are counted, by kind."""
    found: Counter[str] = Counter()
    for op in module.walk():
        approximate = op.approximate if isinstance(op, ops.Gelu) else "none"
        found[op.name if approximate == "none" else f"{op.name}_{approximate}"] += 1
    return {kind: found[kind] for kind in COUNTED if found[kind]}


def architecture(source: Source) -> Counts:
    """The architecture's own counts, from a run of the PyTorch model.

    Raises:
        ValueError: the model's configuration implies others.
    """
    running = count_by_running(source.model, source.sample)
    configured = count_by_configuration(source.model)
    if dict(running) != dict(configured):
        raise ValueError(f"{source.entry.name}: {dict(running)} when run, {dict(configured)} by its configuration")
    return {kind: running[kind] for kind in COUNTED if kind in running}


def measure(source: Source, producer: str, expected: Counts) -> Row:
    """The row of one producer; mistakes of whatever kind are put into it."""
    start = time.perf_counter()
    if producer.startswith("onnx"):
        expected = {kind: number for kind, number in expected.items() if kind != FOLDED_BY_EXPORTERS}
    row = Row(source.entry.name, producer + (", eager" if source.eager else ""), expected)
    try:
        module = optimize(PRODUCERS[producer](source), PIPELINE, check="never").module
        row.found = count(module)
        row.difference = max(difference(module, source, *size) for size in sizes(source.entry))
    except Exception as error:
        row.error = f"{type(error).__name__}: {str(error).splitlines()[0]:.200}"
    row.seconds = round(time.perf_counter() - start, 2)
    return row


def sizes(entry: ZooModel) -> list[tuple[int, int]]:
    """Batch and length: those of the export, and others."""
    symbols = {name for axes in entry.dynamic_axes.values() for name in axes.values()}
    return [(2, 12), (3, 9 if "sequence" in symbols else 12)]


@torch.no_grad()
def difference(module: Module, source: Source, batch: int, length: int) -> float:
    """The largest difference of an output from eager PyTorch's, relative to that output's largest element."""
    inputs = list(source.entry.inputs(batch, length).values())
    wanted, got = tree_leaves(source.model(*inputs)), interpret(module, inputs)
    return max(
        float((a.double() - b.double()).abs().max() / b.double().abs().max()) for a, b in zip(got, wanted, strict=True)
    )


def write_docs(rows: Sequence[Row], page: Path) -> None:
    """Write the table: a line per model, with the architecture's counts and a column per producer."""
    columns = list(dict.fromkeys(row.producer for row in rows))
    cells = {(row.model, row.producer): str(row) for row in rows}
    counts = {row.model: counts_text(row.expected) for row in rows if row.producer == columns[0]}
    lines = [
        *_HEAD.splitlines(),
        f"| model | architecture | {' | '.join(columns)} |",
        "|---|---|" + "---|" * len(columns),
    ]
    for model, text in counts.items():
        lines.append(f"| {model} | {text} | {' | '.join(cells[model, column] for column in columns)} |")
    lines += ["", f"{sum(row.passed for row in rows)} of {len(rows)} are the same."]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def counts_text(counts: Counts) -> str:
    """Counts as the table has them."""
    return ", ".join(f"{number} {kind}" for kind, number in counts.items())


_HEAD = f"""\
# Raising: the table of counts

Written by `python benchmarks/raising_counts.py --write-docs`; do not edit.

How many attentions, norms and activations a model has (`architecture`), and what is found after `{PIPELINE}` in the
modules that producers make of it. `same` means the same number of each, no softmax, erf or sigmoid left over, and
outputs within {TOLERANCE:.0e} of eager PyTorch, relative to the largest element, at two sizes.

The architecture's counts are taken from a run of the PyTorch model, in which calls of torch's functions are counted on
which the outputs depend, and are checked against the numbers of layers in its configuration; no part of Trimtab takes
part. The producers:

- `export`: torch.export, read before decomposition, as `trimtab.trace` does.
- `decomposed`: torch.export and `run_decompositions()`, the core ATen operators. Attention is in pieces.
- `decomposed fully`: layer norms, group norms and GELUs in pieces as well.
- `onnx dynamo`: `torch.onnx.export(dynamo=True)`.
- `onnx legacy`: `torch.onnx.export(dynamo=False)` for opset {LEGACY_OPSET}, which has no layer norm, GELU or attention.
- `..., eager`: the model spells attention out itself.

Both ONNX exporters fold batch norms into the convolutions before them: there, none are expected. ONNX as older
exporters wrote it, in a dozen more spellings, is raised in `tests/test_raising_counts.py`.

"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", action="append", help="only this model")
    parser.add_argument("--producer", action="append", choices=list(PRODUCERS), help="only this producer")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--write-docs", action="store_true", help="write the table to docs/raising.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for entry in (*zoo(), deit_s(), bert_base()):
        if arguments.model and entry.name not in arguments.model:
            continue
        for eager in (False, True):
            source = Source(entry, eager)
            expected = architecture(source)
            for producer in arguments.producer or PRODUCERS:
                row = measure(source, producer, expected)
                rows.append(row)
                print(
                    f"{row.model:16s} {row.producer:23s} {row.seconds:6.1f} s {row.difference:8.1e}  {row}", flush=True
                )
    passed = sum(row.passed for row in rows)
    print(f"{passed} of {len(rows)} are the same")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) | {"passed": row.passed} for row in rows], indent=1) + "\n")
    if arguments.write_docs:
        write_docs(rows, Path(__file__).resolve().parent.parent / "docs" / "raising.md")
    return 0 if passed == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
