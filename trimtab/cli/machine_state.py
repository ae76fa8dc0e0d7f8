"""The facts ``trimtab doctor`` reports: Python, packages, processor, backends and targets, and a trial compilation."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from trimtab.cli.error_report import missing_dependency
from trimtab.errors import TrimtabError

PACKAGES: Mapping[str, tuple[str, str]] = {
    "numpy": ("running artifacts", "pip install trimtab"),
    "apache-tvm-ffi": ("running artifacts", "pip install trimtab"),
    "torch": ("importing models, passes", 'pip install "trimtab[tvm]"'),
    "networkx": ("analyses of the IR", 'pip install "trimtab[tvm]"'),
    "apache-tvm": ("the tvm backend", 'pip install "trimtab[tvm]"'),
    "torch-mlir": ("the mlir backend", 'pip install "trimtab[mlir]"'),
    "iree-base-compiler": ("the mlir backend", 'pip install "trimtab[mlir]"'),
    "iree-base-runtime": ("running artifacts of the mlir backend", "pip install iree-base-runtime"),
    "onnx": ("importing ONNX models", 'pip install "trimtab[onnx]"'),
    "onnx-ir": ("importing ONNX models", 'pip install "trimtab[onnx]"'),
    "scikit-learn": ("trimtab demo", "pip install scikit-learn"),
    "onnxruntime": ("comparisons in trimtab demo", "pip install onnxruntime onnxscript"),
}
"""Packages that Trimtab can use: what for, and how to get them."""


def python_facts() -> dict[str, str]:
    return {"version": platform.python_version(), "executable": sys.executable, "platform": platform.platform()}


def package_facts() -> list[dict[str, Any]]:
    """Version of every package of :data:`PACKAGES`, None where it is not installed."""
    return [
        {"package": name, "version": _version(name), "used_for": used_for, "install": install}
        for name, (used_for, install) in PACKAGES.items()
    ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor_facts() -> dict[str, Any]:
    """Model, architecture, instruction-set level, features and cores of this machine."""
    import os

    from trimtab.cores import usable_cores
    from trimtab.cpu_features import host_architecture, host_features, host_level, host_system, product_features

    features = host_features()
    return {
        "model": _processor_name(),
        "architecture": host_architecture(),
        "system": host_system(),
        "level": host_level(),
        "features": sorted(features) if features is not None else None,
        "products": product_features(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
    }


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def linker_fact() -> str | None:
    """The C compiler that would link generated code."""
    return next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


def backend_facts() -> list[dict[str, Any]]:
    """Every backend with whether it works here, its targets, and for what does not work why and what to install."""
    from dataclasses import asdict

    from trimtab.compiler import BACKENDS, find_backend

    facts = []
    for name in BACKENDS:
        try:
            import_module("trimtab.ir")  # what every backend compiles
            status = asdict(find_backend(name).status())
        except ImportError as error:  # on a machine that only runs artifacts
            cause = missing_dependency(error)
            status = {"works": False, "targets": (), "reason": cause.values["reason"], "fix": cause.fix, "versions": {}}
        facts.append({**status, "name": name})
    return facts


def trial_compilation(backend: str) -> dict[str, Any]:
    """Compile a tiny model with a backend and run it here. The cause of a failure is an error as plain data."""
    import trimtab
    from trimtab.ir import Builder, DType, TensorType, ops

    start = time.perf_counter()
    try:
        import torch

        builder = Builder()
        x = builder.input("x", TensorType(DType.F32, (2, 3)))
        weight = builder.weight("weight", torch.linspace(-1, 1, 12).reshape(4, 3))
        builder.output(builder.add(ops.Relu(builder.add(ops.Linear(x, weight)).result)).result)
        with tempfile.TemporaryDirectory(prefix="trimtab-doctor-") as directory:
            path = Path(directory) / "trial.trim"
            trimtab.compile(builder.module, target="native", backend=backend, name="doctor's trial").save(path)
    except TrimtabError as error:
        return {
            "works": False,
            "seconds": time.perf_counter() - start,
            "error": error.to_dict(),
            "message": error.message,
        }
    return {"works": True, "seconds": time.perf_counter() - start, "error": None, "message": ""}
