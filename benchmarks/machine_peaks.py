"""What this machine's processor and memory can do at most, measured: operations a second and bytes a second.

    python benchmarks/machine_peaks.py [--threads 2] [--json FILE]

The loops are those of trimtab/backends/tvm/peaks.py: multiply-accumulates on registers only, by every instruction that
has them, and a streaming read of a large buffer. All threads run at once; the best of several short runs counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path

from trimtab import TrimtabError
from trimtab.backends.tvm.peaks import Peaks, measure_peaks
from trimtab.cores import usable_cores


def describe(peaks: Peaks) -> str:
    """One line for people."""
    rates = [
        f"{kind} {rate / 1e9:.0f} GOP/s ({instruction})"
        for kind, by_instruction in peaks.rates.items()
        for instruction, rate in by_instruction.items()
    ]
    return f"{', '.join(rates)}; memory {peaks.read_bandwidth / 1e9:.1f} GB/s"


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args()
    try:
        peaks = measure_peaks(args.threads)
    except TrimtabError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{processor_name()}, {args.threads} threads: {describe(peaks)}")
    if args.json:
        Path(args.json).write_text(json.dumps(asdict(peaks), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
