"""Attention agrees with the reference interpreter in float64 for ragged lengths, masks, grouped heads and views."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tvm_harness import Compiled

from trimtab.backends.tvm.targets import TARGETS
from trimtab.cpu_features import host_architecture, missing_features
from trimtab.ir import Builder, DType, Module, TensorType, symbol
from trimtab.ir.ops import Attention, Permute, Reshape, Slice

LENGTHS = (1, 7, 15, 16, 17, 31, 128, 197)


def attention(
    types: Sequence[Any], dtype: DType = DType.F32, mask: tuple[DType, tuple[Any, ...]] | None = None, **attributes: Any
) -> Module:
    """One attention of ``dtype`` on separate inputs of the shapes ``types``."""
    build = Builder()
    inputs = [build.input(name, TensorType(dtype, shape)) for name, shape in zip("qkv", types, strict=True)]
    if mask is not None:
        inputs.append(build.input("mask", TensorType(*mask)))
    build.output(build(Attention(*inputs, **attributes)))
    return build.module


def expected(module: Module, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The result in float64."""
    operands = [value.double() if value.is_floating_point() else value for value in inputs]
    op = module.main.outputs[0].producer
    assert isinstance(op, Attention)
    q, k, v, mask = (*operands, None)[:4]
    return Attention.reference(q, k, v, mask, scale=op.scale, causal=op.causal)


