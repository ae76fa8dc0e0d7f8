"""Rows read and written at positions given by data, and lines that are sorted, as models select and merge tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from tvm_harness import Compiled, assert_matches, random

from trimtab.ir import Builder, Dim, DType, Module, TensorType, Value, ops, symbol
from trimtab.passes.base import Context
from trimtab.passes.group_fusions import GroupFusions

pytest.importorskip("tvm", reason="the TVM backend is not installed")

BATCH, CHOSEN = symbol("batch", 1, 64), symbol("chosen", 1, 999)
STORED = [t for t in DType if t.bits >= 8 and t not in (DType.U16, DType.U32, DType.U64)]
"""The types that torch, and so the reference, computes with."""
NUMBERS = [DType.F64, DType.F32, DType.F16, DType.BF16, DType.I64, DType.I32, DType.I8, DType.U8, DType.BOOL]


def tensor(dtype: DType, *shape: Dim) -> TensorType:
    return TensorType(dtype, shape)


def rows_of(b: Builder, indices: Value, like: Value) -> Value:
    """Indices ``[B, K]`` of rows as gather and scatter take them: ``indices[..., None].expand(-1, -1, C)``."""
    batch, chosen = indices.type.shape
    column = b(ops.Reshape(indices, shape=(batch, chosen, 1)))
    return b(ops.Expand(column, shape=(batch, chosen, like.type.shape[2])))


def drawn(module: Module, generator: torch.Generator, size: int, sizes: dict[str, int]) -> list[Tensor]:
    """Random inputs; of ``[B, K]`` integers, indices below ``size`` without repetition, some of them negative."""
    found = []
    for value in module.main.inputs:
        type = value.type.bind(sizes)
        if value.name != "indices":
            found.append(random(type, generator))
            continue
        batch, chosen = (int(n) for n in type.shape)  # type: ignore[arg-type]
        order = torch.stack([torch.randperm(size, generator=generator)[:chosen] for _ in range(batch)])
        signs = torch.randint(0, 2, order.shape, generator=generator)
        found.append((order - size * signs).to(type.dtype.to_torch()))
    return found


def check(
    build: Callable[[Builder], Any], size: int, *sizes: dict[str, int], groups: bool = True, tolerance: float = 0.0
) -> Compiled:
    """Compile what ``build`` makes, and compare with the interpreter for each binding of the symbols."""
    b = Builder()
    b.output(*build(b))
    if groups:
        GroupFusions().run(b.module, Context())
    compiled = Compiled(b.module)
    generator = torch.Generator().manual_seed(size)
    for binding in sizes or ({},):
        inputs = drawn(b.module, generator, size, binding)
        assert_matches(b.module, inputs, compiled=compiled, rtol=tolerance, atol=tolerance)
    return compiled


# -- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [True, False])
@pytest.mark.parametrize(("tokens", "chosen", "channels"), [(197, 98, 384), (17, 7, 31), (9, 1, 48), (5, 5, 1)])
def test_gathered_rows(tokens: int, chosen: int, channels: int, groups: bool) -> None:
    def build(b: Builder) -> list[Value]:
        x = b.input("x", tensor(DType.F32, 2, tokens, channels))
        rows = rows_of(b, b.input("indices", tensor(DType.I64, 2, chosen)), x)
        return [b(ops.Gather(x, rows, 1)), b(ops.Gather(b(ops.Neg(x)), rows, 1))]

    check(build, tokens, groups=groups)


@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_gathered_rows_of_every_type(dtype: DType) -> None:
    def build(b: Builder) -> list[Value]:
        x = b.input("x", tensor(dtype, BATCH, 19, 37))
        indices = b.input("indices", tensor(DType.I32, BATCH, CHOSEN))
        return [b(ops.Gather(x, rows_of(b, indices, x), 1))]

    check(build, 19, {"batch": 1, "chosen": 1}, {"batch": 3, "chosen": 8})


def test_gathered_rows_beside_what_is_computed_with_them() -> None:
    """The positions are named once a row, though the kernel computes with the row, and those of another gather."""

    def build(b: Builder) -> list[Value]:
        x, y = (b.input(name, tensor(DType.F32, BATCH, 13, 40)) for name in "xy")
        rows = rows_of(b, b.input("indices", tensor(DType.I64, BATCH, CHOSEN)), x)
        total = b(ops.Add(b(ops.Gather(x, rows, 1)), b(ops.Gather(y, rows, 1))))
        return [b(ops.Gelu(total))]

    check(build, 13, {"batch": 2, "chosen": 6}, {"batch": 1, "chosen": 13}, tolerance=1e-6)


def test_positions_that_are_gathered_themselves() -> None:
    """``x[t[i]]``: one position is read at another one, both once a row."""

    def build(b: Builder) -> list[Value]:
        table, order = b.input("table", tensor(DType.F32, 11, 24)), b.input("order", tensor(DType.I64, 11))
        indices = b.input("indices", tensor(DType.I64, 2, 5))
        return [b(ops.Embedding(table, b(ops.IndexSelect(order, indices, 0))))]

    b = Builder()
    b.output(*build(b))
    GroupFusions().run(b.module, Context())
    inputs = [torch.randn(11, 24), torch.randperm(11), torch.randint(-11, 11, (2, 5))]
    assert_matches(b.module, inputs, rtol=0, atol=0)


def test_an_expanded_index_is_read_where_it_lies() -> None:
    """No kernel writes the index of every element, though two kernels need it."""

    def build(b: Builder) -> list[Value]:
        x = b.input("x", tensor(DType.F32, 2, 9, 16))
        rows = rows_of(b, b.input("indices", tensor(DType.I64, 2, 4)), x)
        picked = b(ops.Gather(x, rows, 1))
        return [b(ops.Scatter(x, rows, b(ops.Neg(picked)), 1))]

    compiled = check(build, 9, groups=False)
    assert sorted(compiled.code.kernels) == ["gather", "neg", "scatter"]


# -- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", ["none", "add", "mul", "amax", "amin"])
@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_scattered_rows_of_every_type(dtype: DType, reduce: Any) -> None:
    if dtype is DType.BOOL and reduce in ("mul", "amax", "amin"):
        pytest.skip("torch has no such reduction of truth values")

    def build(b: Builder) -> list[Value]:
        x = b.input("x", tensor(dtype, BATCH, 19, 37))
        indices = b.input("indices", tensor(DType.I64, BATCH, CHOSEN))
        updates = b.input("updates", tensor(dtype, BATCH, CHOSEN, 37))
        return [b(ops.Scatter(x, rows_of(b, indices, x), updates, 1, reduce))]

    tolerance = {DType.F16: 1e-3, DType.BF16: 1e-2}.get(dtype, 1e-6 if dtype.is_floating else 0.0)
    check(build, 19, {"batch": 1, "chosen": 7}, {"batch": 3, "chosen": 19}, tolerance=tolerance)


@pytest.mark.parametrize(("batch", "tokens", "channels"), [(1, 197, 384), (2, 31, 96), (8, 17, 100), (1, 9, 3)])
@pytest.mark.parametrize("reduce", ["none", "add"])
def test_scattered_rows_of_ragged_sizes(batch: int, tokens: int, channels: int, reduce: Any) -> None:
    """With few batches the tasks share the channels."""

    def build(b: Builder) -> list[Value]:
        x = b.input("x", tensor(DType.F32, batch, tokens, channels))
        indices = b.input("indices", tensor(DType.I64, batch, tokens // 2))
        updates = b.input("updates", tensor(DType.F32, batch, tokens // 2, channels))
        return [b(ops.Scatter(x, rows_of(b, indices, x), updates, 1, reduce))]

    check(build, tokens, tolerance=1e-6)


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
@pytest.mark.parametrize("wide", [True, False])
def test_scatter_along_each_axis(dim: int, wide: bool) -> None:
    """By rows or element by element, also where there are fewer updates than the tensor has along the other axes."""
    generator = torch.Generator().manual_seed(dim)
    shape = [3, 6, 5, 32] if wide else [2, 4, 3, 17]
    x = torch.randn(4, 7, 5, 32, generator=generator)
    indices = torch.randint(-x.shape[dim], x.shape[dim], shape, generator=generator)
    updates = torch.randn(shape, generator=generator)
    for by_rows in (False, True):
        b = Builder()
        given = b.input("x", tensor(DType.F32, *x.shape))
        narrow = [*shape[:3], 1] if by_rows else shape
        where = b(ops.Expand(b.input("indices", tensor(DType.I64, *narrow)), shape=tuple(shape)))
        added = b.input("updates", tensor(DType.F32, *shape))
        b.output(b(ops.Scatter(given, where, added, dim, "add")))
        assert_matches(b.module, [x, indices[..., :1] if by_rows else indices, updates], rtol=1e-5, atol=1e-5)


def test_sums_that_collide_are_added_in_the_order_of_the_indices() -> None:
    """Bit for bit, whatever the number of threads: as a loop over the updates gives it."""
    generator = torch.Generator().manual_seed(3)
    x, updates = torch.randn(2, 5, 64, generator=generator), torch.randn(2, 300, 64, generator=generator)
    indices = torch.randint(0, 5, (2, 300), generator=generator)
    expected = x.clone()
    for batch in range(2):
        for row, at in enumerate(indices[batch].tolist()):
            expected[batch, at] += updates[batch, row]
    for put in (False, True):
        b = Builder()
        given = b.input("x", tensor(DType.F32, *x.shape))
        where, added = b.input("indices", tensor(DType.I64, 2, 300)), b.input("updates", tensor(DType.F32, 2, 300, 64))
        if put:
            batches = b(ops.Reshape(b(ops.Arange(2, DType.I64)), shape=(2, 1)))
            b.output(b(ops.IndexPut(given, (batches, where), added, accumulate=True)))
        else:
            b.output(b(ops.Scatter(given, rows_of(b, where, given), added, 1, "add")))
        for threads in (1, 2, 3):
            (got,) = Compiled(b.module, threads=threads)(x, indices, updates)
            assert torch.equal(got, expected)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_rows_put_at_pairs_of_indices(dtype: DType, accumulate: bool) -> None:
    def build(b: Builder) -> list[Value]:
        x = b.input("x", tensor(dtype, 3, 19, 70))
        indices = b.input("indices", tensor(DType.I64, 3, CHOSEN))
        batches = b(ops.Reshape(b(ops.Arange(3, DType.I64)), shape=(3, 1)))
        rows = b.input("updates", tensor(dtype, 3, CHOSEN, 70))
        one = b.input("one", tensor(dtype, 1, 1))
        return [b(ops.IndexPut(x, (batches, indices), value, accumulate)) for value in (rows, one)]

    tolerance = {DType.F16: 1e-3, DType.BF16: 1e-2}.get(dtype, 1e-6 if dtype.is_floating else 0.0)
    check(build, 19, {"chosen": 1}, {"chosen": 11}, tolerance=tolerance)


def test_writes_outside_are_dropped() -> None:
    x, updates = torch.zeros(1, 4, 20), torch.ones(1, 3, 20)
    indices = torch.tensor([[2, 9, -7]])
    b = Builder()
    given, where = b.input("x", tensor(DType.F32, *x.shape)), b.input("indices", tensor(DType.I64, 1, 3))
    added = b.input("updates", tensor(DType.F32, *updates.shape))
    zero = b(ops.Full(0, DType.I64, (1, 1)))
    b.output(
        b(ops.Scatter(given, rows_of(b, where, given), added, 1, "add")), b(ops.IndexPut(given, (zero, where), added))
    )
    for got in Compiled(b.module)(x, indices, updates):
        assert got.sum(-1).tolist() == [[0.0, 0.0, 20.0, 0.0]]


# -- sorting and running sums -----------------------------------------------------------------------------------------


def lines(dtype: DType, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Random lines with repetitions; those of floats with zeros of both signs, infinities and NaN."""
    x = random(tensor(dtype, *shape), generator)
    if dtype.is_floating:
        special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 1e-40]).to(x.dtype)
        x = torch.where(torch.rand(x.shape, generator=generator) < 0.3,
                        special[torch.randint(0, 7, x.shape, generator=generator)], x)  # fmt: skip
    return x


