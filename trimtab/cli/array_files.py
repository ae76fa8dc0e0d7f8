"""Arrays in ``.npz`` and ``.npy`` files, read some rows at a time: a file may be larger than memory."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from trimtab.cli.input_files import readable

_SUFFIX = ".npy"


@dataclass(frozen=True)
class Header:
    """What a file says about an array.

    Attributes:
        shape: sizes.
        dtype: of the elements as they are stored.
        columns_first: stored with the first axis innermost, so that rows cannot be read one after the other.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    columns_first: bool


class ArrayFile:
    """The arrays of a file, of which nothing but the headers is in memory.

    Args:
        path: a ``.npz`` file, compressed or not, or a ``.npy`` file, whose array is called "".

    Raises:
        UsageError: there is no such file.
        InputError: it is damaged, of another kind, or holds Python objects.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with readable(path):
            self._is_archive = zipfile.is_zipfile(path)
            with self._opened() as streams:
                self.headers = {name: _read_header(streams(name)) for name in self._names()}

    def pieces(self, rows: dict[str, int | None]) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        """The arrays in pieces: of each so many rows as ``rows`` says, the last piece fewer, and for None the whole
        array in every piece. The pieces end with the shortest array that is cut; without any, there is one.

        Raises:
            InputError: the file is damaged, or no longer what it was.
        """
        with readable(self.path), self._opened() as streams:
            whole = {name: self._whole(streams, name) for name, size in rows.items() if size is None}
            if len(whole) == len(rows):
                yield whole
                return
            cut = {name: self._rows(streams, name, size) for name, size in rows.items() if size is not None}
            for parts in zip(*cut.values(), strict=False):
                yield {**whole, **dict(zip(cut, parts, strict=True))}

    def _names(self) -> list[str]:
        if not self._is_archive:
            return [""]
        with zipfile.ZipFile(self.path) as archive:
            return [name.removesuffix(_SUFFIX) for name in archive.namelist() if name.endswith(_SUFFIX)]

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        """A function that opens a stream of an array's bytes, by its name."""
        if not self._is_archive:
            with open(self.path, "rb") as file:
                yield lambda name: file
            return
        with zipfile.ZipFile(self.path) as archive:
            yield lambda name: archive.open(name + _SUFFIX)

    def _whole(self, streams: Any, name: str) -> np.ndarray[Any, Any]:
        header = _read_header(stream := streams(name))
        if not header.columns_first:
            return _read(stream, header.shape, header.dtype)
        return _read(stream, header.shape[::-1], header.dtype).T

    def _rows(self, streams: Any, name: str, size: int) -> Iterator[np.ndarray[Any, Any]]:
        header = self.headers[name]
        if header.columns_first:
            whole = self._whole(streams, name)
            yield from (whole[start : start + size] for start in range(0, len(whole), size))
            return
        stream = streams(name)
        if _read_header(stream) != header:
            raise ValueError("the file was changed while it was used")
        for start in range(0, header.shape[0], size):
            yield _read(stream, (min(size, header.shape[0] - start), *header.shape[1:]), header.dtype)


def _read_header(stream: IO[bytes]) -> Header:
    version = npy.read_magic(stream)
    if version == (1, 0):
        shape, columns_first, dtype = npy.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, columns_first, dtype = npy.read_array_header_2_0(stream)
    else:
        raise ValueError(f"an array is in version {version} of the format, which is for records")
    if dtype.hasobject:
        raise ValueError("an array holds Python objects")
    return Header(shape, dtype, columns_first)


def _read(stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    data = bytearray(size)
    view, filled = memoryview(data), 0
    while filled < size:
        part = stream.read(min(size - filled, 1 << 24))
        if not part:
            raise EOFError("the file ends within an array")
        view[filled : filled + len(part)] = part
        filled += len(part)
    return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)
