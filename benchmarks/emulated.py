"""Runs code for AArch64 on this machine, in QEMU.

    make emulator                                             # installs what this needs
    python benchmarks/zoo.py --target aarch64 --backend tvm   # the model zoo

Three things take part: QEMU and a cross compiler, of the distribution (:func:`missing_tools`); the runtimes of TVM and
IREE for AArch64, which are in the Python packages for that architecture and are unpacked beside the installed ones by
``python benchmarks/emulated.py`` (:func:`missing_runtime`); and, for code of TVM, the program
``examples/cpp/call_model``.  Models compute with one thread: QEMU pays for threads that wait for one another.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.cpu_features import host_architecture, split_triple
from trimtab.runtime.container import ArtifactReader
from trimtab.runtime.iree_code import PARAMETER_SCOPE
from trimtab.runtime.variants import variant_weights
from trimtab.tensor_file import STORAGE_TYPES, TensorSource, write_tensors

C_COMPILER, CXX_COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++", "qemu-aarch64-static"

PROCESSORS = {"aarch64": "cortex-a53", "armv8.2-a": "cortex-a76", "armv8.6-a": "max"}
"""For each target a processor of QEMU's that has little beyond it; code that needs more stops there."""

RUNTIMES = {"tvm": ("apache-tvm-ffi", "apache-tvm"), "mlir": ("iree-base-runtime",)}
"""The packages that hold a backend's runtime; the same versions as installed here are needed."""

_FOLDER = Path(sys.prefix) / "aarch64"
_PLATFORM = "manylinux_2_28_aarch64"
_WANTED = (
    "tvm_ffi/include/",
    "tvm_ffi/lib/libtvm_ffi.so",
    "tvm/lib/libtvm_runtime.so",
    "iree/_runtime_libs/iree-run-module",
)
_EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "cpp"
_SECONDS = 300


def is_emulated(target: str) -> bool:
    """Whether code for a target runs on this machine in QEMU only."""
    return target in PROCESSORS and host_architecture() != "aarch64"


def missing_tools(*tools: str) -> str:
    """Which of ``tools`` (by default all) are not installed, in words; empty when they are."""
    missing = [tool for tool in tools or (C_COMPILER, CXX_COMPILER, EMULATOR) if shutil.which(tool) is None]
    return f"not installed: {', '.join(missing)} (make emulator)" if missing else ""


def missing_runtime(backend: str) -> str:
    """Why a backend's code for AArch64 cannot be run here, in words; empty when it can."""
    absent = [name for name in RUNTIMES[backend] if _version(name) is None or not _package(name).is_dir()]
    return missing_tools() or (f"no AArch64 libraries of {', '.join(absent)} (make emulator)" if absent else "")


def fetch_runtimes() -> None:
    """Download the packages that are installed here for AArch64 too, with pip, and unpack what runs code.

    Raises:
        CalledProcessError: pip found no such package, or no network.
    """
    installed = [name for packages in RUNTIMES.values() for name in packages if _version(name) is not None]
    for name in [name for name in installed if not _package(name).is_dir()]:
        with tempfile.TemporaryDirectory() as scratch:
            wanted = f"{name}=={_version(name)}"
            options = ["--quiet", "--no-deps", "--only-binary=:all:", "--platform", _PLATFORM, "--dest", scratch]
            subprocess.run([sys.executable, "-m", "pip", "download", *options, wanted], check=True, timeout=600)
            (wheel,) = Path(scratch).glob("*.whl")
            unpacked = Path(scratch) / "unpacked"
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(unpacked, [entry for entry in archive.namelist() if entry.startswith(_WANTED)])
            for program in unpacked.rglob("iree-run-module"):
                program.chmod(0o755)
            _package(name).parent.mkdir(exist_ok=True)
            shutil.move(unpacked, _package(name))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package(name: str) -> Path:
    """Where what was unpacked of a package's present version lies."""
    return _FOLDER / f"{name}-{_version(name)}"


@functools.cache
def sysroot() -> str:
    """Where the cross compiler finds the C library: the folder that contains ``lib``."""
    command = [C_COMPILER, "-print-file-name=libc.so.6"]
    found = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    return str(found.resolve().parent.parent)


