"""The file itself: layout, round trips, and refusal of every kind of damage."""

from __future__ import annotations

import hashlib
import os
import random
import struct
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runtime_fixture import LIBRARY, MANIFEST, WEIGHTS, samples

from trimtab.errors import ArtifactError, TrimtabError, UsageError
from trimtab.runtime import container
from trimtab.runtime.container import COMMENT_PREFIX, ArtifactReader, ArtifactWriter
from trimtab.runtime.manifest import CHECK_ENTRY, MANIFEST_ENTRY, MODULE_ENTRY, WEIGHTS_ENTRY, FileEntry, Manifest
from trimtab.runtime.samples import encode_samples
from trimtab.runtime.zip_records import ALIGNMENT, ZipEntry, encode_directory, encode_local
from trimtab.tensor_file import TensorSource, write_tensors

# No code is run here: any bytes do for the library, and none is carried for the runtime.
PLAIN = replace(MANIFEST, variants=tuple(replace(variant, runtime=()) for variant in MANIFEST.variants))


def write(path: Path, manifest: Manifest = PLAIN, extra: dict[str, bytes] | None = None) -> Manifest:
    with ArtifactWriter(path) as writer:
        writer.add_bytes(MODULE_ENTRY, b"module\n")
        writer.add_bytes(LIBRARY, random.Random(0).randbytes(500))
        with writer.open_entry(WEIGHTS_ENTRY) as file:
            write_tensors(file, {name: TensorSource("f32", a.shape, a) for name, a in WEIGHTS.items()})
        writer.add_bytes(CHECK_ENTRY, encode_samples(samples()[:1]))
        for name, data in (extra or {}).items():
            writer.add_bytes(name, data)
        return writer.finish(manifest)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write(tmp_path / "model.trim")
    return tmp_path / "model.trim"


def test_round_trip(path: Path, tmp_path: Path) -> None:
    reader = ArtifactReader(path)
    assert reader.names == (MODULE_ENTRY, LIBRARY, WEIGHTS_ENTRY, CHECK_ENTRY, MANIFEST_ENTRY)
    assert replace(reader.manifest, entries={}) == PLAIN
    assert bytes(reader.view(MODULE_ENTRY)) == b"module\n"
    weights = reader.weights()
    for name, array in WEIGHTS.items():
        assert np.array_equal(weights[name].array, array)
    assert write(tmp_path / "again.trim") == reader.manifest
    assert (tmp_path / "again.trim").read_bytes() == path.read_bytes()  # nothing depends on the time


def test_everything_is_aligned_in_memory(path: Path) -> None:
    reader = ArtifactReader(path)
    for name in reader.names:
        assert np.frombuffer(reader.view(name), np.uint8).ctypes.data % ALIGNMENT == 0
    for record in reader.weights().values():
        assert record.array.ctypes.data % ALIGNMENT == 0


