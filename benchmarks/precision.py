"""What lower precision costs: errors against PyTorch in float64, beside PyTorch's own ways to compute in bfloat16.

    python benchmarks/precision.py [--models NAME ...] [--json FILE] [--write-docs]

For each model on random inputs: PyTorch in float32, after ``model.bfloat16()`` and under ``torch.autocast``; the
reference interpreter and compiled code of ``precision="bf16"``; compiled code of ``precision="f16-storage"``.  Errors
are relative to the largest element of an output: the root of the mean square, and the largest.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from trimtab import Module, compile, interpret, load, trace
from trimtab.passes.manager import PassManager
from zoo_models import ZooModel, bert_base, deit_s, get, gpt2_small, minilm_pretrained

_DOCS = Path(__file__).parent.parent / "docs" / "precision.md"
_BEGIN, _END = "<!-- begin table -->\n", "<!-- end table -->\n"
Outputs = Sequence[Tensor]


@dataclass(frozen=True)
class Error:
    """The error of one way to compute a model, the worst of its outputs.

    Attributes:
        model, system: what computed what.
        rms, largest: relative to the largest element of the output in float64.
    """

    model: str
    system: str
    rms: float
    largest: float

    def __str__(self) -> str:
        return f"{self.model:18} {self.system:28} rms {self.rms:.2e}, largest {self.largest:.2e}"


def error(model: str, system: str, expected: Outputs, found: Outputs) -> Error:
    """Compare outputs with those in float64."""
    rms, largest = 0.0, 0.0
    for exact, got in zip(expected, found, strict=True):
        gap, scale = (got.double() - exact).abs(), float(exact.abs().max())
        rms, largest = max(rms, float(gap.square().mean().sqrt()) / scale), max(largest, float(gap.max()) / scale)
    return Error(model, system, rms, largest)


@torch.no_grad()
def pytorch_errors(
    name: str, build: Callable[[], nn.Module], inputs: Mapping[str, Tensor]
) -> tuple[Outputs, list[Error]]:
    """The outputs in float64, and the errors of PyTorch's float32, ``bfloat16()`` and autocast."""

    def run(model: nn.Module, dtype: torch.dtype) -> Outputs:
        given = [x.to(dtype) if x.is_floating_point() else x for x in inputs.values()]
        return [leaf for leaf in tree_leaves(model(*given)) if isinstance(leaf, Tensor)]

    expected = run(build().double(), torch.float64)
    found = {
        "PyTorch float32": run(build(), torch.float32),
        "PyTorch bfloat16()": run(build().bfloat16(), torch.bfloat16),
    }
    with torch.autocast("cpu", torch.bfloat16):
        found["PyTorch autocast"] = run(build(), torch.float32)
    return expected, [error(name, system, expected, outputs) for system, outputs in found.items()]


def interpreted(module: Module, passes: str, inputs: Mapping[str, Tensor]) -> Outputs:
    """The reference interpreter's outputs after the default passes and ``passes``."""
    result, _ = PassManager(f"cleanup,fuse,{passes}", check="never").run(module)
    outputs: Outputs = interpret(result, list(inputs.values()))
    return outputs


def compiled(module: Module, precision: str, inputs: Mapping[str, Tensor]) -> Outputs:
    """The outputs of an artifact."""
    with tempfile.TemporaryDirectory() as folder:
        path = compile(module, target="native", precision=precision).save(Path(folder) / "model.trim")
        with load(path) as session:
            found = session(*(x.numpy() for x in inputs.values()))
            values = list(found) if isinstance(found, tuple | list) else [found]
            return [torch.from_numpy(value.copy()) for value in values]


def errors_of(name: str, build: Callable[[], nn.Module], inputs: Mapping[str, Tensor]) -> list[Error]:
    """All rows of one model."""
    expected, rows = pytorch_errors(name, build, inputs)
    module = trace(build(), tuple(inputs.values()))
    found = {
        "Trimtab bf16, interpreter": interpreted(module, "cast-precision", inputs),
        "Trimtab bf16": compiled(module, "bf16", inputs),
        "Trimtab f16-storage": compiled(module, "f16-storage", inputs),
    }
    return rows + [error(name, system, expected, outputs) for system, outputs in found.items()]


def _digits() -> tuple[Callable[[], nn.Module], Mapping[str, Tensor]]:
    from trimtab.cli.demo_training import load_digits, train

    digits = load_digits()
    model = train(digits, 20, 0, lambda _: None)

    def build() -> nn.Module:
        import copy

        return copy.deepcopy(model).eval()

    return build, {"images": torch.from_numpy(digits.held_out_images[:64])}


def _zoo(entry: ZooModel, batch: int, length: int) -> tuple[Callable[[], nn.Module], Mapping[str, Tensor]]:
    return entry.build, entry.inputs(batch, length)


MODELS: dict[str, Callable[[], tuple[Callable[[], nn.Module], Mapping[str, Tensor]]]] = {
    "digits (trained)": _digits,
    "MiniLM-L6 (trained)": lambda: _zoo(minilm_pretrained(), 4, 64),
    "BERT-base": lambda: _zoo(bert_base(), 1, 64),
    "DeiT-S": lambda: _zoo(deit_s(), 1, 0),
    "GPT-2 small": lambda: _zoo(gpt2_small(), 1, 64),
    "tiny Swin": lambda: _zoo(get("swin"), 4, 0),
    "tiny ConvNeXt": lambda: _zoo(get("convnext"), 4, 0),
}


def table(rows: Sequence[Error]) -> str:
    """Rows as Markdown: a line a model, root of the mean square and largest error for each system."""
    systems = list(dict.fromkeys(row.system for row in rows))
    lines = [f"| model | {' | '.join(systems)} |", "|---" * (len(systems) + 1) + "|"]
    for model in dict.fromkeys(row.model for row in rows):
        cells = {row.system: f"{row.rms:.1e} ({row.largest:.1e})" for row in rows if row.model == model}
        lines.append(f"| {model} | {' | '.join(cells[system] for system in systems)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--write-docs", action="store_true", help="put the table in docs/precision.md")
    options = parser.parse_args(arguments)
    rows: list[Error] = []
    for name in options.models:
        torch.manual_seed(0)
        build, inputs = MODELS[name]()
        for row in errors_of(name, build, inputs):
            print(row, flush=True)
            rows.append(row)
    if options.json is not None:
        data: list[dict[str, Any]] = [asdict(row) for row in rows]
        options.json.write_text(json.dumps(data, indent=1) + "\n")
    if options.write_docs:
        head, _, rest = _DOCS.read_text().partition(_BEGIN)
        _DOCS.write_text(head + _BEGIN + table(rows) + _END + rest.partition(_END)[2])


if __name__ == "__main__":
    main()
