"""Passes: rewrites of modules, one file each, and the machinery that runs and checks them.

This package is what authors of passes import; it does not import torch until a pass runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.contracts import Close, Contract, Drift, Exact, Lossy
from trimtab.passes.report import OptimizeReport, PassRow

if TYPE_CHECKING:
    from trimtab.passes.manager import PassManager
    from trimtab.passes.observers import Dump, Observer, Step
    from trimtab.passes.optimize import OptimizeResult
    from trimtab.passes.pipeline import Group, Pipeline, parse_pipeline
    from trimtab.passes.registry import load_pass, pass_names
    from trimtab.passes.rewrite_pass import RewritePass

_LATE = {
    "PassManager": "manager", "Dump": "observers", "Observer": "observers", "Step": "observers",
    "OptimizeResult": "optimize", "Group": "pipeline", "Pipeline": "pipeline", "parse_pipeline": "pipeline",
    "RewritePass": "rewrite_pass", "load_pass": "registry", "pass_names": "registry",
}  # fmt: skip

__all__ = [
    "Changed", "Close", "Context", "Contract", "Drift", "Dump", "Exact", "Group", "Lossy", "Observer", "OptimizeReport",
    "OptimizeResult", "Pass", "PassManager", "PassRow", "Pipeline", "RewritePass", "Step", "load_pass",
    "parse_pipeline", "pass_names",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATE[name]}"), name)
