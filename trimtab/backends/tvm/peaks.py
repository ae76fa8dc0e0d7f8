"""What this machine can do at most: multiply-accumulates per second by kind of data, and bytes read from memory.

Measured, not looked up, because clock rates depend on the load and virtual machines hide what they share.  The loops
(:mod:`trimtab.backends.tvm.peak_probes`) are compiled once per processor and kept in the user's cache folder; measuring
takes one to two seconds each time, and no tvm when the cached library is there.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import os
import platform
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np

from trimtab.atomic_file import write_atomically
from trimtab.backends.tvm.availability import require_tvm
from trimtab.backends.tvm.peak_probes import KINDS, READ_BLOCK, Instruction, loop_text, read_text, usable_instructions
from trimtab.backends.tvm.targets import find_target
from trimtab.cpu_features import host_features
from trimtab.errors import BackendError, UsageError

_Loop: TypeAlias = Callable[[int, int], None]
"""A probe: takes an address and a number of iterations."""

_BURST = 1e-3
"""Seconds of one measurement: shorter than what a busy system lets a thread run at a time."""

_WINDOW = 8e-3
"""Seconds that count: the best of all such times in which every thread was at work."""
_SECONDS = 0.15
"""Seconds for which every thread repeats a measurement."""

# More than the last-level cache a process is likely to get for itself, without asking for much memory.
_READ_BYTES, _PIECE_BYTES = 512 << 20, 32 << 20
# tvm::CallingConv::kCPackedFunc: the function has its final form.
_AS_WRITTEN = 1


@dataclass(frozen=True)
class Peaks:
    """The most that ``threads`` threads of this machine can do at the same time.

    Attributes:
        threads: how many threads computed.
        rates: for each kind of multiplicands, for each instruction, operations per second: two per multiply-accumulate.
        read_bandwidth: bytes per second read from memory.
    """

    threads: int
    rates: Mapping[str, Mapping[str, float]]
    read_bandwidth: float

    @property
    def f32_flops(self) -> float:
        """Operations per second on f32; 0 where there is no instruction with a probe, as for the other kinds."""
        return self.of("f32")

    @property
    def bf16_flops(self) -> float:
        """Operations per second with products of bf16 and sums in f32."""
        return self.of("bf16")

    @property
    def int8_ops(self) -> float:
        """Operations per second with products of 8-bit integers and sums in i32."""
        return self.of("int8")

    def of(self, kind: str) -> float:
        """Operations per second of the fastest instruction for a kind of multiplicands."""
        return max(self.rates.get(kind, {}).values(), default=0.0)


def measure_peaks(threads: int) -> Peaks:
    """Measure this machine with ``threads`` threads in its best moment: without what else the machine does.

    Raises:
        UsageError: ``threads`` is less than one.
        BackendError: there are no probes for this machine, or they cannot be compiled.
        MissingDependencyError: they have to be compiled, and tvm or a C compiler is missing.
    """
    if threads < 1:
        raise UsageError("bad number of threads", values={"threads": threads}, rule="it must be at least 1")
    instructions = usable_instructions(host_features() or ())
    library = _probe_library(instructions)
    rates: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
    for instruction in instructions:
        speed = _iterations_per_second(_function(library, instruction.name), threads)
        rates[instruction.kind][instruction.name] = 2 * instruction.macs_per_iteration * speed
    return Peaks(threads, rates, _read_bandwidth(_function(library, "read"), threads))


def _iterations_per_second(loop: _Loop, threads: int) -> float:
    """Iterations per second of all threads together."""
    count = 1000
    while (once := min(_seconds(loop, 0, count) for _ in range(3))) < _BURST / 4:
        count *= 4
    count = max(1, int(count * _BURST / once))
    return count * _bursts_per_second([functools.partial(loop, 0, count)] * threads)


def _read_bandwidth(read: _Loop, threads: int) -> float:
    """Likewise for bytes: every thread walks through its part of a large buffer, a piece in each burst."""
    blocks = _PIECE_BYTES // READ_BLOCK
    pieces = max(2, _READ_BYTES // _PIECE_BYTES // threads)
    memory = np.ones(threads * pieces * _PIECE_BYTES // 8 + 8, np.int64)  # written, so that it has pages
    start = -(-memory.ctypes.data // 64) * 64

    def walk(part: int) -> Callable[[], None]:
        places = itertools.cycle(start + (part * pieces + piece) * _PIECE_BYTES for piece in range(pieces))
        return lambda: read(next(places), blocks)

    return _PIECE_BYTES * _bursts_per_second([walk(part) for part in range(threads)])


def _bursts_per_second(jobs: Sequence[Callable[[], object]]) -> float:
    """How often all jobs together are done in a second, each being repeated in a thread of its own.

    Foreign code runs without Python's lock, so that the threads do run at the same time.
    """
    barrier = threading.Barrier(len(jobs))
    unfinished = set(range(len(jobs)))

    def work(number: int) -> list[float]:
        jobs[number]()
        barrier.wait()
        times = [time.perf_counter()]
        while unfinished:  # until the last one is, so that some time is common to all
            jobs[number]()
            times.append(time.perf_counter())
            if times[-1] >= times[0] + _SECONDS:
                unfinished.discard(number)
        return times

    with ThreadPoolExecutor(len(jobs)) as pool:
        return best_rate(list(pool.map(work, range(len(jobs)))), _WINDOW)


def best_rate(ends: Sequence[Sequence[float]], window: float) -> float:
    """Most bursts per second that all threads did together during some ``window``.

    Not the sum of each thread's best: what threads share, like memory, one has for itself while another waits.

    Args:
        ends: for each thread the time of its start and of the end of each burst, in seconds, ascending.
        window: seconds; shortened to the time in which all threads were at work.
    """
    first, last = max(times[0] for times in ends), min(times[-1] for times in ends)
    window = min(window, last - first)
    begins = np.array([first, *(time for times in ends for time in times if first < time <= last - window)])

    def done(at: Any) -> Any:
        return sum(np.interp(at, times, np.arange(len(times))) for times in ends)

    return float((done(begins + window) - done(begins)).max() / window)


def _seconds(function: Callable[..., object], *arguments: int) -> float:
    begin = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - begin


def _symbol(probe: str) -> str:
    return "probe_" + probe.replace(" ", "_")


def _function(library: ctypes.CDLL, probe: str) -> _Loop:
    function = getattr(library, _symbol(probe))
    function.argtypes, function.restype = [ctypes.c_int64, ctypes.c_int64], None
    return cast(_Loop, function)


def _probe_library(instructions: Sequence[Instruction]) -> ctypes.CDLL:
    """The compiled probes, from the cache where they are there."""
    if platform.system() != "Linux" or not instructions:
        raise BackendError(
            "the peak of this machine cannot be measured",
            values={"machine": platform.machine(), "system": platform.system()},
            rule="there are probes for Linux on x86-64 with AVX2, and on 64-bit Arm",
        )
    texts = {_symbol(each.name): loop_text(each) for each in instructions}
    features = sorted({feature for each in instructions for feature in each.features})
    texts[_symbol("read")] = read_text(64 if "avx512f" in features else 32)
    digest = hashlib.sha256(repr((platform.machine(), features, texts)).encode()).hexdigest()
    path = cache_folder() / f"peaks-{digest[:16]}.so"
    if not path.is_file():
        library = compile_probes(texts, features)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, library)
    return ctypes.CDLL(str(path))


def cache_folder() -> Path:
    """Where Trimtab keeps what it can make again: ``$XDG_CACHE_HOME/trimtab``, by default ``~/.cache/trimtab``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab"


