"""Micro-kernels compute exactly what they say, on every instruction set that can be run, and keep to the registers."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from tvm_microkernel_harness import (
    Case,
    HostKernels,
    compile_kernels,
    distinct_kinds,
    pack,
    random_case,
    run_emulated,
    target_of,
)

from emulated import missing_tools
from trimtab.backends.tvm.microkernels import (
    AMX,
    AVX2,
    AVX512,
    AVX512_BF16,
    AVX512_VNNI,
    AVX_VNNI,
    NEON,
    NEON_DOTPROD,
    NEON_I8MM,
    PORTABLE,
    InstructionSet,
    MicroKernel,
    RegisterTile,
    microkernel,
    preferred_tiles,
)
from trimtab.backends.tvm.microkernels.amx import TileProduct
from trimtab.backends.tvm.microkernels.products import MatrixProduct
from trimtab.backends.tvm.microkernels.tiles import fits, tallest
from trimtab.cpu_features import host_architecture, missing_features
from trimtab.errors import BackendError

X86 = (PORTABLE, AVX2, AVX_VNNI, AVX512, AVX512_VNNI, AVX512_BF16, AMX)
ARM = (PORTABLE, NEON, NEON_DOTPROD, NEON_I8MM)
# Below, in and beyond the unrolled part of the loop; the last also beyond a register of A.
STEPS = (1, 3, 4, 19, 38)


def kernels_of(isa: InstructionSet, kind: str) -> list[MicroKernel]:
    """Tiles of every width with one row, half of the rows and all of them; where rows matter most, every height."""
    every_height = kind == "f32" or isinstance(isa.products[kind], TileProduct | MatrixProduct)
    tiles: set[RegisterTile] = set()
    for vectors in range(1, 5):
        if (tile := tallest(isa, kind, vectors)) is not None:
            heights = range(1, tile.rows + 1) if vectors == 1 and every_height else (1, (tile.rows + 1) // 2, tile.rows)
            tiles.update(RegisterTile(rows, vectors) for rows in heights)
    kernels = [microkernel(isa, kind, tile.rows, tile.vectors * isa.lanes) for tile in tiles]
    return [*kernels, *(microkernel(isa, kind, rows, isa.lanes, sharing=1) for rows in (1, 2, 3))]


def cases_of(kernels: list[MicroKernel], seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    return [
        random_case(kernel, steps * kernel.depth_step, number % 2, rng)
        for kernel in kernels
        for number, steps in enumerate(STEPS)
    ]


@pytest.mark.parametrize(("isa", "kind"), [pytest.param(*x, id=f"{x[0].name}-{x[1]}") for x in distinct_kinds(X86)])
def test_results_on_this_machine(isa: InstructionSet, kind: str, tmp_path: Path) -> None:
    kernels = kernels_of(isa, kind)
    if host_architecture() != "x86_64":
        pytest.skip("this machine is no x86-64")
    if missing := missing_features(kernels[0].features):
        pytest.skip(f"this machine lacks {', '.join(missing)}")
    compiled = HostKernels(kernels, target_of(kernels[0].features, "x86_64"), tmp_path)
    for case in cases_of(kernels, 1):
        case.check(compiled.run(case))


@pytest.mark.skipif(bool(missing_tools()), reason=f"code for AArch64 cannot be run here: {missing_tools()}")
def test_results_on_aarch64(tmp_path: Path) -> None:
    features = {feature for isa in ARM for product in isa.products.values() for feature in product.features}
    kernels = [kernel for isa, kind in distinct_kinds(ARM) for kernel in kernels_of(isa, kind)]
    cases = cases_of(kernels, 2)
    target = target_of(("neon", *sorted(features)), "aarch64")
    for case, result in zip(cases, run_emulated(cases, target, tmp_path), strict=True):
        case.check(result)


@pytest.mark.parametrize("isa", [PORTABLE, AVX2, AVX512], ids=lambda isa: isa.name)
def test_every_half_is_converted_exactly(isa: InstructionSet, tmp_path: Path) -> None:
    kernel = microkernel(isa, "f32*f16", 1, isa.lanes)
    if host_architecture() != "x86_64" or missing_features(kernel.features):
        pytest.skip(f"this machine cannot run {isa.name}")
    compiled = HostKernels([kernel], target_of(kernel.features, "x86_64"), tmp_path)
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(-1, isa.lanes)
    results = [compiled.run(half_times_one(kernel, row[None])) for row in halves]
    np.testing.assert_array_equal(np.concatenate(results), halves.astype(np.float32))


def half_times_one(kernel: MicroKernel, b: np.ndarray) -> Case:
    ones, nothing = np.ones((1, 1), np.float32), np.zeros((0, 0), np.float32)
    return Case(kernel, 1, 0, ones, b, np.empty(b.shape, np.float32), nothing, nothing, nothing)


@pytest.mark.parametrize("isa", [PORTABLE, AVX2, AVX_VNNI, AVX512, AVX512_VNNI, AMX], ids=lambda isa: isa.name)
def test_extreme_integers_do_not_saturate(isa: InstructionSet, tmp_path: Path) -> None:
    kernels = [microkernel(isa, kind, 4, isa.lanes) for kind in ("u8*s8", "s8*s8")]
    if host_architecture() != "x86_64" or missing_features(kernels[0].features):
        pytest.skip(f"this machine cannot run {isa.name}")
    compiled = HostKernels(kernels, target_of(kernels[0].features, "x86_64"), tmp_path)
    columns = np.resize(np.array([-128, 127, 0, -1], np.int8), isa.lanes)
    for kernel, dtype in zip(kernels, (np.uint8, np.int8), strict=True):
        rows = np.array([0, 127, 128, 255], np.uint8).view(dtype)
        depth = 4 * kernel.depth_step
        a, b = np.repeat(rows[:, None], depth, axis=1), pack(np.repeat(columns[None], depth, axis=0), kernel)
        nothing = np.zeros((0, 0), np.float32)
        case = Case(kernel, depth, 0, a, b, np.empty((4, isa.lanes), np.int32), nothing, nothing, nothing)
        expected = depth * np.outer(rows.astype(np.int64), columns.astype(np.int64))
        np.testing.assert_array_equal(compiled.run(case), expected)


@pytest.mark.parametrize(("kind", "bytes"), [("f32", 4), ("f32*f16", 2), ("u8*s8", 1)])
def test_tiles_that_share_a_panel_ask_for_all_of_it(kind: str, bytes: int) -> None:
    for sharing in (2, 3, 100):
        kernel = microkernel(AVX512_VNNI, kind, 1, 64, sharing)
        lines = kernel.prefetch_depth * kernel.columns * bytes / 64
        assert kernel.prefetch_lines == max(1, math.ceil(lines / sharing))
        assert kernel.text.count("call void @llvm.prefetch.p0") == kernel.prefetch_lines
    for rows, parts in (1, 2), (2, 1), (5, 1):
        alone = microkernel(AVX512_VNNI, kind, rows, 64, sharing=1)
        assert alone.prefetch_depth == 0
        assert alone.text.count("call void @llvm.prefetch.p0") == lines * parts


@pytest.mark.parametrize("isa", [AVX2, AVX_VNNI, AVX512, AVX512_VNNI, AVX512_BF16], ids=lambda isa: isa.name)
def test_accumulators_stay_in_registers(isa: InstructionSet) -> None:
    for kind, product in isa.products.items():
        kernels = [microkernel(isa, kind, tile.rows, tile.vectors * isa.lanes) for tile in preferred_tiles(isa, kind)]
        features = (*isa.features, *product.features)
        for kernel in kernels:
            assembly = compile_kernels([kernel], target_of(features, "x86_64")).mod.inspect_source("asm")
            loops = innermost_multiplying_loops(assembly)
            assert loops, f"{kernel.name} has no loop that multiplies"
            for loop in loops:
                stores = [line for line in loop if re.match(r"\s+vmov\w+\s+%[xyz]mm\d+, [^%]*\(", line)]
                assert not stores, f"{kernel.name} stores vectors in its loop: {stores}"


def innermost_multiplying_loops(assembly: str) -> list[list[str]]:
    """Lines from a label to the jump back to it, where they multiply and contain no other such loop."""
    lines = assembly.splitlines()
    labels = {line[:-1]: number for number, line in enumerate(lines) if re.match(r"\.L\w+:$", line)}
    ranges = []
    for number, line in enumerate(lines):
        jump = re.match(r"\s+j\w+\s+(\.L\w+)", line)
        if jump and labels.get(jump[1], number) < number:
            ranges.append((labels[jump[1]], number))
    inner = [r for r in ranges if not any(o != r and o[0] >= r[0] and o[1] <= r[1] for o in ranges)]
    loops = [lines[first : last + 1] for first, last in inner]
    return [loop for loop in loops if any(re.search(r"\sv(fmadd|pmaddwd|pdpbusd|dpbf16ps)", line) for line in loop)]


def test_several_functions_may_use_one_kernel(tmp_path: Path) -> None:
    kernels = [microkernel(PORTABLE, "f32", 2, 8), microkernel(PORTABLE, "f32", 3, 8)]
    if host_architecture() != "x86_64":
        pytest.skip("this machine is no x86-64")
    compiled = HostKernels([*kernels, *kernels], target_of((), "x86_64"), tmp_path)
    for case in cases_of(kernels, 3):
        case.check(compiled.run(case))


def test_smaller_tiles_fit_too() -> None:
    for isa in (*X86, *ARM):
        for kind in isa.products:
            for tile in preferred_tiles(isa, kind):
                assert all(fits(isa, kind, RegisterTile(rows, tile.vectors)) for rows in range(1, tile.rows + 1))


@pytest.mark.parametrize(("kind", "rows", "columns", "message"), [
    ("f64", 1, 16, "multiplies certain kinds"),
    ("f32", 1, 24, "multiples of 16"),
    ("f32", 0, 16, "multiples of 16"),
    ("f32", 12, 48, "must fit"),
])  # fmt: skip
def test_refused_tiles(kind: str, rows: int, columns: int, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        microkernel(AVX512, kind, rows, columns)
