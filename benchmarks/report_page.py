"""How long a report page takes to record, to write and to open in a browser, for graphs of growing size.

    python benchmarks/report_page.py [--blocks 12 48 96] [--pipeline cleanup,fuse] [--repeat 5] [--json FILE]

``record`` and ``write`` are processor time on top of that of the pipeline.  ``open`` is the time from asking a headless
Chromium for the file until the graph is on the screen; ``pass`` the median time from choosing another pass until both
of its graphs are, and ``unfold`` until every op of them is laid out.  The models are those of
``benchmarks/pass_pipeline.py``, about 61 ops a block; everything is drawn without an accelerator.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from browser import open_browser
from pass_pipeline import build_transformer
from trimtab.passes.optimize import optimize
from trimtab.report import ReportRecorder, write_page

_DRAWN = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"


def measure(browser: Any, blocks: int, pipeline: str, repeat: int, folder: Path) -> dict[str, float]:
    """The row of one model; times in seconds."""
    module = build_transformer(blocks)
    recorder = ReportRecorder(f"{blocks} blocks")
    started = time.process_time()
    optimize(module, pipeline, check="never")
    plain = time.process_time() - started
    started = time.process_time()
    optimize(module, pipeline, observers=[recorder], check="never")
    recorded = time.process_time() - started
    path = folder / f"{blocks}.html"
    started = time.process_time()
    write_page(path, recorder)
    written = time.process_time() - started
    opened, switched, unfolded = [], [], []
    for _ in range(repeat):
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        started = time.perf_counter()
        page.goto(path.as_uri())
        page.evaluate(_DRAWN)
        opened.append(time.perf_counter() - started)
        for index in range(1, page.locator(".step").count()):
            if page.evaluate(f"report.list.entries[{index}].row.changed"):
                started = time.perf_counter()
                page.evaluate(f"report.show(report.list.entries[{index}])")
                page.evaluate(_DRAWN)
                switched.append(time.perf_counter() - started)
        started = time.perf_counter()
        page.click("#fold")
        page.evaluate(_DRAWN)
        unfolded.append(time.perf_counter() - started)
        page.close()
    return {
        "blocks": blocks,
        "ops": sum(1 for _ in module.walk()),
        "megabytes": path.stat().st_size / 1e6,
        "record": recorded - plain,
        "write": written,
        "open": statistics.median(opened),
        "slowest_open": max(opened),
        "pass": statistics.median(switched),
        "slowest_pass": max(switched),
        "unfold": statistics.median(unfolded),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[12, 48, 96])
    parser.add_argument("--pipeline", default="cleanup,fuse")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    optimize(build_transformer(1), arguments.pipeline)  # imports and caches
    print(f"{'blocks':>6} {'ops':>6} {'MB':>5} {'record':>8} {'write':>7} {'open':>7} {'pass':>7} {'unfold':>7}")
    with open_browser() as browser, tempfile.TemporaryDirectory() as folder:
        for blocks in arguments.blocks:
            row = measure(browser, blocks, arguments.pipeline, arguments.repeat, Path(folder))
            rows.append(row)
            print(
                f"{row['blocks']:6} {row['ops']:6} {row['megabytes']:5.2f} {row['record']:6.2f} s "
                f"{row['write']:5.2f} s {row['open']:5.2f} s {row['pass']:5.2f} s {row['unfold']:5.2f} s"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
