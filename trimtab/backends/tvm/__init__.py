"""The TVM backend: IR to Relax and TIR to a shared library. Importing this package does not import tvm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.backends.tvm.availability import status
    from trimtab.backends.tvm.compiler import build
    from trimtab.backends.tvm.layouts import Layout
    from trimtab.backends.tvm.support import check_supported, unsupported_ops
    from trimtab.backends.tvm.targets import find_target, target_names

_PLACES = {
    "Layout": "layouts",
    "build": "compiler",
    "check_supported": "support",
    "find_target": "targets",
    "status": "availability",
    "target_names": "targets",
    "unsupported_ops": "support",
}

__all__ = ["Layout", "build", "check_supported", "find_target",
           "status", "target_names", "unsupported_ops"]  # fmt: skip


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
