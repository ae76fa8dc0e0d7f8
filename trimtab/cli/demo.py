"""``trimtab demo``: train a small vision transformer, compile it, and compare what comes out with PyTorch."""

from __future__ import annotations

import contextlib
import json as json_text
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.cli.command_options import DebugOption, JsonOption, ThreadsOption
from trimtab.errors import InternalError

if TYPE_CHECKING:
    import numpy as np

    from trimtab.cli.demo_latency import Contenders, Latency
    from trimtab.cli.progress import Update

    Array = np.ndarray[Any, Any]


def demo_command(
    threads: ThreadsOption = None,
    epochs: Annotated[int | None, typer.Option(min=1, metavar="N", help="Passes over the training images.")] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the training.")] = 0,
    keep: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the files: digits.trim, digits.onnx, images, logits.")
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a small vision transformer on digits, compile it, run it without torch, and compare it with PyTorch."""
    from trimtab.cli.model_argument import require_torch
    from trimtab.cli.progress import progress_bar

    require_torch("the demo trains a model, which needs torch")
    with contextlib.ExitStack() as stack:
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trimtab-demo-")))
        update = stack.enter_context(progress_bar("demo"))
        document = run_demo(folder, threads, epochs, seed, update)
    document["kept"] = str(keep) if keep is not None else None
    if json:
        from trimtab.cli.output import print_json

        print_json(document)
    else:
        _print(document)


def run_demo(folder: Path, threads: int | None, epochs: int | None, seed: int, update: Update) -> dict[str, Any]:
    """All stages of the demo; returns every figure.

    Args:
        folder: where the files go.
        threads: threads of all contenders; every usable core by default.
        epochs: passes over the training images; enough by default.
        seed: seed of the training and of the order in which images are timed.
        update: told about progress.
    """
    import torch

    import trimtab
    from trimtab.cli import demo_latency, demo_training
    from trimtab.runtime.threads import resolve_thread_count

    count = resolve_thread_count(threads)
    stages = _Stages(update)
    digits = demo_training.load_digits()
    images, labels = digits.held_out_images, digits.held_out_labels
    path = folder / "digits.trim"

    # The layers are so small that a second thread costs more in waiting than it computes.
    torch.set_num_threads(1)
    with stages("train", 0.0):
        model = demo_training.train(
            digits, epochs or demo_training.EPOCHS, seed, lambda done: update("train", 0.6 * done)
        )
    torch.set_num_threads(count)
    with torch.inference_mode():
        expected = model(torch.from_numpy(images)).numpy()
    with stages("trace", 0.6):
        module = trimtab.trace(model, (torch.from_numpy(images[:2]),), dynamic_shapes={"images": {0: "batch"}})
    with stages("optimize", 0.65):
        optimized = trimtab.optimize(module)
    with stages("compile", 0.68):
        artifact = trimtab.compile(
            optimized.module, target="native", threads=count, pipeline=None, name="digit transformer"
        )
    with stages("save and check", 0.8):
        artifact.save(path)
    with stages("run all digits", 0.85):
        logits, process = _run_without_torch(path, images, folder, count)
    with stages("latency", 0.88), trimtab.load(path, threads=count) as session:
        contenders = demo_latency.build_contenders(model, session, folder, count)
        latencies = demo_latency.measure(
            contenders.calls, images, seed, lambda done: update("latency", 0.88 + 0.12 * done)
        )
        others = {name: call(images) for name, call in contenders.calls.items() if name != "Trimtab"}
    if any(demo_latency.was_disturbed(latencies, batch) for batch in demo_latency.BATCHES):
        contenders.notes.append(
            "This machine was busy: some medians are several times the best, so their ratios are left out."
        )
    rows = _rows({**others, "Trimtab": logits}, expected, labels, latencies, contenders)
    return {
        "digits": {"train": len(digits.train_images), "held_out": len(images)},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "threads": count,
        "contenders": rows,
        "artifact_process": process,
        "file": {"path": str(path), "bytes": path.stat().st_size, "weight_bytes": optimized.module.weight_bytes},
        "ops": {"traced": _count(module), "optimized": _count(optimized.module)},
        "passes_applied": list(dict.fromkeys(optimized.report.applied)),
        "seconds": stages.seconds,
        "notes": contenders.notes,
    }


class _Stages:
    """Times the stages and moves the bar."""

    def __init__(self, update: Update) -> None:
        self._update = update
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str, fraction: float) -> Iterator[None]:
        self._update(name, fraction)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def _count(module: Any) -> int:
    return sum(1 for _ in module.walk())


def _run_without_torch(path: Path, images: Array, folder: Path, threads: int) -> tuple[Array, dict[str, Any]]:
    """Logits of all images from a fresh process without torch and tvm, and what that process says about itself."""
    import numpy as np

    images_path, logits_path = folder / "images.npy", folder / "logits.npy"
    np.save(images_path, images)
    command = [sys.executable, "-m", "trimtab.cli.demo_runner", str(path), str(images_path), str(logits_path)]
    done = subprocess.run([*command, str(threads)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise InternalError(
            "the artifact did not run in a process without torch",
            values={"exit code": done.returncode, "reason": (done.stderr.strip().splitlines() or ["no output"])[-1]},
            fix="please report this with the output of trimtab doctor",
        )
    return np.load(logits_path, allow_pickle=False), json_text.loads(done.stdout)


def _rows(
    logits: dict[str, Array],
    expected: Array,
    labels: Array,
    latencies: dict[str, dict[int, Latency]],
    contenders: Contenders,
) -> list[dict[str, Any]]:
    import numpy as np

    from trimtab.cli import demo_latency
    from trimtab.cli.demo_training import accuracy

    eager = latencies["PyTorch eager"]
    disturbed = {batch: demo_latency.was_disturbed(latencies, batch) for batch in eager}
    return [
        {
            "name": name,
            "version": contenders.versions[name],
            "accuracy": accuracy(logits[name], labels),
            "max_difference": float(np.abs(logits[name].astype(np.float64) - expected).max()),
            "latency": {
                str(batch): {
                    "median_seconds": latency.median,
                    "best_seconds": latency.best,
                    "calls": len(latency.calls),
                    "speed_vs_eager": None if disturbed[batch] else eager[batch].median / latency.median,
                }
                for batch, latency in latencies[name].items()
            },
        }
        for name in contenders.calls
    ]


def _print(document: dict[str, Any]) -> None:
    from trimtab.cli.output import console, table, text_bytes, text_seconds, text_time_pair

    batches = list(document["contenders"][0]["latency"])
    columns = ["", "accuracy", "max\ndiff"]
    for batch in batches:
        columns += [f"batch {batch}\nmedian/best", "vs\neager"]
    held_out = document["digits"]["held_out"]
    shown = table(f"{held_out} held-out digits, {document['threads']} thread(s)", columns, columns[1:])
    for row in document["contenders"]:
        cells = [row["name"], f"{row['accuracy']:.2%}", f"{row['max_difference']:.0e}"]
        for batch in batches:
            latency = row["latency"][batch]
            times = text_time_pair(latency["median_seconds"], latency["best_seconds"])
            speed = latency["speed_vs_eager"]
            cells += [times, "" if speed is None else f"{speed:.2f}x"]
        shown.add_row(*cells)
    shown.add_section()
    file = document["file"]
    shown.add_row("file size", text_bytes(file["bytes"]))
    shown.add_row("of it weights", text_bytes(file["weight_bytes"]))
    shown.add_section()
    for stage, seconds in document["seconds"].items():
        shown.add_row(stage, text_seconds(seconds))
    to = console()
    to.print(shown)
    versions = ", ".join(f"{row['name']} {row['version']}" for row in document["contenders"])
    to.print(f"{versions}; `vs eager` is how many times as fast, by the medians.")
    ops, passes = document["ops"], ", ".join(document["passes_applied"]) or "none"
    to.print(
        f"{ops['traced']} ops were traced and {ops['optimized']} compiled; passes that changed something: {passes}."
    )
    to.print("Accuracy and difference of Trimtab come from a process of its own, without torch or tvm.")
    for note in document["notes"]:
        to.print(note)
    if document["kept"]:
        to.print(f"files are in {document['kept']}; try: trimtab inspect {file['path']}")
