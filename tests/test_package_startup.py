"""Starting is cheap: neither ``import trimtab`` nor the command line's help loads a heavy package."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

HEAVY = frozenset({"iree", "networkx", "onnx", "onnx_ir", "onnxruntime", "scipy", "sklearn", "torch", "torch_mlir",
                   "transformers", "tvm"})  # fmt: skip
SCRIPT = Path(sys.executable).parent / "trimtab"


def _imported_by(*arguments: str) -> set[str]:
    """Top-level packages that a fresh interpreter imports when started with ``arguments``; the time is printed."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, timeout=120)
    print(f"{' '.join(arguments)}: {time.perf_counter() - start:.2f} s with import tracing")
    assert done.returncode == 0, done.stderr
    lines = (line for line in done.stderr.splitlines() if line.startswith("import time:") and line.count("|") == 2)
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}


def test_importing_the_package_imports_nothing_heavy() -> None:
    imported = _imported_by("-c", "import trimtab")
    assert "trimtab" in imported
    assert not imported & HEAVY


@pytest.mark.parametrize("arguments", [("--help",), ("compile", "--help")], ids=" ".join)
def test_help_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    imported = _imported_by(str(SCRIPT), *arguments)
    assert "trimtab" in imported
    assert not imported & HEAVY


def test_the_trace_sees_a_heavy_import() -> None:
    assert "networkx" in _imported_by("-c", "import networkx")
