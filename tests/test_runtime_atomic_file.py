"""Files appear whole or not at all: on errors, interrupts, full disks and kills."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from trimtab import atomic_file
from trimtab.atomic_file import atomic_writer, write_atomically
from trimtab.errors import ArtifactError, UsageError


@pytest.fixture(params=["unnamed", "hidden"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both kinds of temporary file: without a name, and hidden beside the target."""
    if request.param == "hidden":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    return str(request.param)


def test_content_appears_at_the_end_only(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "out"
    with atomic_writer(path) as file:
        file.write(b"abc")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"abc"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_exceptions_leave_everything_as_it_was(tmp_path: Path, kind: str, error: type[BaseException]) -> None:
    path = tmp_path / "out"
    path.write_text("old")
    with pytest.raises(error):
        _write_and_fail(path, error())
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_in_words(tmp_path: Path, kind: str, code: int) -> None:
    with pytest.raises(ArtifactError, match="not enough space") as caught:
        _write_and_fail(tmp_path / "out", OSError(code, os.strerror(code)))
    assert caught.value.values["free_bytes"] > 0
    assert os.listdir(tmp_path) == []


def test_space_is_checked_first(tmp_path: Path) -> None:
    writer = atomic_writer(tmp_path / "out", expected_bytes=1 << 60)
    with pytest.raises(ArtifactError, match="not enough space") as caught:
        writer.__enter__()
    assert caught.value.values["needed_bytes"] == 1 << 60


def test_a_real_full_disk() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with open("/dev/full", "wb", buffering=0) as file, pytest.raises(ArtifactError, match="not enough space"):
        _write_through(file)


def _write_and_fail(path: Path, error: BaseException) -> None:
    with atomic_writer(path) as file:
        file.write(b"new")
        raise error


def _write_through(file: IO[bytes]) -> None:
    with atomic_file._translated_errors(Path("/dev/full"), None):
        file.write(b"x")


def test_permissions_follow_the_umask_or_the_old_file(tmp_path: Path, kind: str) -> None:
    old = os.umask(0o027)
    try:
        write_atomically(tmp_path / "new", "text")
    finally:
        os.umask(old)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
    (tmp_path / "new").chmod(0o604)
    write_atomically(tmp_path / "new", b"again")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o604


def test_symbolic_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_bad_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        write_atomically(tmp_path / "absent" / "out", b"")
    with pytest.raises(UsageError, match="a directory has that name"):
        write_atomically(tmp_path, b"")


KILLED = """
import sys, time
from trimtab.atomic_file import atomic_writer
with atomic_writer(sys.argv[1]) as file:
    file.write(bytes(1 << 20))
    file.flush()
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_writer_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "out"
    path.write_text("old")
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(number)
    process.wait(timeout=30)
    process.stdout.close()
    assert path.read_text() == "old"
    if number is signal.SIGINT or _has_unnamed_files(tmp_path):
        assert os.listdir(tmp_path) == ["out"]


def _has_unnamed_files(directory: Path) -> bool:
    file, name = atomic_file._open_temporary(directory / "probe")
    file.close()
    if name is not None:
        name.unlink()
    return name is None
