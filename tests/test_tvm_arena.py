"""The arena of compiled code: what is in it, how much it is, and that calls do not disturb each other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tvm_harness import Compiled, assert_matches

import trimtab
from trimtab.backends.tvm import build
from trimtab.ir import Builder, DType, Graph, Module, TensorType, interpret, ops, symbol
from trimtab.ir.dims import Dim

pytest.importorskip("tvm")


def f32(*shape: Dim) -> TensorType:
    return TensorType(DType.F32, shape)


def mlp(rows: Dim, layers: int = 3, width: int = 32) -> Module:
    """Residual blocks; each output of a block is read by the next one and by the sum after it."""
    generator = torch.Generator().manual_seed(layers)
    builder = Builder()
    x = builder.input("x", f32(rows, width))
    for layer in range(layers):
        up = builder.weight(f"up{layer}", torch.randn(4 * width, width, generator=generator) / 8)
        down = builder.weight(f"down{layer}", torch.randn(width, 4 * width, generator=generator) / 8)
        x = builder(ops.Add(x, builder(ops.Linear(builder(ops.Gelu(builder(ops.Linear(x, up)))), down))))
    builder.output(x)
    return builder.module


def repeated(rows: Dim, times: int) -> Module:
    """A repeat whose body has intermediate tensors, keeps one carried value and returns a reshaped other one."""
    builder = Builder()
    x, y = builder.input("x", f32(rows, 16)), builder.input("y", f32(rows, 4, 4))
    stack = builder.weight("stack", torch.randn(times, 16, 16) / 4)
    body = Graph()
    h, g = body.add_input(f32(rows, 16), "h"), body.add_input(f32(rows, 4, 4), "g")
    matrix = body.add_input(f32(16, 16), "matrix")
    flat = body.ops.append(ops.Reshape(g, (rows, 16))).result
    product = body.ops.append(ops.Softmax(body.ops.append(ops.Matmul(flat, matrix)).result, 1)).result
    total = body.ops.append(ops.Add(product, h)).result
    body.set_outputs([flat, body.ops.append(ops.Reshape(total, (rows, 4, 4))).result])
    first, second = builder.add(ops.Repeat((x, y), (stack,), (), body, times)).results
    builder.output(builder(ops.Softmax(first, 1)), second)
    return builder.module


def test_a_chain_needs_two_places_and_its_end_is_outside() -> None:
    """The last op's result is the output; before it, one wide and one narrow tensor at a time."""
    memory = build(mlp(8, 1), "native", 2).memory
    assert memory["live_bytes"] == memory["arena_bytes"] == 8 * (4 * 32 + 4 * 32) * 4


@pytest.mark.parametrize("rows", [5, symbol("rows", 1, 64)], ids=str)
def test_repeats_share_their_callers_arena(rows: Dim) -> None:
    module = repeated(rows, 4)
    compiled = Compiled(module)
    for length in (5,) if rows == 5 else (1, 7, 64):
        assert_matches(module, [torch.randn(length, 16), torch.randn(length, 4, 4)], compiled=compiled)
    once, often = (build(repeated(rows, times), "native", 2).memory for times in (6, 12))
    assert once["arena_bytes"] == often["arena_bytes"]


def test_outputs_survive_the_next_call(tmp_path: Path) -> None:
    session = trimtab.load(trimtab.compile(mlp(symbol("rows", 1, 4096)), target="native").save(tmp_path / "m.trim"))
    x, other = torch.randn(9, 32), torch.randn(9, 32)
    first = session(x)
    kept = first.copy()
    session(other)
    assert (first == kept).all()


def test_the_arena_follows_the_sizes_of_the_inputs(tmp_path: Path) -> None:
    """Up and down again, past the size from which it is a mapping of its own."""
    module = mlp(symbol("rows", 1, 8192))
    session = trimtab.load(trimtab.compile(module, target="native").save(tmp_path / "m.trim"))
    for rows in (3, 8000, 1, 700, 8192, 3):
        x = torch.randn(rows, 32)
        (reference,) = interpret(module, [x])
        torch.testing.assert_close(torch.from_numpy(session(x)), reference, rtol=1e-4, atol=1e-4)


def test_sessions_in_two_threads_do_not_share_an_arena(tmp_path: Path) -> None:
    module = mlp(257, 4)
    path = trimtab.compile(module, target="native", threads=1).save(tmp_path / "m.trim")
    inputs = [torch.randn(257, 32) for _ in range(2)]
    expected = [trimtab.load(path)(x) for x in inputs]

    def work(number: int) -> bool:
        session = trimtab.load(path)
        return all((session(inputs[number]) == expected[number]).all() for _ in range(100))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, range(2))) == [True, True]


def test_the_manifest_has_expressions(tmp_path: Path) -> None:
    path = trimtab.compile(mlp(symbol("rows", 1, 64)), target="native").save(tmp_path / "m.trim")
    memory = trimtab.load(path).manifest.memory
    assert memory["arena_bytes"] == memory["live_bytes"]
    assert memory["arena_bytes"].endswith("*rows")
