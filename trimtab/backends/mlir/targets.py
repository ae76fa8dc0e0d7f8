"""Targets by name: what IREE's compiler is told, and what a machine needs to run the code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trimtab.backends.cpu_targets import CPU_TARGETS, LINUX_RISCV, CpuTarget, baseline, native
from trimtab.errors import UsageError


@dataclass(frozen=True)
class TargetSpec:
    """One target.

    Attributes:
        name: what users write, e.g. ``aarch64``.
        triple: what the artifact calls it: an LLVM triple for processors, else the kind of code.
        flags: for ``iree-compile``.
        preferred: further flags that make the code faster, and that the compiler refuses for some modules.
        features: CPU features the code needs, in LLVM's names.
        driver: the driver of IREE's runtime that runs the code.
        needs: what a machine must have to run it, for people.
    """

    name: str
    triple: str
    flags: tuple[str, ...]
    features: tuple[str, ...] = ()
    driver: str = "local-task"
    needs: str = ""
    preferred: tuple[str, ...] = ()


# Packs the operands of matrix products for the registers. IREE 3.13 cannot with some sizes known at run time only;
# its code for packed operands on RISC-V is so large that compiling takes 15 times as long.
_DATA_TILING = ("--iree-opt-data-tiling",)
_LOCAL = "--iree-hal-target-device=local"


def _processor(cpu: CpuTarget) -> TargetSpec:
    flags = [
        _LOCAL,
        "--iree-hal-local-target-device-backends=llvm-cpu",
        f"--iree-llvmcpu-target-triple={cpu.triple}",
        f"--iree-llvmcpu-target-cpu={cpu.cpu}",
        f"--iree-llvmcpu-target-cpu-features={','.join('+' + feature for feature in cpu.features)}",
    ]
    if cpu.abi:
        flags.append(f"--iree-llvmcpu-target-abi={cpu.abi}")
    return TargetSpec(
        cpu.name, cpu.triple, tuple(flags), cpu.features, preferred=() if cpu.triple == LINUX_RISCV else _DATA_TILING
    )


def _device(name: str, device: str, driver: str, needs: str, *flags: str) -> TargetSpec:
    return TargetSpec(name, name, (f"--iree-hal-target-device={device}", *flags), driver=driver, needs=needs)


_DEVICES = [
    TargetSpec("vmvx", "vmvx", (_LOCAL, "--iree-hal-local-target-device-backends=vmvx")),
    _device("vulkan-spirv", "vulkan", "vulkan", "a Vulkan 1.1 driver", "--iree-vulkan-target=vp_android_baseline_2022"),
    _device("metal-spirv", "metal", "metal", "macOS or iOS"),
    _device("rocm-gfx942", "hip", "hip", "an AMD GPU and ROCm", "--iree-rocm-target=gfx942"),
    *(
        _device(f"cuda-{sm}", "cuda", "cuda", "an NVIDIA GPU and its driver", f"--iree-cuda-target={sm}")
        for sm in ("sm_80", "sm_86", "sm_89")
    ),
]

DEVICE_TARGETS: Mapping[str, TargetSpec] = {spec.name: spec for spec in _DEVICES}
"""Targets that are not a processor of a machine's main memory."""


def target_names() -> list[str]:
    """Names that :func:`find_target` accepts."""
    return ["native", *CPU_TARGETS, *DEVICE_TARGETS]


def find_target(name: str = "") -> TargetSpec:
    """The target called ``name``; the portable baseline of this machine's architecture when empty.

    Raises:
        UsageError: there is no such target.
    """
    if name in DEVICE_TARGETS:
        return DEVICE_TARGETS[name]
    cpu = native() if name == "native" else CPU_TARGETS.get(name or baseline())
    if cpu is None:
        raise UsageError("unknown target", values={"target": name, "known": target_names()},
                         fix="use one of the known targets; `native` means this machine")  # fmt: skip
    return _processor(cpu)
