"""Run compiled models: artifacts, sessions, profiles.  Needs numpy and ``apache-tvm-ffi``, nothing of the compiler.

Names are imported when first used, so that importing this package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.runtime.container import ArtifactReader, ArtifactWriter
    from trimtab.runtime.manifest import CodeVariant, Manifest, SymbolRange, TensorSpec, Tolerance, WeightEntry
    from trimtab.runtime.profile import Profile, Roofs
    from trimtab.runtime.session import Session, load
    from trimtab.runtime.signature import Outputs, Signature

_HOMES = {
    "ArtifactReader": "container",
    "ArtifactWriter": "container",
    "CodeVariant": "manifest",
    "Manifest": "manifest",
    "SymbolRange": "manifest",
    "TensorSpec": "manifest",
    "Tolerance": "manifest",
    "WeightEntry": "manifest",
    "Profile": "profile",
    "Roofs": "profile",
    "Session": "session",
    "load": "session",
    "Outputs": "signature",
    "Signature": "signature",
}

__all__ = [
    "ArtifactReader",
    "ArtifactWriter",
    "CodeVariant",
    "Manifest",
    "Outputs",
    "Profile",
    "Roofs",
    "Session",
    "Signature",
    "SymbolRange",
    "TensorSpec",
    "Tolerance",
    "WeightEntry",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
