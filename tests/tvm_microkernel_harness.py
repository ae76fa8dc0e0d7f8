"""Compiles micro-kernels with TVM, here or for AArch64, and calls them with random operands."""

from __future__ import annotations

import ctypes
import struct
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import emulated
from emulated import C_COMPILER
from trimtab.backends.tvm.compiler import link
from trimtab.backends.tvm.microkernels import InstructionSet, MicroKernel

_STORED = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16, "u8": np.uint8, "s8": np.int8, "i32": np.int32}
_AS_WRITTEN = 1  # tvm::CallingConv::kCPackedFunc: the function is not to be given TVM's own calling convention

# Calls one function of a shared library per record of its input, and writes what each leaves in C.
_DRIVER = r"""
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef void (*Kernel)(void*, long, void*, void*, long, long, int, void*, void*, long);
struct Record { char name[64]; long bytes[4]; long lda, ldc, depth, accumulate, group; } record;
int main(int count, char** arguments) {
  void* library = dlopen(arguments[1], RTLD_NOW);
  if (!library) { fputs(dlerror(), stderr); return 1; }
  while (fread(&record, sizeof record, 1, stdin) == 1) {
    void* data[4];
    for (int i = 0; i < 4; ++i) {
      data[i] = aligned_alloc(64, (record.bytes[i] + 127) / 64 * 64);
      if (fread(data[i], 1, record.bytes[i], stdin) != (size_t)record.bytes[i]) return 2;
    }
    Kernel kernel = (Kernel)dlsym(library, record.name);
    if (!kernel) { fprintf(stderr, "no %s\n", record.name); return 3; }
    kernel(data[0], record.lda, data[1], data[2], record.ldc, record.depth, (int)record.accumulate, data[1], data[3],
           record.group);
    fwrite(data[2], 1, record.bytes[2], stdout);
    for (int i = 0; i < 4; ++i) free(data[i]);
  }
  return 0;
}
"""


def compile_kernels(kernels: Iterable[MicroKernel], target: dict[str, Any]) -> Any:
    """TVM's executable with a C function ``call_<kernel>`` per kernel, which sets up, computes and tears down.

    All take ``(A, lda, B, C, ldc, depth, accumulate, next, scales, group)``.
    """
    import tvm
    from tvm import ir, tirx

    functions = {}
    for kernel in kernels:
        types = {"a": "handle", "lda": "int64", "b": "handle", "c": "handle", "ldc": "int64", "depth": "int64",
                 "accumulate": "int32", "next": "handle", "scales": "handle", "group": "int64"}  # fmt: skip
        variables = [tirx.Var(name, type) for name, type in types.items()]
        used = variables if has_scales(kernel) else variables[:-2]
        calls = [tirx.call_extern("int32", symbol) for symbol in (kernel.setup, kernel.teardown) if symbol]
        calls.insert(1, tirx.call_extern("int32", kernel.name, *used))
        body = tirx.SeqStmt([tirx.Evaluate(call) for call in calls]) if len(calls) > 1 else tirx.Evaluate(calls[0])
        body = tirx.AttrStmt(tirx.const(0, "int32"), "pragma_import_llvm", ir.StringImm(kernel.text), body)
        name = f"call_{kernel.name}"
        attributes = {"global_symbol": name, "calling_conv": _AS_WRITTEN}
        functions[name] = tirx.PrimFunc(variables, body).with_attr(attributes)
    return tvm.compile(ir.IRModule(functions), target=tvm.target.Target(target))


def has_scales(kernel: MicroKernel) -> bool:
    """Whether the kernel multiplies f32 by integers that have a scale for each group."""
    return kernel.a_dtype == "f32" and kernel.b_dtype in ("i4", "u4", "s8", "u8")


