"""How many threads compiled code runs on.

TVM keeps one pool of worker threads for each thread that calls compiled code.  A pool cannot grow after its first use,
so it is created with one worker for every core the process may use, and each call takes as many as its session wants.
Workers are not bound to cores: binding would also bind the caller's own thread, for good.  A forked child inherits
pools whose workers do not exist in it; there, compiled code runs in a thread of its own, which gets a new pool.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from trimtab.errors import UsageError

# threading_backend.h, kSpecifyThreadShareAllCore: the one mode in which the number of workers can be given.
_SHARE_ALL_CORES = -3


def usable_cores() -> int:
    """How many cores this process may use: its affinity mask where there is one, else all of the machine's."""
    try:
        return max(1, len(os.sched_getaffinity(0)))
    except (AttributeError, OSError):
        return os.cpu_count() or 1


def resolve_thread_count(threads: int | None) -> int:
    """The number of threads a session uses, at most :func:`usable_cores`.

    None means what the environment variable ``TVM_NUM_THREADS`` says and, without it, all of them.  Warns when it
    lowers the number.

    Raises:
        UsageError: ``threads`` is not a positive integer.
    """
    usable = usable_cores()
    if threads is None:
        from_environment = os.environ.get("TVM_NUM_THREADS", "")
        if not from_environment.isdecimal():
            return usable
        threads = max(1, int(from_environment))
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise UsageError(
            "bad number of threads",
            values={"threads": repr(threads)},
            rule="it must be an integer of at least 1",
            fix="leave it out to use every core this process may use",
        )
    if threads > usable:
        message = f"threads={threads} lowered to {usable}: this process may use {usable} core(s)"
        warnings.warn(message, RuntimeWarning, stacklevel=4)
    return min(threads, usable)


class WorkerPools:
    """TVM's worker pools: runs compiled code on a given number of threads.

    Args:
        get_function: looks up a global function of the loaded TVM runtime by name.
    """

    def __init__(self, get_function: Callable[[str], Any]) -> None:
        # Read by TVM when a pool is created; the user's own value wins.
        os.environ.setdefault("TVM_BIND_THREADS", "0")
        self._configure = get_function("runtime.config_threadpool")
        self._count = get_function("runtime.NumThreads")
        self._local = threading.local()
        self._executor: ThreadPoolExecutor | None = None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._replace_pools)

    def run(self, threads: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call ``function`` with ``threads`` threads at its disposal, the caller's own included."""
        if self._executor is not None:
            return self._executor.submit(self._run_here, threads, function, *arguments).result()
        return self._run_here(threads, function, *arguments)

    def _run_here(self, threads: int, function: Callable[..., Any], *arguments: Any) -> Any:
        if getattr(self._local, "threads", None) != threads:
            self._use(threads)
        return function(*arguments)

    def _use(self, threads: int) -> None:
        cores = [str(core) for core in range(max(threads, usable_cores()))]
        self._configure(_SHARE_ALL_CORES, threads, cores)
        self._local.threads = threads
        if self._count() < threads:
            warnings.warn(
                f"compiled code runs on {self._count()} thread(s) instead of {threads}: other code used TVM in this "
                f"thread before. Set TVM_NUM_THREADS={threads} before it does.",
                RuntimeWarning,
                stacklevel=5,
            )

    def _replace_pools(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="trimtab")
        self._local = threading.local()
