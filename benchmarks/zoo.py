"""Every zoo model through both doors and the backends, in one table.

    python benchmarks/zoo.py [--quick] [--json FILE] [--write-docs] [--model NAME]
                             [--door torch|onnx] [--backend interpreter|tvm|mlir] [--target NAME]

For each model and door: import, verify, print and parse back, then compare with eager PyTorch at several sizes:
the interpreter within 1e-5 (float32) and 1e-10 (float64, torch door), the compiled code within 1e-4 of the
interpreter, all relative to the largest element.  A row's outcome is ``passed``, ``refused`` (an error in words) or
``wrong`` (a disagreement, or an exception that is not one of Trimtab's).  Code for ``aarch64``, ``armv8.2-a`` and
``armv8.6-a`` runs in QEMU, see ``emulated.py``; code for ``vulkan-spirv`` needs a Vulkan driver; software will do.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from emulated import EmulatedModel, is_emulated
from producers import Source, write_dynamo
from trimtab import Module, TrimtabError, compile, from_onnx, interpret, load, trace
from trimtab.compiler import BACKENDS
from trimtab.ir import parse_module, print_module
from zoo_models import ZooModel, zoo

Tensors = Sequence[torch.Tensor]


@dataclass
class Row:
    """One line of the table."""

    model: str
    door: str
    backend: str
    outcome: str
    error: str = ""
    difference: float = 0.0
    seconds: float = 0.0


class Disagreement(Exception):
    """Outputs differ by more than the tolerance."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a subset of the models")
    parser.add_argument("--json", metavar="FILE", help="also write the rows to this file")
    parser.add_argument("--door", choices=["torch", "onnx"], action="append", help="only this door")
    parser.add_argument("--backend", choices=["interpreter", *BACKENDS], action="append", help="only this backend")
    parser.add_argument("--target", default="native", help="what the backends compile for")
    parser.add_argument("--model", action="append", help="only this model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write-docs", action="store_true", help="write the table to docs/zoo.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    print(f"{'model':18s} {'door':6s} {'backend':12s} {'outcome':8s} {'difference':>10s} {'seconds':>8s}")
    for entry in zoo(quick=args.quick):
        if args.model and entry.name not in args.model:
            continue
        for door in args.door or ["torch", "onnx"]:
            for row in check(entry, door, args.backend or ["interpreter", "tvm"], args.target):
                rows.append(row)
                print(
                    f"{row.model:18s} {row.door:6s} {row.backend:12s} {row.outcome:8s} {row.difference:10.1e} "
                    f"{row.seconds:8.1f} {row.error}",
                    flush=True,
                )
    counts = {outcome: sum(row.outcome == outcome for row in rows) for outcome in ("passed", "refused", "wrong")}
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if args.write_docs:
        write_docs([asdict(row) for row in rows])
    return 1 if counts["wrong"] else 0


def write_docs(rows: Sequence[dict[str, Any]]) -> None:
    """Write docs/zoo.md: a line per model, a column per door and backend, with the largest difference."""
    columns = list(dict.fromkeys((row["door"], row["backend"]) for row in rows))
    cells = {(row["model"], row["door"], row["backend"]): row for row in rows}
    lines = [
        "# Model zoo",
        "",
        "Written by `python benchmarks/zoo.py --write-docs`. Small models of each architecture with random weights,",
        "imported with symbolic batch (and length, for text models other than Mamba), run at three sizes. The",
        "interpreter is compared with eager PyTorch (allowed: 1e-5 of the largest element in float32, and through the",
        "torch door also 1e-10 in float64), the compiled code with the interpreter (allowed: 1e-4). Figures are the",
        "largest float32 differences.",
        "",
        "| model | " + " | ".join(f"{door}, {backend}" for door, backend in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        texts = []
        for column in columns:
            row = cells.get((model, *column))
            passed = row is not None and row["outcome"] == "passed"
            texts.append("" if row is None else f"{row['difference']:.1e}" if passed else str(row["outcome"]))
        lines.append(f"| {model} | " + " | ".join(texts) + " |")
    counts = {outcome: sum(row["outcome"] == outcome for row in rows) for outcome in ("passed", "refused", "wrong")}
    lines += ["", ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) + "."]
    page = Path(__file__).resolve().parent.parent / "docs" / "zoo.md"
    page.write_text("\n".join(lines) + "\n")


def check(entry: ZooModel, door: str, backends: Sequence[str], target: str) -> Iterator[Row]:
    """The rows of one model through one door."""
    model = entry.build()
    with tempfile.TemporaryDirectory() as folder:
        imported: list[Module] = []

        def by_interpreter() -> float:
            module = _import(entry, model, door, Path(folder))
            imported.append(module)
            if parse_module(print_module(module)) != module:
                raise Disagreement("the text form does not parse back to the same module")
            worst = _compare_interpreter(module, entry, model, torch.float32, 1e-5)
            if door == "torch":
                double = entry.build().double()
                wide = trace(double, tuple(entry.inputs(2, 12, torch.float64).values()))
                _compare_interpreter(wide, entry, double, torch.float64, 1e-10, [(2, 12)])
            return worst

        def by_code(backend: str) -> float:
            module = imported[0] if imported else _import(entry, model, door, Path(folder))
            return _compare_compiled(module, entry, Path(folder), backend, target)

        for backend in backends:
            start = time.perf_counter()
            row = Row(entry.name, door, backend, "passed")
            try:
                row.difference = by_interpreter() if backend == "interpreter" else by_code(backend)
            except TrimtabError as error:
                row.outcome, row.error = "refused", str(error)
            except Disagreement as error:
                row.outcome, row.error = "wrong", str(error)
            except Exception as error:
                row.outcome, row.error = "wrong", f"{type(error).__name__}: {error}"
            row.seconds = round(time.perf_counter() - start, 2)
            yield row


def _import(entry: ZooModel, model: torch.nn.Module, door: str, folder: Path) -> Module:
    inputs = entry.inputs(2, 12)
    if door == "torch":
        return trace(model, tuple(inputs.values()), dynamic_shapes=entry.dynamic_shapes())
    path = folder / "model.onnx"
    write_dynamo(Source(entry), path)
    return from_onnx(path)


def _sizes(entry: ZooModel) -> list[tuple[int, int]]:
    symbols = {name for axes in entry.dynamic_axes.values() for name in axes.values()}
    return [(2, 12), (1, 7), (3, 9)] if "sequence" in symbols else [(2, 12), (1, 12), (3, 12)]


def _compare_interpreter(
    module: Module,
    entry: ZooModel,
    model: torch.nn.Module,
    dtype: torch.dtype,
    tolerance: float,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> float:
    worst = 0.0
    for batch, length in sizes or _sizes(entry):
        inputs = entry.inputs(batch, length, dtype)
        with torch.no_grad():
            result = model(*inputs.values())
        expected = list(result.values()) if isinstance(result, dict) else result
        expected = list(expected) if isinstance(expected, list | tuple) else [expected]
        got = interpret(module, list(inputs.values()))
        worst = max(worst, _difference(got, expected, tolerance, f"{dtype} at batch {batch}, length {length}"))
    return worst


def _compare_compiled(module: Module, entry: ZooModel, folder: Path, backend: str, target: str) -> float:
    worst = 0.0
    artifact = compile(module, target=target, backend=backend).save(folder / "model.trim")
    with EmulatedModel(artifact, target) if is_emulated(target) else load(artifact) as session:
        for batch, length in _sizes(entry):
            inputs = list(entry.inputs(batch, length).values())
            result = session(*(tensor.numpy() for tensor in inputs))
            arrays = [result] if hasattr(result, "dtype") else list(result)
            got = [torch.from_numpy(array) for array in arrays]
            worst = max(worst, _difference(got, interpret(module, inputs), 1e-4, f"batch {batch}, length {length}"))
    return worst


def _difference(got: Tensors, expected: Tensors, tolerance: float, where: str) -> float:
    """The largest difference relative to each tensor's largest element; raises when above the tolerance."""
    if len(got) != len(expected):
        raise Disagreement(f"{len(got)} outputs instead of {len(expected)}")
    worst = 0.0
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise Disagreement(f"output {index} is {a.dtype}{list(a.shape)} instead of {b.dtype}{list(b.shape)}")
        scale = b.double().abs().max().clamp_min(1e-30)
        error = float((a.double() - b.double()).abs().max() / scale)
        if not error <= tolerance:
            raise Disagreement(f"output {index} differs by {error:.1e} (allowed {tolerance:.0e}) in {where}")
        worst = max(worst, error)
    return worst


if __name__ == "__main__":
    sys.exit(main())
