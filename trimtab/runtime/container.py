"""Write and read ``model.trim``: an uncompressed zip whose entries start on 64-byte boundaries.

The manifest holds the SHA-256 of every other entry and, because those are only known after writing them, is the last
entry.  Its own SHA-256 stands in the zip comment.  The hashes find damage; against an attacker, who can rewrite them,
only a signature helps.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import mmap
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, BinaryIO, Literal, cast

from trimtab.atomic_file import atomic_writer
from trimtab.errors import ArtifactError, UsageError
from trimtab.runtime.manifest import (
    CHECK_ENTRY,
    MANIFEST_ENTRY,
    WEIGHTS_ENTRY,
    FileEntry,
    Manifest,
    check_entries,
)
from trimtab.runtime.zip_records import ZipEntry, encode_directory, encode_local, is_safe_name, read_directory
from trimtab.tensor_file import TensorFile, TensorRecord, map_file

COMMENT_PREFIX = b"trimtab artifact; manifest sha256 "
# Read and copied in pieces: large enough to be fast, small enough to stay in the second-level cache.
_PIECE_BYTES = 1 << 20
_HASHED_BYTES = 32 << 20

Verify = Literal["full", "code"]


class EntryWriter(io.RawIOBase):
    """The open entry of an :class:`ArtifactWriter`: takes bytes, and hashes and counts them as they pass."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self.size = 0
        self.crc32 = 0
        self.sha256 = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, view.nbytes, _PIECE_BYTES):
            piece = view[start : start + _PIECE_BYTES]
            self._file.write(piece)
            self.crc32 = zlib.crc32(piece, self.crc32)
            self.sha256.update(piece)
        self.size += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self.size


class ArtifactWriter:
    """Write an artifact atomically, entry by entry, without holding any entry in memory.

    Use as a context manager; the file appears under its name when the block ends after :meth:`finish`, and not at all
    otherwise.

    Args:
        path: the final name of the file.
        expected_bytes: roughly how large the file will be, when known; checked against the free space first.
    """

    def __init__(self, path: str | os.PathLike[str], *, expected_bytes: int | None = None) -> None:
        self._path = path
        self._atomic: AbstractContextManager[BinaryIO] = atomic_writer(path, expected_bytes=expected_bytes)
        self._file: BinaryIO | None = None
        self._records: dict[str, ZipEntry] = {}
        self._entries: dict[str, FileEntry] = {}
        self._entry_is_open = False
        self._finished = False

    def __enter__(self) -> ArtifactWriter:
        self._file = self._atomic.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None and not self._finished:
            error = UsageError(
                "an artifact was not finished",
                values={"path": self._path},
                rule="a file without a manifest cannot be loaded, so none was left behind",
                fix="call finish(manifest) as the last thing in the block",
            )
            self._atomic.__exit__(type(error), error, None)
            raise error
        self._atomic.__exit__(kind, error, traceback)

    def add_bytes(self, name: str, data: bytes | bytearray | memoryview) -> None:
        """Write an entry from memory."""
        with self.open_entry(name) as entry:
            entry.write(data)

    def add_file(self, name: str, path: str | os.PathLike[str]) -> None:
        """Copy a file into an entry; raises :class:`UsageError` if it cannot be opened."""
        try:
            source = open(path, "rb")  # noqa: SIM115 - so that only opening is translated
        except OSError as error:
            raise UsageError("cannot open a file", values={"path": path, "reason": error.strerror}) from error
        with source, self.open_entry(name) as entry:
            shutil.copyfileobj(source, entry, _PIECE_BYTES)

    @contextmanager
    def open_entry(self, name: str) -> Iterator[BinaryIO]:
        """Open an entry for writing in pieces. Its first byte lands on a 64-byte boundary; one entry at a time.

        Raises:
            UsageError: the name is taken, reserved or not a plain relative path, or another entry is open.
        """
        if name == MANIFEST_ENTRY:
            raise UsageError("the manifest is written by finish()", values={"name": name})
        with self._open_entry(name) as entry:
            yield cast(BinaryIO, entry)

    @contextmanager
    def _open_entry(self, name: str) -> Iterator[EntryWriter]:
        if self._file is None or self._finished or self._entry_is_open:
            raise UsageError(
                "an entry cannot be added now",
                values={"name": name},
                rule="entries are written one after another, between entering the block and finish()",
            )
        if not is_safe_name(name):
            raise UsageError("bad entry name", values={"name": repr(name)}, rule="it must be a plain relative path")
        if name in self._records:
            raise UsageError("an entry was written twice", values={"name": name})
        file = self._file
        self._entry_is_open = True
        header = file.tell()
        file.write(encode_local(name, header, 0, 0))
        start = file.tell()
        entry = EntryWriter(file)
        try:
            yield entry
            end = file.tell()
            file.seek(header)
            file.write(encode_local(name, header, entry.size, entry.crc32))
            file.seek(end)
        finally:
            self._entry_is_open = False
        self._records[name] = ZipEntry(name, header, start, entry.size, entry.crc32)
        self._entries[name] = FileEntry(entry.size, entry.sha256.hexdigest())

    def finish(self, manifest: Manifest) -> Manifest:
        """Write the manifest with sizes and hashes filled in, close the archive, and return the manifest as written.

        Raises:
            ArtifactError: the manifest contradicts itself, or refers to entries that were not written.
        """
        complete = dataclasses.replace(manifest, entries=dict(self._entries))
        check_entries(complete)
        with self._open_entry(MANIFEST_ENTRY) as entry:
            entry.write(complete.to_json().encode("utf-8"))
        assert self._file is not None  # _open_entry has checked it
        comment = COMMENT_PREFIX + entry.sha256.hexdigest().encode()
        self._file.write(encode_directory(self._records.values(), self._file.tell(), comment))
        self._finished = True
        return complete


