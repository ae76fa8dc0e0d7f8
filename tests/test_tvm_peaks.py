"""The probes of what a machine can do at most: they compile, they run, and their text says what it should."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.backends.tvm import peaks
from trimtab.backends.tvm.peak_probes import INSTRUCTIONS, KINDS, loop_text, read_text, usable_instructions
from trimtab.cpu_features import host_features
from trimtab.errors import BackendError, UsageError

pytest.importorskip("tvm")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Measurements too short to mean anything, and an empty cache, which is returned."""
    monkeypatch.setattr(peaks, "_BURST", 1e-5)
    monkeypatch.setattr(peaks, "_SECONDS", 1e-4)
    monkeypatch.setattr(peaks, "_READ_BYTES", 1 << 20)
    monkeypatch.setattr(peaks, "_PIECE_BYTES", 1 << 17)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "trimtab"


def test_every_instruction_of_this_machine_is_measured(quick: Path) -> None:
    if not usable_instructions(host_features() or ()):
        pytest.skip("this processor has none of the instructions")
    measured = peaks.measure_peaks(2)
    assert measured.threads == 2
    assert measured.read_bandwidth > 0
    assert all(rate > 0 for rates in measured.rates.values() for rate in rates.values())
    assert measured.f32_flops == max(measured.rates["f32"].values())
    (library,) = quick.iterdir()
    written = library.stat().st_mtime_ns
    peaks.measure_peaks(1)
    assert library.stat().st_mtime_ns == written
    assert len(list(quick.iterdir())) == 1


def test_the_slower_of_two_instructions_does_not_count() -> None:
    measured = peaks.Peaks(1, {"f32": {"wide": 3.0, "narrow": 2.0}, "bf16": {}}, 1.0)
    assert (measured.f32_flops, measured.bf16_flops, measured.int8_ops) == (3.0, 0.0, 0.0)


def test_threads_that_take_turns_do_not_add_up() -> None:
    """Two threads of one burst a second each while both run; alone, one did two."""
    first = [0.0, 1.0, 2.0, 3.0, 4.0, 4.5, 5.0]
    second = [0.0, 1.0, 2.0, 3.0, 4.0]
    assert peaks.best_rate([first, second], window=2.0) == pytest.approx(2.0)
    assert peaks.best_rate([first], window=1.0) == pytest.approx(2.0)
    waiting = [0.0, 0.5, 1.0, 4.0, 4.5, 5.0]  # each is quick while the other waits
    other = [0.0, 2.5, 3.0, 3.5, 4.0, 5.0]
    assert peaks.best_rate([waiting, other], window=4.0) < 2.2


def test_sums_fit_the_registers_and_cover_the_latency() -> None:
    # A sum may be renewed after 4 to 6 cycles, in which two units take 8 to 12 instructions; AVX2 has 16 registers.
    for each in INSTRUCTIONS:
        registers = 8 if each.tile else 16 if "avx2" in each.features else 32
        operands = 4 if each.tile else 2
        assert each.accumulators + operands <= registers
        assert each.tile or each.accumulators >= 12
        assert each.kind in KINDS


@pytest.mark.parametrize("architecture", ["x86_64", "aarch64"])
def test_the_probes_of_every_instruction_compile(architecture: str) -> None:
    """Also those this machine lacks: machine code is made, not run."""
    import tvm
    from tvm import ir

    mine = [each for each in INSTRUCTIONS if ("neon" in each.features) == (architecture == "aarch64")]
    features = sorted({feature for each in mine for feature in each.features})
    triple = f"{architecture}-unknown-linux-gnu"
    target = {"kind": "llvm", "mtriple": triple, "mattr": [f"+{feature}" for feature in features]}
    texts = {f"probe{number}": loop_text(each) for number, each in enumerate(mine)} | {"read": read_text(32)}
    module = tvm.compile(ir.IRModule(peaks.carriers(texts)), target=tvm.target.Target(target)).mod
    assembly = module.inspect_source("s")
    for each in mine:
        assert assembly.count(each.name.split()[0]) >= each.accumulators


def test_what_cannot_be_measured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="threads=0"):
        peaks.measure_peaks(0)
    monkeypatch.setattr(peaks, "host_features", set)
    with pytest.raises(BackendError, match="cannot be measured"):
        peaks.measure_peaks(1)
