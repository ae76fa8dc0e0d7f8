"""IR module to native code: emit, lower, compile, link."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.backends.base import CompiledCode, StoredWeight
from trimtab.backends.tvm.availability import require_tvm
from trimtab.cpu_features import host_architecture, split_triple
from trimtab.errors import BackendError, MissingDependencyError, TrimtabError
from trimtab.ir.core import Module
from trimtab.ir.weights import Weight

if TYPE_CHECKING:
    from trimtab.backends.tvm.layouts import Layout
    from trimtab.backends.tvm.targets import TargetSpec


def build(module: Module, target: str = "", threads: int | None = None) -> CompiledCode:
    """Compile ``module`` for a CPU.

    The library holds a Relax executable whose ``main`` takes the inputs, the weights and the arena, which is memory for
    intermediate tensors, and returns a tuple with the outputs. Its function ``arena_bytes`` takes the inputs and
    returns how large the arena must be. ``memory`` has

    - ``arena_bytes``, and ``live_bytes``, the most of it that holds tensors at one time: no arena can be smaller;
    - ``scratch_bytes``, the most that a thread takes for itself inside of a kernel;
    - ``weight_bytes``.

    Args:
        module: a verified module.
        target: a name from :func:`trimtab.backends.tvm.targets.target_names`; the portable baseline when empty.
        threads: threads to plan parallel work for; the processors of this machine by default. The code runs with any.

    Raises:
        UsageError: unknown target.
        UnsupportedByBackendError: some ops cannot be compiled; all are listed.
        MissingDependencyError: tvm or a C compiler is missing.
        BackendError: the code generator failed.
    """
    require_tvm()
    import importlib.metadata

    from trimtab.backends.tvm.arena import ENTRY_SIZE
    from trimtab.backends.tvm.emit import emit
    from trimtab.backends.tvm.pipeline import build_executable, lower
    from trimtab.backends.tvm.support import check_supported
    from trimtab.backends.tvm.targets import find_target

    spec = find_target(target, threads)
    check_supported(module)
    compiler = find_compiler(spec)
    clock = _Clock()
    emitted = emit(module, spec.machine)
    clock.lap("emit")
    try:
        lowered = lower(emitted.relax, spec.tvm_target(), spec.machine, module.symbols())
        clock.lap("lower")
        executable = build_executable(lowered.module, spec.tvm_target())
        clock.lap("generate")
        library = link(executable, compiler)
        clock.lap("link")
    except TrimtabError:
        raise
    except Exception as error:
        raise _explain(error, emitted.origins) from error
    weights = tuple(_stored(module.weights[id], emitted.layouts[id]) for id in emitted.weights)
    return CompiledCode(
        backend="tvm",
        triple=spec.triple,
        features=spec.features,
        library=library,
        weights=weights,
        runtime_libraries=_runtime_libraries(spec.triple),
        requires={name: importlib.metadata.version(name) for name in ("apache-tvm", "apache-tvm-ffi")},
        memory={
            "arena_bytes": lowered.arena_bytes,
            "live_bytes": lowered.live_bytes,
            "scratch_bytes": lowered.scratch_bytes,
            "weight_bytes": sum(w.nbytes for w in weights),
        },
        seconds=clock.laps,
        calls=emitted.calls,
        arena=ENTRY_SIZE,
    )


def _stored(weight: Weight, layout: Layout) -> StoredWeight:
    """``weight`` as the code reads it."""
    from trimtab.backends.tvm.layouts import packed_blocks

    shape = tuple(int(size) for size in weight.type.shape)  # type: ignore[arg-type]
    return StoredWeight(
        name=weight.id,
        dtype=str(layout.stored_dtype(weight.type.dtype)),
        shape=layout.stored_shape(shape),
        blocks=functools.partial(packed_blocks, weight, layout),
        layout=None if layout.is_plain else layout.to_dict(),
        plain_dtype=str(weight.type.dtype),
        plain_shape=shape,
    )


def _runtime_libraries(triple: str) -> tuple[Path, ...]:
    """The runtime library that a device needs beside libtvm_ffi; none for another machine's architecture."""
    import tvm

    if split_triple(triple)[0] != host_architecture():
        return ()
    return (Path(tvm.__file__).parent / "lib" / "libtvm_runtime.so",)


class _Clock:
    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now


def find_compiler(spec: TargetSpec) -> str:
    """The path of the C compiler driver that links for ``spec``.

    Raises:
        MissingDependencyError: none of the target's drivers is installed.
    """
    wanted = os.environ.get("CC", "")
    candidates = [wanted, *spec.compiler] if wanted and spec.compiler[0] == "cc" else list(spec.compiler)
    for name in candidates:
        found = shutil.which(name)
        if found:
            return found
    raise MissingDependencyError(
        "no C compiler", values={"looked_for": candidates, "target": spec.name},
        rule="the generated object file is linked into a shared library by the system's compiler driver",
        fix="install one, e.g. `apt-get install gcc`" if spec.compiler[0] == "cc" else f"install {spec.compiler[0]}",
    )  # fmt: skip


def link(executable: Any, compiler: str) -> bytes:
    """The bytes of the shared library that ``compiler`` links from TVM's output.

    Raises:
        BackendError: linking failed.
    """
    from tvm.support import cc

    with tempfile.TemporaryDirectory(prefix="trimtab-link-") as directory:
        path = os.path.join(directory, "model.so")
        try:
            executable.export_library(path, fcompile=cc.cross_compiler(compiler, options=["-shared", "-fPIC", "-O1"]))
        except (RuntimeError, subprocess.SubprocessError, OSError) as error:
            raise BackendError(
                "linking the generated code failed",
                values={"compiler": compiler},
                rule=str(error).strip()[-400:],
                fix="check that the compiler can link shared libraries",
            ) from error
        return Path(path).read_bytes()


def _explain(error: Exception, origins: Mapping[str, Sequence[Any]]) -> BackendError:
    """An error of TVM in terms of the user's model: the kernels it names are traced back to their ops."""
    text = str(error).strip()
    named = sorted((name for name in origins if name and name in text), key=len, reverse=True)
    op = origins[named[0]][0] if named else None
    lines = [line for line in text.splitlines() if line.strip()]
    return BackendError(
        "TVM could not compile the module",
        values={
            "kernel": named[0] if named else "unknown",
            "error": lines[-1][:300] if lines else type(error).__name__,
        },
        rule="a module that passed the capability check should compile",
        fix="this is a bug of Trimtab or TVM: report it with the module's text",
        where=f"op {op!r}" if op is not None else "",
        location=op.location if op is not None else None,
    )
