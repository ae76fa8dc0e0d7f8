"""How long starting takes: a bare interpreter, ``import trimtab`` and ``trimtab --help``, each in fresh processes.

    python benchmarks/startup.py [--repeat 11] [--json FILE]

The three commands take turns, so that a busy moment of the machine hits all of them. Goals: ``import trimtab`` under
0.2 s beyond the bare interpreter, ``trimtab --help`` under 0.5 s in all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import trimtab": [sys.executable, "-c", "import trimtab"],
    "trimtab --help": [str(Path(sys.executable).parent / "trimtab"), "--help"],
}


def measure(repeat: int) -> dict[str, float]:
    """Median wall time of each command in seconds, after one run that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(repeat + 1):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeat", type=int, default=11, help="counted runs of each command")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the medians to FILE")
    options = parser.parse_args()
    medians = measure(options.repeat)
    bare = medians["python -c pass"]
    print(f"median of {options.repeat} runs\n{'command':<18}{'seconds':>9}{'beyond bare python':>20}")
    for name, median in medians.items():
        print(f"{name:<18}{median:>9.3f}{median - bare:>20.3f}")
    if options.json:
        options.json.write_text(json.dumps(medians, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
