"""Where the time of a session's calls goes: whole calls, the kernels inside one, and what the machine could do."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from trimtab.atomic_file import write_atomically
from trimtab.runtime.dimension import evaluate
from trimtab.runtime.manifest import KernelCall

MACHINE_NAME = "(virtual machine)"
"""The virtual machine's own functions (allocation, shape arithmetic), counted together."""

_MACHINE_PREFIX = "vm.builtin."


@dataclass(frozen=True)
class Roofs:
    """The most that a machine can do: the roofs of the roofline model (Williams et al., CACM 52, 2009).

    Args:
        flops: operations per second, two per multiply-accumulate, by the dtype of the factors.
        bandwidth: bytes per second from memory.
    """

    flops: Mapping[str, float]
    bandwidth: float


@dataclass(frozen=True)
class KernelEvent:
    """One kernel call inside one call of the model.

    Args:
        name: the kernel, or a function of the virtual machine.
        begin: seconds since the call of the model began.
        seconds: how long it took, a few microseconds of measuring included.
        is_kernel: False for a function of the virtual machine.
        ops: the ops it computes, with their source lines; empty where the artifact does not tell.
        macs: multiply-accumulates.
        factors: dtype of the numbers that are multiplied.
        bytes_read, bytes_written: bytes of operands and of results.
    """

    name: str
    begin: float
    seconds: float
    is_kernel: bool = True
    ops: tuple[str, ...] = ()
    macs: int = 0
    factors: str = ""
    bytes_read: int = 0
    bytes_written: int = 0

    @property
    def flops(self) -> int:
        return 2 * self.macs

    @property
    def bytes(self) -> int:
        return self.bytes_read + self.bytes_written


@dataclass(frozen=True)
class KernelTime:
    """All calls of one kernel inside one call of the model.

    Args:
        name: the kernel.
        calls: how often it ran.
        seconds: for how long in all.
        flops: operations in all, two per multiply-accumulate.
        bytes: bytes of operands and results in all.
        factors: dtype of the numbers that are multiplied.
        ops: the ops that the calls compute, with their source lines.
    """

    name: str
    calls: int
    seconds: float
    flops: int = 0
    bytes: int = 0
    factors: str = ""
    ops: tuple[str, ...] = ()

    def of_compute(self, roofs: Roofs) -> float | None:
        """The fraction of the machine's operations per second; None where that peak is unknown."""
        peak = roofs.flops.get(self.factors, 0.0)
        return self.flops / self.seconds / peak if self.flops and peak and self.seconds else None

    def of_bandwidth(self, roofs: Roofs) -> float | None:
        """The fraction of the memory's bandwidth, over 1 when data came from a cache."""
        return self.bytes / self.seconds / roofs.bandwidth if self.bytes and roofs.bandwidth and self.seconds else None

    def of_peak(self, roofs: Roofs) -> tuple[float, str] | None:
        """The fraction of the roof that binds this kernel, and that roof: ``compute``, ``memory`` or ``cache``.

        The roof that binds is the one under which the kernel would take longer.  Memory does not bind a kernel that is
        faster than memory: its data came from a cache, and the fraction, of the memory's bandwidth, is over 1.
        """
        compute, memory = self.of_compute(roofs), self.of_bandwidth(roofs)
        if compute is not None and (memory is None or compute >= memory or memory > 1):
            return compute, "compute"
        return (memory, "cache" if memory > 1 else "memory") if memory is not None else None


