"""The rooms of the package import only what they may: every import statement of every file is checked.

Statements inside functions count too: a room that imports another one late still depends on it.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "trimtab"
LEAVES = frozenset({"errors", "tensor_file", "atomic_file", "cores", "cpu_features", "user_file"})
"""Modules that every room may import and that import no room."""


@dataclass(frozen=True)
class Room:
    """What a folder of the package may import, besides the standard library, the leaves and itself."""

    rooms: frozenset[str] = frozenset()
    packages: frozenset[str] = frozenset()


def _room(rooms: str = "", packages: str = "") -> Room:
    return Room(frozenset(rooms.split()), frozenset(packages.split()))


ROOMS = {
    "ir": _room("", "networkx numpy torch"),
    "frontend": _room("ir", "networkx numpy onnx onnx_ir torch"),
    "passes": _room("ir", "networkx numpy torch"),
    "debug": _room("ir passes", "numpy torch"),
    "report": _room("ir passes", "numpy"),
    "backends": _room("ir", "numpy torch"),
    "backends/torch": _room("ir backends", "numpy torch"),
    "backends/onnx": _room("ir backends", "numpy onnx onnx_ir torch"),
    "backends/tvm": _room("ir backends", "numpy torch tvm tvm_ffi"),
    "backends/mlir": _room("ir backends", "iree numpy torch torch_mlir"),
    "tuning": _room("backends runtime", "cloudpickle numpy psutil tvm tvm_ffi xgboost"),
    "runtime": _room("", "iree ml_dtypes numpy tvm_ffi"),
}
"""Every room but cli, which may import all of Trimtab like the modules at the top of the package (the facade)."""

LATE_ONLY = {"runtime": frozenset({"iree", "ml_dtypes", "tvm_ffi"}), "": frozenset({"numpy"})}
"""Packages that a room (or the facade, "") may import inside functions only."""

FACADE_PACKAGES = frozenset({"PIL", "click", "numpy", "onnxruntime", "openvino", "rich", "sklearn", "torch", "typer"})

TORCH_FILES = frozenset({"cli/demo_model"})
"""Files outside the rooms of torch that define torch modules, and are imported inside functions only."""


def _room_of(parts: tuple[str, ...]) -> str:
    """The room of a module given by its path below the package: "" for the facade, a leaf's name for a leaf."""
    if not parts or (len(parts) == 1 and parts[0] not in ROOMS and parts[0] != "cli"):
        return parts[0] if parts and parts[0] in LEAVES else ""
    nested = "/".join(parts[:2])
    return nested if nested in ROOMS else parts[0]


