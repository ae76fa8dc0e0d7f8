"""Tensors in files beside the model, mapped into memory and never read before they are needed.

A model file names its data files itself, so a hostile one may name any file of the machine: only regular files inside
the model's own directory are opened, after symbolic links are resolved.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.errors import ImportModelError
from trimtab.ir.types import TensorType


class ExternalFiles:
    """The data files of a model in ``directory``; each is mapped once, however many tensors lie in it."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._maps: dict[Path, np.ndarray[Any, Any]] = {}

    def bytes_of(
        self, tensor: str, type: TensorType, location: str, offset: int | None, length: int | None
    ) -> np.ndarray[Any, Any]:
        """The bytes of a tensor, as a view of the mapped file.

        Raises:
            ImportModelError: the file is missing, lies elsewhere, or is too short for the tensor.
        """
        needed = type.bytes
        assert isinstance(needed, int)
        values = {"tensor": tensor, "location": repr(location), "type": type}
        if length is not None and length != needed:
            raise ImportModelError(
                "a stored tensor has data of the wrong size",
                values={**values, "length": length, "expected": needed},
                rule="the length is that of the tensor's elements",
                fix="export the model again; the file is damaged",
            )
        start = offset or 0
        data = self._map(location, values)
        if start < 0 or start + needed > data.size:
            raise ImportModelError(
                "external data lies outside its file",
                values={**values, "offset": start, "bytes": needed, "file size": data.size},
                rule="offset and length stay within the file",
                fix="check that the data file is complete and belongs to this model",
            )
        return data[start : start + needed]

    def _map(self, location: str, values: dict[str, Any]) -> np.ndarray[Any, Any]:
        path = self._resolve(location, values)
        if path not in self._maps:
            self._maps[path] = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
        return self._maps[path]

    def _resolve(self, location: str, values: dict[str, Any]) -> Path:
        if self._directory is None:
            raise ImportModelError(
                "external data of a model without a file",
                values=values,
                rule="external data is found relative to the model's file",
                fix="pass the path of the model instead of the loaded model",
            )
        root = Path(os.path.realpath(self._directory))
        outside = not location or "\0" in location or os.path.isabs(location) or "\\" in location
        path = Path(os.path.realpath(root / location)) if not outside else root
        if outside or not path.is_relative_to(root) or path == root:
            raise ImportModelError(
                "external data outside the model's directory",
                values=values,
                rule="a model may only read files in its own directory, links resolved",
                fix="move the data file beside the model and use a relative location",
            )
        if not path.is_file():
            raise ImportModelError(
                "external data is missing",
                values={**values, "directory": self._directory},
                rule="the model keeps its weights in this file",
                fix="copy the data file beside the model",
            )
        return path
