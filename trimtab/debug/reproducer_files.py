"""A reproducer as files: a module, inputs, what is expected, and a program that shows the failure from them alone."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.atomic_file import atomic_folder, atomic_writer, write_atomically
from trimtab.debug.checks import Batch, Check, Data, KeepsContract
from trimtab.debug.findings import Bisection
from trimtab.debug.reproducer import Reproducer, culprit_of
from trimtab.errors import TrimtabError
from trimtab.ir.core import Module
from trimtab.ir.printer import print_module
from trimtab.ir.storage import write_module
from trimtab.passes.base import Pass
from trimtab.passes.evaluation import evaluate
from trimtab.passes.registry import load_pass

if TYPE_CHECKING:
    import torch

MODULE_FILE = "reproducer.ttir"
_SHORT = 40
"""Ops of a module whose text stands in the README."""


def write_reproducer(reproducer: Reproducer, folder: str | os.PathLike[str]) -> None:
    """Write everything that shows the failure into the new ``folder``, which appears whole or not at all.

    ``reproducer.ttir`` and ``reproducer.safetensors`` are the module, ``inputs.npz`` the inputs, ``outputs.npz`` what
    is expected and what is found, ``README.md`` the story, and ``reproduce.py`` a program whose exit code is 1 while
    the failure is there.

    Raises:
        UsageError: there is something in ``folder``, or its parent does not exist.
        ArtifactError: the disk is full or cannot be written.
    """
    shown = reproducer.shown
    outputs = _outputs(reproducer)
    with atomic_folder(folder) as files:
        write_module(reproducer.module, files / MODULE_FILE)
        for name, batch in _batch_files(shown.data):
            _write_arrays(files / name, batch)
        if outputs:
            _write_arrays(files / "outputs.npz", outputs)
        write_atomically(files / "README.md", _readme(reproducer, outputs))
        if program := _program(shown):
            write_atomically(files / "reproduce.py", program)


def _batch_files(data: Data) -> list[tuple[str, Batch]]:
    named = [("inputs.npz", batch) for batch in data.inputs]
    return named + [(f"calibration.{index}.npz", batch) for index, batch in enumerate(data.calibration)]


def _write_arrays(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """An ``.npz`` file. numpy has no bfloat16, so such tensors are stored as float32, which holds them exactly."""
    import numpy as np
    import torch

    arrays = {n: (t.float() if t.dtype is torch.bfloat16 else t).detach().numpy() for n, t in tensors.items()}
    with atomic_writer(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _outputs(reproducer: Reproducer) -> dict[str, torch.Tensor]:
    """``expected/NAME`` and ``found/NAME`` for every output, where both can be evaluated."""
    shown = reproducer.shown
    if shown.culprit is None or not isinstance(shown.culprit.application.after, Module):
        return {}
    sample = shown.data.samples(reproducer.module)[0]
    outputs: dict[str, torch.Tensor] = {}
    for kind, module in (("expected", reproducer.module), ("found", shown.culprit.application.after)):
        try:
            values = evaluate(module, sample)
        except TrimtabError:
            return {}
        outputs |= {f"{kind}/{name}": v for name, v in zip(module.main.output_names, values, strict=True)}
    return outputs


def _readme(reproducer: Reproducer, outputs: Mapping[str, torch.Tensor]) -> str:
    shown, found = reproducer.shown, reproducer.found
    pass_ = culprit_of(found).application.pass_
    ways = ["    python reproduce.py"] if _program(shown) else []
    if _is_registered(pass_) and _loads(shown.check):
        ways.append(f"    {_command(shown)}")
    parts = [
        f"# A failure of the pass {pass_.name}",
        "Run, in this folder:" if ways else "The pass or the check is in no file that a program could load.",
        "\n\n".join(ways),
        "On this module:",
        f"```text\n{shown}\n```",
        "\n".join(f"- {note}" for note in reproducer.notes),
        _worst(reproducer.module, outputs),
        *_text_of(reproducer.module),
        f"It was reduced from {reproducer.ops_before} ops, looking at {reproducer.evaluations} candidates. "
        "Found first in:",
        f"```text\n{found}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _text_of(module: Module) -> list[str]:
    if sum(1 for _ in module.walk()) > _SHORT:
        return []
    text = print_module(module, hashes=False, locations=False).strip()
    return [f"The module before the pass ({MODULE_FILE}):", f"```text\n{text}\n```"]


def _worst(module: Module, outputs: Mapping[str, torch.Tensor]) -> str:
    """The element that is furthest from what is expected, in words."""
    import torch

    worst, text = 0.0, ""
    for name in module.main.output_names:
        expected, found = outputs.get(f"expected/{name}"), outputs.get(f"found/{name}")
        if expected is None or found is None or expected.shape != found.shape or not expected.numel():
            continue
        gap = (expected.to(torch.float64) - found.to(torch.float64)).abs().nan_to_num(nan=math.inf)
        gap = gap.masked_fill(expected.isnan() & found.isnan(), 0.0)
        if float(gap.max()) > worst:
            worst = float(gap.max())
            place = [int(i) for i in torch.unravel_index(gap.argmax(), gap.shape)]
            values = (float(expected[tuple(place)]), float(found[tuple(place)]))
            text = f"Output {name}, element {place}: {values[0]:.6g} is expected, {values[1]:.6g} is found."
    return text


def _command(shown: Bisection) -> str:
    words = ["trimtab", "bisect", MODULE_FILE, "--passes", str(shown.pipeline), "--check", shown.check.text]
    for name, _ in _batch_files(shown.data):
        words += ["--inputs" if name == "inputs.npz" else "--calibration", name]
    return shlex.join([*words, "--no-reproducer"])


def _program(shown: Bisection) -> str:
    """``reproduce.py``; "" where the pass or the check cannot be loaded from a file."""
    (pass_,) = shown.pipeline.passes
    imports, expression = _source_of(pass_)
    if not expression or not _loads(shown.check):
        return ""
    batches = [f'dict(np.load(folder / "{name}"))' for name, _ in _batch_files(shown.data)]
    arguments = [f"inputs=[{batches[0]}]"]
    arguments += [f"calibration=[{', '.join(batches[1:])}]"] if batches[1:] else []
    lines = [
        '"""Shows a failure that `trimtab bisect` found. Exit code: 1 while it is there, 0 once it is gone."""',
        "",
        "import sys",
        "from pathlib import Path",
        "",
        "import numpy as np",
        "",
        "import trimtab",
        *imports,
        "",
        "folder = Path(__file__).parent",
        "found = trimtab.bisect(",
        f'    trimtab.read(folder / "{MODULE_FILE}"),',
        f"    {expression},",
        f"    {shown.check.text!r},",
        *(f"    {argument}," for argument in arguments),
        f"    seed={shown.data.seed},",
        ")",
        "print(found)",
        "sys.exit(1 if found.culprit else 0)",
    ]
    return "\n".join(lines) + "\n"


def _source_of(pass_: Pass) -> tuple[list[str], str]:
    """Lines that import what the pass needs, and an expression for a pipeline of it; "" when it cannot be imported."""
    if _is_registered(pass_):
        return [], repr(str(pass_))
    cls = type(pass_)
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    if file is None or cls.__module__ == "__main__" or "<locals>" in cls.__qualname__:
        return [], ""
    root = Path(file).absolute().parents[cls.__module__.count(".") + (Path(file).stem == "__init__")]
    imports = [
        "",
        f"sys.path.append({str(root)!r})",
        f"from {cls.__module__} import {cls.__qualname__.partition('.')[0]}  # noqa: E402",
    ]
    return imports, f"[{pass_!r}]"


def _is_registered(pass_: Pass) -> bool:
    try:
        return load_pass(pass_.name) is type(pass_)
    except TrimtabError:
        return False


def _loads(check: Check) -> bool:
    """Whether the text of a check gives the check back."""
    file, _, function = check.text.rpartition(":")
    return isinstance(check, KeepsContract) or (Path(file).is_file() and function.isidentifier())
