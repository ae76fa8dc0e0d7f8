"""Write a file, or a folder of files, so that it either appears whole under its name or not at all.

The bytes go to a file without a name (``O_TMPFILE``) where the file system has them, so that even a killed process
leaves nothing behind; elsewhere to a hidden file beside the target, removed on every exception.  Only the standard
library is used: the runtime on a device and the compiler share this module.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

from trimtab.errors import ArtifactError, UsageError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What a file system says when it has no unnamed files, or cannot give one a name later.
_NO_UNNAMED_FILES = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT, errno.EPERM, errno.ENOSYS}


@contextmanager
def atomic_writer(path: str | os.PathLike[str], *, expected_bytes: int | None = None) -> Iterator[BinaryIO]:
    """Open ``path`` for writing; the file is put in place only when the ``with`` block ends without an exception.

    A symbolic link is followed, and an existing file keeps its permission bits.  On any exception, also
    ``KeyboardInterrupt``, what stood under the name before stays as it was.

    Args:
        path: the final name; its directory must exist.
        expected_bytes: the size in bytes the file will have, when known: checked against the free space before the
            first byte is written.

    Yields:
        A seekable binary file, open for reading and writing.

    Raises:
        UsageError: the directory does not exist, or the name is that of a directory.
        ArtifactError: the disk is full or the directory cannot be written.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise UsageError(
            "cannot write a file",
            values={"path": target, "directory": target.parent},
            rule="its directory does not exist",
            fix=f"create it first: mkdir -p {target.parent}",
        )
    if target.is_dir():
        raise UsageError("cannot write a file", values={"path": target}, rule="a directory has that name")
    if expected_bytes is not None and expected_bytes > shutil.disk_usage(target.parent).free:
        raise _no_space(target, expected_bytes)

    with _translated_errors(target, expected_bytes):
        file, temporary = _open_temporary(target)
    try:
        with _translated_errors(target, expected_bytes):
            with file:
                yield file
                file.flush()
                os.fchmod(file.fileno(), _permissions(target))
                os.fsync(file.fileno())
                if temporary is None:
                    temporary = _hidden_name(target)
                    # The directory descriptor is not used for an absolute path, but makes Python call linkat(), the
                    # one form that follows the symbolic link to the unnamed file.
                    os.link(f"/proc/self/fd/{file.fileno()}", temporary, src_dir_fd=file.fileno())
            os.replace(temporary, target)
    except BaseException:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)
        raise
    _sync_directory(target.parent)


def write_atomically(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write ``data`` (text as UTF-8) to ``path`` atomically; errors as in :func:`atomic_writer`."""
    content = data.encode("utf-8") if isinstance(data, str) else data
    with atomic_writer(path, expected_bytes=len(content)) as file:
        file.write(content)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder to write files into, which gets its name ``path`` when the ``with`` block ends without an exception.

    Until then it has a hidden name beside ``path``, and on any exception it is removed with everything in it.

    Raises:
        UsageError, ArtifactError: as in :func:`check_new_folder`; and when the disk is full.
    """
    check_new_folder(path)
    target = Path(os.path.abspath(path))
    temporary = _hidden_name(target)
    with _translated_errors(target, None):
        temporary.mkdir()
        try:
            yield temporary
            temporary.replace(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    _sync_directory(target.parent)


def check_new_folder(path: str | os.PathLike[str]) -> None:
    """Refuse, before any long work, a folder that :func:`atomic_folder` could not make.

    Raises:
        UsageError: its parent does not exist, or something is there already other than an empty folder.
        ArtifactError: its parent cannot be written.
    """
    target = Path(os.path.abspath(path))
    if not target.parent.is_dir():
        raise UsageError(
            "cannot make a folder",
            values={"path": target},
            rule=f"{target.parent} is no folder",
            fix=f"create it first: mkdir -p {target.parent}",
        )
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UsageError(
            "cannot make a folder", values={"path": target}, rule="something is there", fix="give another name"
        )
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise ArtifactError(
            "cannot make a folder",
            values={"path": target},
            rule=f"{target.parent} may not be written by this user",
            fix="choose another place",
        )


def _open_temporary(target: Path) -> tuple[BinaryIO, Path | None]:
    """An open file in the directory of ``target``, and its name if it has one."""
    unnamed = getattr(os, "O_TMPFILE", None)
    if unnamed is not None and os.path.isdir("/proc/self/fd"):
        try:
            descriptor = os.open(target.parent, unnamed | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in _NO_UNNAMED_FILES:
                raise
        else:
            return cast(BinaryIO, os.fdopen(descriptor, "w+b")), None
    temporary = _hidden_name(target)
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    return cast(BinaryIO, os.fdopen(descriptor, "w+b")), temporary


def _hidden_name(target: Path) -> Path:
    # The stem is cut so that the hidden name fits wherever the target's own name does.
    return target.with_name(f".{target.name[:200]}.{secrets.token_hex(6)}.tmp")


def _permissions(target: Path) -> int:
    try:
        return stat.S_IMODE(os.stat(target).st_mode)
    except OSError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask


def _sync_directory(directory: Path) -> None:
    # Without this a power cut can undo the rename. Some file systems cannot sync a directory: then nothing is lost.
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _translated_errors(target: Path, expected_bytes: int | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise _no_space(target, expected_bytes) from error
        raise ArtifactError(
            "cannot write a file",
            values={"path": target, "reason": error.strerror or error},
            rule="nothing was left behind and an earlier file of that name is unchanged",
            fix="check that the directory can be written, or choose another path",
        ) from error


def _no_space(target: Path, expected_bytes: int | None) -> ArtifactError:
    values: dict[str, object] = {"path": target, "free_bytes": shutil.disk_usage(target.parent).free}
    if expected_bytes is not None:
        values["needed_bytes"] = expected_bytes
    return ArtifactError(
        "not enough space to write a file",
        values=values,
        rule="nothing was left behind and an earlier file of that name is unchanged",
        fix="free some space (or raise the quota), or write to another file system",
    )
