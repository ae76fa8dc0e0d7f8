"""CPU features by their LLVM names."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from trimtab.runtime import cpu

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


def test_no_features_listed_means_unknown() -> None:
    assert cpu.parse_cpuinfo("processor : 0\n", "x86_64") is None


def test_missing_features_are_sorted_and_levels_expanded() -> None:
    present = cpu.LEVELS["x86-64-v3"]
    assert cpu.missing_features(["x86-64-v3", "+avx2"], present) == ()
    assert cpu.missing_features(["x86-64-v4", "amx-int8"], present) == (
        "amx-int8",
        *sorted(cpu.LEVELS["x86-64-v4"] - present),
    )


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
