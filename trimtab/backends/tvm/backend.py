"""The TVM backend behind the interface that all backends share."""

from __future__ import annotations

from trimtab.backends.base import BackendStatus, CompiledCode
from trimtab.ir.core import Module


class TvmBackend:
    """Relax and TIR to a shared library for CPUs. See :class:`trimtab.backends.base.Backend`."""

    passes = "channels-last,group-fusions"

    def check(self, module: Module, target: str = "") -> None:
        from trimtab.backends.tvm.support import check_supported

        check_supported(module)

    def build(self, module: Module, target: str = "", threads: int | None = None) -> CompiledCode:
        from trimtab.backends.tvm.compiler import build

        return build(module, target, threads)

    def status(self) -> BackendStatus:
        from trimtab.backends.tvm.availability import status

        return status()


BACKEND = TvmBackend()
