"""CPU features by their LLVM names."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab import cpu_features as cpu
from trimtab.backends.cpu_targets import CPU_TARGETS, LINUX_ARM, LINUX_RISCV

V3 = "fpu sse sse2 pni ssse3 cx16 sse4_1 sse4_2 movbe popcnt xsave avx f16c lahf_lm abm bmi1 avx2 bmi2 fma"
X86 = f"processor : 0\nflags\t\t: {V3} avx512_vnni\n\nprocessor : 1\nflags\t\t: {V3}\n"
ARM = "processor : 0\nFeatures : fp asimd evtstrm aes crc32 atomics fphp asimdhp asimdrdm asimddp\n"


def test_x86_features_are_those_of_all_cores() -> None:
    features = cpu.parse_cpuinfo(X86, "x86_64")
    assert features is not None
    assert features >= cpu.LEVELS["x86-64-v3"]
    assert "avx512vnni" not in features  # the second core does not have it


def test_arm_features() -> None:
    features = cpu.parse_cpuinfo(ARM, "aarch64")
    assert features is not None
    assert features >= cpu.LEVELS["armv8.2-a"] | {"dotprod", "fullfp16"}


def test_riscv_features() -> None:
    features = cpu.parse_cpuinfo("isa : rv64gcv_zba_zbb\n", "riscv64")
    assert features is not None
    assert features >= {"i", "m", "a", "f", "d", "c", "v", "zba", "zbb"}


def test_linux_names_all_that_portable_targets_need() -> None:
    """Else their code would be refused on every machine."""
    told = {
        LINUX_ARM: "Features : fp asimd evtstrm aes crc32 atomics fphp asimdhp asimdrdm asimddp i8mm bf16",
        LINUX_RISCV: "isa : rv64imafdcv_zicsr_zifencei",
    }
    for triple, line in told.items():
        found = cpu.parse_cpuinfo(line, triple.split("-")[0])
        for target in CPU_TARGETS.values():
            assert target.triple != triple or not cpu.missing_features(target.features, found), target.name


def test_no_features_listed_means_unknown() -> None:
    assert cpu.parse_cpuinfo("processor : 0\n", "x86_64") is None


def test_missing_features_are_sorted_and_levels_expanded() -> None:
    present = cpu.LEVELS["x86-64-v3"]
    assert cpu.missing_features(["x86-64-v3", "+avx2"], present) == ()
    assert cpu.missing_features(["x86-64-v4", "amx-int8"], present) == (
        "amx-int8",
        *sorted(cpu.LEVELS["x86-64-v4"] - present),
    )


def test_features_that_the_system_refuses_are_named() -> None:
    found = frozenset({"avx2", "amx-tile", "amx-bf16"})
    assert cpu.refused_features(found, lambda: False) == {"amx-tile", "amx-bf16"}
    assert cpu.refused_features(found, lambda: True) == frozenset()


def test_permission_is_asked_for_what_needs_it_only() -> None:
    def must_not_be_asked() -> bool:
        raise AssertionError("the processor has no AMX")

    assert cpu.refused_features(frozenset({"avx2"}), must_not_be_asked) == frozenset()


REFUSE_TILES = """
import ctypes, struct

def refuse_tiles():
    # A filter of system calls (seccomp): arch_prctl(ARCH_REQ_XCOMP_PERM, ...) fails with EPERM, all others pass.
    load, equal, end = 0x20, 0x15, 0x06
    steps = [(load, 0, 0, 0), (equal, 0, 3, 158), (load, 0, 0, 16), (equal, 0, 1, 0x1023),
             (end, 0, 0, 0x00050001), (end, 0, 0, 0x7FFF0000)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(code)))
    prctl = ctypes.CDLL(None).prctl
    assert prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert prctl(22, 2, ctypes.c_void_p(ctypes.addressof(program)), 0, 0) == 0  # PR_SET_SECCOMP
"""


def in_a_process_without_tiles(program: str) -> str:
    """What a program prints where the system refuses AMX; skips the test where that cannot be arranged."""
    if "amx-tile" not in (cpu.host_features() or ()):
        pytest.skip("this process may not use AMX, so there is nothing to refuse")
    if subprocess.run([sys.executable, "-c", f"{REFUSE_TILES}\nrefuse_tiles()"], check=False).returncode:
        pytest.skip("this system does not let a process filter its system calls")
    command = [sys.executable, "-c", f"{REFUSE_TILES}\nrefuse_tiles()\n{program}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_code_for_amx_is_refused_where_the_system_refuses_amx() -> None:
    printed = in_a_process_without_tiles("""
from trimtab.cpu_features import host_system
from trimtab.errors import ArtifactError
from trimtab.runtime.manifest import CodeVariant
from trimtab.runtime.variants import select_variant
plain = CodeVariant(f"x86_64-{host_system()}", "plain")
tiles = CodeVariant(f"x86_64-{host_system()}", "tiles", features=("avx2", "amx-tile", "amx-bf16"))
print(select_variant([plain, tiles], "m.trim").library)
try:
    select_variant([tiles], "m.trim")
except ArtifactError as error:
    print(error)
""")
    assert printed.startswith("plain\n")
    assert "missing=amx-bf16 amx-tile" in printed
    assert "the system does not let this process use them" in printed


def test_code_for_this_machine_leaves_amx_out_where_the_system_refuses_it() -> None:
    pytest.importorskip("tvm", reason="the TVM backend is not installed")
    printed = in_a_process_without_tiles("""
from trimtab.backends.tvm.targets import find_target
spec = find_target("native")
print(any("amx" in name for name in spec.features), [each.name for each in spec.machine.instruction_sets])
""")
    assert printed.startswith("False ")
    assert "amx" not in printed


def test_nothing_is_missing_where_features_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "host_features", lambda: None)
    assert cpu.missing_features(["amx-int8"]) == ()


def test_this_machine() -> None:
    assert cpu.host_architecture() == platform.machine().lower()
    features = cpu.host_features()
    if cpu.host_architecture() == "x86_64" and Path("/proc/cpuinfo").exists():
        assert features is not None
        assert "sse2" in features
        level = cpu.host_level()
        assert level is not None
        assert cpu.LEVELS[level] <= features


@pytest.mark.parametrize(
    ("triple", "expected"),
    [
        ("x86_64-unknown-linux-gnu", ("x86_64", "linux")),
        ("aarch64-linux-gnu", ("aarch64", "linux")),
        ("arm64-apple-macosx14.0.0", ("aarch64", "macos")),
        ("arm64-apple-darwin", ("aarch64", "macos")),
        ("AMD64-pc-windows-msvc", ("x86_64", "windows")),
        ("riscv64", ("riscv64", None)),
        ("x86_64-unknown-none-elf", ("x86_64", None)),
    ],
)
def test_triples_are_split(triple: str, expected: tuple[str, str | None]) -> None:
    assert cpu.split_triple(triple) == expected
