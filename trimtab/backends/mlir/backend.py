"""The MLIR backend behind the interface that all backends share."""

from __future__ import annotations

from trimtab.backends.base import BackendStatus, CompiledCode
from trimtab.ir.core import Module


class MlirBackend:
    """Structured ops of MLIR to IREE's virtual machine. See :class:`trimtab.backends.base.Backend`."""

    passes = ""

    def check(self, module: Module, target: str = "") -> None:
        from trimtab.backends.mlir.support import check_supported

        check_supported(module)

    def build(self, module: Module, target: str = "", threads: int | None = None) -> CompiledCode:
        from trimtab.backends.mlir.compiler import build

        return build(module, target, threads)

    def status(self) -> BackendStatus:
        from trimtab.backends.mlir.availability import status

        return status()


BACKEND = MlirBackend()
