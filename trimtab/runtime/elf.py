"""Check a shared library before the system's loader sees it.

The loader maps what the headers say without asking whether the file is that long, and a library that was cut off (while
it was built or copied, before its hash was taken) ends the process with SIGBUS.  Code for another architecture gets a
message that names both.
"""

from __future__ import annotations

import struct
import sys

from trimtab.errors import ArtifactError

_MACHINES = {3: "i386", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
_SEGMENT = struct.Struct("<IIQQQQQQ")
_SHARED_OBJECT = 3
_LOADED_SEGMENTS = {1, 2, 0x6474E552}  # PT_LOAD, PT_DYNAMIC, PT_GNU_RELRO


def check_library(data: memoryview, architecture: str, name: str) -> None:
    """Check that ``data`` is a complete 64-bit little-endian ELF shared library for ``architecture``.

    Systems whose libraries are not ELF files (macOS, Windows) check them themselves; nothing is done there.

    Raises:
        ArtifactError: it is something else, for another architecture, or cut off.
    """
    if sys.platform in ("darwin", "win32"):
        return
    head = data[:64].tobytes()
    if len(head) < 64 or head[:4] != b"\x7fELF":
        raise _refused(name, "it is not an ELF shared library")
    kind, machine = struct.unpack_from("<HH", head, 16)
    if head[5] != 1 or kind != _SHARED_OBJECT:
        raise _refused(name, "it is not an ELF shared library")
    built_for = _MACHINES.get(machine, f"ELF machine {machine}")
    if built_for != architecture:
        raise _refused(name, f"it is code for {built_for}, and this machine is {architecture}")
    if head[4] != 2:
        return  # 32-bit systems have other headers, and nothing to gain from this check but a nicer message
    table, count = struct.unpack_from("<Q", head, 32)[0], struct.unpack_from("<H", head, 56)[0]
    if struct.unpack_from("<H", head, 54)[0] != _SEGMENT.size or table + count * _SEGMENT.size > len(data):
        raise _refused(name, "its program headers lie outside the file")
    for index in range(count):
        segment, _, offset, _, _, size, _, _ = _SEGMENT.unpack_from(data, table + index * _SEGMENT.size)
        if segment in _LOADED_SEGMENTS and offset + size > len(data):
            raise _refused(name, "it is cut off: a segment reaches past the end of the file")


def _refused(name: str, problem: str) -> ArtifactError:
    return ArtifactError(
        "the code of the artifact cannot be loaded",
        values={"library": name},
        rule=problem,
        fix="compile the model again: trimtab compile MODEL -o model.trim",
    )
