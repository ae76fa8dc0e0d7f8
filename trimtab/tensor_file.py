"""Safetensors files whose tensors all start on a 64-byte boundary, written as a stream and read through ``mmap``.

The files are plain safetensors (https://github.com/huggingface/safetensors, "Format"): eight bytes of header length, a
JSON header, the data.  The format allows spaces at the end of the header but no holes in the data, so alignment costs
trailing spaces plus small ``U8`` padding tensors between the real ones, which this reader hides.  Generated code
assumes 64-byte alignment, and plain files come out at 8 modulo 64 when mapped.

Only numpy is needed.  numpy has no bfloat16: such tensors are read as their raw bits, a ``uint16`` array with the dtype
string ``bf16`` beside it.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from trimtab.atomic_file import atomic_writer
from trimtab.errors import ArtifactError, UsageError

ALIGNMENT = 64
PADDING_PREFIX = "__padding__."
# The reference implementation refuses longer headers too; without a bound a hostile length field costs memory.
MAX_HEADER_BYTES = 100_000_000
_PIECE_BYTES = 16 << 20

Chunk = np.ndarray[Any, Any] | bytes | bytearray | memoryview


@dataclass(frozen=True)
class StorageType:
    """How elements of one dtype lie in a file.

    Args:
        name: the dtype's name in the IR and in manifests, such as ``f32``.
        code: its name in a safetensors header, such as ``F32``.
        numpy_dtype: the little-endian numpy dtype of the raw view (``uint16`` for ``bf16``).
    """

    name: str
    code: str
    numpy_dtype: np.dtype[Any]


STORAGE_TYPES: dict[str, StorageType] = {
    name: StorageType(name, code, np.dtype(raw))
    for name, code, raw in (
        ("f64", "F64", "<f8"),
        ("f32", "F32", "<f4"),
        ("f16", "F16", "<f2"),
        ("bf16", "BF16", "<u2"),
        ("i64", "I64", "<i8"),
        ("i32", "I32", "<i4"),
        ("i16", "I16", "<i2"),
        ("i8", "I8", "i1"),
        ("u64", "U64", "<u8"),
        ("u32", "U32", "<u4"),
        ("u16", "U16", "<u2"),
        ("u8", "U8", "u1"),
        ("bool", "BOOL", "?"),
    )
}
_BY_CODE = {storage.code: storage for storage in STORAGE_TYPES.values()}


class TensorSource(NamedTuple):
    """One tensor to write.

    Args:
        dtype: a name from :data:`STORAGE_TYPES`.
        shape: sizes, all >= 0.
        chunks: the data in row-major order: one array or bytes object, an iterable of them, or a function that returns
            such an iterable when the tensor's turn comes (so that only one chunk exists at a time).
    """

    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Chunk]] | Iterable[Chunk] | Chunk


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of a file.

    Args:
        dtype: a name from :data:`STORAGE_TYPES`.
        shape: sizes.
        array: a read-only view of the file with ``shape`` and the raw numpy dtype (``uint16`` bits for ``bf16``).
    """

    dtype: str
    shape: tuple[int, ...]
    array: np.ndarray[Any, Any]


