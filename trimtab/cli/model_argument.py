"""The MODEL argument: a ``.onnx``, ``.pt2``, ``.ttir`` or ``.trim`` file, or ``file.py:function``."""

from __future__ import annotations

import importlib.util
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import ImportModelError, MissingDependencyError, UsageError
from trimtab.user_file import call_function, load_function, nearby, one_line

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
        raise UsageError("there is no such model file", values={"model": spec}, fix=nearby(path))
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
            values={"file": path, "torch": torch.__version__, "error": one_line(error)},
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

    returned = call_function(load_function(path, name), path, name)
    return trimtab.trace(*_trace_arguments(path, name, returned))


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