class ArtifactReader:
    """A mapped artifact whose structure and hashes have been checked.

    The views it gives share the mapping and keep it alive.  The file must not be changed in place while it is mapped:
    replacing it by a new file (as the writer does) is safe, truncating it is not.

    Args:
        path: the file.
        verify: ``"full"`` compares the SHA-256 of every entry; ``"code"`` leaves out ``weights.safetensors`` and
            ``check.npz``, so that loading does not read gigabytes of weights.

    Raises:
        UsageError: no such file, or an unknown ``verify``.
        ArtifactError: the file is damaged, truncated, malformed, or has an unknown schema.
    """

    manifest: Manifest

    def __init__(self, path: str | os.PathLike[str], *, verify: Verify = "full") -> None:
        if verify not in ("full", "code"):
            raise UsageError("unknown value of verify", values={"verify": repr(verify)}, rule="use 'full' or 'code'")
        self.path = os.fspath(path)
        self._mapping = map_file(path)
        self._data = memoryview(self._mapping)
        directory = read_directory(self._data, self.path)
        self._records = directory.entries
        self.manifest = self._read_manifest(directory.comment)
        self._check_listing()
        skipped = {WEIGHTS_ENTRY, CHECK_ENTRY} if verify == "code" else set()
        for name in self.manifest.entries:
            if name not in skipped:
                self._check_hash(name, self.manifest.entries[name].sha256)

    def _read_manifest(self, comment: bytes) -> Manifest:
        if MANIFEST_ENTRY not in self._records:
            raise self._damaged("it has no manifest.json: it is a zip archive, but not an artifact")
        if not comment.startswith(COMMENT_PREFIX):
            raise self._damaged("the archive comment with the manifest's hash is missing")
        self._check_hash(MANIFEST_ENTRY, comment.removeprefix(COMMENT_PREFIX).decode("ascii", errors="replace"))
        return Manifest.from_json(bytes(self.view(MANIFEST_ENTRY)))

    def _check_listing(self) -> None:
        listed, present = set(self.manifest.entries), set(self._records) - {MANIFEST_ENTRY}
        if listed != present:
            names = sorted(listed ^ present)
            raise self._damaged("manifest and archive list different entries", entries=", ".join(names))
        for name, entry in self.manifest.entries.items():
            if entry.size != self._records[name].size:
                raise self._damaged("an entry has another size than its manifest says", entry=name)
        check_entries(self.manifest)

    def _check_hash(self, name: str, expected: str) -> None:
        digest = hashlib.sha256()
        view, first = self.view(name), self._records[name].start
        for start in range(0, len(view), _HASHED_BYTES):
            digest.update(view[start : start + _HASHED_BYTES])
            if len(view) > _HASHED_BYTES:
                self._let_go(first + start, min(_HASHED_BYTES, len(view) - start))
        if digest.hexdigest() != expected:
            raise self._damaged("an entry's SHA-256 is not the one recorded", entry=name)

    def _let_go(self, start: int, size: int) -> None:
        """Unmap pages for now: weights that were only hashed need not count as this process's memory."""
        page = mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED"):
            begin = start - start % page
            self._mapping.madvise(mmap.MADV_DONTNEED, begin, start + size - begin)

    def _damaged(self, problem: str, **values: object) -> ArtifactError:
        return ArtifactError(
            "the artifact is damaged",
            values={"file": self.path, **values},
            rule=problem,
            fix="copy the file again, or compile the model again: trimtab compile MODEL -o model.trim",
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all entries, in file order."""
        return tuple(self._records)

    def __contains__(self, name: object) -> bool:
        return name in self._records

    def view(self, name: str) -> memoryview:
        """The bytes of an entry, mapped, read-only, 64-byte aligned; raises :class:`ArtifactError` if it is absent."""
        record = self._records.get(name)
        if record is None:
            raise self._damaged("it has no such entry", entry=name)
        return self._data[record.start : record.start + record.size]

    def weights(self) -> Mapping[str, TensorRecord]:
        """The weights as views of the file, checked against the manifest's list; without an entry of weights, none."""
        if WEIGHTS_ENTRY not in self._records:
            return {}
        file = TensorFile(self.view(WEIGHTS_ENTRY), source=f"{self.path}/{WEIGHTS_ENTRY}")
        for weight in self.manifest.weights:
            stored = file.describe(weight.name) if weight.name in file else None
            if stored != (weight.dtype, weight.shape):
                raise self._damaged(
                    "a weight is not stored as its manifest says",
                    weight=weight.name,
                    manifest=f"{weight.dtype}{list(weight.shape)}",
                    stored=f"{stored[0]}{list(stored[1])}" if stored else "missing",
                )
        return file
