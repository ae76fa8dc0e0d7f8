"""The 64-byte aligned safetensors files: round trips, streaming, and hostile headers."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings

from trimtab.errors import ArtifactError, UsageError
from trimtab.tensor_file import ALIGNMENT, PADDING_PREFIX, STORAGE_TYPES, TensorFile, TensorSource, write_tensors

DTYPES = sorted(STORAGE_TYPES)


def random_array(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray[Any, Any]:
    raw = STORAGE_TYPES[dtype].numpy_dtype
    generator = np.random.default_rng(seed)
    if dtype == "bool":
        return generator.integers(0, 2, shape).astype(bool)
    size = int(np.prod(shape)) * raw.itemsize
    return np.frombuffer(generator.bytes(size), raw).reshape(shape)


def encoded(tensors: dict[str, TensorSource], metadata: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    written = write_tensors(buffer, tensors, metadata)
    assert written == len(buffer.getvalue())
    return buffer.getvalue()


def raw_file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=4)), max_size=6))
def test_any_tensors_come_back_aligned_and_equal(specs: list[tuple[str, list[int]]]) -> None:
    arrays = {f"t{i}": (dtype, random_array(dtype, tuple(shape), i)) for i, (dtype, shape) in enumerate(specs)}
    data = encoded({name: TensorSource(dtype, array.shape, array) for name, (dtype, array) in arrays.items()})
    file = TensorFile(data)
    assert list(file) == list(arrays)
    base = np.frombuffer(data, np.uint8).ctypes.data
    for name, (dtype, array) in arrays.items():
        record = file[name]
        assert (record.dtype, record.shape) == (dtype, array.shape) == file.describe(name)
        assert record.array.tobytes() == array.tobytes()
        assert not record.array.flags.writeable
        assert array.size == 0 or (record.array.ctypes.data - base) % ALIGNMENT == 0


def test_reference_implementation_reads_the_file(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    arrays = {f"a.{dtype}": random_array(dtype, (3, 5)) for dtype in DTYPES if dtype != "bf16"}
    write_tensors(path, {name: (name[2:], array.shape, array) for name, array in arrays.items()}, {"format": "test"})
    loaded = safetensors.numpy.load_file(path)
    assert {name for name in loaded if not name.startswith(PADDING_PREFIX)} == set(arrays)
    for name, array in arrays.items():
        assert loaded[name].tobytes() == array.tobytes()
        assert loaded[name].dtype == array.dtype
    assert TensorFile.open(path).metadata == {"format": "test"}


def test_files_of_the_reference_implementation_are_read(tmp_path: Path) -> None:
    arrays = {"x": random_array("f32", (3,)), "y": random_array("i8", (5, 1)), "empty": np.zeros((0, 4), np.float16)}
    path = tmp_path / "t.safetensors"
    safetensors.numpy.save_file(arrays, path)
    file = TensorFile.open(path)
    assert set(file) == set(arrays)
    for name, array in arrays.items():
        assert file[name].array.tobytes() == array.tobytes()


def test_bfloat16_is_raw_bits() -> None:
    values = np.array([1.5, -2.0, float("inf")], ml_dtypes.bfloat16)
    record = TensorFile(encoded({"v": TensorSource("bf16", (3,), values)}))["v"]
    assert record.dtype == "bf16"
    assert record.array.dtype == np.uint16
    assert np.array_equal(record.array.view(ml_dtypes.bfloat16), values)


def test_chunks_of_every_kind_are_joined() -> None:
    array = random_array("f32", (6, 4))
    part = array.tobytes()
    for chunks in (
        array,
        part,
        memoryview(part),
        [array[:2], array[2:]],
        [part[:7], bytearray(part[7:])],
        (row for row in array),
        lambda: (row for row in array),
        np.asfortranarray(array),
        array.astype(">f4"),
    ):
        record = TensorFile(encoded({"a": TensorSource("f32", (6, 4), chunks)}))["a"]
        assert np.array_equal(record.array, array, equal_nan=True)


def test_large_strided_arrays_are_written_in_order() -> None:
    array = np.arange(6_000_000, dtype=np.int32).reshape(2, 3, 1_000_000)
    for view in (array.transpose(2, 1, 0), array[:, ::2], array[::-1]):
        record = TensorFile(encoded({"a": TensorSource("i32", view.shape, view)}))["a"]
        assert np.array_equal(record.array, view)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (("f32", (2, 2), np.zeros(3, np.float32)), "expected_bytes=16, given_bytes=12"),
        (("f32", (2,), np.zeros(2, np.float64)), "declared=f32, given=float64"),
        (("f32", (2,), []), "given_bytes=0"),
        (("i4", (2,), b""), "store sub-byte types packed"),
        (("f32", (-1,), b""), "negative size"),
    ],
)
def test_wrong_sources_are_refused(source: tuple[str, tuple[int, ...], Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        encoded({"a": TensorSource(*source)})


@pytest.mark.parametrize("name", ["__metadata__", f"{PADDING_PREFIX}12"])
def test_reserved_names_are_refused(name: str) -> None:
    with pytest.raises(ArtifactError, match="reserved"):
        encoded({name: TensorSource("u8", (1,), b"x")})


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"a": ("u8", (1,), b"x")})
    before = path.read_bytes()

    def interrupted() -> Any:
        yield b"y"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tensors(path, {"a": ("u8", (2,), interrupted)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["t.safetensors"]


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE = {
    "empty": b"",
    "seven bytes": b"1234567",
    "absurd length": raw_file({}, length=2**63),
    "length past the end": raw_file({}, length=3),
    "length over the limit": struct.pack("<Q", 200_000_000) + b"{}",
    "not json": raw_file(b"hello"),
    "not utf-8": raw_file(b'{"\xff":1}'),
    "not an object": raw_file([1]),
    "deeply nested": raw_file(b"[" * 100_000),
    "huge number": raw_file(b'{"a":' + b"9" * 10_000 + b"}"),
    "entry not an object": raw_file({"a": 3}),
    "entry without dtype": raw_file({"a": {"shape": [], "data_offsets": [0, 4]}}),
    "unknown dtype": raw_file({"a": ENTRY | {"dtype": "F7"}}, bytes(8)),
    "dtype not text": raw_file({"a": ENTRY | {"dtype": ["F32"]}}, bytes(8)),
    "negative size": raw_file({"a": ENTRY | {"shape": [-2]}}, bytes(8)),
    "size not an integer": raw_file({"a": ENTRY | {"shape": [2.0]}}, bytes(8)),
    "size true": raw_file({"a": ENTRY | {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, bytes(1)),
    "offsets reversed": raw_file({"a": ENTRY | {"data_offsets": [8, 0]}}, bytes(8)),
    "offsets out of range": raw_file({"a": ENTRY | {"data_offsets": [8, 16]}}, bytes(8)),
    "offsets do not fit the shape": raw_file({"a": ENTRY | {"shape": [3]}}, bytes(8)),
    "overlap": raw_file({"a": ENTRY, "b": ENTRY | {"data_offsets": [4, 12]}}, bytes(12)),
    "hole": raw_file({"a": ENTRY, "b": ENTRY | {"data_offsets": [12, 20]}}, bytes(20)),
    "data left over": raw_file({"a": ENTRY}, bytes(9)),
    "truncated data": raw_file({"a": ENTRY}, bytes(7)),
    "name twice": raw_file(b'{"a":%b,"a":%b}' % ((json.dumps(ENTRY).encode(),) * 2), bytes(8)),
    "absurd empty shape": raw_file({"a": {"dtype": "F32", "shape": [0, 2**61, 2**61], "data_offsets": [0, 0]}}),
    "absurd rank": raw_file({"a": {"dtype": "U8", "shape": [1] * 65, "data_offsets": [0, 1]}}, b"x"),
    "metadata not strings": raw_file({"__metadata__": {"a": 1}}),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_headers_are_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(data)
    with pytest.raises(ArtifactError):
        TensorFile.open(path)


@settings(max_examples=300)
@given(st.data())
def test_damage_is_refused_or_harmless(data: st.DataObject) -> None:
    good = encoded({"a": TensorSource("f32", (3,), random_array("f32", (3,))), "b": TensorSource("i8", (5,), b"12345")})
    damaged = bytearray(good[: data.draw(st.integers(0, len(good)))])
    for _ in range(data.draw(st.integers(0, 3))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        file = TensorFile(bytes(damaged))
    except ArtifactError:
        return
    for record in file.values():
        assert record.array.nbytes <= len(damaged)
        record.array.sum()


def test_special_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match="not a regular file"):
        TensorFile.open(tmp_path / "pipe")
    for bad in (tmp_path, tmp_path / "absent", "a\0b"):
        with pytest.raises((ArtifactError, UsageError)):
            TensorFile.open(bad)


STREAM = """
import resource, sys
import numpy as np
from trimtab.tensor_file import TensorFile, TensorSource, write_tensors
rows, columns = 200, 1 << 18  # 200 MiB of f32
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def chunks():
    for row in range(rows):
        yield np.full(columns, row, np.float32)
write_tensors(sys.argv[1], {"table": TensorSource("f32", (rows, columns), chunks)})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
table = TensorFile.open(sys.argv[1])["table"].array
assert table[123, 7] == 123 and table.shape == (rows, columns)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_streaming_needs_no_copy_in_memory(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STREAM, str(tmp_path / "big")], capture_output=True, text=True, check=True, timeout=120
    )
    writing, reading = map(int, done.stdout.split())
    assert writing < 40 * 1024  # KiB, on Linux
    assert reading < 60 * 1024
