"""Load the native code of an artifact: TVM's small runtime library, then the model's own shared library.

Neither torch nor the TVM compiler is imported.  Libraries carried in the file are loaded from memory
(``memfd_create``), or from a private temporary directory where the system has no such thing.

A process can hold one TVM runtime only: a second copy aborts it when registering its functions.  So a runtime that is
already loaded is used; next, that of an installed ``tvm`` package of the version the code was built for, because a
later ``import tvm`` then finds its own library loaded; and only then the one carried in the file, after which importing
``tvm`` in the same process is refused with an explanation instead of a crash.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import mmap
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from trimtab.cpu_features import (
    host_architecture,
)
from trimtab.errors import ArtifactError, MissingDependencyError
from trimtab.runtime.container import ArtifactReader
from trimtab.runtime.elf import check_library
from trimtab.runtime.manifest import CodeVariant
from trimtab.runtime.threads import WorkerPools

# A function that only libtvm_runtime registers: when it is there, a runtime is loaded.
_RUNTIME_MARK = "ffi.Module.load_from_bytes.relax.VMExecutable"
_CPU_DEVICE, _POOLED_ALLOCATOR = 1, 2

_lock = threading.RLock()


@dataclass(frozen=True)
class NativeRuntime:
    """The loaded TVM runtime.

    Args:
        ffi: the ``tvm_ffi`` module.
        pools: its worker threads.
        origin: where the runtime library came from: ``loaded``, ``installed`` or ``artifact``.
    """

    ffi: ModuleType
    pools: WorkerPools
    origin: str

    def function(self, name: str) -> Any:
        """A global function of the runtime."""
        return self.ffi.get_global_func(name)

    def view(self, tensor: Any, dtype: str) -> Any:
        """The memory of a tensor read as another dtype of the same width, such as ``bfloat16``."""
        ffi = self.ffi
        return self.function("runtime.TVMTensorCreateView")(tensor, ffi.Shape(tensor.shape), ffi.dtype(dtype), 0)


@dataclass(frozen=True)
class Executable:
    """The code of one model, loaded."""

    runtime: NativeRuntime
    module: Any
    entry: str
    arena: str = ""

    def new_machine(self, instrument: Callable[..., int] | None = None) -> Callable[..., Any]:
        """The entry function of a fresh virtual machine (they are not safe for concurrent use).

        Args:
            instrument: called before and after every kernel with ``(function, name, is_before, result, *arguments)``;
                cannot be removed again.
        """
        machine = self._machine()
        if instrument is not None:
            machine["set_instrument"](self.runtime.ffi.convert(instrument))
        function: Callable[..., Any] = machine[self.entry]
        return function

    def arena_size(self) -> Callable[..., int] | None:
        """The function that takes the inputs and says how large the arena must be; None when the code takes none."""
        if not self.arena:
            return None
        function: Callable[..., int] = self._machine()[self.arena]
        return function

    def _machine(self) -> Any:
        machine = self.module["vm_load_executable"]()
        machine["vm_initialization"](_CPU_DEVICE, 0, _POOLED_ALLOCATOR)
        return machine


def load_executable(reader: ArtifactReader, variant: CodeVariant, *, prefer_carried: bool = False) -> Executable:
    """Load the runtime, if need be, and the code of a variant.

    Code is loaded once per process and content and stays loaded: two sessions of one file share it.

    Args:
        reader: the artifact.
        variant: one of its variants, see :func:`select_variant`.
        prefer_carried: use the runtime carried in the file even where a ``tvm`` package is installed.

    Raises:
        MissingDependencyError: ``apache-tvm-ffi`` is missing or of another version, or no runtime library is to be had.
        ArtifactError: a library cannot be loaded, or has no such entry function.
    """
    with _lock:
        runtime = _load_runtime(reader, variant, prefer_carried)
        digest = reader.manifest.entries[variant.library].sha256
        module = _modules.get(digest)
        if module is None:
            path = _library_path(variant.library, reader.view(variant.library))
            try:
                module = runtime.function("ffi.Module.load_from_file.so")(path, "so")
            except Exception as error:
                raise _unloadable(reader, variant.library, error) from error
            _modules[digest] = module
    executable = Executable(runtime, module, variant.entry, variant.arena)
    try:
        executable.new_machine()
        executable.arena_size()
    except Exception as error:
        raise _unloadable(reader, variant.library, error) from error
    return executable


_modules: dict[str, Any] = {}
_runtime: NativeRuntime | None = None


def _load_runtime(reader: ArtifactReader, variant: CodeVariant, prefer_carried: bool) -> NativeRuntime:
    global _runtime
    if _runtime is not None:
        return _runtime
    ffi = _import_ffi(variant)
    if ffi.get_global_func(_RUNTIME_MARK, allow_missing=True) is not None:
        origin = "loaded"
    else:
        origin = _load_runtime_library(reader, variant, prefer_carried)
    _runtime = NativeRuntime(ffi, WorkerPools(ffi.get_global_func), origin)
    return _runtime


def _import_ffi(variant: CodeVariant) -> ModuleType:
    """Import ``tvm_ffi`` without what it would import for its own convenience: torch, which takes seconds."""
    wanted = variant.requires.get("apache-tvm-ffi", "")
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]  # what makes 'import torch' fail at once
    try:
        import tvm_ffi
    except ImportError as error:
        raise MissingDependencyError(
            "a package that runs compiled models is not installed",
            values={"package": "apache-tvm-ffi", "reason": error},
            rule="the runtime needs numpy and apache-tvm-ffi",
            fix=f"pip install apache-tvm-ffi{'==' + wanted if wanted else ''}",
        ) from error
    finally:
        if hidden:
            del sys.modules["torch"]
    present: str = tvm_ffi.__version__
    if wanted and present.split(".")[:2] != wanted.split(".")[:2]:
        raise MissingDependencyError(
            "apache-tvm-ffi has another version than the artifact's code was built for",
            values={"installed": present, "needed": wanted},
            rule="its binary interface may change between minor versions",
            fix=f"pip install apache-tvm-ffi=={wanted}, or compile the model again",
        )
    module: ModuleType = tvm_ffi
    return module


def _load_runtime_library(reader: ArtifactReader, variant: CodeVariant, prefer_carried: bool) -> str:
    installed = _installed_runtime(variant.requires.get("apache-tvm"))
    if installed is not None and not (prefer_carried and variant.runtime):
        _load_globally(str(installed), str(installed))
        return "installed"
    if not variant.runtime:
        wanted = variant.requires.get("apache-tvm", "")
        raise MissingDependencyError(
            "no TVM runtime library",
            values={"file": reader.path, "apache-tvm": wanted or "any version"},
            rule="the file was compiled without its runtime library, and no matching tvm package is installed",
            fix=f"pip install apache-tvm{'==' + wanted if wanted else ''}, or compile the model with its runtime",
        )
    for name in variant.runtime:
        _load_globally(_library_path(name, reader.view(name)), f"{reader.path}/{name}")
    if importlib.util.find_spec("tvm") is not None:
        sys.meta_path.insert(0, _RefuseSecondRuntime(reader.path))
    return "artifact"


def _load_globally(path: str, what: str) -> None:
    try:
        _keep_alive.append(ctypes.CDLL(path, ctypes.RTLD_GLOBAL))
    except OSError as error:
        raise ArtifactError(
            "the TVM runtime library cannot be loaded",
            values={"library": what, "reason": error},
            rule="it must match this system and the installed apache-tvm-ffi",
            fix="compile the model again on a machine with the same C library, or update this system",
        ) from error


_keep_alive: list[Any] = []


def _installed_runtime(wanted: str | None) -> Path | None:
    """The runtime library of an installed ``tvm`` package of the wanted version, found without importing it."""
    spec = importlib.util.find_spec("tvm")
    if spec is None or not spec.submodule_search_locations:
        return None
    if wanted is not None:
        try:
            if importlib.metadata.version("apache-tvm") != wanted:
                return None
        except importlib.metadata.PackageNotFoundError:
            return None
    suffix = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
    name = f"tvm_runtime.{suffix}" if sys.platform == "win32" else f"libtvm_runtime.{suffix}"
    candidates = [Path(place) / "lib" / name for place in spec.submodule_search_locations]
    return next((path for path in candidates if path.is_file()), None)


class _RefuseSecondRuntime:
    """Makes ``import tvm`` an error rather than an abort once a runtime from an artifact is loaded."""

    def __init__(self, source: str) -> None:
        self._source = source

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Found, so that asking whether tvm is installed is answered; only loading it fails."""
        return ModuleSpec(name, self) if name == "tvm" else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        raise ImportError(
            f"this process runs the TVM runtime carried in {self._source}, and a second one would abort it. "
            "Compile in another process, or install the tvm version the artifact was built with"
        )


