"""Runs an artifact on images as a device would: a process of its own with numpy and the runtime, without torch.

    python -m trimtab.cli.demo_runner model.trim images.npy logits.npy THREADS

Prints one JSON object: seconds, and which of torch and tvm this process has loaded (none).
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np

from trimtab.runtime import load

_BATCH = 64


def main(artifact: str, images_path: str, logits_path: str, threads: str) -> None:
    """Run all images, in batches with a smaller last one, and write the logits."""
    start = time.perf_counter()
    images = np.load(images_path, allow_pickle=False)
    with load(artifact, int(threads), prefer_carried=True) as session:
        loaded = time.perf_counter()
        logits = np.concatenate([session(images[at : at + _BATCH]) for at in range(0, len(images), _BATCH)])
    done = time.perf_counter()
    np.save(logits_path, logits)
    compiler = sorted({"torch", "tvm", "onnx"} & set(sys.modules))
    if compiler:
        raise SystemExit(f"this process was to run without the compiler, but has loaded {', '.join(compiler)}")
    print(json.dumps({"load_seconds": loaded - start, "run_seconds": done - loaded, "compiler_packages": compiler}))


if __name__ == "__main__":
    main(*sys.argv[1:])
