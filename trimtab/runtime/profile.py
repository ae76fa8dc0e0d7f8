"""Times of a session's calls and of the kernels inside one call."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

# The virtual machine's own functions (allocation, shape arithmetic) are counted together.
_MACHINE_PREFIX = "vm.builtin."
MACHINE_NAME = "(virtual machine)"


@dataclass(frozen=True)
class KernelTime:
    """One kernel: how often one call of the model ran it, and for how many seconds in all."""

    name: str
    calls: int
    seconds: float


@dataclass(frozen=True)
class Profile:
    """What :meth:`Session.profile` measured.

    Args:
        calls: seconds of each whole call, conversions of inputs and outputs included, in order.
        kernels: kernels of one call, slowest first; each kernel's time includes a few microseconds of measuring.  Empty
            when the code does not call its kernels through the virtual machine.
        threads: threads the calls used.
    """

    calls: tuple[float, ...]
    kernels: tuple[KernelTime, ...]
    threads: int

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

    def to_dict(self) -> dict[str, Any]:
        """Plain data, times in seconds."""
        return {
            "threads": self.threads,
            "repeat": len(self.calls),
            "median": self.median,
            "best": self.best,
            "worst": self.worst,
            "kernels": [{"name": k.name, "calls": k.calls, "seconds": k.seconds} for k in self.kernels],
        }

    def __str__(self) -> str:
        head = f"{len(self.calls)} calls, {self.threads} thread(s)"
        text = f"{head}: median {_ms(self.median)}, best {_ms(self.best)}, worst {_ms(self.worst)}"
        rows = [f"  {_ms(k.seconds):>12}  {k.calls:>4} x  {k.name}" for k in self.kernels]
        return "\n".join([text, *rows])


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"


class KernelTimer:
    """An instrument of the virtual machine that adds up the time of every kernel by name."""

    def __init__(self) -> None:
        self._totals: dict[str, tuple[int, float]] = {}
        self._begun: list[float] = []

    def __call__(self, function: Any, name: str, is_before: bool, result: Any, *arguments: Any) -> int:
        now = time.perf_counter()
        if is_before:
            self._begun.append(time.perf_counter())
            return 0
        key = MACHINE_NAME if name.startswith(_MACHINE_PREFIX) else name
        calls, seconds = self._totals.get(key, (0, 0.0))
        self._totals[key] = calls + 1, seconds + now - self._begun.pop()
        return 0

    def clear(self) -> None:
        """Forget what was measured so far."""
        self._totals.clear()
        self._begun.clear()

    def kernels(self) -> tuple[KernelTime, ...]:
        """What was measured, slowest first."""
        times = [KernelTime(name, calls, seconds) for name, (calls, seconds) in self._totals.items()]
        return tuple(sorted(times, key=lambda kernel: -kernel.seconds))
