"""The table of ONNX operators that are imported: which function handles which operator from which version on."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from trimtab.frontend.onnx.ops import FAMILIES

if TYPE_CHECKING:
    from trimtab.frontend.onnx.node import Node
    from trimtab.ir.core import Value

Handler: TypeAlias = "Callable[[Node], Value | tuple[Value | None, ...]]"

_HANDLERS: dict[tuple[str, str], list[tuple[int, Handler]]] = {}
CONTRIB = "com.microsoft"


def onnx_op(*names: str, since: int, domain: str = "") -> Callable[[Handler], Handler]:
    """Register a handler for operators ``names``, whose semantics it follows from opset version ``since`` on.

    The handler takes a :class:`~trimtab.frontend.onnx.node.Node` and returns a value per output of the node.
    """

    def register(handler: Handler) -> Handler:
        for name in names:
            _HANDLERS.setdefault((domain, name), []).append((since, handler))
            _HANDLERS[(domain, name)].sort(key=lambda entry: -entry[0])
        return handler

    return register


def find_handler(domain: str, name: str, version: int) -> Handler | None:
    """The handler for an operator as defined in opset ``version``; None when there is none for that version."""
    _load()
    for since, handler in _HANDLERS.get((domain, name), ()):
        if version >= since:
            return handler
    return None


def oldest_version(domain: str, name: str) -> int | None:
    """The oldest opset version of an operator that is handled; None when the operator is unknown."""
    _load()
    versions = [since for since, _ in _HANDLERS.get((domain, name), ())]
    return min(versions) if versions else None


def registered() -> list[tuple[str, str, int]]:
    """All handled operators: domain, name, oldest version; sorted."""
    _load()
    return sorted((domain, name, min(since for since, _ in entries)) for (domain, name), entries in _HANDLERS.items())


def _load() -> None:
    for family in FAMILIES:
        importlib.import_module(f"trimtab.frontend.onnx.ops.{family}")  # which registers its handlers


def normalized_domain(domain: Any) -> str:
    """The default domain has two spellings."""
    return "" if domain in ("", "ai.onnx", None) else str(domain)
