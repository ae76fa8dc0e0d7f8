"""Trimtab: a compiler for transformer inference.

The public names are loaded on first use, so that ``import trimtab`` costs nothing and a machine that only runs
artifacts needs no compiler packages.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    from trimtab.artifact import Artifact
    from trimtab.backends.torch import to_torch, update
    from trimtab.compiler import compile
    from trimtab.debug.bisect import bisect
    from trimtab.debug.reduce import reduce_module as reduce
    from trimtab.frontend.onnx import from_onnx
    from trimtab.frontend.torch_export.trace import trace
    from trimtab.ir import Module, interpret
    from trimtab.ir.storage import read_module as read
    from trimtab.ir.storage import write_module as write
    from trimtab.passes.optimize import optimize
    from trimtab.runtime import Session, load

__version__ = "0.1.0.dev0"

_HOMES = {
    "Artifact": ("trimtab.artifact", "Artifact"),
    "Module": ("trimtab.ir", "Module"),
    "Session": ("trimtab.runtime", "Session"),
    "bisect": ("trimtab.debug.bisect", "bisect"),
    "compile": ("trimtab.compiler", "compile"),
    "from_onnx": ("trimtab.frontend.onnx", "from_onnx"),
    "interpret": ("trimtab.ir", "interpret"),
    "load": ("trimtab.runtime", "load"),
    "optimize": ("trimtab.passes.optimize", "optimize"),
    "read": ("trimtab.ir.storage", "read_module"),
    "reduce": ("trimtab.debug.reduce", "reduce_module"),
    "to_torch": ("trimtab.backends.torch", "to_torch"),
    "trace": ("trimtab.frontend.torch_export", "trace"),
    "update": ("trimtab.backends.torch", "update"),
    "write": ("trimtab.ir.storage", "write_module"),
}

__all__ = [
    "Artifact", "Module", "Session", "TrimtabError", "__version__", "bisect", "compile", "from_onnx", "interpret",
    "load", "optimize", "read", "reduce", "to_torch", "trace", "update", "write",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trimtab' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