def target_of(features: Sequence[str], architecture: str) -> dict[str, Any]:
    """A TVM target that has exactly ``features``."""
    cpu = {"x86_64": "x86-64", "aarch64": "generic"}[architecture]
    return {"kind": "llvm", "mtriple": f"{architecture}-unknown-linux-gnu", "mcpu": cpu, "num-cores": 1,
            "mattr": [f"+{feature}" for feature in features]}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Operands of one call, as the kernel wants them, and what it must leave in C.

    ``scales`` has a row for each group of the depth, and none for kernels without them.
    """

    kernel: MicroKernel
    depth: int
    accumulate: int
    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    scales: np.ndarray
    expected: np.ndarray
    tolerance: np.ndarray

    @property
    def lda(self) -> int:
        return self.a.shape[1]

    @property
    def ldc(self) -> int:
        return self.c.shape[1]

    @property
    def group(self) -> int:
        return self.depth // max(1, len(self.scales))

    def check(self, result: np.ndarray) -> None:
        """Every element within its tolerance; what lies right of the tile is unchanged."""
        error = np.abs(result.astype(np.float64) - self.expected)
        worst = np.unravel_index(np.argmax(error - self.tolerance), error.shape)
        assert (error <= self.tolerance).all(), (
            f"{self.kernel.name}, depth {self.depth}, accumulate {self.accumulate}: {result[worst]} instead of "
            f"{self.expected[worst]} at {tuple(map(int, worst))}"
        )


def random_case(kernel: MicroKernel, depth: int, accumulate: int, rng: np.random.Generator) -> Case:
    """A case with rows of A and C longer than the tile; half of the integers are extreme ones."""
    lda, ldc = depth + 3, kernel.columns + 5
    a, a_values = _operand(kernel.a_dtype, (kernel.rows, lda), rng)
    b, b_values = _operand(kernel.b_dtype, (depth, kernel.columns), rng)
    c, _ = _operand(kernel.c_dtype, (kernel.rows, ldc), rng)
    scales = np.zeros((0, kernel.columns), np.float32)
    if has_scales(kernel):
        steps = depth // kernel.group
        groups = int(rng.choice([n for n in range(1, steps + 1) if steps % n == 0]))
        scales = rng.uniform(0.5, 2, (groups, kernel.columns)).astype(np.float32)
        b_values = b_values * np.repeat(scales, depth // groups, axis=0)
    inside = (slice(None), slice(kernel.columns))
    expected, tolerance = c.astype(np.float64), np.zeros(c.shape)
    start = expected[inside] * accumulate
    expected[inside] = a_values[:, :depth] @ b_values + start
    if kernel.c_dtype == "f32":
        terms = np.abs(a_values[:, :depth]) @ np.abs(b_values) + np.abs(start)
        tolerance[inside] = (depth + 4) * np.finfo(np.float32).eps * terms
    return Case(kernel, depth, accumulate, a, pack(b, kernel), c, scales, expected, tolerance)


def pack(b: np.ndarray, kernel: MicroKernel) -> np.ndarray:
    """[depth, columns] as the panel of ``kernel``."""
    depth, columns = b.shape
    panel = b.reshape(depth // kernel.group, kernel.group, columns).transpose(0, 2, 1).copy()
    if kernel.b_dtype in ("i4", "u4"):
        return ((panel[:, :, 0] & 15) | (panel[:, :, 1] << 4)).astype(np.uint8)
    return panel


def _operand(dtype: str, shape: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random elements as they are stored, and their values in float64."""
    if dtype in ("i4", "u4"):
        stored = (rng.integers(0, 16, shape) - (8 if dtype == "i4" else 0)).astype(np.int8)
    elif dtype in ("u8", "s8"):
        limits = np.iinfo(_STORED[dtype])
        stored = rng.integers(limits.min, limits.max + 1, shape)
        extreme = rng.choice([limits.min, limits.max, 0, 127], shape)
        stored = np.where(rng.random(shape) < 0.5, extreme, stored).astype(_STORED[dtype])
    elif dtype == "i32":
        stored = rng.integers(-(2**20), 2**20, shape).astype(np.int32)
    elif dtype == "bf16":
        stored = (rng.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return stored, (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    else:
        stored = rng.standard_normal(shape).astype(_STORED[dtype])
    return stored, stored.astype(np.float64)


class HostKernels:
    """Kernels compiled for this machine."""

    def __init__(self, kernels: Sequence[MicroKernel], target: dict[str, Any], directory: Path) -> None:
        path = directory / "kernels.so"
        path.write_bytes(link(compile_kernels(kernels, target), "cc"))
        self.library = ctypes.CDLL(str(path))

    def run(self, case: Case) -> np.ndarray:
        function = self.library[f"call_{case.kernel.name}"]
        pointer, long = ctypes.c_void_p, ctypes.c_int64
        function.argtypes = [pointer, long, pointer, pointer, long, long, ctypes.c_int32, pointer, pointer, long]
        function.restype = None
        b, c = aligned(case.b), case.c.copy()
        function(case.a.ctypes.data, case.lda, b.ctypes.data, c.ctypes.data, case.ldc, case.depth, case.accumulate,
                 b.ctypes.data, case.scales.ctypes.data, case.group)  # fmt: skip
        return c


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that starts at a multiple of 64 bytes."""
    space = np.zeros(array.nbytes + 64, np.uint8)
    start = -space.ctypes.data % 64
    copy = space[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def run_emulated(cases: Sequence[Case], target: dict[str, Any], directory: Path) -> list[np.ndarray]:
    """What the cases leave in C when compiled for AArch64 and run by QEMU."""
    kernels = {case.kernel.name: case.kernel for case in cases}
    library, driver = directory / "kernels.so", directory / "driver"
    library.write_bytes(link(compile_kernels(kernels.values(), target), C_COMPILER))
    (directory / "driver.c").write_text(_DRIVER)
    subprocess.run([C_COMPILER, "-O1", "-o", str(driver), str(directory / "driver.c"), "-ldl"], check=True)
    records = []
    for case in cases:
        operands = [np.ascontiguousarray(x).tobytes() for x in (case.a, case.b, case.c, case.scales)]
        name = f"call_{case.kernel.name}".encode()
        sizes = [len(operand) for operand in operands]
        numbers = case.lda, case.ldc, case.depth, case.accumulate, case.group
        records += [struct.pack("64s9q", name, *sizes, *numbers), *operands]
    stdout = emulated.run(driver, library, stdin=b"".join(records))
    results, offset = [], 0
    for case in cases:
        results.append(np.frombuffer(stdout, case.c.dtype, case.c.size, offset).reshape(case.c.shape))
        offset += case.c.nbytes
    return results


def distinct_kinds(sets: Iterable[InstructionSet]) -> list[tuple[InstructionSet, str]]:
    """Each way to multiply on each vector length once: instruction sets share what the smaller one has."""
    found: dict[Any, tuple[InstructionSet, str]] = {}
    for isa in sets:
        for kind, product in isa.products.items():
            found.setdefault((isa.lanes, product, kind), (isa, kind))
    return list(found.values())