def write_tensors(
    destination: str | os.PathLike[str] | BinaryIO,
    tensors: Mapping[str, TensorSource | tuple[str, tuple[int, ...], Any]],
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write tensors in the order of the mapping, chunk by chunk: no second copy of the data is made in memory.

    Args:
        destination: a path (written atomically) or an open binary file, written from its current position, which must
            itself be 64-byte aligned in whatever will be mapped later.
        tensors: name -> :class:`TensorSource` (or the same as a plain tuple).
        metadata: strings to keep in the header.

    Returns:
        The number of bytes written.

    Raises:
        ArtifactError: an unknown dtype, a reserved name, chunks that do not add up to the declared shape, a full disk.
    """
    sources = {name: TensorSource(*source) for name, source in tensors.items()}
    header, data_bytes = _encode_header(sources, metadata)
    if isinstance(destination, (str, os.PathLike)):
        with atomic_writer(destination, expected_bytes=len(header) + data_bytes) as file:
            return write_tensors(file, sources, metadata)
    _write_all(destination, memoryview(header))
    for name, source in sources.items():
        written = 0
        for chunk in _iterate_chunks(source.chunks):
            written += _write_chunk(destination, name, source.dtype, chunk)
        size = _byte_size(source)
        if written != size:
            raise ArtifactError(
                "a tensor's data does not fill its shape",
                values={
                    "tensor": name,
                    "dtype": source.dtype,
                    "shape": list(source.shape),
                    "expected_bytes": size,
                    "given_bytes": written,
                },
                rule="the header was written from the declared shape",
                fix="make the chunks add up to the declared dtype and shape",
            )
        _write_all(destination, memoryview(bytes(-size % ALIGNMENT)))
    return len(header) + data_bytes


class TensorFile(Mapping[str, TensorRecord]):
    """The tensors of a safetensors file, as lazy read-only views of mapped memory.

    Iterates in file order; padding tensors are hidden.  The mapping stays alive as long as any view of it does.  Any
    valid safetensors file is read; only those written by :func:`write_tensors` promise alignment.

    Args:
        buffer: the whole file: bytes, an ``mmap``, or a view of either.
        source: the file's name for error messages.

    Raises:
        ArtifactError: the bytes are not a valid safetensors file.
    """

    def __init__(self, buffer: Any, source: str = "tensor file") -> None:
        self._bytes: np.ndarray[Any, Any] = np.frombuffer(buffer, dtype=np.uint8)
        self._bytes.flags.writeable = False
        self._source = source
        self._layout, self._data_start, self.metadata = _decode_header(self._bytes, source)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> TensorFile:
        """Map the file at ``path``; errors as for the class, plus :class:`UsageError` when there is no such file."""
        return cls(map_file(path), source=os.fspath(path))

    def __getitem__(self, name: str) -> TensorRecord:
        storage, shape, begin, end = self._layout[name]
        raw = self._bytes[self._data_start + begin : self._data_start + end]
        return TensorRecord(storage.name, shape, raw.view(storage.numpy_dtype).reshape(shape))

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout)

    def __len__(self) -> int:
        return len(self._layout)

    def __contains__(self, name: object) -> bool:
        return name in self._layout

    def describe(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape of a tensor, without touching its data."""
        storage, shape, _, _ = self._layout[name]
        return storage.name, shape


def map_file(path: str | os.PathLike[str]) -> mmap.mmap:
    """Map a whole regular file read-only.

    Raises:
        UsageError: there is no such file, or it cannot be opened.
        ArtifactError: it is empty, or not a regular file.
    """
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ArtifactError("cannot map a file", values={"path": path}, rule="it is not a regular file")
            if status.st_size == 0:
                raise ArtifactError("cannot map a file", values={"path": path}, rule="it is empty")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UsageError(
            "cannot open a file",
            values={"path": path, "reason": error.strerror or error},
            fix="check the path and its permissions",
        ) from error
    except ValueError as error:  # a NUL character in the path
        raise UsageError("cannot open a file", values={"path": repr(path), "reason": error}) from error


def _open_without_waiting(path: str, flags: int) -> int:
    # A named pipe would otherwise block the open for ever.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


# --- writing ---------------------------------------------------------------------------------------------------------


def _encode_header(sources: Mapping[str, TensorSource], metadata: Mapping[str, str] | None) -> tuple[bytes, int]:
    header: dict[str, Any] = {}
    if metadata:
        if not all(isinstance(key, str) and isinstance(value, str) for key, value in metadata.items()):
            raise ArtifactError("bad tensor file metadata", rule="keys and values must be strings")
        header["__metadata__"] = dict(metadata)
    offset = 0
    for name, source in sources.items():
        if name == "__metadata__" or name.startswith(PADDING_PREFIX):
            raise ArtifactError(
                "a tensor cannot be written under this name",
                values={"name": name},
                rule=f"'__metadata__' and names that begin with '{PADDING_PREFIX}' are reserved by the file format",
                fix="rename it",
            )
        if source.dtype not in STORAGE_TYPES:
            raise ArtifactError(
                "a tensor has a dtype that files cannot hold",
                values={"tensor": name, "dtype": source.dtype},
                rule=f"known are {', '.join(STORAGE_TYPES)}",
                fix="store sub-byte types packed, as u8",
            )
        if any(size < 0 for size in source.shape):
            raise ArtifactError("a tensor has a negative size", values={"tensor": name, "shape": list(source.shape)})
        end = offset + _byte_size(source)
        shape = [int(size) for size in source.shape]
        header[name] = {"dtype": STORAGE_TYPES[source.dtype].code, "shape": shape, "data_offsets": [offset, end]}
        padding = -end % ALIGNMENT
        if padding:
            padded = {"dtype": "U8", "shape": [padding], "data_offsets": [end, end + padding]}
            header[f"{PADDING_PREFIX}{end}"] = padded
        offset = end + padding
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, offset


def _byte_size(source: TensorSource) -> int:
    return math.prod(source.shape) * STORAGE_TYPES[source.dtype].numpy_dtype.itemsize


def _iterate_chunks(chunks: Any) -> Iterable[Chunk]:
    given = chunks() if callable(chunks) else chunks
    return (given,) if isinstance(given, (np.ndarray, bytes, bytearray, memoryview)) else given


def _write_chunk(file: BinaryIO, name: str, dtype: str, chunk: Chunk) -> int:
    """Write one chunk and return its size in bytes."""
    if not isinstance(chunk, np.ndarray):
        flat = memoryview(chunk).cast("B")
        _write_all(file, flat)
        return flat.nbytes
    expected = STORAGE_TYPES[dtype].numpy_dtype
    # bfloat16 arrays exist only through ml_dtypes, which this module does not import.
    if chunk.dtype.newbyteorder("<") != expected and not (dtype == "bf16" and chunk.dtype.name == "bfloat16"):
        raise ArtifactError(
            "a tensor's data has another dtype than declared",
            values={"tensor": name, "declared": dtype, "given": chunk.dtype},
            fix="convert the data, or declare the dtype it has",
        )
    for piece in _contiguous_pieces(chunk):
        if piece.dtype.byteorder == ">":
            piece = piece.astype(expected)
        _write_all(file, piece.reshape(-1).view(np.uint8).data)
    return chunk.nbytes


def _contiguous_pieces(array: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    """``array`` in row-major order, copying no more than about 16 MiB at a time when it is strided."""
    if array.size == 0:
        return
    if array.flags.c_contiguous or array.nbytes <= _PIECE_BYTES:
        yield np.ascontiguousarray(array)
        return
    rows = max(1, len(array) * _PIECE_BYTES // array.nbytes)
    for start in range(0, len(array), rows):
        part = array[start : start + rows]
        if rows == 1 and part.nbytes > _PIECE_BYTES and part.ndim > 1:
            yield from _contiguous_pieces(part[0])
        else:
            yield np.ascontiguousarray(part)


def _write_all(file: BinaryIO, data: memoryview) -> None:
    for start in range(0, data.nbytes, _PIECE_BYTES):
        piece = data[start : start + _PIECE_BYTES]
        while piece.nbytes:
            written = file.write(piece)  # a raw file may take less than it was given
            piece = piece[written:] if written is not None else piece[:0]


# --- reading ---------------------------------------------------------------------------------------------------------

_Layout = dict[str, tuple[StorageType, tuple[int, ...], int, int]]


def _decode_header(data: np.ndarray[Any, Any], source: str) -> tuple[_Layout, int, dict[str, str]]:
    """Check a header completely: after this, every view of the layout lies inside the file."""
    if data.size < 8:
        raise _broken(source, "it is shorter than eight bytes", size=data.size)
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > MAX_HEADER_BYTES or length > data.size - 8:
        raise _broken(source, "the header length points outside the file", header_bytes=length, size=data.size)
    try:
        header = json.loads(data[8 : 8 + length].tobytes(), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise _broken(source, "the header is not JSON", reason=error) from None
    if not isinstance(header, dict):
        raise _broken(source, "the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(source, "__metadata__ is not an object of strings")

    layout: _Layout = {}
    for name, entry in header.items():
        layout[name] = _decode_entry(source, name, entry)
    end = 0
    for name, (_, _, begin, stop) in sorted(layout.items(), key=lambda item: item[1][2:]):
        if begin != end:
            problem = "tensors overlap" if begin < end else "there is a hole between tensors"
            raise _broken(source, problem, tensor=name, begins=begin, previous_ends=end)
        end = stop
    if end != data.size - 8 - length:
        raise _broken(source, "the tensors do not fill the file", data_bytes=data.size - 8 - length, used_bytes=end)
    visible = {name: entry for name, entry in layout.items() if not name.startswith(PADDING_PREFIX)}
    return visible, 8 + length, metadata


def _decode_entry(source: str, name: str, entry: Any) -> tuple[StorageType, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _broken(source, "an entry is not an object of dtype, shape and data_offsets", tensor=name)
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _BY_CODE:
        raise _broken(source, f"unknown dtype (known are {', '.join(_BY_CODE)})", tensor=name, dtype=code)
    if not _is_sizes(shape) or len(shape) > 64:
        raise _broken(source, "a shape is not a short list of sizes", tensor=name, shape=str(shape)[:100])
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _broken(source, "data_offsets are not [begin, end]", tensor=name, data_offsets=str(offsets)[:100])
    storage = _BY_CODE[code]
    size = math.prod(shape) * storage.numpy_dtype.itemsize
    if offsets[1] - offsets[0] != size:
        raise _broken(source, "data_offsets do not fit dtype and shape", tensor=name, shape=shape, data_offsets=offsets)
    # numpy multiplies the non-zero sizes even of an empty array.
    if math.prod(extent for extent in shape if extent) >= 1 << 60:
        raise _broken(source, "a shape is absurdly large", tensor=name, shape=str(shape)[:100])
    return storage, tuple(shape), offsets[0], offsets[1]


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 62 for size in value)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _broken(source: str, problem: str, **values: object) -> ArtifactError:
    return ArtifactError(
        "not a valid safetensors file",
        values={"file": source, **values},
        rule=problem,
        fix="write or copy the file again: it is damaged, truncated, or not a safetensors file",
    )
