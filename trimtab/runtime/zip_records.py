"""The zip records of an artifact: encode them, and read them back so strictly that no byte of them may differ.

Python's ``zipfile`` forgives a great deal (bytes before the archive, overlapping entries, headers that contradict each
other).  A file that holds native code deserves less: the reader collects names, sizes, checksums and offsets, encodes
the records anew and compares, so that a file is either what the writer would have written or refused.

Any zip tool reads the result.  Every record uses the zip64 form, whatever the size, so there is one form only.  Format:
APPNOTE.TXT of PKWARE, sections 4.3 to 4.5; the padding field is the one Android's zipalign uses.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from trimtab.errors import ArtifactError

ALIGNMENT = 64

_LOCAL = struct.Struct("<IHHHHHIIIHH")
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_END = struct.Struct("<IHHHHIIH")
_END64 = struct.Struct("<IQHHIIQQQQ")
_LOCATOR64 = struct.Struct("<IIQI")
_LOCAL_ZIP64 = struct.Struct("<HHQQ")
_CENTRAL_ZIP64 = struct.Struct("<HHQQQ")
_PADDING = struct.Struct("<HH")

_LOCAL_SIGNATURE = 0x04034B50
_CENTRAL_SIGNATURE = 0x02014B50
_END_SIGNATURE = 0x06054B50
_END64_SIGNATURE = 0x06064B50
_LOCATOR64_SIGNATURE = 0x07064B50

_ZIP64_FIELD = 0x0001
_PADDING_FIELD = 0xD935
_VERSION = 45  # the first with zip64
_UTF8_NAMES = 0x0800
_UNIX = 3 << 8
_DATE = 0x0021  # 1980-01-01: files must not depend on when they were built
_READABLE_FILE = 0o100644 << 16
_ONES16, _ONES32 = 0xFFFF, 0xFFFFFFFF
_MAX_ENTRIES = 10_000


@dataclass(frozen=True)
class ZipEntry:
    """An entry: its header begins at ``header``, its data is ``data[start : start + size]`` with this CRC-32."""

    name: str
    header: int
    start: int
    size: int
    crc32: int


@dataclass(frozen=True)
class ZipDirectory:
    """The entries of an archive in file order, and its comment."""

    entries: dict[str, ZipEntry]
    comment: bytes


def encode_local(name: str, header: int, size: int, crc32: int) -> bytes:
    """The header in front of an entry, as long as it takes for the data after it to start aligned."""
    raw = name.encode("utf-8")
    unpadded = header + _LOCAL.size + len(raw) + _LOCAL_ZIP64.size + _PADDING.size
    padding = -unpadded % ALIGNMENT
    extra = _LOCAL_ZIP64.pack(_ZIP64_FIELD, _LOCAL_ZIP64.size - 4, size, size)
    extra += _PADDING.pack(_PADDING_FIELD, padding) + bytes(padding)
    fixed = (_LOCAL_SIGNATURE, _VERSION, _UTF8_NAMES, 0, 0, _DATE, crc32, _ONES32, _ONES32, len(raw), len(extra))
    return _LOCAL.pack(*fixed) + raw + extra


def encode_directory(entries: Iterable[ZipEntry], start: int, comment: bytes) -> bytes:
    """Everything behind the last entry: the directory, which begins at offset ``start``, and the end records."""
    records = [_encode_central(entry) for entry in entries]
    directory = b"".join(records)
    count, size = len(records), len(directory)
    version = _VERSION | _UNIX
    end64 = _END64.pack(_END64_SIGNATURE, _END64.size - 12, version, _VERSION, 0, 0, count, count, size, start)
    locator = _LOCATOR64.pack(_LOCATOR64_SIGNATURE, 0, start + size, 1)
    end = _END.pack(_END_SIGNATURE, 0, 0, _ONES16, _ONES16, _ONES32, _ONES32, len(comment))
    return directory + end64 + locator + end + comment


def _encode_central(entry: ZipEntry) -> bytes:
    raw = entry.name.encode("utf-8")
    extra = _CENTRAL_ZIP64.pack(_ZIP64_FIELD, _CENTRAL_ZIP64.size - 4, entry.size, entry.size, entry.header)
    made_by = (_CENTRAL_SIGNATURE, _VERSION | _UNIX, _VERSION, _UTF8_NAMES, 0, 0, _DATE)
    sizes = (entry.crc32, _ONES32, _ONES32, len(raw), len(extra))
    return _CENTRAL.pack(*made_by, *sizes, 0, 0, 0, _READABLE_FILE, _ONES32) + raw + extra


def is_safe_name(name: str) -> bool:
    """Whether a name is a relative path that stays inside any directory it is unpacked into."""
    return (
        0 < len(name) <= 1000
        and name.isprintable()
        and not set(name) & set("\\:")
        and all(part not in ("", ".", "..") for part in name.split("/"))
    )


def read_directory(data: memoryview, source: str) -> ZipDirectory:
    """Read and check all records of an archive.

    Args:
        data: the whole file.
        source: its name, for messages.

    Raises:
        ArtifactError: truncated, not a zip, compressed entries, unsafe or repeated names, or any other difference from
            what :func:`encode_local` and :func:`encode_directory` would have written.
    """
    try:
        return _read(data, source)
    except struct.error:
        raise _damaged(source, "a record of the zip archive is cut off") from None


def _read(data: memoryview, source: str) -> ZipDirectory:
    if data[:2].tobytes() != b"PK":
        raise _damaged(source, "it does not begin like a zip archive")
    start, count, comment = _read_end(data, source)
    entries: dict[str, ZipEntry] = {}
    position, previous_end = start, 0
    for _ in range(count):
        entry, position = _read_central(data, source, position)
        if entry.name in entries:
            raise _damaged(source, "two entries have one name", entry=entry.name)
        if entry.header != previous_end or entry.start + entry.size > start:
            raise _damaged(source, "entries overlap, leave a gap, or lie outside the file", entry=entry.name)
        local = encode_local(entry.name, entry.header, entry.size, entry.crc32)
        if data[entry.header : entry.start] != local:
            raise _damaged(source, "the header before an entry differs from the directory", entry=entry.name)
        entries[entry.name] = entry
        previous_end = entry.start + entry.size
    if previous_end != start or data[start:] != encode_directory(entries.values(), start, comment):
        raise _damaged(source, "the directory at the end of the file is malformed")
    return ZipDirectory(entries, comment)


def _read_end(data: memoryview, source: str) -> tuple[int, int, bytes]:
    """Offset of the directory, number of entries, and the comment."""
    tail = data[max(0, len(data) - _END.size - _ONES16) :].tobytes()
    found = tail.rfind(_END_SIGNATURE.to_bytes(4, "little"))
    if found < 0 or found + _END.size > len(tail):
        raise _damaged(source, "the end of the file is missing: it is truncated, or not an artifact", size=len(data))
    comment = tail[found + _END.size :]
    end64_start = len(data) - len(tail) + found - _LOCATOR64.size - _END64.size
    if end64_start < 0:
        raise _damaged(source, "it has no zip64 end record")
    signature, *_, count, _, start = _END64.unpack_from(data, end64_start)
    if signature != _END64_SIGNATURE:
        raise _damaged(source, "it has no zip64 end record: it was not written as an artifact")
    if start > end64_start or count > _MAX_ENTRIES:
        raise _damaged(source, "the end record points outside the file", directory=start, entries=count)
    return start, count, comment


def _read_central(data: memoryview, source: str, position: int) -> tuple[ZipEntry, int]:
    """One entry as the directory describes it, and the position of the next record."""
    values = _CENTRAL.unpack_from(data, position)
    signature, flags, method, crc32, name_size = values[0], values[3], values[4], values[7], values[10]
    if signature != _CENTRAL_SIGNATURE:
        raise _damaged(source, "a record of the directory is malformed")
    name_start = position + _CENTRAL.size
    raw = data[name_start : name_start + name_size].tobytes()
    name = raw.decode("utf-8", errors="replace")
    if not is_safe_name(name):
        raise _damaged(source, "an entry's name is not a plain relative path", entry=ascii(name[:200]))
    if method != 0 or flags & 1:
        raise _damaged(source, "an entry is compressed or encrypted, so it cannot be mapped", entry=name)
    extra_start = name_start + name_size
    _, _, size, _, header = _CENTRAL_ZIP64.unpack_from(data, extra_start)
    start = header + len(encode_local(name, header, 0, 0))
    return ZipEntry(name, header, start, size, crc32), extra_start + _CENTRAL_ZIP64.size


def _damaged(source: str, problem: str, **values: object) -> ArtifactError:
    return ArtifactError(
        "the file is not a readable artifact",
        values={"file": source, **values},
        rule=problem,
        fix="copy the file again, or compile the model again: trimtab compile MODEL -o model.trim",
    )
