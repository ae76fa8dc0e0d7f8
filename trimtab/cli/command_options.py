"""Options that several commands share, so that they read and behave the same everywhere."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from trimtab.errors import UsageError

JsonOption: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on standard output and nothing else.")
]
DebugOption: TypeAlias = Annotated[bool, typer.Option("--debug", help="Show the Python traceback of an error.")]
ThreadsOption: TypeAlias = Annotated[
    int | None, typer.Option("--threads", min=1, metavar="N", help="Threads to use; all usable cores by default.")
]
ModelArgument: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A .onnx, .pt2, .ttir or .trim file, or file.py:function (the function returns `module, args`).",
        show_default=False,
    ),
]


def split_assignments(option: str, given: Iterable[str], example: str) -> dict[str, str]:
    """``["a=1", "b=2"]`` as a dictionary.

    Raises:
        UsageError: an item has no name, no ``=`` or no value, or a name occurs twice.
    """
    found: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UsageError(
                f"cannot read {option}",
                values={"given": repr(text)},
                rule="it is a name, an equals sign and a value",
                fix=f"for example {option} {example}",
            )
        if name in found:
            raise UsageError(f"{option} names one thing twice", values={"name": name}, fix="give each name once")
        found[name] = value
    return found


def split_counts(option: str, given: Iterable[str], example: str) -> dict[str, int]:
    """Like :func:`split_assignments`, with whole numbers of at least 0 as values."""
    counts = {}
    for name, value in split_assignments(option, given, example).items():
        if not value.isdecimal():
            raise UsageError(
                f"cannot read {option}",
                values={"name": name, "value": repr(value)},
                rule="the value is a whole number",
                fix=f"for example {option} {example}",
            )
        counts[name] = int(value)
    return counts


def require_directory(path: Path, option: str) -> None:
    """Refuse, before any long work, a file to write whose directory is missing or that is a directory itself.

    Raises:
        UsageError: as above.
    """
    if path.is_dir():
        raise UsageError(f"{option} is a directory", values={"path": path}, fix="give the name of a file")
    if not path.absolute().parent.is_dir():
        raise UsageError(
            f"the directory of {option} does not exist",
            values={"path": path},
            fix=f"make it: mkdir -p {path.absolute().parent}",
        )
