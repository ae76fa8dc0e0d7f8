"""Weights inside the model file itself, mapped instead of read.

A protobuf parser copies every tensor.  This scan of the wire format cuts the data of large initializers out of the
message first, and leaves in its place a reference to the same bytes of the same file, in the form of external data.
What remains is small, so that models whose file exceeds protobuf's 2 GiB can be read too.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import onnx

SMALLEST = 1 << 12
"""Bytes from which on data is cut out."""
_GRAPH_OF_MODEL, _INITIALIZER_OF_GRAPH = 7, 5
_RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 9, 13, 14

Span = tuple[int, int]
Field = tuple[int, int, Span, Span]
"""A field's number, wire type, whole extent, and extent of its payload."""


class _Malformed(Exception):
    """Not the wire format; protobuf's own parser will say what is wrong."""


def read_without_weights(path: Path) -> bytes:
    """The model message in ``path`` without the data of large initializers; the file's bytes where it is malformed."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return b""
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if "\\" in path.name:
                return data[:]
            try:
                return b"".join(_model(data, path.name))
            except _Malformed:
                return data[:]


def _model(data: mmap.mmap, name: str) -> Iterator[bytes]:
    for number, kind, whole, payload in _fields(data, (0, len(data))):
        if number == _GRAPH_OF_MODEL and kind == 2:
            yield _delimited(number, b"".join(_graph(data, payload, name)))
        else:
            yield data[slice(*whole)]


def _graph(data: mmap.mmap, span: Span, name: str) -> Iterator[bytes]:
    for number, kind, whole, payload in _fields(data, span):
        if number == _INITIALIZER_OF_GRAPH and kind == 2 and payload[1] - payload[0] >= SMALLEST:
            yield _delimited(number, _tensor(data, payload, name))
        else:
            yield data[slice(*whole)]


def _tensor(data: mmap.mmap, span: Span, name: str) -> bytes:
    """A tensor message, its raw data replaced by a reference where there is one such field of a good size."""
    fields = list(_fields(data, span))
    raw = [payload for number, kind, _, payload in fields if number == _RAW_DATA and kind == 2]
    external = any(number in (_EXTERNAL_DATA, _DATA_LOCATION) for number, *_ in fields)
    if len(raw) != 1 or external or raw[0][1] - raw[0][0] < SMALLEST:
        return data[slice(*span)]
    rest = b"".join(data[slice(*whole)] for number, _, whole, _ in fields if number != _RAW_DATA)
    reference = onnx.TensorProto(data_location=onnx.TensorProto.EXTERNAL)
    start, end = raw[0]
    for key, value in (("location", name), ("offset", str(start)), ("length", str(end - start))):
        reference.external_data.add(key=key, value=value)
    return rest + reference.SerializeToString()


def _fields(data: mmap.mmap, span: Span) -> Iterator[Field]:
    place, end = span
    while place < end:
        start = place
        tag, place = _varint(data, place, end)
        kind = tag & 7
        if kind == 0:
            payload = place
            _, place = _varint(data, place, end)
        elif kind == 2:
            length, payload = _varint(data, place, end)
            place = payload + length
        elif kind in (1, 5):
            payload, place = place, place + (8 if kind == 1 else 4)
        else:
            raise _Malformed
        if place > end:
            raise _Malformed
        yield tag >> 3, kind, (start, place), (payload, place)


def _varint(data: mmap.mmap, place: int, end: int) -> tuple[int, int]:
    number = 0
    for shift in range(0, 70, 7):
        if place >= end:
            raise _Malformed
        byte = data[place]
        place += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, place
    raise _Malformed


def _delimited(number: int, payload: bytes) -> bytes:
    return _encode(number << 3 | 2) + _encode(len(payload)) + payload


def _encode(number: int) -> bytes:
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes((*encoded, number))
