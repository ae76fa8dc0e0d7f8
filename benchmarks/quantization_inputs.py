"""Inputs for quantized models: batches to calibrate on, and a fresh one to time and to measure the error on.

Images are random, with a scale and an offset of their own for each, as photographs differ in contrast; tokens are
random, and for the pretrained MiniLM real sentences. All systems get the same batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmark_models import BenchmarkModel
from measuring import as_arrays
from token_text import find_sentences, tokenizer_of_minilm

BATCHES = 8
"""Batches to calibrate on."""
Batch = dict[str, np.ndarray]


def batches(entry: BenchmarkModel, count: int = BATCHES) -> tuple[list[Batch], Batch]:
    """``count`` batches to calibrate on and another one, arrays by the name of the input."""
    shapes = {name: value.numpy() for name, value in entry.inputs().items()}
    if entry.make.__name__ == "minilm_pretrained":
        made = _sentences(entry, shapes, count + 1)
    else:
        generator = np.random.default_rng(7)
        made = [{name: _random(array, generator) for name, array in shapes.items()} for _ in range(count + 1)]
    return made[:-1], made[-1]


def _random(like: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """An array of the shape and type of ``like``."""
    if like.dtype.kind == "f":
        scale = generator.uniform(0.3, 1.5, (len(like), *[1] * (like.ndim - 1)))
        offset = generator.uniform(-0.5, 0.5, scale.shape)
        return (generator.standard_normal(like.shape) * scale + offset).astype(like.dtype)
    if like.min() == like.max():  # a mask
        return like
    return generator.integers(0, like.max() + 1, like.shape, dtype=like.dtype)


def _sentences(entry: BenchmarkModel, shapes: Batch, count: int) -> list[Batch]:
    """Paragraphs of real sentences, which fill a half or more of the tokens."""
    sentences = find_sentences()
    tokenizer = tokenizer_of_minilm()
    made = []
    for number in range(count):
        rows = [
            " ".join(sentences[(8 * (number * entry.batch + row) + i) % len(sentences)] for i in range(8))
            for row in range(entry.batch)
        ]
        found = tokenizer(rows, padding="max_length", truncation=True, max_length=entry.length, return_tensors="np")
        made.append({name: found[name].astype(shapes[name].dtype) for name in shapes})
    return made


def write_batches(folder: Path, found: Sequence[Batch]) -> None:
    """One file a batch: what ``trimtab compile --calibration FOLDER`` takes."""
    folder.mkdir(exist_ok=True)
    for number, batch in enumerate(found):
        np.savez(folder / f"{number:03d}.npz", **batch)


def read_batches(folder: Path) -> list[Batch]:
    made = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as file:
            made.append({name: file[name] for name in file.files})
    return made


def write_expected(path: Path, entry: BenchmarkModel, batch: Batch) -> None:
    """The model's outputs for ``batch`` in float64."""
    model = entry.build().double()
    given = [torch.from_numpy(array) for array in batch.values()]
    with torch.no_grad():
        exact = model(*(value.double() if value.is_floating_point() else value for value in given))
    np.savez(path, *as_arrays(exact))
