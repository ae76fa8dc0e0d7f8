"""One system in a process of its own, which compiles a model and then runs as many calls as it is told.

A worker is asked and answers in lines of JSON.  What libraries print goes to the worker's log.  Started by
cpu_peers.py; see there why every system has a process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from cpu_peers_job import Job, write_job
from cpu_peers_systems import SYSTEMS, Call, System
from measuring import as_arrays, largest_error, relative_distance, time_calls

LONGEST_REASON = 400


class WorkerError(Exception):
    """A system does not work; the message says why."""


class Worker:
    """The parent's end.

    Args:
        job: the model.
        label: the system, or None for the process that fills the job's folder.

    Attributes:
        report: what the worker says about the preparation: ``compile_seconds``, ``peak_bytes``,
            ``error``, ``distance`` and ``note``.

    Raises:
        WorkerError: the system failed, died, or took longer than ``limit`` seconds.
    """

    def __init__(self, job: Job, label: str | None, limit: float) -> None:
        arguments = ["--folder", str(job.folder), "--model", job.model, "--threads", str(job.threads)]
        arguments += ["--target", job.target, *(["--system", label] if label else [])]
        environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads), "MKL_NUM_THREADS": str(job.threads)}
        self._log = job.folder / f"{label or 'job'}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__, *arguments],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
            )  # fmt: skip
        self.report = self._answer(limit)

    def block(self, runs: int) -> list[float]:
        """Milliseconds of each of ``runs`` calls."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"runs": runs}) + "\n")
        self._process.stdin.flush()
        times: list[float] = self._answer(limit=600)["times"]
        return times

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _answer(self, limit: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self._process.kill()

        timer = threading.Timer(limit, expire)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        if not line:
            self.close()
            raise WorkerError(f"no result within {limit:.0f} s" if expired.is_set() else self._cause_of_death())
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            self.close()
            raise WorkerError(answer["failed"])
        return answer

    def _cause_of_death(self) -> str:
        code = self._process.returncode
        name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        last = self._log.read_text(errors="replace").strip().splitlines()[-1:]
        return f"the process ended with {name}; {''.join(last)}"[:LONGEST_REASON]


def peak_memory_bytes() -> int:
    """The most memory that this process, or one that it started, has had resident."""
    peak = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    try:  # of this program alone: ru_maxrss also remembers the process that started it
        status = Path("/proc/self/status").read_text()
        own = 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        own = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(peak, own)


def prepare(job: Job, system: System) -> tuple[Call, dict[str, Any]]:
    """The model of ``job`` ready to be called in this process, and what `Worker.report` says about it."""
    model = system.load(job)
    start = time.perf_counter()
    call = system.compile(model, job)
    seconds, peak = time.perf_counter() - start, peak_memory_bytes()
    found = as_arrays(call())
    error, distance = largest_error(found, job.expected), relative_distance(found, job.expected)
    report = {"compile_seconds": seconds, "peak_bytes": peak, "error": error, "distance": distance}
    return call, {**report, "note": system.note}


def find_system(label: str) -> System:
    """The contender of one of the benchmarks with that label."""
    from quantization_systems import SYSTEMS as QUANTIZED

    return next(system for system in (*SYSTEMS, *QUANTIZED) if system.label == label)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--system", help="label of the system; without it the folder is filled")
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    job = Job(args.folder, args.model, args.threads, args.target)
    try:
        if args.system is None:
            write_job(job)
            answer({})
            return 0
        call, report = prepare(job, find_system(args.system))
    except Exception as failure:  # whatever a system raises is the reason that its row is missing
        answer({"failed": f"{type(failure).__name__}: {' '.join(str(failure).split())}"[:LONGEST_REASON]})
        return 1
    answer(report)
    for line in sys.stdin:
        answer({"times": time_calls(call, json.loads(line)["runs"])})
    return 0


if __name__ == "__main__":
    sys.exit(main())
