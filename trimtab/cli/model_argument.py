"""The MODEL argument: a ``.onnx``, ``.pt2``, ``.ttir`` or ``.trim`` file, or ``file.py:function``."""

from __future__ import annotations

import importlib.util
import linecache
import os
import sys
import traceback
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import ImportModelError, Location, MissingDependencyError, TrimtabError, UsageError

if TYPE_CHECKING:
    from trimtab.ir import Module

_FORMS = "a .onnx, .pt2, .ttir or .trim file, or file.py:function, where the function returns `module, args`"
_RETURNS = "`module, args`, `module, args, kwargs` or `module, args, kwargs, dynamic_shapes`"


def load_model(spec: str) -> Module:
    """Import the model that a MODEL argument names.

    Python files run as code: give only files you trust.

    Raises:
        UsageError: there is no such file or function, the form is unknown, or the function returned something else.
        ImportModelError: the model cannot be imported, or the user's function failed; names the line that raised.
        MissingDependencyError: torch or another package for this form is not installed.
    """
    file, colon, function = spec.rpartition(":")
    if colon and file.endswith(".py"):
        require_torch()
        return _from_function(Path(file), function)
    path = Path(spec)
    loader = _LOADERS.get(path.suffix.lower())
    if loader is None:
        raise UsageError("cannot tell what kind of model this is", values={"model": spec},
                         rule=f"MODEL is {_FORMS}", fix=_advice(path))  # fmt: skip
    if not path.is_file():
        raise UsageError("there is no such model file", values={"model": spec}, fix=_nearby(path))
    require_torch()
    return loader(path)


def model_name(spec: str) -> str:
    """A short name for the model of a MODEL argument: the file's, or the function's."""
    path, colon, function = spec.rpartition(":")
    return function if colon and path.endswith(".py") else Path(spec).stem


def require_torch(what: str = "importing a model needs torch") -> None:
    """Raise :class:`MissingDependencyError`, which says ``what``, where torch is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise MissingDependencyError(
            what,
            values={"package": "torch"},
            rule="only running compiled models works without it",
            fix='pip install "trimtab[tvm]"',
        )


def _advice(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix == ".py":
        return f"name the function too: {path}:build"
    if suffix in (".pt", ".pth", ".bin", ".safetensors", ".ckpt"):
        return "such a file holds weights without the model: write a function that builds the module and loads them"
    return "write a function that returns the module and example arguments"


def _nearby(path: Path) -> str:
    if path.suffix.lower() == ".ttir" and path.is_dir():
        return "give the file, not its directory"
    if not path.parent.is_dir():
        return f"the directory {path.parent} does not exist either"
    same = sorted(other.name for other in path.parent.iterdir() if other.suffix == path.suffix)[:5]
    return f"there are: {', '.join(same)}" if same else f"there is no {path.suffix} file in {path.parent.absolute()}"


def _from_onnx(path: Path) -> Module:
    import trimtab

    return trimtab.from_onnx(path)


def _from_ttir(path: Path) -> Module:
    import trimtab

    return trimtab.read(path)


def _from_artifact(path: Path) -> Module:
    from trimtab.cli.artifact_module import module_from_artifact

    return module_from_artifact(path)


def _from_exported_program(path: Path) -> Module:
    import torch

    from trimtab.frontend.torch_export import import_program

    if not zipfile.is_zipfile(path):
        raise ImportModelError(
            "the file is not an exported program",
            values={"file": path},
            rule="a .pt2 file is the zip archive that torch.export.save writes",
            fix="write it again with torch.export.save(torch.export.export(model, args), path)",
        )
    try:
        program = torch.export.load(path)
    except Exception as error:  # torch raises many kinds for a damaged or foreign file
        raise ImportModelError(
            "torch cannot load the exported program",
            values={"file": path, "torch": torch.__version__, "error": _one_line(error)},
            rule="a program is loaded by the version of torch that saved it, or a newer one",
            fix="export it again with this version of torch, or give file.py:function",
        ) from error
    return import_program(program)


_LOADERS: Mapping[str, Callable[[Path], Any]] = {
    ".onnx": _from_onnx,
    ".ttir": _from_ttir,
    ".trim": _from_artifact,
    ".pt2": _from_exported_program,
}


def _from_function(path: Path, name: str) -> Module:
    import trimtab

    returned = _call_function(path, name)
    return trimtab.trace(*_trace_arguments(path, name, returned))


def _call_function(path: Path, name: str) -> Any:
    if not path.is_file():
        raise UsageError("there is no such model file", values={"file": path}, fix=_nearby(path))
    if not name.isidentifier():
        raise UsageError("a function name is missing", values={"given": f"{path}:{name}"}, fix=f"{path}:build")
    module = _run_file(path)
    function = getattr(module, name, None)
    if not callable(function):
        own = module.__name__
        defined = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == own]
        raise UsageError(
            "the file has no such function",
            values={"file": path, "function": name},
            fix=f"it defines {', '.join(defined)}" if defined else f"define it: def {name}(): return module, args",
        )
    try:
        return function()
    except TrimtabError:
        raise
    except (Exception, SystemExit) as error:
        raise _user_error("the model function failed", path, error, function=name) from error


def _run_file(path: Path) -> Any:
    """The user's file as a module, with its own directory first on the path, as when Python runs it."""
    name = f"trimtab_user_model_{path.stem}"
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
        raise ImportModelError(
            "the model file is not valid Python",
            values={"error": error.msg},
            where=(error.text or "").strip(),
            location=Location(error.filename or os.fspath(path), error.lineno or 0),
        ) from error
    except TrimtabError:
        raise
    except (Exception, SystemExit) as error:
        raise _user_error("the model file failed", path, error) from error
    return module


def _trace_arguments(path: Path, name: str, returned: Any) -> tuple[Any, ...]:
    import torch

    parts = returned if isinstance(returned, tuple) else (returned,)
    if not 2 <= len(parts) <= 4:
        raise UsageError(
            "the model function returned something else than a model with its arguments",
            values={"function": f"{path}:{name}", "returned": _kind(returned)},
            rule=f"it returns {_RETURNS}",
            fix="end it with: return module, (example_input,)",
        )
    module, args, *rest = parts
    if not isinstance(module, torch.nn.Module):
        raise UsageError(
            "the first thing the model function returned is not a torch.nn.Module",
            values={"function": f"{path}:{name}", "returned": _kind(returned)},
            rule=f"it returns {_RETURNS}",
        )
    args = tuple(args) if isinstance(args, list | tuple) else (args,)
    if rest and rest[0] is not None and not isinstance(rest[0], Mapping):
        raise UsageError(
            "the keyword arguments that the model function returned are not a dict",
            values={"function": f"{path}:{name}", "kwargs": _kind(rest[0])},
            rule=f"it returns {_RETURNS}",
        )
    return module, args, *rest


def _kind(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_kind, value))})"
    return type(value).__name__


def _user_error(what: str, path: Path, error: BaseException, **values: Any) -> ImportModelError:
    """The user's own exception, with the innermost line of their file that it passed through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).absolute() == path.absolute()]
    location, source = None, ""
    if frames:
        last = frames[-1]
        location = Location(os.fspath(path), last.lineno or 0, "" if last.name == "<module>" else last.name)
        source = (last.line or linecache.getline(last.filename, last.lineno or 0)).strip()
    return ImportModelError(
        what,
        values={**values, "error": _one_line(error)},
        fix="see the whole traceback with --debug",
        where=source,
        location=location,
    )


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
