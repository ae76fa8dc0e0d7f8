"""How the command line reports errors: to people on standard error, or as JSON; and which exit code they give."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import Any

import typer

from trimtab import __version__
from trimtab.cli.output import print_json
from trimtab.errors import InternalError, MissingDependencyError, TrimtabError, UsageError

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells use it: 128 + SIGINT."""
BROKEN_PIPE = 141
"""Exit code when the reader of the output has gone away, as shells use it: 128 + SIGPIPE."""

_EXTRAS = {"torch": "tvm", "networkx": "tvm", "tvm": "tvm", "onnx": "onnx", "onnx_ir": "onnx"}
"""Packages that parts of Trimtab import when they run, and the extra that brings each."""

# The base of what typer raises for wrong options and arguments. It has no public name of its own.
CommandLineError: Any = typer.BadParameter.__base__


def report(error: BaseException, arguments: Sequence[str]) -> int:
    """Print an error and return the exit code.

    Args:
        error: anything a command raised.
        arguments: the command line; with ``--json`` the error is a JSON document on standard output, with ``--debug``
            the traceback is printed before it.
    """
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return _print(_interrupted(), arguments, INTERRUPTED)
    if isinstance(error, BrokenPipeError):
        # Python flushes standard output once more at exit; there is nobody to read it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    if isinstance(error, SystemExit):  # a library's doing
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if "--debug" in arguments:
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, TrimtabError):
        known = error
    elif isinstance(error, CommandLineError):
        known = _command_line_error(error)
    elif isinstance(error, ImportError) and missing_package(error) in _EXTRAS:
        known = missing_dependency(error)
    elif isinstance(error, MemoryError):
        known = TrimtabError("there is not enough memory", fix="close other programs, or use a machine with more")
    else:
        known = _internal_error(error, arguments)
    return _print(known, arguments, known.exit_code)


def missing_package(error: ImportError) -> str:
    """The package that could not be imported, "" if Python does not say which."""
    return (error.name or "").split(".")[0]


def missing_dependency(error: ImportError) -> MissingDependencyError:
    """An import that failed inside Trimtab, with the command that installs the package."""
    package = missing_package(error)
    return MissingDependencyError(
        "a package that this needs is not installed",
        values={"package": package, "reason": str(error)},
        rule="only running and inspecting artifacts works without it",
        fix=f'pip install "trimtab[{_EXTRAS.get(package, "tvm")}]"',
    )


def _print(error: TrimtabError, arguments: Sequence[str], exit_code: int) -> int:
    if "--json" in arguments:
        print_json({"error": {**error.to_dict(), "exit_code": exit_code}})
    else:
        from rich.text import Text

        from trimtab.cli.output import console

        console(stderr=True).print(Text.assemble(("error: ", "bold red"), error.message), soft_wrap=True)
    return exit_code


def _interrupted() -> TrimtabError:
    return TrimtabError("interrupted", rule="files are written in one step at the end, so none is half-written")


def _command_line_error(error: Any) -> UsageError:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "trimtab"
    what = str(error.format_message()).strip() or "a command is missing"
    return UsageError(what[0].lower() + what[1:], fix=f"see {command} --help")


def _internal_error(error: BaseException, arguments: Sequence[str]) -> InternalError:
    """A bug of ours: everything needed to report it goes into a file."""
    text = "\n".join(
        [
            f"command: trimtab {' '.join(arguments)}",
            f"trimtab {__version__}, Python {platform.python_version()}, {platform.platform()}",
            "",
            "".join(traceback.format_exception(error)),
        ]
    )
    try:
        descriptor, path = tempfile.mkstemp(prefix="trimtab-error-", suffix=".txt")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        path = "none could be written; use --debug"
    return InternalError(
        "this is a bug in Trimtab",
        values={"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", "report": path},
        fix="please report it with that file",
    )
