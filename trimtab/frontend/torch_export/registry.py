"""The table of converters: which function turns a call of a torch operator into ops of ours.

A converter takes the :class:`~trimtab.frontend.torch_export.importer.Call` and the operator's arguments by their
schema names, with tensors as values and sizes as dimensions, and returns the value (or tuple of values) of the call.
It raises :class:`Refusal` for a form of the operator that it does not cover.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Converter = Callable[..., Any]

_converters: dict[str, Converter] = {}


class Refusal(Exception):
    """A converter does not cover this form of its operator; the text is the rule for the error message."""


def converts(*targets: str) -> Callable[[Converter], Converter]:
    """Register a converter for operators named as torch prints them, e.g. ``aten.linear.default``."""

    def register(function: Converter) -> Converter:
        for target in targets:
            _converters[target] = function
        return function

    return register


def find_converter(target: str) -> Converter | None:
    """The converter for an operator, or None. The table is filled when the package's converter modules load."""
    return _converters.get(target)
