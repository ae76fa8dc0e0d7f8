"""Puts whole ops together again from the pieces that exporters leave."""

from __future__ import annotations

from trimtab.ir.core import Module


def raise_module(module: Module) -> None:
    """Apply every rewrite to ``module`` in place."""
