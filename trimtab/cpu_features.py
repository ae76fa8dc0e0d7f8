"""What the processor of this machine can do, in the words LLVM uses for targets.

An artifact names the CPU features its code needs; running it without one of them ends in SIGILL.  The features come
from ``/proc/cpuinfo`` on Linux and from ``sysctl`` on macOS.  Where neither answers, features are unknown and nothing
is refused because of them.  A feature that the system does not let this process use counts as absent.
"""

from __future__ import annotations

import ctypes
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

_ARCHITECTURES = {
    "amd64": "x86_64",
    "x86-64": "x86_64",
    "x64": "x86_64",
    "i686": "i386",
    "i586": "i386",
    "arm64": "aarch64",
    "armv7l": "arm",
    "armv7a": "arm",
}
_OPERATING_SYSTEMS = {"darwin": "macos", "macosx": "macos", "win32": "windows", "cygwin": "windows", "ios": "ios"}

_X86_64_V2 = frozenset("cx16 popcnt sahf sse sse2 sse3 sse4.1 sse4.2 ssse3".split())
_X86_64_V3 = _X86_64_V2 | frozenset("avx avx2 bmi bmi2 f16c fma lzcnt movbe xsave".split())
_X86_64_V4 = _X86_64_V3 | frozenset("avx512f avx512bw avx512cd avx512dq avx512vl".split())

# Names of whole instruction-set levels that a manifest may list beside single features.
LEVELS: dict[str, frozenset[str]] = {
    "x86-64": frozenset({"sse", "sse2"}),
    "x86-64-v2": _X86_64_V2,
    "x86-64-v3": _X86_64_V3,
    "x86-64-v4": _X86_64_V4,
    "armv8-a": frozenset({"neon"}),
    "armv8.2-a": frozenset({"neon", "crc", "lse", "rdm"}),
}

# Linux lends the tile registers on request: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA = 158, 0x1023, 18

PRODUCT_FEATURES: dict[str, tuple[str, ...]] = {
    "bf16": ("amx-bf16", "avx512bf16", "bf16"),
    "int8": ("amx-int8", "avx512vnni", "avxvnni", "i8mm", "dotprod"),
}
"""Features with instructions that multiply and sum narrow numbers in wide accumulators, the fastest first."""

# Where Linux and LLVM call a feature by different names; all others are the same but for '_' written as '-'.
_X86_NAMES = {
    "pni": "sse3",
    "sse4_1": "sse4.1",
    "sse4_2": "sse4.2",
    "lahf_lm": "sahf",
    "abm": "lzcnt",
    "bmi1": "bmi",
    "pclmulqdq": "pclmul",
    "sha_ni": "sha",
    "avx512_vnni": "avx512vnni",
    "avx512_bf16": "avx512bf16",
    "avx512_fp16": "avx512fp16",
    "avx512_vbmi2": "avx512vbmi2",
    "avx512_bitalg": "avx512bitalg",
    "avx512_vpopcntdq": "avx512vpopcntdq",
    "avx_vnni": "avxvnni",
    "avx_vnni_int8": "avxvnniint8",
    "avx_vnni_int16": "avxvnniint16",
    "avx_ifma": "avxifma",
    "avx_ne_convert": "avxneconvert",
    "rdrand": "rdrnd",
    "3dnowprefetch": "prfchw",
}
_ARM_NAMES = {
    "fp": "fp-armv8",
    "asimd": "neon",
    "asimdhp": "fullfp16",
    "asimddp": "dotprod",
    "asimdfhm": "fp16fml",
    "asimdrdm": "rdm",
    "atomics": "lse",
    "crc32": "crc",
    "jscvt": "jsconv",
    "fcma": "complxnum",
    "lrcpc": "rcpc",
    "dcpop": "ccpp",
    "svei8mm": "i8mm",
    "svebf16": "bf16",
    "sme2": "sme2",
}
_MACOS_ARM_NAMES = {
    "AdvSIMD": "neon",
    "FEAT_FP16": "fullfp16",
    "FEAT_DotProd": "dotprod",
    "FEAT_FHM": "fp16fml",
    "FEAT_RDM": "rdm",
    "FEAT_LSE": "lse",
    "FEAT_I8MM": "i8mm",
    "FEAT_BF16": "bf16",
    "armv8_crc32": "crc",
    "FEAT_SME": "sme",
    "FEAT_SME2": "sme2",
}


def host_architecture() -> str:
    """The architecture as the first part of an LLVM triple: ``x86_64``, ``aarch64``, ``riscv64``, ..."""
    return normalized_architecture(platform.machine())


def host_system() -> str:
    """The operating system as in an LLVM triple: ``linux``, ``macos``, ``windows``."""
    return _OPERATING_SYSTEMS.get(sys.platform, sys.platform)


def normalized_architecture(name: str) -> str:
    """One spelling for each architecture (``AMD64`` and ``x86-64`` are ``x86_64``, ``arm64`` is ``aarch64``)."""
    lowered = name.lower()
    return _ARCHITECTURES.get(lowered, lowered)