def check(
    module: Module, shapes: Sequence[Sequence[int]], mask: torch.Tensor | None = None, target: str = "native",
    threads: int = 2, code: Compiled | None = None, rtol: float = 3e-6, dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(sum(map(sum, shapes)))
    inputs = [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]
    inputs += [mask] if mask is not None else []
    (got,) = (code or Compiled(module, target, threads))(*inputs)
    torch.testing.assert_close(got.double(), expected(module, inputs), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("length", LENGTHS)
def test_ragged_lengths(length: int, causal: bool) -> None:
    shape = (2, 3, length, 32)
    check(attention([shape] * 3, scale=0.2, causal=causal), [shape] * 3)


@pytest.mark.parametrize(("depth", "width"), [(24, 24), (8, 80), (64, 64), (80, 24), (128, 128), (33, 5)])
@pytest.mark.parametrize("queries", [1, 21])
def test_sizes_of_heads(depth: int, width: int, queries: int) -> None:
    shapes = [(2, queries, depth), (2, 37, depth), (2, 37, width)]
    check(attention(shapes, scale=0.15), shapes)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(scale: float) -> None:
    shape = (2, 21, 16)
    check(attention([shape] * 3, scale=scale), [shape] * 3)


@pytest.mark.parametrize(("heads", "key_heads", "queries"), [(8, 2, 33), (6, 1, 1), (4, 2, 1), (3, 3, 100)])
@pytest.mark.parametrize("threads", [1, 3, 16])
def test_grouped_heads_and_numbers_of_threads(heads: int, key_heads: int, queries: int, threads: int) -> None:
    shapes = [(heads, queries, 32), (key_heads, 45, 32), (key_heads, 45, 32)]
    check(attention(shapes, scale=0.2), shapes, threads=threads)


def allowed(shape: Sequence[int], kind: str) -> torch.Tensor:
    """A mask with a row that allows nothing."""
    chosen = torch.rand(*shape, generator=torch.Generator().manual_seed(1)) < 0.6
    chosen[..., 0, :] = False
    if kind == "bool":
        return chosen
    addend = torch.randn(*shape, generator=torch.Generator().manual_seed(2))
    return torch.where(chosen, addend, -math.inf)


@pytest.mark.parametrize("kind", ["bool", "addend"])
@pytest.mark.parametrize("shape", [(2, 4, 19, 43), (2, 1, 1, 43), (19, 43), (4, 1, 43), (1, 1, 19, 1)])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_masks_are_broadcast_and_rows_without_keys_give_zeros(kind: str, shape: tuple[int, ...], causal: bool) -> None:
    shapes = [(2, 4, 19, 24), (2, 2, 43, 24), (2, 2, 43, 24)]
    dtype = DType.BOOL if kind == "bool" else DType.F32
    mask = allowed(shape, kind)
    check(attention(shapes, mask=(dtype, shape), scale=0.2, causal=causal), shapes, mask)
    one = [(2, 4, 1, 24), *shapes[1:]]
    shape = (*shape[:-2], 1, shape[-1])
    check(attention(one, mask=(dtype, shape), scale=0.2, causal=causal), one, allowed(shape, kind))


@pytest.mark.parametrize("shape", [(2, 1, 1, 43), (2, 4, 1, 43), (1, 43), (4, 1, 43), (2, 1, 1, 1)])
@pytest.mark.parametrize(("key_heads", "queries"), [(4, 19), (2, 19), (2, 1)])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_an_addend_for_each_key(shape: tuple[int, ...], key_heads: int, queries: int, causal: bool) -> None:
    """The logarithms of the sizes of merged tokens, and -inf for keys that are padding."""
    shapes = [(2, 4, queries, 24), (2, key_heads, 43, 24), (2, key_heads, 43, 24)]
    sizes = torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(3)).float()
    sizes[..., 0] = 2
    check(attention(shapes, mask=(DType.F32, shape), scale=0.2, causal=causal), shapes, sizes.log())


def test_an_addend_for_each_key_over_several_blocks() -> None:
    shapes = [(1, 33, 16), (1, 4097, 16), (1, 4097, 16)]
    addend = torch.randn(1, 4097, generator=torch.Generator().manual_seed(4))
    check(attention(shapes, mask=(DType.F32, (1, 4097)), scale=0.5), shapes, addend)


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_long_rows_are_taken_in_blocks(causal: bool, masked: bool) -> None:
    shapes = [(1, 577, 16), (1, 4097, 16), (1, 4097, 16)]
    mask = (torch.arange(4097) > 3000)[None] if masked else None
    check(attention(shapes, mask=(DType.BOOL, (1, 4097)) if masked else None, scale=0.5, causal=causal), shapes, mask)


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_later_blocks_with_much_larger_scores(causal: bool) -> None:
    keys = torch.randn(1, 5000, 16, generator=torch.Generator().manual_seed(0)) * torch.linspace(0, 30, 5000)[:, None]
    inputs = [keys[:, -40:] / 10, keys, keys]
    module = attention([tuple(x.shape) for x in inputs], scale=0.25, causal=causal)
    (got,) = Compiled(module)(*inputs)
    torch.testing.assert_close(got.double(), expected(module, inputs), rtol=2e-4, atol=1e-4)


def test_symbolic_lengths_and_batch() -> None:
    batch, queries, keys = symbol("b", 1, 8), symbol("n", 1, 2000), symbol("m", 1, 5000)
    types = [(batch, 4, queries, 24), (batch, 2, keys, 24), (batch, 2, keys, 24)]
    for causal in (False, True):
        module = attention(types, scale=0.2, causal=causal)
        code = Compiled(module)
        for b, n, m in ((1, 1, 1), (2, 5, 17), (1, 14, 16), (3, 40, 33), (1, 130, 2500)):
            check(module, [(b, 4, n, 24), (b, 2, m, 24), (b, 2, m, 24)], code=code)


@pytest.mark.parametrize("target", ["x86-64-v2", "x86-64-v3", "x86-64-v4"])
@pytest.mark.parametrize("shape", [(2, 21, 24), (1, 1, 40)])
def test_portable_targets(target: str, shape: tuple[int, ...]) -> None:
    if host_architecture() != "x86_64" or missing_features(TARGETS[target].features):
        pytest.skip(f"this machine cannot run code for {target}")
    check(attention([shape] * 3, scale=0.2), [shape] * 3, target=target)


def test_float64_needs_no_micro_kernel() -> None:
    shapes = [(4, 19, 24), (2, 43, 24), (2, 43, 20)]
    check(attention(shapes, DType.F64, scale=0.2, causal=True), shapes, rtol=1e-13, dtype=torch.float64)
    one = [(4, 1, 24), *shapes[1:]]
    check(attention(one, DType.F64, scale=0.2), one, rtol=1e-13, dtype=torch.float64)


def check_bf16(shapes: Sequence[Sequence[int]], **options: Any) -> None:
    """Powers and results are rounded to bfloat16, with 2**-9 of relative error each."""
    attributes = {name: options.pop(name) for name in ("scale", "causal") if name in options}
    mask = options.get("mask")
    stored = None if mask is None else (DType.BOOL if mask.dtype == torch.bool else DType.BF16, tuple(mask.shape))
    module = attention(shapes, DType.BF16, mask=stored, **attributes)
    check(module, shapes, dtype=torch.bfloat16, rtol=2**-7, **options)


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("length", [1, 17, 31, 197])
def test_bf16_of_ragged_lengths(length: int, causal: bool) -> None:
    check_bf16([(2, length, 32)] * 3, scale=0.2, causal=causal)


@pytest.mark.parametrize(("depth", "width"), [(24, 24), (64, 80), (80, 64), (33, 5)])
def test_bf16_of_sizes_of_heads(depth: int, width: int) -> None:
    check_bf16([(4, 35, depth), (2, 47, depth), (2, 47, width)], scale=0.15)


@pytest.mark.parametrize("kind", ["bool", "addend"])
def test_bf16_with_masks(kind: str) -> None:
    mask = allowed((2, 1, 19, 43), kind)
    check_bf16([(2, 4, 19, 32)] + [(2, 2, 43, 32)] * 2, scale=0.2, mask=mask if kind == "bool" else mask.bfloat16())


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_bf16_in_blocks_of_keys(causal: bool) -> None:
    check_bf16([(1, 577, 32)] + [(1, 4097, 32)] * 2, scale=0.5, causal=causal)


def test_bf16_without_instructions_for_it() -> None:
    check_bf16([(2, 21, 32)] * 3, scale=0.2, target="x86-64-v3" if host_architecture() == "x86_64" else "native")


def test_bf16_of_symbolic_lengths() -> None:
    queries, keys = symbol("n", 1, 2000), symbol("m", 1, 5000)
    module = attention([(2, queries, 32), (2, keys, 32), (2, keys, 32)], DType.BF16, scale=0.2)
    code = Compiled(module)
    for n, m in ((1, 1), (5, 17), (40, 33), (130, 2500)):
        check(module, [(2, n, 32), (2, m, 32), (2, m, 32)], code=code, dtype=torch.bfloat16, rtol=2**-7)


@pytest.mark.parametrize("special", [math.nan, math.inf])
def test_special_values_reach_their_rows_only(special: float) -> None:
    q, k, v = (torch.randn(1, 40, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    q[0, 17, 3] = special
    (got,) = Compiled(attention([(1, 40, 16)] * 3, scale=0.2))(q, k, v)
    reference = Attention.reference(q, k, v, None, scale=0.2, causal=False)
    torch.testing.assert_close(got, reference, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16], ids=str)
@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 3, 1)], ids=["rows", "columns"])
def test_heads_are_read_where_they_lie(order: tuple[int, ...], dtype: DType) -> None:
    """Heads from slices of one matrix: with channels next to each other in memory, and far apart."""
    build = Builder()
    shape = (1, 19, 3, 24) if order[1] == 2 else (3, 24, 1, 19)
    x = build.input("x", TensorType(dtype, (3, *shape)))
    parts = []
    for start in range(3):
        part = build(Reshape(build(Slice(x, dim=0, start=start, stop=start + 1, step=1)), shape=shape))
        parts.append(build(Permute(part, dims=order)))
    build.output(build(Attention(*parts, scale=0.2)))
    given = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).to(dtype.to_torch())
    (got,) = Compiled(build.module)(given)
    q, k, v = (given[part].double().permute(order) for part in range(3))
    reference = Attention.reference(q, k, v, None, scale=0.2, causal=False)
    tolerance = 3e-6 if dtype is DType.F32 else 2**-7
    torch.testing.assert_close(got.double(), reference, rtol=tolerance, atol=tolerance)
