"""``trimtab demo``: train a small vision transformer, compile it, and compare what comes out with PyTorch."""

from __future__ import annotations

import typer


def demo_command() -> None:
    """placeholder"""
    raise typer.Exit(2)
