"""Whole models through the TVM backend: static and symbolic shapes, repeats, tied weights, no compiler at run time."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from tvm_harness import Compiled

from trimtab.ir import Builder, DType, Graph, Module, TensorType, interpret, ops, symbol

pytest.importorskip("tvm")
BATCH, SEQ = symbol("batch", 1, 16), symbol("seq", 1, 300)


def f32(*shape: object) -> TensorType:
    return TensorType(DType.F32, shape)  # type: ignore[arg-type]


def _agree(module: Module, compiled: Compiled, *inputs: torch.Tensor, tolerance: float = 1e-5) -> None:
    for mine, reference in zip(compiled(*inputs), interpret(module, list(inputs)), strict=True):
        assert mine.shape == reference.shape
        scale = max(1.0, float(reference.abs().max()))
        torch.testing.assert_close(mine, reference, rtol=tolerance, atol=tolerance * scale)


def _block(
    b: Builder, x: object, width: int, heads: int, batch: object, length: object, name: str, rand: object
) -> object:
    """A pre-norm transformer block with attention over [batch, length, width]."""
    w = lambda part, *shape: b.weight(f"{name}.{part}", rand(*shape) * 0.2)  # noqa: E731
    y = b(ops.LayerNorm(x, w("norm", width), w("shift", width)))
    q, k, v = (
        b(ops.Permute(b(ops.Reshape(b(ops.Linear(y, w(part, width, width), w(part + "_b", width))),
                                    (batch, length, heads, width // heads))), (0, 2, 1, 3)))
        for part in "qkv"
    )  # fmt: skip
    y = b(ops.Attention(q, k, v, scale=(width // heads) ** -0.5))
    y = b(ops.Reshape(b(ops.Permute(y, (0, 2, 1, 3))), (batch, length, width)))
    x = b(ops.Add(b(ops.Linear(y, w("out", width, width))), x))
    y = b(ops.Gelu(b(ops.Linear(b(ops.RmsNorm(x)), w("up", 3 * width, width), w("up_b", 3 * width)))))
    return b(ops.Add(b(ops.Linear(y, w("down", width, 3 * width))), x))


def _transformer(batch: object, length: object, width: int = 48, heads: int = 4) -> Module:
    generator = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    b = Builder()
    x = b.input("x", f32(batch, length, width))
    for n in range(2):
        x = _block(b, x, width, heads, batch, length, f"layer{n}", rand)
    b.output(x)
    return b.module


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 33)])
def test_static_transformer(batch: int, length: int) -> None:
    module = _transformer(batch, length)
    _agree(module, Compiled(module), torch.randn(batch, length, 48, generator=torch.Generator().manual_seed(2)))


def test_symbolic_transformer_at_many_sizes() -> None:
    module = _transformer(BATCH, SEQ)
    compiled = Compiled(module)
    generator = torch.Generator().manual_seed(3)
    for batch, length in [(1, 1), (1, 7), (2, 8), (3, 65), (1, 300), (16, 2)]:
        _agree(module, compiled, torch.randn(batch, length, 48, generator=generator))


def test_equal_layers_share_kernels() -> None:
    code = Compiled(_transformer(1, 8)).code
    assert sum(len(ops_) for ops_ in code.kernels.values()) > len(code.kernels)


def test_portable_baseline_gives_the_same_results() -> None:
    module = _transformer(BATCH, SEQ)
    compiled = Compiled(module, "x86-64-v3")
    assert "avx2" in compiled.code.features
    assert not any(feature.startswith("avx512") for feature in compiled.code.features)
    _agree(module, compiled, torch.randn(2, 37, 48, generator=torch.Generator().manual_seed(4)))


def _repeated(stacked: bool, n: int = 3) -> Module:
    generator = torch.Generator().manual_seed(0)
    b = Builder()
    x = b.input("x", f32(BATCH, 16))
    body = Graph()
    inner = body.add_input(f32(BATCH, 16), "x")
    if stacked:
        stack = b.weight("stack", torch.randn(n, 16, 16, generator=generator) * 0.3)
        bias = b.weight("bias", torch.randn(n, 16, generator=generator))
        matrix, shift = body.add_input(f32(16, 16), "w"), body.add_input(f32(16), "b")
    else:
        shared = b.weight("shared", torch.randn(16, 16, generator=generator) * 0.3)
        matrix, shift = body.weight(b.module.weights[shared.weight]), None
    y = body.ops.append(ops.Tanh(body.ops.append(ops.Linear(inner, matrix, shift)).result)).result
    body.set_outputs([body.ops.append(ops.Add(y, inner)).result])
    b.output(*b.add(ops.Repeat((x,), (stack, bias) if stacked else (), (), body, n)).results)
    return b.module


@pytest.mark.parametrize("stacked", [True, False])
def test_repeat_stores_weights_and_code_once(stacked: bool) -> None:
    module = _repeated(stacked)
    compiled = Compiled(module)
    generator = torch.Generator().manual_seed(5)
    for batch in (1, 5):
        _agree(module, compiled, torch.randn(batch, 16, generator=generator))
    assert len(compiled.code.weights) == len(module.weights)
    twice = Compiled(_repeated(stacked, n=6 if not stacked else 3)).code
    assert len(twice.kernels) == len(compiled.code.kernels)


def test_tied_weight_is_stored_once_in_panels_from_which_rows_are_picked() -> None:
    generator = torch.Generator().manual_seed(0)
    b = Builder()
    ids = b.input("ids", TensorType(DType.I64, (BATCH, SEQ)))
    table = b.weight("table", torch.randn(100, 24, generator=generator))
    b.output(b(ops.Linear(b(ops.Embedding(table, ids)), table)))
    compiled = Compiled(b.module)
    (stored,) = compiled.code.weights
    assert stored.layout is not None
    assert stored.layout["kind"] == "panels"
    _agree(b.module, compiled, torch.randint(0, 100, (2, 9), generator=generator))


def test_a_table_that_only_embeddings_read_stays_plain() -> None:
    generator = torch.Generator().manual_seed(0)
    b = Builder()
    ids = b.input("ids", TensorType(DType.I64, (BATCH, SEQ)))
    b.output(b(ops.Embedding(b.weight("table", torch.randn(100, 24, generator=generator)), ids)))
    compiled = Compiled(b.module)
    assert [weight.layout for weight in compiled.code.weights] == [None]
    _agree(b.module, compiled, torch.randint(0, 100, (2, 9), generator=generator))


def test_runs_without_tvm_and_torch(tmp_path: Path) -> None:
    """A fresh process with numpy and tvm_ffi only: no packed function of the compiler is needed."""
    b = Builder()
    x = b.input("x", f32(3, 40))
    values, indices = b.add(ops.Sort(x, 1)).results
    best, _ = b.add(ops.Topk(x, 1, 5)).results
    total = b(ops.Cumsum(b(ops.Softmax(values, 1)), 1, DType.F32))
    joined = b(ops.Concat((b(ops.Reshape(b(ops.Gather(total, indices, 1)), (120,))), b(ops.Reshape(best, (15,)))), 0))
    b.output(joined)
    compiled = Compiled(b.module)
    library = tmp_path / "model.so"
    library.write_bytes(compiled.code.library)
    script = textwrap.dedent(f"""
        import ctypes, sys
        sys.modules["torch"] = None
        import numpy, tvm_ffi
        ctypes.CDLL({str(compiled.code.runtime_libraries[0])!r}, ctypes.RTLD_GLOBAL)
        vm = tvm_ffi.load_module({str(library)!r})["vm_load_executable"]()
        vm["vm_initialization"](1, 0, 2)
        def aligned(nbytes):
            raw = numpy.zeros(nbytes + 64, "uint8")
            start = -raw.ctypes.data % 64
            return raw[start : start + nbytes]
        x = aligned(480).view("float32").reshape(3, 40)
        x[:] = numpy.sin(numpy.arange(120)).reshape(3, 40)
        x = tvm_ffi.from_dlpack(x)
        arena = aligned(vm[{compiled.code.arena!r}](x))
        (y,) = vm["main"](x, tvm_ffi.from_dlpack(arena))
        numpy.from_dlpack(y).tofile({str(tmp_path / "y")!r})
        assert "tvm" not in sys.modules
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    import numpy

    got = torch.from_numpy(numpy.fromfile(tmp_path / "y", "float32"))
    x_value = torch.from_numpy(numpy.sin(numpy.arange(120)).astype("float32").reshape(3, 40))
    torch.testing.assert_close(got, interpret(b.module, [x_value])[0], rtol=1e-5, atol=1e-6)
