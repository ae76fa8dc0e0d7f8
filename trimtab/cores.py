"""How many cores this process may compute on.

Threads that multiply gain nothing from a second hyperthread of a core, whose units are busy already, and lose when the
system stops one of them in the middle of a kernel while the others wait.  So what counts are physical cores, among
those that the process may run on, and no more than the time its control group may use.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from trimtab.errors import UsageError


def usable_processors() -> frozenset[int]:
    """Numbers of the logical processors in the affinity mask; all of the machine's where there is no mask."""
    try:
        return frozenset(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        return frozenset(range(os.cpu_count() or 1))


def usable_cores(root: str | os.PathLike[str] = "/") -> int:
    """How many threads should compute: at least 1.

    The physical cores of :func:`usable_processors`, or the processor time that the control group grants if that is
    less: two and a half processors are two, because a third thread would stand still half of the time.

    Args:
        root: where ``/sys`` and ``/proc`` are looked for.
    """
    cores = len({_siblings(Path(root), processor) for processor in usable_processors()})
    return max(1, min([cores, *map(int, _cgroup_limits(Path(root)))]))


def check_thread_count(threads: int | None) -> None:
    """Refuse a number of threads that is not a positive integer; None, for the default, passes.

    Raises:
        UsageError: as above.
    """
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise UsageError(
            "bad number of threads",
            values={"threads": repr(threads)},
            rule="it must be an integer of at least 1",
            fix="leave it out to use every core this process may use",
        )


def _siblings(root: Path, processor: int) -> str:
    """Text that is the same for all processors of one core."""
    place = f"sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list"
    return _read(root / place) or str(processor)


def _cgroup_limits(root: Path) -> Iterator[float]:
    """Processors granted by the control group of this process and by each group around it, in either version."""
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2) if line.count(":") >= 2 else ("", "-", "")
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = ("", "unified") if not controllers else (controllers, "cpu")
        for mount in mounts:
            for folder in _groups(root / "sys/fs/cgroup" / mount, path):
                quota, period = _quota(folder)
                if quota > 0 and period > 0:
                    yield quota / period


def _groups(mount: Path, path: str) -> Iterator[Path]:
    """The folder of a group and those of the groups around it.

    In a container the path may be that of the host, which is not there; the mounted folder itself is the group then.
    """
    parts = PurePosixPath(path).parts[1:]
    for count in range(0 if ".." in parts else len(parts), -1, -1):
        yield mount.joinpath(*parts[:count])


def _quota(folder: Path) -> tuple[float, float]:
    """Processor time per period, both in microseconds; a quota of 0 where there is no limit."""
    second_version = (_read(folder / "cpu.max") or "").split()
    if len(second_version) == 2:
        return _number(second_version[0]), _number(second_version[1])
    return _number(_read(folder / "cpu.cfs_quota_us")), _number(_read(folder / "cpu.cfs_period_us"))


def _number(text: str | None) -> float:
    return float(text) if text is not None and text.isdecimal() else 0.0


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return None
