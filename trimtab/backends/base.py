"""What every backend gives: code for one target, and the weights as that code reads them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from trimtab.ir.core import Module
from trimtab.ir.dims import Dim
from trimtab.ir.dtypes import DType


@dataclass(frozen=True)
class StoredWeight:
    """A weight in the form the code reads it, produced a block at a time.

    Attributes:
        name: id of the weight in the module's table, and key in the artifact.
        dtype: element type in storage, e.g. ``f32``.
        shape: shape in storage.
        blocks: makes an iterator over the stored bytes in order; may be called again.
        layout: None when stored as in the module, else ``{"kind": ..., **parameters}`` from which it can be restored.
        plain_dtype: element type in the module.
        plain_shape: shape in the module.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[bytes | memoryview]]
    layout: Mapping[str, Any] | None
    plain_dtype: str
    plain_shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Stored bytes, padding included."""
        return math.prod(self.shape) * max(DType(self.dtype).bits // 8, 1)


@dataclass(frozen=True)
class KernelCall:
    """One of the kernel calls that a call of the model makes.

    Attributes:
        name: the kernel's name in the code.
        ops: the ops it computes, as ``mnemonic at location``.
        macs: multiply-accumulates (see :meth:`~trimtab.ir.op.Op.macs`).
        factors: dtype of the numbers that are multiplied; empty without multiply-accumulates.
        bytes_read: bytes of its operands, weights included; each counts once, however often it is read.
        bytes_written: bytes of its results.
    """

    name: str
    ops: tuple[str, ...]
    macs: Dim = 0
    factors: str = ""
    bytes_read: Dim = 0
    bytes_written: Dim = 0


@dataclass(frozen=True)
class CompiledCode:
    """A module compiled for one target.

    Attributes:
        backend: name of the backend.
        triple: target triple.
        features: CPU features the code needs, by LLVM name.
        library: the code: a shared library, or a module of a virtual machine.
        weights: what the entry function takes after the inputs, in order.
        runtime_libraries: files the code needs at run time besides ``library``, in loading order.
        requires: versions of the packages the code was built for.
        memory: bytes by purpose; those that depend on the inputs' sizes are expressions.
        seconds: time spent, by stage.
        calls: the kernel calls that a call of the model makes, in order.
        entry: name of the function to call.
        arena: name of the function that takes the inputs and says how many bytes of memory for intermediate tensors the
            entry takes after the weights; empty when it takes none.
        driver: the driver of the backend's runtime that runs the code, where there are several.
        suffix: of a file that holds the code.
    """

    backend: str
    triple: str
    features: tuple[str, ...]
    library: bytes
    weights: tuple[StoredWeight, ...]
    runtime_libraries: tuple[Path, ...] = ()
    requires: Mapping[str, str] = field(default_factory=dict)
    memory: Mapping[str, Dim] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    calls: tuple[KernelCall, ...] = ()
    entry: str = "main"
    arena: str = ""
    driver: str = ""
    suffix: str = ".so"

    @property
    def kernels(self) -> dict[str, tuple[str, ...]]:
        """For each kernel's name the ops that its calls compute."""
        found: dict[str, tuple[str, ...]] = {}
        for call in self.calls:
            found[call.name] = found.get(call.name, ()) + call.ops
        return found


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend works on this machine; if not, why and what to install.

    Attributes:
        name: of the backend.
        works: whether it can compile for this machine.
        targets: what it can compile for.
        reason: why it does not work.
        fix: what to do then.
        versions: of the packages that it uses.
        missing_targets: for each target that it cannot compile for, what that needs.
        foreign_targets: for each of ``targets`` whose code does not run on this machine, what running it needs.
    """

    name: str
    works: bool
    targets: tuple[str, ...] = ()
    reason: str = ""
    fix: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    missing_targets: Mapping[str, str] = field(default_factory=dict)
    foreign_targets: Mapping[str, str] = field(default_factory=dict)


class Backend(Protocol):
    """A code generator. Importing its package is cheap; the compiler behind it is loaded at first use.

    Attributes:
        passes: the pipeline that ``compile`` runs after the user's, in the form the backend wants modules in.
    """

    passes: str

    def check(self, module: Module, target: str = "") -> None:
        """Raise :class:`~trimtab.errors.UnsupportedByBackendError` listing every op that cannot be compiled."""
        ...

    def build(self, module: Module, target: str = "", threads: int | None = None) -> CompiledCode:
        """Compile ``module.main``; ``target`` empty means the portable baseline of this machine's architecture."""
        ...

    def status(self) -> BackendStatus:
        """Whether the backend works here."""
        ...
