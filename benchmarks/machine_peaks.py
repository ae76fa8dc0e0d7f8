"""What this machine's processor and memory can do at most, measured: operations a second and bytes a second.

    python benchmarks/machine_peaks.py [--threads 2] [--json FILE]

The loops are in machine_peaks.c, compiled by the system's C compiler for this processor: multiply-accumulates on
registers only, by every instruction that has them (f32 FMA; bf16 and int8 of AVX-512 and of AMX), and a streaming read
of a buffer four times the last-level cache. All threads run at once; the best of several runs counts.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

RATES = {
    "f32": {"FMA": "rate_f32"},
    "bf16": {"AVX-512": "rate_bf16_avx512", "AMX": "rate_bf16_amx"},
    "int8": {"AVX-512 VNNI": "rate_int8_avx512", "AMX": "rate_int8_amx"},
}
"""Functions of machine_peaks.c, by precision and instruction."""

REPEATS = 7
RUN_SECONDS = 0.05
LARGEST_BUFFER = 2 << 30


@dataclass(frozen=True)
class Peaks:
    """Measured limits of a machine.

    Attributes:
        threads: how many threads ran at once.
        rates: operations a second (a multiply and an add are two) by precision, then by instruction; instructions that
            the processor lacks are left out.
        read_rate: bytes a second that all threads together read from memory.
        buffer_bytes: size of the buffer that was read.
    """

    threads: int
    rates: dict[str, dict[str, float]]
    read_rate: float
    buffer_bytes: int

    def rate(self, precision: str) -> float | None:
        """Operations a second of the fastest instruction for ``precision``, None where there is none."""
        return max(self.rates.get(precision, {}).values(), default=None)


class NoCompilerError(Exception):
    """There is no C compiler, or it does not compile the loops."""


def measure_peaks(threads: int) -> Peaks:
    """Run the loops; takes about ten seconds.

    Raises:
        NoCompilerError: the message says why.
    """
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(threads) as pool:
        library = _compile(Path(folder))
        rates = {}
        for precision, functions in RATES.items():
            measured = {how: _operation_rate(getattr(library, name), pool, threads) for how, name in functions.items()}
            rates[precision] = {how: rate for how, rate in measured.items() if rate}
        read_rate, buffer_bytes = _read_rate(library.stream_read, pool, threads)
    return Peaks(threads, rates, read_rate, buffer_bytes)


def _compile(folder: Path) -> ctypes.CDLL:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise NoCompilerError("no C compiler (cc, gcc or clang) is on the PATH")
    source, library = Path(__file__).with_suffix(".c"), folder / "peaks.so"
    options = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
    done = subprocess.run([compiler, *options, str(source), "-o", str(library)], capture_output=True, text=True)
    if done.returncode:
        raise NoCompilerError(f"{compiler} does not compile {source.name}: {done.stderr.strip()[-500:]}")
    loops = ctypes.CDLL(str(library))
    for functions in RATES.values():
        for name in functions.values():
            getattr(loops, name).argtypes, getattr(loops, name).restype = [ctypes.c_long], ctypes.c_double
    loops.stream_read.argtypes, loops.stream_read.restype = [ctypes.c_void_p, ctypes.c_long], ctypes.c_double
    return loops


def _operation_rate(loop: Callable[[int], float], pool: ThreadPoolExecutor, threads: int) -> float:
    """Operations a second of ``loop`` on all threads, 0 where it does nothing."""
    rounds = 10_000
    while True:  # ctypes lets go of the interpreter's lock, so the calls overlap
        start = time.perf_counter()
        if not loop(rounds):
            return 0.0
        if time.perf_counter() - start > RUN_SECONDS / 2:
            break
        rounds *= 2
    return _best_rate(pool, [lambda: loop(rounds)] * threads)


def _read_rate(read: Callable[[int, int], float], pool: ThreadPoolExecutor, threads: int) -> tuple[float, int]:
    """Bytes a second of a streaming read by all threads, and the size of the buffer."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size = min(max(4 * last_level_cache_bytes(), 256 << 20), LARGEST_BUFFER, free // 2)
    share = size // 4 // threads
    buffer = np.ones(share * threads, np.float32)
    starts = [buffer.ctypes.data + 4 * share * index for index in range(threads)]
    return _best_rate(pool, [lambda start=start: read(start, share) for start in starts]), buffer.nbytes


def _best_rate(pool: ThreadPoolExecutor, work: Sequence[Callable[[], float]]) -> float:
    """What the work of all threads adds up to, over the time until the last of them is done; the best of several."""
    best = 0.0
    for _ in range(REPEATS):
        start = time.perf_counter()
        done = sum(future.result() for future in [pool.submit(part) for part in work])
        best = max(best, done / (time.perf_counter() - start))
    return best


def last_level_cache_bytes() -> int:
    """Size of the largest cache of the first core; 32 MiB where the system does not say."""
    sizes = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KM")) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1))
    return max(sizes)


def processor_name() -> str:
    """What the system calls the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def describe(peaks: Peaks) -> str:
    """One line for people."""
    rates = [
        f"{precision} {rate / 1e9:.0f} GOP/s ({how})"
        for precision, by_instruction in peaks.rates.items()
        for how, rate in by_instruction.items()
    ]
    return f"{', '.join(rates)}; memory {peaks.read_rate / 1e9:.1f} GB/s (read of {peaks.buffer_bytes / 1e9:.1f} GB)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args()
    try:
        peaks = measure_peaks(args.threads)
    except NoCompilerError as error:
        print(f"machine_peaks: {error}", file=sys.stderr)
        return 1
    print(f"{processor_name()}, {args.threads} threads: {describe(peaks)}")
    if args.json:
        Path(args.json).write_text(json.dumps(asdict(peaks), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