def split_triple(triple: str) -> tuple[str, str | None]:
    """Architecture and operating system of a target triple; the system is None when the triple names none we know."""
    parts = triple.lower().split("-")
    known = ("linux", "macos", "darwin", "macosx", "windows", "android", "freebsd")
    system = next((name for part in parts[1:] for name in known if part.startswith(name)), None)
    return normalized_architecture(parts[0]), _OPERATING_SYSTEMS.get(system, system) if system else None


def parse_cpuinfo(text: str, architecture: str) -> frozenset[str] | None:
    """LLVM feature names from the text of ``/proc/cpuinfo``: those that every core has; None if it lists none."""
    key = {"x86_64": "flags", "i386": "flags", "aarch64": "features", "arm": "features", "riscv64": "isa"}
    wanted = key.get(architecture)
    cores: list[frozenset[str]] = []
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() != wanted:
            continue
        if architecture == "riscv64":
            cores.append(_riscv_features(value.strip()))
            continue
        names = _ARM_NAMES if architecture in ("aarch64", "arm") else _X86_NAMES
        cores.append(frozenset(names.get(flag, flag.replace("_", "-")) for flag in value.split()))
    return frozenset.intersection(*cores) if cores else None


def _riscv_features(isa: str) -> frozenset[str]:
    single, *multi = isa.lower().split("_")
    letters = re.sub(r"^rv\d+", "", single)
    expanded = letters.replace("g", "imafd")
    implied = {"zvl128b"} if "v" in expanded else set()  # the extension V has registers of at least 128 bits
    return frozenset(expanded) | frozenset(multi) | implied


@cache
def processor_features() -> frozenset[str] | None:
    """What the processor of this machine has, under LLVM's names, or None where that cannot be found out."""
    architecture = host_architecture()
    if sys.platform == "darwin":
        return _macos_features(architecture)
    try:
        return parse_cpuinfo(Path("/proc/cpuinfo").read_text(errors="replace"), architecture)
    except OSError:
        return None


@cache
def host_features() -> frozenset[str] | None:
    """Those of :func:`processor_features` that this process may use."""
    found = processor_features()
    return None if found is None else found - refused_features(found, may_use_tiles)


def refused_features(found: frozenset[str], tiles: Callable[[], bool]) -> frozenset[str]:
    """The features among ``found`` that need a permission which the system does not give: those of AMX.

    Args:
        found: what the processor has.
        tiles: whether the system permits AMX; asked only where the processor has it.
    """
    asked = frozenset(name for name in found if name.startswith("amx-"))
    return asked if asked and not tiles() else frozenset()


def may_use_tiles() -> bool:
    """Ask the system to let this process use the tile registers of AMX, and say whether it does."""
    if sys.platform != "linux" or host_architecture() != "x86_64":
        return False
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    return bool(syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA) == 0)


def _macos_features(architecture: str) -> frozenset[str] | None:
    try:
        text = subprocess.run(
            ["sysctl", "hw.optional", "machdep.cpu"], capture_output=True, text=True, timeout=10, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    if architecture == "aarch64":
        present = {line.rsplit(":", 1)[0].rsplit(".", 1)[-1] for line in text.splitlines() if line.endswith(": 1")}
        return frozenset(_MACOS_ARM_NAMES[name] for name in present & set(_MACOS_ARM_NAMES)) | {"neon", "fp-armv8"}
    flags = re.findall(r"machdep\.cpu\.(?:leaf7_|ext)?features: (.*)", text)
    if not flags:
        return None
    names = {"avx1.0": "avx", "lahf": "sahf", "avx512ifma": "avx512ifma", "rdrand": "rdrnd", "bmi1": "bmi"}
    found = {names.get(flag, flag) for line in flags for flag in line.lower().split()}
    return frozenset(found | ({"sahf", "cx16"} if "ssse3" in found else set()))


def missing_features(required: Iterable[str], available: frozenset[str] | None = None) -> tuple[str, ...]:
    """The features among ``required`` (levels expanded, a leading ``+`` ignored) that this machine lacks, sorted.

    Args:
        required: LLVM feature names and names from :data:`LEVELS`.
        available: what to compare with; this machine's features by default.

    Returns:
        Missing names; empty as well when this machine's features are unknown.
    """
    present = host_features() if available is None else available
    if present is None:
        return ()
    return tuple(sorted(expand_features(required) - present))


def expand_features(names: Iterable[str]) -> frozenset[str]:
    """Single feature names, with levels such as ``x86-64-v3`` replaced by what they consist of."""
    expanded: set[str] = set()
    for name in names:
        plain = name.removeprefix("+")
        expanded |= LEVELS.get(plain, {plain})
    return frozenset(expanded)


def product_features() -> dict[str, tuple[str, ...] | None]:
    """For each kind of :data:`PRODUCT_FEATURES` those that this machine has; None where its features are unknown."""
    present = host_features()
    return {
        kind: None if present is None else tuple(name for name in names if name in present)
        for kind, names in PRODUCT_FEATURES.items()
    }


def host_level() -> str | None:
    """The highest instruction-set level of :data:`LEVELS` that this machine has, or None."""
    present = host_features()
    prefix = {"x86_64": "x86-64", "aarch64": "armv8"}.get(host_architecture())
    if present is None or prefix is None:
        return None
    return max((n for n, need in LEVELS.items() if n.startswith(prefix) and need <= present), default=None)
