"""Functions from the user's own Python files, such as ``model.py:build``; whatever they raise names the user's line.

A Python file is run: it is for files that the user trusts.
"""

from __future__ import annotations

import importlib.util
import linecache
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimtab.errors import ImportModelError, Location, TrimtabError, UsageError


def load_function(path: Path, name: str, *, role: str = "model", error: type[TrimtabError] = ImportModelError) -> Any:
    """The callable ``name`` of the file ``path``.

    Args:
        path: a Python file; it runs with its own directory on the path, as when Python runs it.
        name: a function of the file.
        role: what the file is to the user, for messages.
        error: what to raise when the file itself fails.

    Raises:
        UsageError: there is no such file or function.
    """
    if not path.is_file():
        raise UsageError(f"there is no such {role} file", values={"file": path}, fix=nearby(path))
    if not name.isidentifier():
        example = "build" if role == "model" else role
        raise UsageError("a function name is missing", values={"given": f"{path}:{name}"}, fix=f"{path}:{example}")
    module = _run_file(path, role, error)
    function = getattr(module, name, None)
    if not callable(function):
        own = module.__name__
        defined = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == own]
        raise UsageError(
            "the file has no such function",
            values={"file": path, "function": name},
            fix=f"it defines {', '.join(defined)}" if defined else "define it",
        )
    return function


def call_function(function: Callable[..., Any], path: Path, name: str) -> Any:
    """What the user's model ``function`` returns.

    Raises:
        ImportModelError: it raised; the message has the innermost line of the user's file.
    """
    try:
        return function()
    except TrimtabError:
        raise
    except (Exception, SystemExit) as error:
        raise _user_error(ImportModelError, "the model function failed", path, error, function=name) from error


def nearby(path: Path) -> str:
    """Advice for a file that is not there: others of its kind beside it."""
    if path.suffix.lower() == ".ttir" and path.is_dir():
        return "give the file, not its directory"
    if not path.parent.is_dir():
        return f"the directory {path.parent} does not exist either"
    same = sorted(other.name for other in path.parent.iterdir() if other.suffix == path.suffix)[:5]
    return f"there are: {', '.join(same)}" if same else f"there is no {path.suffix} file in {path.parent.absolute()}"


def one_line(error: BaseException) -> str:
    """Kind and first line of an exception's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _run_file(path: Path, role: str, kind: type[TrimtabError]) -> Any:
    """The user's file as a module, with its own directory first on the path."""
    name = f"trimtab_user_{role}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError("Python cannot load the file", values={"file": path})
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look modules up by name
    directory = os.fspath(path.absolute().parent)
    if directory not in sys.path:
        sys.path.insert(0, directory)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise kind(
            f"the {role} file is not valid Python",
            values={"error": error.msg},
            where=(error.text or "").strip(),
            location=Location(error.filename or os.fspath(path), error.lineno or 0),
        ) from error
    except TrimtabError:
        raise
    except (Exception, SystemExit) as error:
        raise _user_error(kind, f"the {role} file failed", path, error) from error
    return module


def _user_error(kind: type[TrimtabError], what: str, path: Path, error: BaseException, **values: Any) -> TrimtabError:
    """The user's own exception, with the innermost line of their file that it passed through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).absolute() == path.absolute()]
    location, source = None, ""
    if frames:
        last = frames[-1]
        location = Location(os.fspath(path), last.lineno or 0, "" if last.name == "<module>" else last.name)
        source = (last.line or linecache.getline(last.filename, last.lineno or 0)).strip()
    return kind(
        what,
        values={**values, "error": one_line(error)},
        fix="see the whole traceback with --debug",
        where=source,
        location=location,
    )