def _imports(tree: ast.AST, package: Path) -> list[tuple[str, int, bool]]:
    """Imported modules, their lines and whether the statement runs when the file is imported."""
    found: list[tuple[str, int, bool]] = []

    def visit(node: ast.AST, at_import: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, node.lineno, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = ("." * node.level) + (node.module or "")
            for alias in node.names:
                # `from trimtab import errors` imports a module, `from trimtab import trace` a name of the facade.
                path = package.parent.joinpath(*module.split("."), alias.name)
                is_module = path.with_suffix(".py").exists() or path.is_dir()
                found.append((f"{module}.{alias.name}" if is_module else module, node.lineno, at_import))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            first = node.args[0] if node.args else None
            if name in ("import_module", "__import__") and isinstance(first, ast.Constant):
                found.append((str(first.value), node.lineno, at_import))
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            visit(child, at_import and not inside and not typing_only)

    visit(tree, True)
    return found


def _complaint(room: str, imported: str, at_import: bool, file: str = "") -> str:
    """Why ``room``, or its ``file``, may not import the module ``imported``; empty when it may."""
    top, *below = imported.split(".")
    if imported.startswith("."):
        return "write the full name: relative imports hide the room"
    if top == "trimtab":
        target = _room_of(tuple(below))
        if target in LEAVES or room in ("", "cli") or target == room:
            return ""
        if room in LEAVES:
            return "the leaf modules import no room and no facade"
        if target == "":
            return "rooms do not import the facade: it imports them"
        allowed = ROOMS[room].rooms
        if target in allowed or target.split("/")[0] in allowed:
            return ""
        return f"{room} may import {', '.join(sorted(allowed)) or 'no other room'}"
    if top in sys.stdlib_module_names:
        return ""
    if room in LEAVES:
        packages = frozenset({"numpy"})
    elif room in ("", "cli"):
        packages = FACADE_PACKAGES
    else:
        packages = ROOMS[room].packages
    if top not in packages:
        return f"of the installed packages it may import {', '.join(sorted(packages))}"
    heavy = frozenset({"PIL", "onnxruntime", "openvino", "sklearn", "torch"}) if room in ("", "cli") else frozenset()
    heavy -= {"torch"} if file in TORCH_FILES else frozenset()
    if at_import and top in LATE_ONLY.get(room, frozenset()) | heavy:
        return f"{top} may be imported inside functions only"
    return ""


def violations(package: Path) -> list[str]:
    """One line per import that breaks the rules, for the package rooted at ``package``."""
    found = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        room = _room_of(tuple(part for part in parts if part != "__init__"))
        for imported, line, at_import in _imports(ast.parse(path.read_text(encoding="utf-8")), package):
            complaint = _complaint(room, imported, at_import, "/".join(parts))
            if complaint:
                found.append(f"{path.relative_to(package.parent)}:{line} imports {imported}: {complaint}")
    return found


def test_every_import_of_the_package_is_allowed() -> None:
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "source", "part_of_complaint"),
    [
        ("ir/a.py", "import trimtab.passes", "ir may import no other room"),
        ("ir/a.py", "def f():\n    import tvm", "of the installed packages"),
        ("passes/a.py", "from trimtab.backends.tvm import build", "passes may import ir"),
        ("frontend/a.py", "from trimtab import passes", "frontend may import ir"),
        ("frontend/a.py", "from trimtab import trace", "rooms do not import the facade"),
        ("backends/onnx/a.py", "import tvm", "of the installed packages"),
        ("backends/mlir/a.py", "import trimtab.tuning.search", "may import backends, ir"),
        ("runtime/a.py", "import torch", "of the installed packages"),
        ("runtime/a.py", "from trimtab.ir import types", "runtime may import no other room"),
        ("runtime/a.py", "import tvm_ffi", "inside functions only"),
        ("runtime/a.py", "import importlib\nimportlib.import_module('torch')", "of the installed packages"),
        ("errors.py", "from trimtab.ir import types", "the leaf modules import no room"),
        ("errors.py", "import trimtab", "the leaf modules import no room"),
        ("compiler.py", "import torch", "inside functions only"),
        ("cli/run.py", "import torch", "inside functions only"),
        ("cli/run.py", "import transformers", "of the installed packages"),
        ("passes/a.py", "from . import manager", "relative imports"),
    ],
)
def test_a_forbidden_import_is_reported(tmp_path: Path, file: str, source: str, part_of_complaint: str) -> None:
    path = _write(tmp_path, file, source)
    (complaint,) = violations(path)
    assert part_of_complaint in complaint
    assert file in complaint


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("passes/a.py", "import re\nimport torch\nfrom trimtab.errors import PassError\nfrom trimtab.ir import core"),
        ("runtime/a.py", "def f():\n    import tvm_ffi"),
        ("tuning/a.py", "from trimtab.backends.tvm import build\nfrom trimtab.runtime import session"),
        ("backends/tvm/a.py", "from trimtab.backends.capability import Table\nimport tvm"),
        ("compiler.py", "def f():\n    import torch\n    from trimtab.backends.tvm import build"),
        ("cli/run.py", "import typer\nimport trimtab"),
        ("__init__.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
    ],
)
def test_an_allowed_import_is_not_reported(tmp_path: Path, file: str, source: str) -> None:
    assert violations(_write(tmp_path, file, source)) == []


def _write(folder: Path, file: str, source: str) -> Path:
    """A package with one file, beside empty folders for the rooms."""
    package = folder / "trimtab"
    for room in ROOMS:
        (package / room).mkdir(parents=True, exist_ok=True)
    path = package / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")
    return package