def compile_probes(texts: Mapping[str, str], features: Sequence[str]) -> bytes:
    """A shared library with the functions of :func:`carriers`; it needs no other library."""
    require_tvm()
    import tvm
    from tvm import ir

    from trimtab.backends.tvm.compiler import find_compiler, link

    spec = find_target("native")
    # The loops are inlined into their carriers, which therefore must have all features.
    target = {**spec.tvm_target(), "mattr": [f"+{feature}" for feature in features]}
    try:
        executable = tvm.compile(ir.IRModule(carriers(texts)), target=tvm.target.Target(target))
    except Exception as error:
        raise BackendError(
            "the probes of this machine's peak cannot be compiled",
            values={"cpu": spec.cpu, "error": (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]},
            fix="this is a bug of Trimtab or TVM: report it with the processor's name",
        ) from error
    return link(executable, find_compiler(spec))


def carriers(texts: Mapping[str, str]) -> dict[str, Any]:
    """For each name a C function ``void name(i64, i64)`` in TIR that calls the ``loop`` of an LLVM module."""
    from tvm import ir, tirx

    functions = {}
    for name, text in texts.items():
        inner = f"{name}_loop"
        arguments = [tirx.Var("address", "int64"), tirx.Var("iterations", "int64")]
        call = tirx.Evaluate(tirx.call_extern("void", inner, *arguments))
        imported = ir.StringImm(text.replace("@loop(", f"@{inner}("))
        body = tirx.AttrStmt(tirx.const(0, "int32"), "pragma_import_llvm", imported, call)
        # A calling convention that is given is kept: TVM's own would need its runtime.
        attributes = {"global_symbol": name, "calling_conv": _AS_WRITTEN, "tirx.noalias": True}
        functions[name] = tirx.PrimFunc(arguments, body).with_attr(attributes)
    return functions