def run(program: str | Path, *arguments: str | Path, processor: str = "max", stdin: bytes = b"",
        libraries: Sequence[Path] = ()) -> bytes:  # fmt: skip
    """What a program for AArch64 writes to its standard output.

    Args:
        processor: one of QEMU's.
        libraries: folders of shared libraries besides the system's.

    Raises:
        RuntimeError: it failed; with its last words.
    """
    variables = ["-E", f"LD_LIBRARY_PATH={os.pathsep.join(map(str, libraries))}", "-E", "TVM_NUM_THREADS=1"]
    command = [EMULATOR, "-cpu", processor, "-L", sysroot(), *variables, str(program), *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, check=False, timeout=_SECONDS)
    if done.returncode != 0:
        words = (done.stderr or done.stdout).decode(errors="replace").strip()[-600:]
        raise RuntimeError(f"{Path(program).name} ended with {done.returncode}: {words}")
    return done.stdout


class EmulatedModel:
    """An artifact for AArch64 whose calls are processes in QEMU.

    Args:
        path: the ``.trim`` file.
        target: the name of the target that it was compiled for.
    """

    def __init__(self, path: str | Path, target: str) -> None:
        self._path, self._processor = Path(path), PROCESSORS[target]
        self._folder = tempfile.TemporaryDirectory(prefix="trimtab-emulated-")
        reader = ArtifactReader(path)
        self._outputs = [STORAGE_TYPES[spec.dtype].numpy_dtype for spec in reader.manifest.outputs]
        self._variant = next(v for v in reader.manifest.variants if split_triple(v.target)[0] == "aarch64")
        if self._variant.backend == "mlir":
            self._file("code.vmfb").write_bytes(reader.view(self._variant.library))
            stored, names = reader.weights(), variant_weights(reader, self._variant)
            keys = zip(self._variant.parameters or names, (stored[name] for name in names), strict=True)
            write_tensors(
                self._file("weights.safetensors"),
                {key: TensorSource(weight.dtype, weight.shape, weight.array) for key, weight in keys},
            )

    def __enter__(self) -> EmulatedModel:
        return self

    def __exit__(self, *exception: object) -> None:
        self._folder.cleanup()

    def __call__(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """New output arrays; ``bf16`` as the ``uint16`` of its bits.

        Raises:
            RuntimeError: the program failed.
        """
        given = [self._file(f"input{i}.npy") for i in range(len(inputs))]
        made = [self._file(f"output{i}.npy") for i in range(len(self._outputs))]
        for file, array in zip(given, inputs, strict=True):
            np.save(file, np.ascontiguousarray(array))
        call = self._call_iree if self._variant.backend == "mlir" else self._call_tvm
        call(given, made)
        return [np.load(file).view(dtype) for file, dtype in zip(made, self._outputs, strict=True)]

    def _call_tvm(self, given: Sequence[Path], made: Sequence[Path]) -> None:
        folders = [
            _package(name) / package / "lib" for name, package in zip(RUNTIMES["tvm"], ("tvm_ffi", "tvm"), strict=True)
        ]
        run(call_model(), self._path, *given, *made, processor=self._processor, libraries=folders)

    def _call_iree(self, given: Sequence[Path], made: Sequence[Path]) -> None:
        program = _package("iree-base-runtime") / "iree/_runtime_libs/iree-run-module"
        arguments = ["--device=local-task", "--task_topology_group_count=1", f"--module={self._file('code.vmfb')}",
                     f"--function={self._variant.entry}",
                     f"--parameters={PARAMETER_SCOPE}={self._file('weights.safetensors')}",
                     *(f"--input=@{file}" for file in given), *(f"--output=@{file}" for file in made)]  # fmt: skip
        run(program, *arguments, processor=self._processor)

    def _file(self, name: str) -> Path:
        return Path(self._folder.name) / name


@functools.cache
def call_model() -> Path:
    """``examples/cpp/call_model`` for AArch64; built anew when its source is newer."""
    ffi, program = _package("apache-tvm-ffi") / "tvm_ffi", _FOLDER / "call_model"
    sources = [_EXAMPLE / "call_model.cc", *_EXAMPLE.glob("*.h")]
    if not program.exists() or program.stat().st_mtime < max(source.stat().st_mtime for source in sources):
        with tempfile.TemporaryDirectory(dir=_FOLDER) as scratch:
            draft = Path(scratch) / "call_model"
            options: list[Any] = ["-std=c++17", "-O1", "-isystem", ffi / "include", "-L", ffi / "lib"]
            command = [CXX_COMPILER, *options, sources[0], "-o", draft, "-ltvm_ffi", "-ldl"]
            subprocess.run(list(map(str, command)), check=True, timeout=_SECONDS)
            draft.replace(program)
    return program


if __name__ == "__main__":
    fetch_runtimes()
    print(f"The runtimes for AArch64 are in {_FOLDER}.")
