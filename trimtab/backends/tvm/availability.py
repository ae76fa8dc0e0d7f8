"""Whether the TVM backend works on this machine, and what to install when it does not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil

from trimtab.backends.base import BackendStatus
from trimtab.backends.cpu_targets import foreign_processors
from trimtab.errors import MissingDependencyError

INSTALL = "pip install 'trimtab[tvm]'"


def status() -> BackendStatus:
    """Look for tvm and for C compilers, without importing tvm."""
    versions = {}
    for name in ("apache-tvm", "apache-tvm-ffi"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return BackendStatus("tvm", False, (), f"the package {name} is not installed", INSTALL, versions)
    if importlib.util.find_spec("tvm") is None:
        return BackendStatus("tvm", False, (), "the module tvm cannot be found", INSTALL, versions)
    linkers = _linkers()
    usable = tuple(name for name, drivers in linkers.items() if any(shutil.which(driver) for driver in drivers))
    missing = {name: f"{drivers[0]} to link with" for name, drivers in linkers.items() if name not in usable}
    if "native" not in usable:
        return BackendStatus(
            "tvm", False, usable, "there is no C compiler to link with", "apt-get install gcc", versions
        )
    foreign = foreign_processors(usable)
    return BackendStatus("tvm", True, usable, versions=versions, missing_targets=missing, foreign_targets=foreign)


def _linkers() -> dict[str, tuple[str, ...]]:
    from trimtab.backends.tvm.targets import HOST_LINKERS, TARGETS

    return {"native": HOST_LINKERS, **{name: spec.compiler for name, spec in TARGETS.items()}}


def require_tvm() -> None:
    """Raise unless tvm can be imported.

    Raises:
        MissingDependencyError: it is not installed or does not load.
    """
    if importlib.util.find_spec("tvm") is None:
        raise MissingDependencyError("the TVM backend needs tvm", values={"package": "apache-tvm"}, fix=INSTALL)
    try:
        import tvm  # noqa: F401
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise MissingDependencyError(
            "tvm is installed but does not load",
            values={"error": str(error).splitlines()[0]},
            rule="apache-tvm and apache-tvm-ffi must have matching versions",
            fix=INSTALL,
        ) from error