@dataclass(frozen=True)
class Profile:
    """What :meth:`Session.profile` measured.

    Args:
        calls: seconds of each whole call, conversions of inputs and outputs included, in order.
        events: the functions of a call in order, each with the least time it took in as many calls with a timer around
            every function.  Empty when the code does not call its kernels through the virtual machine.
        threads: threads the calls used.
        roofs: what the machine can do at most with as many threads; None if not measured.
    """

    calls: tuple[float, ...]
    events: tuple[KernelEvent, ...]
    threads: int
    roofs: Roofs | None = field(default=None)

    @property
    def median(self) -> float:
        """Median seconds per call."""
        return statistics.median(self.calls)

    @property
    def best(self) -> float:
        """Fewest seconds of a call."""
        return min(self.calls)

    @property
    def worst(self) -> float:
        """Most seconds of a call."""
        return max(self.calls)

    @property
    def outside_kernels(self) -> float | None:
        """Seconds of the best call not spent in kernels: checks and conversions of arrays, allocation, dispatch.

        From the time of each kernel is taken what measuring costs: the least time of any function, as some functions of
        the virtual machine do next to nothing.  0 where the kernels' least times add up to more than the best call;
        None without ``events``.
        """
        if not self.events:
            return None
        cost = min(event.seconds for event in self.events)
        return max(0.0, self.best - sum(event.seconds - cost for event in self.events if event.is_kernel))

    @property
    def kernels(self) -> tuple[KernelTime, ...]:
        """The kernels of ``events`` by name, slowest first, and the virtual machine as if it were one."""
        grouped: dict[str, list[KernelEvent]] = {}
        for event in self.events:
            grouped.setdefault(event.name if event.is_kernel else MACHINE_NAME, []).append(event)
        times = [
            KernelTime(
                name,
                len(events),
                sum(event.seconds for event in events),
                sum(event.flops for event in events),
                sum(event.bytes for event in events),
                next((event.factors for event in events if event.factors), ""),
                tuple(op for event in events for op in event.ops),
            )
            for name, events in grouped.items()
        ]
        return tuple(sorted(times, key=lambda kernel: -kernel.seconds))

    def to_dict(self) -> dict[str, Any]:
        """Plain data: times in seconds, rates per second, fractions of a peak as numbers from 0 to 1."""
        total = sum(kernel.seconds for kernel in self.kernels) or 1.0
        return {
            "threads": self.threads,
            "repeat": len(self.calls),
            "median": self.median,
            "best": self.best,
            "worst": self.worst,
            "outside_kernels": self.outside_kernels,
            "peaks": None
            if self.roofs is None
            else {"flops": dict(self.roofs.flops), "bandwidth": self.roofs.bandwidth},
            "kernels": [_kernel_row(kernel, total, self.roofs) for kernel in self.kernels],
        }

    def __str__(self) -> str:
        head = f"{len(self.calls)} calls, {self.threads} thread(s)"
        text = f"{head}: median {_ms(self.median)}, best {_ms(self.best)}, worst {_ms(self.worst)}"
        if self.outside_kernels is not None:
            text += f"; {_ms(self.outside_kernels)} of the best outside kernels"
        rows = [[" time", "share", "calls", "GFLOP/s", "GB/s", "of peak", "kernel"]]
        rows += [[row[key] for key in _COLUMNS] for row in self.rows()] if self.events else []
        widths = [max(len(row[column]) for row in rows) for column in range(6)]
        lines = ["  ".join([*(cell.rjust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]
        return "\n".join([text, *(lines if self.events else ())])

    def rows(self) -> list[dict[str, str]]:
        """The table of kernels as text: ``time``, ``share``, ``calls``, ``gflops``, ``gbytes``, ``peak``, ``kernel``
        and ``ops``."""
        total = sum(kernel.seconds for kernel in self.kernels) or 1.0
        rows = []
        for kernel in self.kernels:
            peak = kernel.of_peak(self.roofs) if self.roofs is not None else None
            rows.append({
                "time": _ms(kernel.seconds),
                "share": f"{kernel.seconds / total:.1%}",
                "calls": str(kernel.calls),
                "gflops": f"{kernel.flops / kernel.seconds / 1e9:.1f}" if kernel.flops else "",
                "gbytes": f"{kernel.bytes / kernel.seconds / 1e9:.1f}" if kernel.bytes else "",
                "peak": "" if peak is None else "in cache" if peak[1] == "cache" else f"{peak[0]:.0%} {peak[1]}",
                "kernel": kernel.name,
                "ops": summary(kernel.ops),
            })  # fmt: skip
        return rows

    def trace(self) -> dict[str, Any]:
        """The ``events`` as data of the Trace Event Format, which chrome://tracing and Perfetto show.

        Every function is a complete event (``ph`` is ``X``) with its begin and its duration in microseconds.
        """
        shared = {"pid": 1, "tid": 1}
        named = [
            {"ph": "M", "name": "process_name", **shared, "args": {"name": "trimtab"}},
            {"ph": "M", "name": "thread_name", **shared, "args": {"name": f"session, {self.threads} thread(s)"}},
        ]
        return {
            "traceEvents": [*named, *(_trace_event(event, shared) for event in self.events)],
            "displayTimeUnit": "ms",
        }

    def write_trace(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`trace` as a JSON file, which appears whole or not at all.

        Raises:
            UsageError: the directory does not exist.
            ArtifactError: the disk is full or the directory cannot be written.
        """
        write_atomically(path, json.dumps(self.trace(), indent=1) + "\n")


_COLUMNS = ("time", "share", "calls", "gflops", "gbytes", "peak", "kernel")


def summary(ops: Sequence[str], shown: int = 2) -> str:
    """The first few different ops, each with how often it occurs, and how many different ones there are beside them."""
    counts = Counter(ops)
    texts = [op if count == 1 else f"{op} ({count} times)" for op, count in counts.items()]
    more = len(texts) - shown
    return ", ".join(texts[:shown]) + (f", and {more} more" if more > 0 else "")


def _kernel_row(kernel: KernelTime, total: float, roofs: Roofs | None) -> dict[str, Any]:
    peak = kernel.of_peak(roofs) if roofs is not None else None
    return {
        "name": kernel.name,
        "calls": kernel.calls,
        "seconds": kernel.seconds,
        "share": kernel.seconds / total,
        "flops": kernel.flops,
        "bytes": kernel.bytes,
        "flops_per_second": kernel.flops / kernel.seconds,
        "bytes_per_second": kernel.bytes / kernel.seconds,
        "of_compute": kernel.of_compute(roofs) if roofs is not None else None,
        "of_bandwidth": kernel.of_bandwidth(roofs) if roofs is not None else None,
        "bound": peak[1] if peak is not None else None,
        "ops": list(kernel.ops),
    }


def _trace_event(event: KernelEvent, shared: Mapping[str, int]) -> dict[str, Any]:
    arguments = {
        "ops": list(event.ops),
        "flops": event.flops,
        "bytes_read": event.bytes_read,
        "bytes_written": event.bytes_written,
    }
    return {
        "ph": "X",
        "name": event.name,
        "cat": "kernel" if event.is_kernel else "virtual machine",
        **shared,
        "ts": event.begin * 1e6,
        "dur": event.seconds * 1e6,
        "args": arguments if event.is_kernel else {},
    }


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"


class FunctionTime(NamedTuple):
    """A function of the virtual machine that ran, with its begin and end in seconds of :func:`time.perf_counter`."""

    name: str
    begin: float
    end: float


class KernelTimer:
    """An instrument of the virtual machine that times every function that it calls and that calls no other one."""

    def __init__(self) -> None:
        self._times: list[FunctionTime] = []
        self._open: list[tuple[float, int]] = []

    def __call__(self, function: Any, name: str, is_before: bool, result: Any, *arguments: Any) -> int:
        now = time.perf_counter()
        if is_before:
            self._open.append((time.perf_counter(), len(self._times)))
            return 0
        begin, finished_before = self._open.pop()
        if finished_before == len(self._times):
            self._times.append(FunctionTime(name, begin, now))
        return 0

    def take(self) -> list[FunctionTime]:
        """What was measured since the last time, in order."""
        taken, self._times, self._open = self._times, [], []
        return taken


def best_times(runs: Sequence[Sequence[FunctionTime]]) -> list[FunctionTime]:
    """The fastest of several equal runs, with every function cut to the least time that it took in one of them."""
    fastest = min(runs, key=lambda times: times[-1].end - times[0].begin if times else 0.0)
    alike = [times for times in runs if [time.name for time in times] == [time.name for time in fastest]]
    spans = (min(time.end - time.begin for time in column) for column in zip(*alike, strict=True))
    return [time._replace(end=time.begin + span) for time, span in zip(fastest, spans, strict=True)]


def kernel_events(
    times: Sequence[FunctionTime], calls: Sequence[KernelCall], sizes: Mapping[str, int]
) -> tuple[KernelEvent, ...]:
    """The functions that ran, with what the artifact says about its kernel calls.

    Args:
        times: what a timer saw, in order.
        calls: the kernel calls of the artifact, in order; empty if it does not tell: then every function that is not of
            the virtual machine is a kernel.
        sizes: what the symbols of the signature were.
    """
    expected = iter(calls)
    following = next(expected, None)
    events = []
    for name, begin, end in times:
        place = (name, begin - times[0].begin, end - begin)
        if following is not None and name == following.name:
            macs = evaluate(following.macs, sizes)
            moved = (evaluate(following.bytes_read, sizes), evaluate(following.bytes_written, sizes))
            events.append(KernelEvent(*place, True, following.ops, macs, following.factors, *moved))
            following = next(expected, None)
        else:
            events.append(KernelEvent(*place, is_kernel=not calls and not name.startswith(_MACHINE_PREFIX)))
    # Code that does something else than the artifact says is still timed.
    return tuple(events) if following is None else kernel_events(times, (), sizes)
