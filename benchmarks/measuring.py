"""What benchmarks of compiled models share: calls that take turns, and the difference between two results.

Contenders take turns in blocks of a few calls, so that a machine whose speed drifts slows all of them.  Before a block
comes a pause, and calls that are not counted: the thread pools of PyTorch and ONNX Runtime spin for a while after a
call and would slow down whoever comes next, and caches must fill again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

BLOCK = 5
SETTLE_SECONDS = 0.4
WARM_SECONDS = 0.03

Block = Callable[[int], Sequence[float]]
"""Runs as many calls as it is told, and returns the milliseconds of each."""


def time_calls(call: Callable[[], Any], runs: int) -> list[float]:
    """Milliseconds of each of ``runs`` calls; at least one call before them, and 30 ms of calls, are not counted."""
    start = time.perf_counter()
    while True:
        call()
        if time.perf_counter() - start >= WARM_SECONDS:
            break
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def take_turns(contenders: Mapping[str, Block], runs: int) -> dict[str, list[float]]:
    """Milliseconds of at least ``runs`` calls of each contender, in blocks that alternate."""
    times: dict[str, list[float]] = {label: [] for label in contenders}
    for _ in range(-(-runs // BLOCK)):
        for label, block in contenders.items():
            time.sleep(SETTLE_SECONDS)
            times[label].extend(block(BLOCK))
    return times


def as_arrays(result: Any) -> list[np.ndarray]:
    """All output tensors of whatever a contender returned, in float64; integers stay integers."""
    if isinstance(result, Mapping):
        return [array for value in result.values() for array in as_arrays(value)]
    if isinstance(result, list | tuple):
        return [array for value in result for array in as_arrays(value)]
    if hasattr(result, "is_floating_point"):  # a tensor of torch, which not every process imports
        result = (result.double() if result.is_floating_point() else result).numpy()
    array = np.asarray(result)
    return [array.astype(np.float64) if array.dtype.kind == "f" else array]


def largest_error(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """The largest difference of an element, relative to the largest element of its tensor; the worst of all tensors.

    Raises:
        ValueError: other shapes, or not a number.
    """
    _check_shapes(found, expected)
    errors = [np.abs(a - b).max() / max(np.abs(b).max(), 1e-30) for a, b in zip(found, expected, strict=True)]
    if not np.isfinite(errors).all():
        raise ValueError("outputs contain values that are not finite")
    return float(max(errors))


def relative_distance(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """The length of the difference relative to that of ``expected`` (L2); the worst of all tensors.

    Raises:
        ValueError: other shapes, or not a number.
    """
    _check_shapes(found, expected)
    worst = max(
        float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)) for a, b in zip(found, expected, strict=True)
    )
    if not np.isfinite(worst):
        raise ValueError("outputs contain values that are not finite")
    return worst


def _check_shapes(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
    shapes = [array.shape for array in found], [array.shape for array in expected]
    if shapes[0] != shapes[1]:
        raise ValueError(f"outputs of shapes {shapes[0]}, expected {shapes[1]}")
