"""Options that several commands share, so that they read and behave the same everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from trimtab.errors import UsageError

JsonOption: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on standard output and nothing else.")
]
DebugOption: TypeAlias = Annotated[bool, typer.Option("--debug", help="Show the Python traceback of an error.")]
ThreadsOption: TypeAlias = Annotated[
    int | None,
    typer.Option("--threads", min=1, metavar="N", help="Threads to use; the cores this process may use by default."),
]
ArtifactArgument: TypeAlias = Annotated[
    Path, typer.Argument(metavar="FILE.trim", help="A compiled model.", show_default=False)
]
InputOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--input", "-i", metavar="FILE", help="An .npz file with one array per input, or name=file.npy (repeatable)."
    ),
]
RandomOption: TypeAlias = Annotated[
    int | None, typer.Option("--random", metavar="SEED", help="Run on random inputs instead, made with this seed.")
]
SizeOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--size", metavar="NAME=N", help="With random inputs: a dynamic size, such as batch=8 (repeatable)."),
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


def check_input_options(
    command: str, input: Sequence[str] | None, random: int | None, size: Sequence[str] | None
) -> None:
    """Refuse a command line that does not say what to run on, or says it twice.

    Raises:
        UsageError: neither or both of ``--input`` and ``--random`` are given, or ``--size`` without the latter.
    """
    if (random is None) == (not input):
        raise UsageError(
            f"{command} needs inputs" if not input else "--input and --random exclude each other",
            fix="give --input x.npz, or --random 0",
        )
    if size and random is None:
        raise UsageError("--size belongs to --random", fix="the sizes of --input are those of its arrays")


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
