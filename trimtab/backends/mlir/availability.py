"""Whether the MLIR backend works on this machine, and what to install when it does not."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from trimtab.backends.base import BackendStatus
from trimtab.backends.cpu_targets import foreign_processors
from trimtab.errors import MissingDependencyError

INSTALL = "pip install 'trimtab[mlir]'"
_PACKAGES = ("torch-mlir", "iree-base-compiler", "iree-base-runtime")


def status() -> BackendStatus:
    """Look for torch-mlir and IREE, without importing them but for IREE's runtime, which looks for devices."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return BackendStatus("mlir", False, (), f"the package {name} is not installed", INSTALL, versions)
    skew = version_skew(versions["iree-base-compiler"], versions["iree-base-runtime"])
    if skew:
        return BackendStatus("mlir", False, (), skew, INSTALL, versions)
    from trimtab.backends.mlir.targets import DEVICE_TARGETS, target_names

    names = tuple(target_names())
    foreign = foreign_processors(names)
    found = {driver: _has_device(driver) for driver in {spec.driver for spec in DEVICE_TARGETS.values()}}
    foreign |= {name: spec.needs for name, spec in DEVICE_TARGETS.items() if not found[spec.driver]}
    return BackendStatus("mlir", True, names, versions=versions, foreign_targets=foreign)


def _has_device(driver: str) -> bool:
    """Whether IREE's runtime has the driver and finds a device with it."""
    from iree import runtime

    try:
        return driver in runtime.query_available_drivers() and bool(
            runtime.get_driver(driver).query_available_devices()
        )
    except (RuntimeError, ValueError):
        return False


def version_skew(compiler: str, runtime: str) -> str:
    """Why code of this compiler may not run in this runtime, or "": they are released together."""
    if compiler.split(".")[:2] == runtime.split(".")[:2]:
        return ""
    return f"iree-base-compiler {compiler} and iree-base-runtime {runtime} are of different releases"


def require_compiler() -> None:
    """Raise unless torch-mlir and IREE's compiler are installed.

    Raises:
        MissingDependencyError: one is not.
    """
    for module, package in (("torch_mlir", "torch-mlir"), ("iree.compiler", "iree-base-compiler")):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise MissingDependencyError(f"the MLIR backend needs {package}", values={"package": package}, fix=INSTALL)
