"""The TVM backend behind the interface that all backends share."""

from __future__ import annotations

from trimtab.backends.base import BackendStatus, CompiledCode, StoredWeight
from trimtab.ir.core import Module


class TvmBackend:
    """Relax and TIR to a shared library for CPUs. See :class:`trimtab.backends.base.Backend`."""

    def check(self, module: Module, target: str = "") -> None:
        from trimtab.backends.tvm.support import check_supported

        check_supported(module)

    def build(self, module: Module, target: str = "", threads: int | None = None) -> CompiledCode:
        from trimtab.backends.tvm.compiler import build

        code = build(module, target, threads)
        return CompiledCode(
            backend="tvm",
            triple=code.triple,
            features=code.features,
            library=code.library,
            weights=tuple(
                StoredWeight(
                    name=stored.id,
                    dtype=str(stored.weight.type.dtype),
                    shape=stored.shape,
                    blocks=stored.blocks,
                    layout=None if stored.layout.is_plain else stored.layout.to_dict(),
                    plain_dtype=str(stored.weight.type.dtype),
                    plain_shape=tuple(int(size) for size in stored.plain_shape),
                )
                for stored in code.weights
            ),
            runtime_libraries=(code.runtime_library,),
            requires=code.requires,
            memory=code.memory,
            seconds=code.seconds,
        )

    def status(self) -> BackendStatus:
        from trimtab.backends.tvm.availability import status

        return status()


BACKEND = TvmBackend()
