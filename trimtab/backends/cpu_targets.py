"""The processors that the backends generate code for, by the names that users write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from trimtab.cpu_features import host_architecture, host_features, host_level, missing_features, split_triple

X86_64_V2 = ("cx16", "sahf", "popcnt", "sse3", "sse4.1", "sse4.2", "ssse3")
X86_64_V3 = (*X86_64_V2, "avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe")
X86_64_V4 = (*X86_64_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_OPTIONAL_X86 = ("avxvnni", "avx512vnni", "avx512bf16", "avx512fp16", "avx512vbmi", "avx512vbmi2")
_ARMV8 = ("neon", "fp-armv8")
_ARMV82 = (*_ARMV8, "fullfp16", "dotprod")
_ARMV86 = (*_ARMV82, "i8mm", "bf16")
_RV64GC = ("m", "a", "f", "d", "c")

LINUX_X86 = "x86_64-unknown-linux-gnu"
LINUX_ARM = "aarch64-unknown-linux-gnu"
LINUX_RISCV = "riscv64-unknown-linux-gnu"


@dataclass(frozen=True)
class CpuTarget:
    """A processor as LLVM knows it.

    Attributes:
        name: what users write, e.g. ``x86-64-v3``.
        triple: LLVM triple of the code.
        cpu: LLVM processor name.
        features: CPU features the code may use, in LLVM's names; the loader checks them.
        abi: the calling convention, where the triple leaves it open.
    """

    name: str
    triple: str
    cpu: str
    features: tuple[str, ...]
    abi: str = ""


_TARGETS = (
    CpuTarget("x86-64-v2", LINUX_X86, "x86-64-v2", X86_64_V2),
    CpuTarget("x86-64-v3", LINUX_X86, "x86-64-v3", X86_64_V3),
    CpuTarget("x86-64-v4", LINUX_X86, "x86-64-v4", X86_64_V4),
    CpuTarget("aarch64", LINUX_ARM, "generic", _ARMV8),
    # Not the name of a core: LLVM would use what that core has beyond these features, such as SVE, unchecked.
    CpuTarget("armv8.2-a", LINUX_ARM, "generic", _ARMV82),
    CpuTarget("armv8.6-a", LINUX_ARM, "generic", _ARMV86),
    CpuTarget("riscv64", LINUX_RISCV, "generic-rv64", _RV64GC, abi="lp64d"),
    CpuTarget("riscv64-v", LINUX_RISCV, "generic-rv64", (*_RV64GC, "v", "zvl128b"), abi="lp64d"),
)

CPU_TARGETS: Mapping[str, CpuTarget] = {target.name: target for target in _TARGETS}
"""By name."""

_BASELINES = {"x86_64": "x86-64-v3", "aarch64": "aarch64", "riscv64": "riscv64"}


def baseline() -> str:
    """The portable target of this machine's architecture."""
    return _BASELINES.get(host_architecture(), "x86-64-v3")


def native() -> CpuTarget:
    """This machine: the highest level it reaches, and what it has beyond."""
    portable = CPU_TARGETS[baseline()]
    level = CPU_TARGETS.get(host_level() or "", portable)
    every = {feature for target in _TARGETS if target.triple == portable.triple for feature in target.features}
    found = tuple(sorted((every | set(_OPTIONAL_X86)) & (host_features() or frozenset())))
    return CpuTarget("native", portable.triple, level.cpu, found or portable.features, portable.abi)


def needed_to_run(target: CpuTarget) -> str:
    """What this machine lacks to run code for ``target``, in words; empty when it lacks nothing."""
    architecture = split_triple(target.triple)[0]
    if architecture != host_architecture():
        return f"{'an' if architecture[0] == 'a' else 'a'} {architecture} processor"
    missing = missing_features(target.features)
    return f"a processor with {', '.join(missing)}" if missing else ""


def foreign_processors(names: Iterable[str]) -> dict[str, str]:
    """Those targets among ``names`` whose code does not run on this machine, with what running it needs."""
    needs = {name: needed_to_run(CPU_TARGETS[name]) for name in names if name in CPU_TARGETS}
    return {name: need for name, need in needs.items() if need}
