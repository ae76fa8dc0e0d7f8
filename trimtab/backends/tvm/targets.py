"""Targets by name: what TVM is told, which CPU features the code needs, and the tiles that suit the processor."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from trimtab.backends.tvm.codegen.machine import AVX2, AVX512, NEON, SCALAR, Machine
from trimtab.backends.tvm.microkernels.available import all_features, available_sets
from trimtab.cores import usable_cores
from trimtab.cpu_features import host_features
from trimtab.errors import UsageError

HOST_LINKERS = ("cc", "gcc", "clang")

_V2 = ("cx16", "sahf", "popcnt", "sse3", "sse4.1", "sse4.2", "ssse3")
_V3 = (*_V2, "avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")


@dataclass(frozen=True)
class TargetSpec:
    """One target.

    Attributes:
        name: what users write, e.g. ``x86-64-v3``.
        triple: LLVM triple of the code.
        cpu: LLVM processor name.
        features: CPU features the code needs, in LLVM's names; the loader checks them.
        machine: sizes for the kernel generators.
        compiler: the C compiler driver that links the library, tried in order.
        extra: further entries of TVM's target dictionary.
    """

    name: str
    triple: str
    cpu: str
    features: tuple[str, ...]
    machine: Machine
    compiler: tuple[str, ...] = HOST_LINKERS
    extra: Mapping[str, Any] = field(default_factory=dict)

    def tvm_target(self) -> dict[str, Any]:
        """The dictionary for ``tvm.target.Target``."""
        return {
            "kind": "llvm",
            "mtriple": self.triple,
            "mcpu": self.cpu,
            "num-cores": self.machine.threads,
            **self.extra,
        }

    def with_threads(self, threads: int) -> TargetSpec:
        return replace(self, machine=replace(self.machine, threads=threads))

    def with_micro_kernels(self) -> TargetSpec:
        """The target with the instruction sets that its features allow."""
        sets = available_sets(self.triple, self.features)
        return replace(self, machine=replace(self.machine, instruction_sets=sets))


_LINUX_X86 = "x86_64-unknown-linux-gnu"
_LINUX_ARM = "aarch64-unknown-linux-gnu"

TARGETS = {
    "x86-64-v2": TargetSpec("x86-64-v2", _LINUX_X86, "x86-64-v2", _V2, SCALAR),
    "x86-64-v3": TargetSpec("x86-64-v3", _LINUX_X86, "x86-64-v3", _V3, AVX2),
    "x86-64-v4": TargetSpec("x86-64-v4", _LINUX_X86, "x86-64-v4", _V4, AVX512),
    "aarch64": TargetSpec("aarch64", _LINUX_ARM, "generic", ("neon", "fp-armv8"), NEON, ("aarch64-linux-gnu-gcc",)),
    "armv8.2-a": TargetSpec("armv8.2-a", _LINUX_ARM, "cortex-a76", ("neon", "fp-armv8", "fullfp16", "dotprod"), NEON,
                            ("aarch64-linux-gnu-gcc",)),
}  # fmt: skip

DEFAULT_TARGET = "x86-64-v3"


def target_names() -> list[str]:
    """Names that :func:`find_target` accepts."""
    return ["native", *TARGETS]


def find_target(name: str = "", threads: int | None = None) -> TargetSpec:
    """The target called ``name``; the portable baseline of this machine's architecture when empty.

    Raises:
        UsageError: there is no such target.
    """
    is_arm = platform.machine() in ("aarch64", "arm64")
    name = name or ("aarch64" if is_arm else DEFAULT_TARGET)
    spec = native_target() if name == "native" else TARGETS.get(name)
    if spec is None:
        raise UsageError("unknown target", values={"target": name, "known": target_names()},
                         fix="use one of the known targets; `native` means this machine")  # fmt: skip
    if is_arm and spec.triple == _LINUX_ARM:
        spec = replace(spec, compiler=HOST_LINKERS)
    return spec.with_micro_kernels().with_threads(threads or default_threads())


def default_threads() -> int:
    """Threads to plan parallel loops for: the cores this process may use, at most 64."""
    return min(64, usable_cores())


def native_target() -> TargetSpec:
    """This machine, as LLVM sees it."""
    from tvm.target import Target, codegen

    cpu = str(codegen.llvm_get_system_cpu())
    if platform.machine() in ("aarch64", "arm64"):
        return TargetSpec("native", _LINUX_ARM, cpu, TARGETS["aarch64"].features, NEON)
    flags = host_features() or frozenset()
    wide = all(feature in flags for feature in _V4)
    machine = AVX512 if wide else AVX2 if all(feature in flags for feature in _V3) else SCALAR
    wanted = codegen.llvm_get_cpu_features(Target({"kind": "llvm", "mtriple": _LINUX_X86, "mcpu": cpu}))
    # A virtual machine may show the model number of another processor; the micro-kernels go by the flags alone.
    known = sorted((set(map(str, wanted)) | all_features()) & flags)
    more = [f"+{feature}" for feature in known if feature not in set(map(str, wanted))]
    return TargetSpec("native", _LINUX_X86, cpu, tuple(known), machine, extra={"mattr": more} if more else {})
