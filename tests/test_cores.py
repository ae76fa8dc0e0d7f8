"""How many cores a process may use: hyperthreads, affinity masks, and control groups of both versions."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from trimtab import cores
from trimtab.backends.tvm.targets import default_threads
from trimtab.errors import UsageError
from trimtab.runtime.threads import resolve_thread_count

Write = Callable[[str, str], None]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(place: str, text: str) -> None:
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")

    return write


@pytest.fixture(autouse=True)
def eight_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def topology(write: Write, siblings: list[str]) -> None:
    for number, text in enumerate(siblings):
        write(f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list", text)


def test_without_any_information_every_processor_is_a_core(tmp_path: Path) -> None:
    assert cores.usable_cores(tmp_path) == 8


@pytest.mark.parametrize("siblings", [["0-1", "0-1", "2-3", "2-3", "4-5", "4-5", "6-7", "6-7"],
                                      ["0,4", "1,5", "2,6", "3,7"] * 2], ids=["beside", "far"])  # fmt: skip
def test_hyperthreads_of_one_core_count_once(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch, siblings: list[str]
) -> None:
    topology(write, siblings)
    assert cores.usable_cores(tmp_path) == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2, 3})
    allowed = {siblings[number] for number in (1, 2, 3)}
    assert cores.usable_cores(tmp_path) == len(allowed)


@pytest.mark.parametrize(("quota", "expected"), [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1),
                                                 ("1600000 100000", 8), ("nonsense", 8), ("0 0", 8)])  # fmt: skip
def test_the_second_version_of_control_groups(tmp_path: Path, write: Write, quota: str, expected: int) -> None:
    write("proc/self/cgroup", "0::/system.slice/job")
    write("sys/fs/cgroup/system.slice/job/cpu.max", quota)
    assert cores.usable_cores(tmp_path) == expected


def test_the_tightest_of_the_groups_around_a_process_counts(tmp_path: Path, write: Write) -> None:
    write("proc/self/cgroup", "0::/a/b/c")
    write("sys/fs/cgroup/a/b/c/cpu.max", "600000 100000")
    write("sys/fs/cgroup/a/b/cpu.max", "max 100000")
    write("sys/fs/cgroup/a/cpu.max", "300000 100000")
    assert cores.usable_cores(tmp_path) == 3
    write("sys/fs/cgroup/cpu.max", "200000 100000")
    assert cores.usable_cores(tmp_path) == 2


@pytest.mark.parametrize("group", ["/", "/docker/0123456789abcdef", "/../../outside"])
def test_in_a_container_the_mounted_group_counts(tmp_path: Path, write: Write, group: str) -> None:
    write("proc/self/cgroup", f"0::{group}")
    write("sys/fs/cgroup/cpu.max", "200000 100000")
    assert cores.usable_cores(tmp_path) == 2


@pytest.mark.parametrize("mount", ["cpu,cpuacct", "cpu"])
def test_the_first_version_of_control_groups(tmp_path: Path, write: Write, mount: str) -> None:
    write("proc/self/cgroup", "5:memory:/job\n4:cpu,cpuacct:/job\n1:name=systemd:/job\n0::/job")
    write(f"sys/fs/cgroup/{mount}/job/cpu.cfs_period_us", "100000")
    write(f"sys/fs/cgroup/{mount}/job/cpu.cfs_quota_us", "-1")
    assert cores.usable_cores(tmp_path) == 8
    write(f"sys/fs/cgroup/{mount}/job/cpu.cfs_quota_us", "399999")
    assert cores.usable_cores(tmp_path) == 3
    write("sys/fs/cgroup/memory/job/cpu.cfs_quota_us", "100000")
    assert cores.usable_cores(tmp_path) == 3


def test_a_system_without_affinity_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert cores.usable_cores(tmp_path) == 3
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores.usable_cores(tmp_path) == 1


def test_the_same_number_is_planned_for_and_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TVM_NUM_THREADS", raising=False)
    assert default_threads() == resolve_thread_count(None) == cores.usable_cores()


def test_which_number_of_threads_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.runtime.threads.usable_cores", lambda: 4)
    monkeypatch.delenv("TVM_NUM_THREADS", raising=False)
    assert resolve_thread_count(None) == 4
    assert resolve_thread_count(None, planned=2) == 2
    assert resolve_thread_count(None, planned=64) == 4
    # Whoever asks for hyperthreads gets them.
    assert resolve_thread_count(7, planned=2) == 7
    with pytest.warns(RuntimeWarning, match="threads=9 lowered to 8"):
        assert resolve_thread_count(9) == 8
    monkeypatch.setenv("TVM_NUM_THREADS", "3")
    assert resolve_thread_count(None, planned=2) == 3
    assert resolve_thread_count(1, planned=2) == 1


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_what_is_no_number_of_threads(threads: object) -> None:
    with pytest.raises(UsageError, match="bad number of threads"):
        cores.check_thread_count(threads)  # type: ignore[arg-type]
