"""Profiles: what a timer sees becomes kernels with work, rates, fractions of a peak, and a trace file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trimtab.errors import UsageError
from trimtab.runtime.manifest import KernelCall
from trimtab.runtime.profile import (
    MACHINE_NAME,
    FunctionTime,
    KernelEvent,
    KernelTime,
    KernelTimer,
    Profile,
    Roofs,
    best_times,
    kernel_events,
    summary,
)

CALLS = (
    KernelCall("linear", ("linear at m.py:3",), "1000*batch", "f32", "40*batch + 800", "40*batch"),
    KernelCall("norm", ("layer_norm at m.py:4",), 0, "", 400, 400),
    KernelCall("linear", ("linear at m.py:5",), "1000*batch", "f32", "40*batch + 800", "40*batch"),
)
TIMES = [
    FunctionTime("vm.builtin.alloc", 5.0, 5.5),
    FunctionTime("linear", 5.5, 7.5),
    FunctionTime("shape_func", 7.5, 7.75),
    FunctionTime("norm", 8.0, 9.0),
    FunctionTime("linear", 9.0, 10.0),
]


def profile(roofs: Roofs | None = None) -> Profile:
    return Profile((3.0, 1.0, 2.0), kernel_events(TIMES, CALLS, {"batch": 2}), 2, roofs)


def test_events_get_the_work_of_their_calls() -> None:
    events = kernel_events(TIMES, CALLS, {"batch": 2})
    assert [event.is_kernel for event in events] == [False, True, False, True, True]
    assert [event.begin for event in events] == [0.0, 0.5, 2.5, 3.0, 4.0]
    assert [event.macs for event in events if event.is_kernel] == [2000, 0, 2000]
    assert [event.bytes for event in events if event.is_kernel] == [960, 800, 960]
    assert events[4].ops == ("linear at m.py:5",)


@pytest.mark.parametrize("calls", [(), CALLS[:1] + CALLS[2:] + CALLS[:2], (KernelCall("other"),)])
def test_code_that_differs_from_what_the_artifact_says_is_timed_without_work(calls: tuple[KernelCall, ...]) -> None:
    events = kernel_events(TIMES, calls, {"batch": 2})
    assert [event.is_kernel for event in events] == [False, True, True, True, True]
    assert all(event.macs == 0 and event.ops == () for event in events)


def test_nothing_timed_gives_no_events() -> None:
    assert kernel_events([], (), {}) == ()
    assert "kernel" not in str(Profile((1.0,), (), 1))
    assert Profile((1.0,), (), 1).outside_kernels is None


def test_what_a_call_spends_outside_kernels() -> None:
    events = kernel_events(TIMES, CALLS, {"batch": 2})
    measured = Profile((7.0, 5.0), events, 1)
    # Measuring costs what the fastest function takes, 0.25 seconds; the kernels take 2, 1 and 1 with it.
    assert measured.outside_kernels == pytest.approx(5 - (4 - 3 * 0.25))
    assert measured.to_dict()["outside_kernels"] == measured.outside_kernels
    assert "1750.000 ms of the best outside kernels" in str(measured)
    assert Profile((1.0,), events, 1).outside_kernels == 0


def test_a_timer_takes_the_innermost_functions_only() -> None:
    timer = KernelTimer()
    for name, is_before in [("body", True), ("a", True), ("a", False), ("b", True), ("b", False), ("body", False),
                            ("c", True), ("c", False)]:  # fmt: skip
        timer(None, name, is_before, None)
    times = timer.take()
    assert [time.name for time in times] == ["a", "b", "c"]
    assert all(time.begin <= time.end for time in times)
    assert timer.take() == []


def test_every_function_counts_with_its_least_time() -> None:
    fast = [FunctionTime("a", 1.0, 2.0), FunctionTime("b", 2.0, 5.0)]
    slow = [FunctionTime("a", 10.0, 19.0), FunctionTime("b", 19.0, 20.0)]
    other = [FunctionTime("c", 0.0, 30.0)]
    assert best_times([slow, fast, other]) == [FunctionTime("a", 1.0, 2.0), FunctionTime("b", 2.0, 3.0)]
    assert best_times([[], []]) == []


def test_kernels_are_summed_by_name_slowest_first() -> None:
    kernels = profile().kernels
    assert [(k.name, k.calls, k.seconds, k.flops, k.bytes) for k in kernels] == [
        ("linear", 2, 3.0, 8000, 1920), ("norm", 1, 1.0, 0, 800), (MACHINE_NAME, 2, 0.75, 0, 0),
    ]  # fmt: skip
    assert kernels[0].ops == ("linear at m.py:3", "linear at m.py:5")


@pytest.mark.parametrize(
    ("flops", "bytes", "factors", "expected"),
    [
        (80, 10, "f32", (0.8, "compute")),
        (20, 50, "f32", (0.5, "memory")),
        (20, 300, "f32", (0.2, "compute")),  # faster than memory: it cannot be what binds
        (0, 30, "", (0.3, "memory")),
        (0, 300, "", (3.0, "cache")),
        (80, 0, "f64", None),  # no peak is known
        (80, 20, "f64", (0.2, "memory")),
        (0, 0, "", None),
    ],
)
def test_the_roof_that_binds(flops: int, bytes: int, factors: str, expected: tuple[float, str] | None) -> None:
    kernel = KernelTime("k", 1, 1.0, flops, bytes, factors)
    assert kernel.of_peak(Roofs({"f32": 100.0, "bf16": 0.0}, 100.0)) == expected


def test_an_unknown_peak_gives_no_fraction() -> None:
    kernel = KernelTime("k", 1, 1.0, 10, 10, "bf16")
    assert kernel.of_peak(Roofs({"bf16": 0.0}, 0.0)) is None


def test_plain_data_and_text() -> None:
    measured = profile(Roofs({"f32": 8000.0}, 1600.0))
    data = json.loads(json.dumps(measured.to_dict()))
    linear, norm, machine = data["kernels"]
    assert (data["median"], data["best"], data["worst"], data["threads"]) == (2.0, 1.0, 3.0, 2)
    assert linear["of_compute"] == pytest.approx(1 / 3)
    assert linear["of_bandwidth"] == pytest.approx(0.4)
    assert (linear["bound"], norm["bound"], machine["bound"]) == ("memory", "memory", None)
    assert sum(kernel["share"] for kernel in data["kernels"]) == pytest.approx(1)
    text = str(measured)
    assert "3 calls, 2 thread(s): median 2000.000 ms" in text
    assert [line.split()[-1] for line in text.splitlines()[2:4]] == ["linear", "norm"]
    assert "40% memory" in text
    assert profile().to_dict()["peaks"] is None


def test_equal_ops_are_named_once() -> None:
    assert summary(["a", "b", "a"]) == "a (2 times), b"
    assert summary(["a", "b", "c", "d"]) == "a, b, and 2 more"
    assert summary([]) == ""


def test_the_trace_file(tmp_path: Path) -> None:
    measured = profile()
    measured.write_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    complete = [event for event in events if event["ph"] == "X"]
    assert [event["name"] for event in complete] == [time.name for time in TIMES]
    assert all({"ts", "dur", "pid", "tid", "cat", "args"} <= event.keys() for event in complete)
    first = next(event for event in complete if event["cat"] == "kernel")
    assert (first["ts"], first["dur"]) == (0.5e6, 2e6)
    assert first["args"] == {"ops": ["linear at m.py:3"], "flops": 4000, "bytes_read": 880, "bytes_written": 80}
    names = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names == {"trimtab", "session, 2 thread(s)"}
    with pytest.raises(UsageError, match="directory does not exist"):
        measured.write_trace(tmp_path / "absent" / "trace.json")
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


def test_events_know_their_rates() -> None:
    event = KernelEvent("k", 0.0, 1.0, macs=3, bytes_read=5, bytes_written=2)
    assert (event.flops, event.bytes) == (6, 7)