@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_sorting_is_stable_for_every_type(dtype: DType) -> None:
    """Equal elements keep their order, by which alone the indices of both directions are determined."""
    generator = torch.Generator().manual_seed(5)
    b = Builder()
    x = b.input("x", tensor(dtype, 3, 83))
    made = (ops.Sort(x, 1), ops.Sort(x, 1, descending=True), ops.Topk(x, 1, 40), ops.Topk(x, 1, 83, largest=False))
    b.output(*(result for op in made for result in b.add(op).results))
    data = lines(dtype, (3, 83), generator)
    got = Compiled(b.module)(data)
    for number, (descending, k) in enumerate([(False, 83), (True, 83), (True, 40), (False, 83)]):
        values, indices = torch.sort(data, dim=1, descending=descending, stable=True)
        torch.testing.assert_close(got[2 * number], values[:, :k], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(got[2 * number + 1], indices[:, :k])


@pytest.mark.parametrize(("shape", "dim", "k"), [
    ((2, 197), 1, 98), ((1, 16), 1, 16), ((4, 65, 3), 1, 20), ((2, 7), 1, 3), ((3, 1), 1, 1),
    ((2, 577), 1, 5), ((2, 2049), 1, 2), ((2, 2049), 1, 300), ((2500,), 0, 2500), ((6, 5), 0, 4),
])  # fmt: skip
def test_topk_by_counting_by_insertion_and_by_merging(shape: tuple[int, ...], dim: int, k: int) -> None:
    generator = torch.Generator().manual_seed(6)
    b = Builder()
    x = b.input("x", tensor(DType.F32, *shape))
    b.output(*b.add(ops.Topk(x, dim, k)).results, *b.add(ops.Topk(x, dim, k, largest=False)).results)
    data = lines(DType.F32, shape, generator)
    got = Compiled(b.module)(data)
    for number, descending in enumerate((True, False)):
        values, indices = torch.sort(data, dim=dim, descending=descending, stable=True)
        torch.testing.assert_close(got[2 * number], values.narrow(dim, 0, k), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(got[2 * number + 1], indices.narrow(dim, 0, k))


@pytest.mark.parametrize("dtype", [DType.F32, DType.F64, DType.BF16, DType.I32, DType.BOOL], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 100), (1, 7, 64), (3, 4, 2, 17), (2, 5, 3)])
def test_running_sums_along_each_axis(dtype: DType, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(7)
    b = Builder()
    x = b.input("x", tensor(dtype, BATCH, *shape[1:]))
    b.output(*(b(ops.Cumsum(x, dim, DType.I64 if dtype is DType.BOOL else dtype)) for dim in range(len(shape))))
    tolerance = 2e-2 if dtype is DType.BF16 else 1e-5
    assert_matches(b.module, [random(tensor(dtype, *shape), generator)], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(8, 99, 98), (2, 5, 1), (3, 17, 31)])
def test_positions_of_extremes(shape: tuple[int, ...]) -> None:
    """The first of equal ones; NaN wins."""
    generator = torch.Generator().manual_seed(8)
    b = Builder()
    x = b.input("x", tensor(DType.F32, BATCH, *shape[1:]))
    b.output(
        *(b(make(x, dim, keepdim)) for make in (ops.Argmax, ops.Argmin) for dim in (1, 2) for keepdim in (False, True))
    )
    data = lines(DType.F32, shape, generator)
    data[0, 0, :] = 1.0
    assert_matches(b.module, [data], rtol=0, atol=0)
