"""Statistics of a module's values in a file, to be used again for the same module.

The file is a safetensors file of the observers' arrays. Its metadata say of which module they are, by the hash of its
text and weights, and which observer belongs to which value, by the value's place in the graph.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import CalibrationError, UsageError
from trimtab.ir.core import Graph, Module, Value
from trimtab.ir.printer import print_module
from trimtab.passes.quantization.observers import KINDS, Observer, make_observer
from trimtab.tensor_file import TensorFile, TensorSource, write_tensors

_FORMAT = "trimtab.statistics 1"
_DTYPES = {np.dtype(np.float64): "f64", np.dtype(np.int64): "i64"}


def save_statistics(path: str | os.PathLike[str], module: Module, watched: Mapping[Value, Observer]) -> None:
    """Write what ``watched`` have seen to ``path``, so that it is there as a whole or not at all.

    Args:
        path: of the file.
        module: that was observed.
        watched: values of ``module`` with observers from :func:`.observers.make_observer`.

    Raises:
        UsageError: a value is not in ``module``, an observer is of an unknown kind, or the folder does not exist.
        ArtifactError: the disk is full, or cannot be written.
    """
    places = {value: place for place, value in _places(module)}
    arrays: dict[str, NDArray[Any]] = {}
    observers: dict[str, dict[str, Any]] = {}
    for value, observer in watched.items():
        if value not in places:
            raise UsageError("statistics are of a value that is not in the module", values={"value": value})
        if observer.kind not in KINDS:
            raise UsageError(
                "statistics of this observer cannot be saved",
                values={"observer": observer.kind, "known": ", ".join(KINDS)},
            )
        observers[places[value]] = {"kind": observer.kind, **observer.options}
        arrays |= {f"{places[value]}:{name}": array for name, array in observer.state().items()}
    metadata = {
        "format": _FORMAT,
        "module": _fingerprint(module),
        "observers": json.dumps(observers),
        "data": _digest(arrays),
    }
    sources = {name: TensorSource(_DTYPES[array.dtype], array.shape, array) for name, array in arrays.items()}
    write_tensors(path, sources, metadata)


def load_statistics(path: str | os.PathLike[str], module: Module) -> dict[Value, Observer]:
    """The observers of a file from :func:`save_statistics`, by the values of ``module`` that they are of.

    They may be given more data.

    Raises:
        UsageError: there is no such file.
        ArtifactError: it is not a safetensors file, or is damaged or truncated.
        CalibrationError: it holds something else, or the statistics of another module.
    """
    file = TensorFile.open(path)
    metadata = file.metadata
    if metadata.get("format") != _FORMAT:
        raise _unusable(path, "it holds no statistics that this version reads", found=metadata.get("format", "nothing"))
    fingerprint = _fingerprint(module)
    if metadata.get("module") != fingerprint:
        raise CalibrationError(
            "statistics are of another module",
            values={"file": path, "module": fingerprint[:12], "statistics of": metadata.get("module", "")[:12]},
            rule="they are of the values of one module: its text and its weights",
            fix="calibrate this module",
        )
    arrays = {name: record.array for name, record in file.items()}
    if metadata.get("data") != _digest(arrays):
        raise _unusable(path, "the data are not what was written: the file is damaged")
    values = dict(_places(module))
    found = {}
    try:
        for place, options in json.loads(metadata["observers"]).items():
            observer = make_observer(**options)
            prefix = f"{place}:"
            observer.load({n.removeprefix(prefix): array for n, array in arrays.items() if n.startswith(prefix)})
            found[values[place]] = observer
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unusable(path, "what it says about its observers cannot be read", reason=error) from error
    return found


def _unusable(path: str | os.PathLike[str], rule: str, **values: object) -> CalibrationError:
    return CalibrationError("cannot use a file of statistics", values={"file": path, **values}, rule=rule,
                            fix="calibrate again, and save what comes out")  # fmt: skip


def _fingerprint(module: Module) -> str:
    text = print_module(module, locations=False, hashes=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _places(module: Module) -> Iterator[tuple[str, Value]]:
    """Every input and result with its place: ``main/input/0``, ``main/12/0``, and in a body ``main/12/body0/3/0``."""
    for name, graph in module.graphs.items():
        yield from _places_in(graph, name)


def _places_in(graph: Graph, at: str) -> Iterator[tuple[str, Value]]:
    for number, value in enumerate(graph.inputs):
        yield f"{at}/input/{number}", value
    for index, op in enumerate(graph.ops):
        for number, value in enumerate(op.results):
            yield f"{at}/{index}/{number}", value
        for number, region in enumerate(op.regions):
            yield from _places_in(region, f"{at}/{index}/body{number}")
