"""``check.npz``: sample inputs and the outputs expected for them, and the comparison with what a session returns."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab.errors import ArtifactError
from trimtab.runtime.manifest import Manifest, TensorSpec, Tolerance
from trimtab.runtime.signature import Array
from trimtab.tensor_file import STORAGE_TYPES


@dataclass(frozen=True)
class Sample:
    """Inputs in the order of the signature, and the expected outputs; ``bf16`` tensors as ``uint16`` bits."""

    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]


@dataclass(frozen=True)
class Difference:
    """How far one output of one sample is from what was expected.

    Args:
        sample: number of the sample, from 0.
        output: name of the output.
        largest: the largest absolute difference; infinite when shapes, dtypes or places of NaN differ.
        allowed: the largest that passes.
        reason: why ``largest`` is infinite, in words; empty otherwise.
    """

    sample: int
    output: str
    largest: float
    allowed: float
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.largest <= self.allowed


def encode_samples(samples: Iterable[Sample]) -> bytes:
    """The bytes of ``check.npz``: keys ``SAMPLE/input/INDEX`` and ``SAMPLE/output/INDEX``, not compressed."""
    arrays: dict[str, Array] = {}
    for number, sample in enumerate(samples):
        for kind, group in (("input", sample.inputs), ("output", sample.outputs)):
            arrays.update({f"{number}/{kind}/{index}": np.asarray(array) for index, array in enumerate(group)})
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def decode_samples(data: bytes | memoryview, manifest: Manifest, source: str) -> list[Sample]:
    """Read ``check.npz``; raises :class:`ArtifactError` if it is malformed or does not fit the signature."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, NotImplementedError) as error:
        raise _malformed(source, "it is not a readable .npz archive", reason=error) from error
    count = len({name.split("/")[0] for name in arrays})
    samples = []
    for number in range(count):
        groups = []
        for kind, specs in (("input", manifest.inputs), ("output", manifest.outputs)):
            groups.append(tuple(_take(arrays, f"{number}/{kind}/{i}", spec, source) for i, spec in enumerate(specs)))
        samples.append(Sample(*groups))
    if arrays:
        surplus = ", ".join(sorted(arrays)[:5])
        raise _malformed(source, "it has arrays that belong to no input or output", arrays=surplus)
    return samples


def _take(arrays: dict[str, Array], key: str, spec: TensorSpec, source: str) -> Array:
    if key not in arrays:
        raise _malformed(source, "an array is missing", array=key)
    array = arrays.pop(key)
    if array.dtype != STORAGE_TYPES[spec.dtype].numpy_dtype:
        raise _malformed(source, "an array has the wrong dtype", array=key, dtype=array.dtype, expected=spec.dtype)
    return array


def compare(
    number: int, specs: Sequence[TensorSpec], got: Any, sample: Sample, tolerance: Tolerance
) -> list[Difference]:
    """Compare a session's result with a sample.

    Floating-point outputs pass when ``max|got - expected| <= atol + rtol * max|expected|``, the maxima taken over the
    finite elements of one tensor; NaN and infinities must stand in the same places.  Integers and booleans must be
    equal, unless the tolerance says otherwise.
    """
    outputs = [got] if isinstance(got, np.ndarray) else list(got)
    return [
        _difference(number, spec, array, expected, tolerance)
        for spec, array, expected in zip(specs, outputs, sample.outputs, strict=True)
    ]


def _difference(number: int, spec: TensorSpec, got: Array, expected: Array, tolerance: Tolerance) -> Difference:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        reason = f"got {got.dtype}{list(got.shape)}, expected {expected.dtype}{list(expected.shape)}"
        return Difference(number, spec.name, float("inf"), 0.0, reason)
    exact = spec.dtype != "bf16" and got.dtype.kind in "biu"
    a, b = (_as_float64(array, spec.dtype) for array in (got, expected))
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(a[finite]).all():
        return Difference(number, spec.name, float("inf"), 0.0, "NaN or infinity in different places")
    largest = float(np.abs(a[finite] - b[finite]).max(initial=0.0))
    if exact and not np.array_equal(got, expected):
        largest = max(largest, 1.0)
        return Difference(number, spec.name, largest, 0.0 if tolerance.integers else largest)
    scale = float(np.abs(b[finite]).max(initial=0.0))
    return Difference(number, spec.name, largest, 0.0 if exact else tolerance.atol + tolerance.rtol * scale)


def _as_float64(array: Array, dtype: str) -> Array:
    if dtype == "bf16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


def _malformed(source: str, problem: str, **values: object) -> ArtifactError:
    return ArtifactError(
        "the sample data of the artifact is malformed",
        values={"file": source, **values},
        rule=problem,
        fix="compile the model again: trimtab compile MODEL -o model.trim",
    )
