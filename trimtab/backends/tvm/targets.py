"""Targets by name: what TVM is told, which CPU features the code needs, and the tiles that suit the processor."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from trimtab.backends.cpu_targets import CPU_TARGETS, LINUX_ARM, LINUX_X86, X86_64_V3, X86_64_V4, baseline
from trimtab.backends.tvm.codegen.machine import AVX2, AVX512, NEON, SCALAR, Machine
from trimtab.backends.tvm.microkernels.available import all_features, available_sets
from trimtab.cores import usable_cores
from trimtab.cpu_features import host_features
from trimtab.errors import UsageError

HOST_LINKERS = ("cc", "gcc", "clang")


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


_ARM_LINKERS = ("aarch64-linux-gnu-gcc",)


def _spec(name: str, machine: Machine, compiler: tuple[str, ...] = HOST_LINKERS) -> TargetSpec:
    cpu = CPU_TARGETS[name]
    extra = {"mattr": [f"+{feature}" for feature in cpu.features]} if cpu.cpu == "generic" else {}
    return TargetSpec(name, cpu.triple, cpu.cpu, cpu.features, machine, compiler, extra)


TARGETS = {
    "x86-64-v2": _spec("x86-64-v2", SCALAR),
    "x86-64-v3": _spec("x86-64-v3", AVX2),
    "x86-64-v4": _spec("x86-64-v4", AVX512),
    "aarch64": _spec("aarch64", NEON, _ARM_LINKERS),
    "armv8.2-a": _spec("armv8.2-a", NEON, _ARM_LINKERS),
    "armv8.6-a": _spec("armv8.6-a", NEON, _ARM_LINKERS),
}


def target_names() -> list[str]:
    """Names that :func:`find_target` accepts."""
    return ["native", *TARGETS]


def find_target(name: str = "", threads: int | None = None) -> TargetSpec:
    """The target called ``name``; the portable baseline of this machine's architecture when empty.

    Raises:
        UsageError: there is no such target.
    """
    is_arm = platform.machine() in ("aarch64", "arm64")
    spec = native_target() if name == "native" else TARGETS.get(name or baseline())
    if spec is None:
        raise UsageError("unknown target", values={"target": name, "known": target_names()},
                         fix="use one of the known targets; `native` means this machine")  # fmt: skip
    if is_arm and spec.triple == LINUX_ARM:
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
        return TargetSpec("native", LINUX_ARM, cpu, TARGETS["aarch64"].features, NEON)
    flags = host_features() or frozenset()
    wide = all(feature in flags for feature in X86_64_V4)
    machine = AVX512 if wide else AVX2 if all(feature in flags for feature in X86_64_V3) else SCALAR
    wanted = codegen.llvm_get_cpu_features(Target({"kind": "llvm", "mtriple": LINUX_X86, "mcpu": cpu}))
    # A virtual machine may show the model number of another processor; the micro-kernels go by the flags alone.
    known = sorted((set(map(str, wanted)) | all_features()) & flags)
    more = [f"+{feature}" for feature in known if feature not in set(map(str, wanted))]
    return TargetSpec("native", LINUX_X86, cpu, tuple(known), machine, extra={"mattr": more} if more else {})