def test_zip_tools_read_it(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        manifest = archive.read(MANIFEST_ENTRY)
        assert archive.comment == COMMENT_PREFIX + hashlib.sha256(manifest).hexdigest().encode()
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        for name, entry in Manifest.from_json(manifest).entries.items():
            assert hashlib.sha256(archive.read(name)).hexdigest() == entry.sha256


def test_large_offsets_need_no_large_file() -> None:
    big = 5 << 30
    local = encode_local("weights", big + 3, 2 * big, 7)
    assert (big + 3 + len(local)) % ALIGNMENT == 0
    assert struct.unpack_from("<QQ", local, 30 + 7 + 4) == (2 * big, 2 * big)
    directory = encode_directory([ZipEntry("weights", big, big + len(local), 2 * big, 7)], 3 * big, b"")
    assert struct.unpack_from("<QQQ", directory, 46 + 7 + 4) == (2 * big, 2 * big, big)


def test_a_sparse_file_over_four_gigabytes(tmp_path: Path) -> None:
    """The layout of a 5 GB entry, written as a hole: offsets behind it do not fit 32 bits."""
    path, size = tmp_path / "big.trim", 5 << 30
    weights = ZipEntry("big", 0, len(encode_local("big", 0, 0, 0)), size, 0)
    end = weights.start + size
    manifest = replace(
        PLAIN,
        weights=(),
        entries={"big": FileEntry(size, "0" * 64), LIBRARY: FileEntry(1, hashlib.sha256(b"x").hexdigest())},
    )
    try:
        with open(path, "wb") as file:
            file.write(encode_local("big", 0, size, 0))
            file.seek(end)
            records = [weights]
            for name, data in ((LIBRARY, b"x"), (MANIFEST_ENTRY, manifest.to_json().encode())):
                header = file.tell()
                file.write(encode_local(name, header, len(data), 0))
                records.append(ZipEntry(name, header, file.tell(), len(data), 0))
                file.write(data)
            comment = COMMENT_PREFIX + hashlib.sha256(manifest.to_json().encode()).hexdigest().encode()
            file.write(encode_directory(records, file.tell(), comment))
    except OSError as error:
        pytest.skip(f"no sparse files here: {error}")
    original = container.ArtifactReader._check_hash
    try:
        container.ArtifactReader._check_hash = lambda self, name, digest: (  # type: ignore[method-assign]
            None if name == "big" else original(self, name, digest)
        )
        reader = ArtifactReader(path)
    finally:
        container.ArtifactReader._check_hash = original  # type: ignore[method-assign]
    assert len(reader.view("big")) == size
    assert bytes(reader.view(LIBRARY)) == b"x"


def test_every_flipped_byte_is_refused(path: Path, tmp_path: Path) -> None:
    """Flips in every region: records, padding, module, code, weights, samples, manifest, directory, comment."""
    good = path.read_bytes()
    reader = ArtifactReader(path)
    inside: set[int] = set()
    for name in reader.names:
        start = (
            np.frombuffer(reader.view(name), np.uint8).ctypes.data - np.frombuffer(reader._data, np.uint8).ctypes.data
        )
        inside |= set(range(start, start + len(reader.view(name))))
    generator = random.Random(1)
    positions = sorted(set(range(len(good))) - inside) + generator.sample(sorted(inside), 400)
    damaged = tmp_path / "damaged.trim"
    for position in positions:
        data = bytearray(good)
        data[position] ^= 1 << generator.randrange(8)
        damaged.write_bytes(data)
        with pytest.raises(ArtifactError):
            ArtifactReader(damaged)


def test_every_truncation_is_refused(path: Path, tmp_path: Path) -> None:
    good = path.read_bytes()
    cut = tmp_path / "cut.trim"
    for length in {*range(0, len(good), 7), *range(len(good) - 600, len(good))}:
        cut.write_bytes(good[:length])
        with pytest.raises(ArtifactError):
            ArtifactReader(cut)


def test_surplus_bytes_are_refused(path: Path, tmp_path: Path) -> None:
    good = path.read_bytes()
    for data in (b"x" + good, good + b"x", good + good, good[:-100] + b"x" + good[-100:]):
        (tmp_path / "odd.trim").write_bytes(data)
        with pytest.raises(ArtifactError):
            ArtifactReader(tmp_path / "odd.trim")


def test_random_damage_to_records_never_crashes(path: Path, tmp_path: Path) -> None:
    good = path.read_bytes()
    directory = good.index(b"PK\x01\x02")
    generator = random.Random(2)
    for _ in range(1500):
        data = bytearray(good)
        for _ in range(generator.randint(1, 12)):
            position = generator.randrange(directory, len(data))
            data[position] = generator.choice((0, 1, 0x7F, 0x80, 0xFF, generator.randrange(256)))
        if data == good:
            continue
        (tmp_path / "odd.trim").write_bytes(data)
        with pytest.raises(ArtifactError):
            ArtifactReader(tmp_path / "odd.trim")


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/passwd", "a/../b", "a//b", "C:\\x", "a\\b", ".", "", "a\nb", "x" * 2000]
)
def test_unsafe_names_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="bad entry name"):
        write(tmp_path / "m.trim", extra={name: b"x"})
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(container, "is_safe_name", lambda name: True)
    write(tmp_path / "m.trim", extra={name: b"x"})
    with pytest.raises(ArtifactError, match="not a plain relative path"):
        ArtifactReader(tmp_path / "m.trim")


