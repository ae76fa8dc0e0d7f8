"""How many threads compiled code runs on.

TVM keeps one pool of worker threads for each thread that calls compiled code.  A pool cannot grow after its first use,
so it is created with one worker for every processor the process may run on, and each call takes as many as its session
wants; the others sleep.
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

from trimtab.cores import check_thread_count, usable_cores, usable_processors

# threading_backend.h, kSpecifyThreadShareAllCore: the one mode in which the number of workers can be given.
_SHARE_ALL_CORES = -3


def resolve_thread_count(threads: int | None, planned: int | None = None) -> int:
    """The number of threads a session uses.

    None means what the environment variable ``TVM_NUM_THREADS`` says; without it, what the artifact was compiled for,
    but not more than :func:`~trimtab.cores.usable_cores`; and without that, all of these.  A number given is lowered,
    with a warning, to the processors this process may run on.

    Args:
        threads: what the caller asked for.
        planned: what the artifact was compiled for; None if it does not say.

    Raises:
        UsageError: ``threads`` is not a positive integer.
    """
    check_thread_count(threads)
    if threads is None:
        from_environment = os.environ.get("TVM_NUM_THREADS", "")
        if not from_environment.isdecimal():
            return min(planned or usable_cores(), usable_cores())
        threads = max(1, int(from_environment))
    usable = len(usable_processors())
    if threads > usable:
        message = f"threads={threads} lowered to {usable}: this process may run on {usable} processor(s)"
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
        workers = [str(number) for number in range(max(threads, len(usable_processors())))]
        self._configure(_SHARE_ALL_CORES, threads, workers)
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