def _library_path(name: str, data: memoryview) -> str:
    """A path under which the loader finds these bytes. The file behind it lives as long as the process."""
    check_library(data, host_architecture(), name)
    base = name.rsplit("/", 1)[-1]
    if hasattr(os, "memfd_create"):
        try:
            # The descriptor stays open: were its number used again, the loader would take a new library for this one.
            descriptor = os.memfd_create(base, os.MFD_CLOEXEC)
            with os.fdopen(os.dup(descriptor), "wb") as file:
                file.write(data)
            path = f"/proc/self/fd/{descriptor}"
            if os.path.exists(path) and _may_execute(descriptor):
                return path
            os.close(descriptor)
        except OSError:
            pass  # no memory files here: a real one will do
    directory = tempfile.TemporaryDirectory(prefix="trimtab-")
    _keep_alive.append(directory)
    target = Path(directory.name) / base
    target.write_bytes(data)
    return str(target)


def _may_execute(descriptor: int) -> bool:
    """Whether code in this file may be mapped; some systems forbid it for memory files (``vm.memfd_noexec``)."""
    try:
        mmap.mmap(descriptor, 1, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_EXEC).close()
    except (OSError, ValueError):
        return False
    return True


def _unloadable(reader: ArtifactReader, library: str, error: Exception) -> ArtifactError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ArtifactError(
        "the code of the artifact cannot be loaded",
        values={"file": reader.path, "library": library, "reason": lines[-1][:300]},
        rule="the library does not fit this system, or was not built by the tvm backend",
        fix=f"compile it on this machine: trimtab compile {reader.path} --target native -o model.trim",
    )