def rezipped(path: Path, compression: int, **changes: bytes) -> None:
    with zipfile.ZipFile(path) as archive:
        comment, entries = archive.comment, {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.comment = comment
        for name, data in (entries | changes).items():
            archive.writestr(name, data)


def test_archives_of_other_tools_are_refused(path: Path) -> None:
    rezipped(path, zipfile.ZIP_DEFLATED)
    with pytest.raises(ArtifactError, match="no zip64 end record"):
        ArtifactReader(path)
    path.write_bytes(b"PK\x05\x06" + bytes(18))  # the empty archive
    with pytest.raises(ArtifactError):
        ArtifactReader(path)


def assemble(path: Path, entries: list[tuple[str, bytes]], comment: bytes | None = None) -> None:
    """An archive of any entries, hostile ones too, in the form the writer uses."""
    with open(path, "wb") as file:
        records = []
        for name, data in entries:
            header, crc = file.tell(), 0
            file.write(encode_local(name, header, len(data), crc))
            records.append(ZipEntry(name, header, file.tell(), len(data), crc))
            file.write(data)
        digest = hashlib.sha256(entries[-1][1]).hexdigest().encode()
        file.write(encode_directory(records, file.tell(), COMMENT_PREFIX + digest if comment is None else comment))


def listing(entries: list[tuple[str, bytes]]) -> bytes:
    listed = {name: FileEntry(len(data), hashlib.sha256(data).hexdigest()) for name, data in entries}
    return replace(PLAIN, weights=(), entries=listed).to_json().encode()


CODE = [(LIBRARY, b"code")]


def test_the_smallest_artifact_is_read(tmp_path: Path) -> None:
    assemble(tmp_path / "m", [*CODE, (MANIFEST_ENTRY, listing(CODE))])
    assert ArtifactReader(tmp_path / "m").names == (LIBRARY, MANIFEST_ENTRY)


@pytest.mark.parametrize(
    ("entries", "comment", "words"),
    [
        ([*CODE, *CODE, (MANIFEST_ENTRY, listing(CODE))], None, "two entries have one name"),
        ([*CODE, ("extra", b"x"), (MANIFEST_ENTRY, listing(CODE))], None, "list different entries.*|.*extra"),
        ([(MANIFEST_ENTRY, listing(CODE))], None, "list different entries"),
        ([(LIBRARY, b"c0de"), (MANIFEST_ENTRY, listing(CODE))], None, "SHA-256"),
        ([(LIBRARY, b"code!"), (MANIFEST_ENTRY, listing(CODE))], None, "another size"),
        ([(MANIFEST_ENTRY, listing([]))], None, "refers to entries the file does not have"),
        ([*CODE], None, "no manifest.json"),
        ([*CODE, (MANIFEST_ENTRY, listing(CODE))], b"", "hash is missing"),
        ([*CODE, (MANIFEST_ENTRY, listing(CODE))], COMMENT_PREFIX + b"\xff", "SHA-256"),
        ([*CODE, (MANIFEST_ENTRY, b"{}")], None, "no schema number"),
    ],
)
def test_contradictions_are_named(
    tmp_path: Path, entries: list[tuple[str, bytes]], comment: bytes | None, words: str
) -> None:
    assemble(tmp_path / "m", entries, comment)
    with pytest.raises(ArtifactError, match=words):
        ArtifactReader(tmp_path / "m")


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"w": np.zeros((8, 4), np.float32)}, "stored=missing"),
        ({"w": np.zeros((4, 8), np.float32), "b": WEIGHTS["b"]}, r"manifest=f32\[8, 4\], stored=f32\[4, 8\]"),
    ],
)
def test_weights_must_be_stored_as_listed(tmp_path: Path, weights: dict[str, Any], words: str) -> None:
    with ArtifactWriter(tmp_path / "m") as writer:
        writer.add_bytes(LIBRARY, b"code")
        with writer.open_entry(WEIGHTS_ENTRY) as file:
            write_tensors(file, {name: TensorSource("f32", a.shape, a) for name, a in weights.items()})
        writer.finish(PLAIN)
    with pytest.raises(ArtifactError, match=words):
        ArtifactReader(tmp_path / "m").weights()


def test_verify_code_skips_weights_only(path: Path) -> None:
    good = path.read_bytes()

    def flip(needle: bytes) -> None:
        data = bytearray(good)
        data[good.index(needle)] ^= 1
        path.write_bytes(data)

    flip(WEIGHTS["w"].tobytes())
    ArtifactReader(path, verify="code")
    with pytest.raises(ArtifactError, match=WEIGHTS_ENTRY):
        ArtifactReader(path, verify="full")
    flip(b"module\n")
    with pytest.raises(ArtifactError, match=MODULE_ENTRY):
        ArtifactReader(path, verify="code")
    with pytest.raises(UsageError, match="use 'full' or 'code'"):
        ArtifactReader(path, verify="none")  # type: ignore[arg-type]


def test_special_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    for name in ("empty", "pipe", "absent", "."):
        with pytest.raises(TrimtabError):
            ArtifactReader(tmp_path / name)


def test_writer_misuse_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    def unfinished() -> None:
        with ArtifactWriter(tmp_path / "m") as writer:
            writer.add_bytes("a", b"x")

    def twice() -> None:
        write(tmp_path / "m", extra={MODULE_ENTRY: b"again"})

    def manifest_by_hand() -> None:
        write(tmp_path / "m", extra={MANIFEST_ENTRY: b"{}"})

    def nested() -> None:
        with ArtifactWriter(tmp_path / "m") as writer, writer.open_entry("a"), writer.open_entry("b"):
            pass

    def no_such_source() -> None:
        with ArtifactWriter(tmp_path / "m") as writer:
            writer.add_file("a", tmp_path / "absent")

    for misuse in (unfinished, twice, manifest_by_hand, nested, no_such_source):
        with pytest.raises(UsageError):
            misuse()
    with pytest.raises(ArtifactError, match="refers to entries"), ArtifactWriter(tmp_path / "m") as writer:
        writer.finish(PLAIN)
    assert os.listdir(tmp_path) == []


def test_files_are_copied_in(tmp_path: Path) -> None:
    content = random.Random(3).randbytes(3_000_000)
    (tmp_path / "source").write_bytes(content)
    with ArtifactWriter(tmp_path / "m", expected_bytes=len(content)) as writer:
        writer.add_file(LIBRARY, tmp_path / "source")
        manifest = writer.finish(replace(PLAIN, weights=()))
    assert manifest.entries[LIBRARY].sha256 == hashlib.sha256(content).hexdigest()
    assert ArtifactReader(tmp_path / "m").view(LIBRARY) == content


def test_a_replaced_file_does_not_disturb_a_reader(path: Path) -> None:
    reader = ArtifactReader(path)
    before = bytes(reader.view(LIBRARY))
    write(path, replace(PLAIN, name="another"))
    assert bytes(reader.view(LIBRARY)) == before
    assert ArtifactReader(path).manifest.name == "another"
