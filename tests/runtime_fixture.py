"""Small artifacts for the runtime's tests, built straight with TVM: the tests do not depend on the compiler.

The model has two inputs ``x: f32[batch, 8]`` and ``scale: f32[batch, 1]``, weights ``w: f32[8, 4]`` and ``b: f32[4]``,
and two outputs: ``z = (x @ w + b) * scale`` and ``y = relu(z)``.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.cpu_features import host_architecture
from trimtab.runtime.container import ArtifactWriter
from trimtab.runtime.manifest import (
    CHECK_ENTRY,
    MODULE_ENTRY,
    WEIGHTS_ENTRY,
    CodeVariant,
    Manifest,
    SymbolRange,
    TensorSpec,
    Tolerance,
    WeightEntry,
)
from trimtab.runtime.samples import Sample, encode_samples
from trimtab.tensor_file import TensorSource, write_tensors

LIBRARY = "code/host/model.so"
RUNTIME = "code/host/libtvm_runtime.so"
TARGET = f"{host_architecture()}-unknown-linux-gnu"

WEIGHTS = {
    "w": np.random.default_rng(1).standard_normal((8, 4), np.float32),
    "b": np.random.default_rng(2).standard_normal(4, np.float32),
}
MANIFEST = Manifest(
    name="two outputs",
    inputs=(TensorSpec("x", "f32", ("batch", 8)), TensorSpec("scale", "f32", ("batch", 1))),
    outputs=(TensorSpec("z", "f32", ("batch", 4)), TensorSpec("y", "f32", ("batch", 4))),
    symbols=(SymbolRange("batch", 1, 64),),
    weights=(WeightEntry("w", "f32", (8, 4)), WeightEntry("b", "f32", (4,))),
    variants=(
        CodeVariant(
            target=TARGET,
            library=LIBRARY,
            runtime=(RUNTIME,),
            requires={name: importlib.metadata.version(name) for name in ("apache-tvm", "apache-tvm-ffi")},
        ),
    ),
    tolerance=Tolerance(rtol=1e-5, atol=1e-6),
)


def expected(x: np.ndarray[Any, Any], scale: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], ...]:
    """What the model computes, in numpy."""
    z = (x @ WEIGHTS["w"] + WEIGHTS["b"]) * scale
    return z, np.maximum(z, 0)


def random_inputs(batch: int = 3, seed: int = 0) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Inputs ``x`` and ``scale``."""
    generator = np.random.default_rng(seed)
    return generator.standard_normal((batch, 8), np.float32), generator.standard_normal((batch, 1), np.float32)


def samples() -> list[Sample]:
    """Two samples of different batch sizes."""
    inputs = [random_inputs(batch, seed=batch) for batch in (2, 5)]
    return [Sample(pair, expected(*pair)) for pair in inputs]


@cache
def model_library() -> bytes:
    """The shared library of the model; the product with ``scale`` is a loop over rows that runs on all threads."""
    from tvm.script import ir as I
    from tvm.script import relax as R
    from tvm.script import tirx as T

    @I.ir_module
    class Module:
        @T.prim_func(private=True, s_tir=True)
        def scale_rows(a: T.handle, s: T.handle, o: T.handle):
            T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
            rows = T.int64()
            rows_in = T.match_buffer(a, (rows, 4), "float32")
            factors = T.match_buffer(s, (rows, 1), "float32")
            rows_out = T.match_buffer(o, (rows, 4), "float32")
            for i in T.parallel(rows):
                for j in range(4):
                    with T.sblock("scale_rows"):
                        row, column = T.axis.remap("SS", [i, j])
                        rows_out[row, column] = rows_in[row, column] * factors[row, 0]

        @R.function
        def main(
            x: R.Tensor(("batch", 8), "float32"),
            scale: R.Tensor(("batch", 1), "float32"),
            w: R.Tensor((8, 4), "float32"),
            b: R.Tensor((4,), "float32"),
        ):
            batch = T.int64()
            cls = Module
            with R.dataflow():
                linear = R.add(R.matmul(x, w), b)
                z = R.call_tir(cls.scale_rows, (linear, scale), out_ty=R.Tensor((batch, 4), "float32"))
                y = R.nn.relu(z)
                R.output(z, y)
            return (z, y)

    return compile_library(Module)


def compile_library(module: Any, exec_mode: str = "bytecode") -> bytes:
    """Compile a Relax module for this machine's baseline; returns the bytes of its shared library."""
    import tvm

    target = tvm.target.Target({"kind": "llvm", **({"mcpu": "x86-64-v3"} if host_architecture() == "x86_64" else {})})
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.so"
        tvm.relax.build(module, target=target, exec_mode=exec_mode).export_library(str(path))
        return path.read_bytes()


@cache
def passthrough_library(exec_mode: str = "bytecode") -> bytes:
    """A model that returns its input ``x: f32[2]`` twice, its weight ``w: f32[2]``, and ``x + w``."""
    from tvm.script import ir as I
    from tvm.script import relax as R

    @I.ir_module
    class Module:
        @R.function
        def main(x: R.Tensor((2,), "float32"), w: R.Tensor((2,), "float32")):
            total = R.add(x, w)
            return (x, x, w, total)

    return compile_library(Module, exec_mode)


@cache
def cast_library() -> bytes:
    """A model from ``h: bf16[n]``, ``k: i64[n]``, ``m: bool[n]`` to ``where(m, h, -h)`` and ``2 * k``."""
    from tvm.script import ir as I
    from tvm.script import relax as R

    @I.ir_module
    class Module:
        @R.function
        def main(h: R.Tensor(("n",), "bfloat16"), k: R.Tensor(("n",), "int64"), m: R.Tensor(("n",), "bool")):
            chosen = R.where(m, h, R.negative(h))
            double = R.add(k, k)
            return (chosen, double)

    return compile_library(Module)


@cache
def runtime_library() -> bytes:
    """The TVM runtime library of the installed package."""
    import importlib.util

    spec = importlib.util.find_spec("tvm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return (Path(spec.submodule_search_locations[0]) / "lib" / "libtvm_runtime.so").read_bytes()


def write_artifact(
    path: Path,
    *,
    library: bytes | None = None,
    weights: dict[str, np.ndarray[Any, Any]] | None = None,
    change: Callable[[Manifest], Manifest] = lambda manifest: manifest,
    carried: bool = True,
    check: bytes | None = None,
) -> Manifest:
    """Write an artifact of the model above, or of another one given its library, weights and manifest."""
    manifest = MANIFEST
    if not carried:
        manifest = replace(manifest, variants=tuple(replace(v, runtime=()) for v in manifest.variants))
    with ArtifactWriter(path) as writer:
        writer.add_bytes(MODULE_ENTRY, b"module two_outputs\n")
        writer.add_bytes(LIBRARY, model_library() if library is None else library)
        if carried:
            writer.add_bytes(RUNTIME, runtime_library())
        with writer.open_entry(WEIGHTS_ENTRY) as file:
            tensors = WEIGHTS if weights is None else weights
            write_tensors(file, {name: TensorSource("f32", array.shape, array) for name, array in tensors.items()})
        writer.add_bytes(CHECK_ENTRY, encode_samples(samples()) if check is None else check)
        return writer.finish(change(manifest))
