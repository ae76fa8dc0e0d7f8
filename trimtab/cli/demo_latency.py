"""The demo's comparison: the artifact against eager PyTorch and other runtimes, call by call on the same digits.

All contenders use the same number of threads and float32.  They take turns in short blocks, in a new random order each
round, so that a machine whose speed drifts slows all of them; the first calls of a block, which find the caches and
threads of another contender, are not timed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

    from trimtab.runtime import Session

    Array = np.ndarray[Any, Any]

BATCHES = (1, 64)
_ROUNDS = 8
_MIN_ROUNDS = 2
_SECONDS = 20.0
"""No further round begins after this long: a busy machine must not make the demo endless."""
_UNTIMED = 3
_CALLS = {1: 25, 64: 6}
"""Timed calls in a block, by batch."""


@dataclass(frozen=True)
class Latency:
    """Seconds of every timed call."""

    calls: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.calls)

    @property
    def best(self) -> float:
        return min(self.calls)


@dataclass
class Contenders:
    """What is compared: a function from images f32[n, 1, 8, 8] to logits f32[n, 10] by name.

    Attributes:
        calls: the functions.
        notes: who is left out, and why.
        versions: what each contender is, by name.
    """

    calls: dict[str, Callable[[Array], Array]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)


_BUSY = 3.0


def was_disturbed(latencies: Mapping[str, Mapping[int, Latency]], batch: int) -> bool:
    """Whether other work on the machine got in the way of the timings at a batch, so that ratios would mislead.

    On a quiet machine the median call takes little longer than the best one; where the threads of a contender wait for
    cores that others use, it takes many times as long.
    """
    return any(by_batch[batch].median > _BUSY * by_batch[batch].best for by_batch in latencies.values())


def build_contenders(model: torch.nn.Module, session: Session, folder: Path, threads: int) -> Contenders:
    """Eager PyTorch, the artifact, and ONNX Runtime and OpenVINO where they are installed.

    Args:
        model: the trained model in eval mode.
        session: the loaded artifact.
        folder: where the ONNX file may be written.
        threads: threads for every contender.
    """
    import torch

    found = Contenders()

    def eager(images: Array) -> Any:
        with torch.inference_mode():
            return model(torch.from_numpy(images)).numpy()

    found.calls["PyTorch eager"] = eager
    found.versions["PyTorch eager"] = torch.__version__
    exported = _export(model, folder / "digits.onnx", found.notes)
    if exported is not None:
        _add_onnx_runtime(found, exported, threads)
        _add_openvino(found, exported, threads)
    found.calls["Trimtab"] = session
    found.versions["Trimtab"] = session.manifest.versions.get("trimtab", "")
    return found


def _export(model: torch.nn.Module, path: Path, notes: list[str]) -> Path | None:
    """The model as ONNX with a dynamic batch, for the other runtimes; None and a note where torch cannot write it."""
    import torch

    if importlib.util.find_spec("onnxscript") is None:
        notes.append("ONNX Runtime and OpenVINO are left out: torch needs the package onnxscript to write an ONNX file")
        return None
    with _silence():
        torch.onnx.export(
            model,
            (torch.zeros(2, 1, 8, 8),),
            str(path),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    return path


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def _add_onnx_runtime(found: Contenders, path: Path, threads: int) -> None:
    if importlib.util.find_spec("onnxruntime") is None:
        found.notes.append("ONNX Runtime is left out: it is not installed (pip install onnxruntime)")
        return
    import onnxruntime  # noqa: TID251  a contender, not a dependency

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    runtime = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found.calls["ONNX Runtime"] = lambda images: runtime.run(None, {"images": images})[0]
    found.versions["ONNX Runtime"] = onnxruntime.__version__


def _add_openvino(found: Contenders, path: Path, threads: int) -> None:
    if importlib.util.find_spec("openvino") is None:
        found.notes.append("OpenVINO is left out: it is not installed (pip install openvino)")
        return
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(str(path)), "CPU", settings)
    found.calls["OpenVINO"] = lambda images: compiled(images)[0]
    found.versions["OpenVINO"] = openvino.__version__


def measure(
    calls: Mapping[str, Callable[[Array], Array]], images: Array, seed: int, progress: Callable[[float], None]
) -> dict[str, dict[int, Latency]]:
    """Time every contender at every batch of :data:`BATCHES`, on images in one random order for all.

    Returns:
        Latencies by contender and batch.
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    times: dict[str, dict[int, list[float]]] = {name: {batch: [] for batch in BATCHES} for name in calls}
    begun = time.perf_counter()
    for turn in range(_ROUNDS):
        if turn >= _MIN_ROUNDS and time.perf_counter() - begun > _SECONDS:
            break
        progress(turn / _ROUNDS)
        for batch in BATCHES:
            chosen = generator.integers(0, len(images), (_UNTIMED + _CALLS[batch], batch))
            inputs = [np.ascontiguousarray(images[rows]) for rows in chosen]
            for name in generator.permutation(list(calls)):
                times[name][batch] += _block(calls[name], inputs)
    return {name: {batch: Latency(tuple(c)) for batch, c in by_batch.items()} for name, by_batch in times.items()}


def _block(call: Callable[[Array], Array], inputs: list[Array]) -> list[float]:
    for images in inputs[:_UNTIMED]:
        call(images)
    seconds = []
    for images in inputs[_UNTIMED:]:
        start = time.perf_counter()
        call(images)
        seconds.append(time.perf_counter() - start)
    return seconds
