"""palettize: codebooks and indices against formulas, what the graph computes, and what calibration gains."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pass_harness import read
from test_passes_quantize_weights import MLP, batches, outliers, random

import trimtab
from trimtab.errors import UsageError
from trimtab.ir import Module, interpret, ops, parse_module, print_module
from trimtab.ir.rewrite.log import Rewrites
from trimtab.passes.base import Context
from trimtab.passes.manager import PassManager
from trimtab.passes.palettize import Palettize
from trimtab.passes.weight_only.codebooks import Palette, _sweep, find_codebook, nearest, pack, reselect
from trimtab.passes.weight_only.moments import Moments

NAME = Palettize.name


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(module: Module, options: str = "", *, ctx: Context | None = None) -> tuple[Module, list[str], list[dict]]:  # type: ignore[type-arg]
    """The module after the pass, its notes, and its log."""
    result, report = PassManager(f"{NAME}{{{options}}}" if options else NAME).run(module, ctx or Context())
    return result, report.rows[0].notes, report.rows[0].rules


# -- codebooks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "dim", "entries"), [(300, 1, 16), (257, 3, 20), (90, 4, 8)])
def test_a_codebook_is_a_fixed_point_of_lloyds_iteration(count: int, dim: int, entries: int) -> None:
    centres = 10 * random(entries, dim).double()
    vectors = centres[torch.randint(entries, (count,), generator=generator())] + 0.01 * random(count, dim).double()
    codebook = find_codebook(vectors, entries, generator())
    distances = ((vectors[:, None] - codebook) ** 2).sum(-1).numpy()
    indices = distances.argmin(1)
    np.testing.assert_array_equal(nearest(vectors, codebook)[:, 0].numpy(), indices)
    for entry in np.unique(indices):
        mean = vectors.numpy()[indices == entry].mean(0)
        np.testing.assert_allclose(codebook[entry].numpy(), mean, rtol=1e-9, atol=1e-9)


def test_candidates_are_the_nearest_entries_in_order() -> None:
    vectors, codebook = random(40, 3).double(), random(11, 3, seed=1).double()
    expected = (vectors[:, None] - codebook).square().sum(-1).argsort(1)[:, :4]
    assert torch.equal(nearest(vectors, codebook, 4), expected)


@pytest.mark.parametrize("dim", [1, 2])
def test_few_different_vectors_are_kept_exactly(dim: int) -> None:
    vectors = torch.tensor([[-1.0] * dim, [0.0] * dim, [2.5] * dim], dtype=torch.float64).repeat(20, 1)
    codebook = find_codebook(vectors, 16, generator())
    assert codebook.shape == (16, dim)
    assert torch.equal(codebook[nearest(vectors, codebook)[:, 0]], vectors)


@pytest.mark.parametrize("dim", [1, 2])
def test_one_huge_value_takes_one_entry(dim: int) -> None:
    vectors = random(400, dim).double()
    vectors[7] = 3e38
    codebook = find_codebook(vectors, 16, generator())
    values = codebook[nearest(vectors, codebook)[:, 0]]
    assert bool(values.isfinite().all())
    torch.testing.assert_close(values[7], vectors[7])
    others = torch.arange(400) != 7
    assert (values - vectors)[others].square().mean() < 0.25 * vectors[others].square().mean()


@pytest.mark.parametrize("scale", [0.0, 1e-42])
def test_zeros_and_denormals(scale: float) -> None:
    vectors = (scale * random(60, 1)).double()
    values = find_codebook(vectors, 4, generator())[nearest(vectors, find_codebook(vectors, 4, generator()))[:, 0]]
    assert float((values - vectors).abs().max()) <= scale


# -- calibration -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "entries"), [(1, 4), (1, 16), (4, 32)])
def test_selection_by_results_errs_less(dim: int, entries: int) -> None:
    weight, x = random(24, 32).double(), outliers(200, 32)
    moments = Moments(32)
    moments.update(x)
    vectors = weight.reshape(-1, dim)
    codebook = find_codebook(vectors, entries, generator())
    before = Palette(codebook, nearest(vectors, codebook).reshape(24, -1))
    after = reselect(weight, before, moments, 8)

    def error(palette: Palette) -> float:
        return float((x.double() @ (palette.values() - weight).T).square().sum())

    assert error(after) < 0.7 * error(before)
    assert after.indices.shape == before.indices.shape
    assert int(after.indices.max()) < entries
    assert reselect(weight, before, moments, 1) is before
    assert reselect(weight, before, Moments(32), 8) is before


@pytest.mark.parametrize("dim", [1, 2])
def test_sweeps_end_where_no_vector_alone_can_do_better(dim: int) -> None:
    weight, x, codebook = random(3, 8).double(), outliers(40, 8), random(5, dim, seed=dim).double()
    moments = Moments(8)
    moments.update(x)
    palette = Palette(codebook, nearest(weight.reshape(-1, dim), codebook).reshape(3, -1))
    offered = torch.arange(5).expand(*palette.indices.shape, 5)

    def error(indices: torch.Tensor) -> torch.Tensor:
        """Of each row."""
        return (x.double() @ (Palette(codebook, indices).values() - weight).T).square().sum(0)

    before = error(palette.indices)
    while not torch.equal(after := _sweep(weight, palette, moments.products, offered), palette.indices):
        assert error(after).sum() < error(palette.indices).sum()
        palette = Palette(codebook, after)
    assert (error(palette.indices) < before).any()
    for place in range(palette.indices.shape[1]):
        for entry in range(5):
            other = palette.indices.clone()
            other[:, place] = entry
            assert bool((error(other) >= error(palette.indices) - 1e-9).all())


@pytest.mark.parametrize(
    ("bits", "count", "size"),
    [(1, 16, 8), (1, 12, 4), (2, 12, 4), (3, 6, 2), (4, 6, 2), (4, 7, 1), (5, 8, 1), (8, 3, 1)],
)
def test_packed_indices_give_the_same_weight(bits: int, count: int, size: int) -> None:
    codebook = random(2**bits, 3).double()
    palette = Palette(codebook, torch.randint(2**bits, (5, count), generator=generator()))
    table, packed = pack(palette, bits)
    assert packed.dtype is torch.uint8
    assert packed.shape == (5, count // size)
    assert torch.equal(table[packed.long()].flatten(1), palette.values())


# -- graphs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "dim", "size"), [(2, 1, 4), (3, 1, 2), (4, 1, 2), (5, 1, 1), (4, 2, 2)])
@pytest.mark.parametrize("calibrated", [False, True])
def test_the_graph_computes_with_the_codebook(bits: int, dim: int, size: int, calibrated: bool) -> None:
    module = read(MLP)
    ctx = Context(calibration=batches(20, 32) if calibrated else ())
    result, notes, _ = run(module, f"bits={bits}, dim={dim}", ctx=ctx)
    assert str(result.weights["up.indices"].type) == f"u8[48, {32 // (dim * size)}]"
    assert str(result.weights["down.codebook"].type) == f"f32[{2 ** (bits * size)}, {dim * size}]"
    assert not {"up", "down"} & set(result.weights)
    assert result.weight_bytes < module.weight_bytes
    assert notes[0].startswith(f"2 layers in {bits} bits; 12.3 kB become")
    weights = {
        id: result.weights[f"{id}.codebook"]
        .tensor()
        .double()[result.weights[f"{id}.indices"].tensor().long()]
        .flatten(1)
        for id in ("up", "down")
    }
    x = random(5, 32)
    (expected,) = interpret(module, [x], precision=torch.float64, weights=weights)
    (found,) = interpret(result, [x])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    text = print_module(result)
    assert print_module(parse_module(text, lambda id, type: result.weights[id].source)) == text


def test_constant_folding_does_not_undo_it() -> None:
    module = read(MLP.replace("[32,", "[64,").replace("32]", "64]").replace("48", "96"))
    result, _ = PassManager(f"{NAME},cleanup,fuse").run(module)
    assert sum(isinstance(op, ops.Embedding) for op in result.walk()) == 2
    assert result.weight_bytes == run(module)[0].weight_bytes


def test_calibration_moves_outputs_less() -> None:
    module, data = read(MLP), batches(40, 32)

    def lost(options: str) -> float:
        result, _, _ = run(module, options, ctx=Context(calibration=data))
        return sum(float((interpret(result, b)[0] - interpret(module, b)[0]).square().sum()) for b in data)

    assert lost("bits=3") < 0.7 * lost("bits=3, candidates=1")


def test_results_do_not_depend_on_the_run() -> None:
    first, second = (run(read(MLP), "bits=4, dim=2")[0] for _ in range(2))
    assert first == second


def test_shared_weights_stay_shared() -> None:
    module = read(
        """
weight @w: f32[32, 32]
graph main(%x: f32[4, 32]) {
  %a = linear(%x, @w) : f32[4, 32]
  %r = repeat([%a], [], []) {n=2} : f32[4, 32] graph (%c: f32[4, 32]) {
    %t = tanh(%c) : f32[4, 32]
    %l = linear(%t, @w) : f32[4, 32]
    return output=%l
  }
  %y = linear(%r, @w) : f32[4, 32]
  return y=%y
}"""
    )
    result, _, _ = run(module, ctx=Context(calibration=batches(4, 32)))
    assert sorted(result.weights) == ["w.codebook", "w.indices"]
    found = [op for op in result.walk() if isinstance(op, ops.Linear)]
    assert found[0].weight is found[2].weight
    assert sum(isinstance(op, ops.Embedding) for op in result.walk()) == 2  # one in the graph, one in the body


def test_what_stays_and_why() -> None:
    bad = random(40, 32)
    bad[0, 0] = math.inf
    module = read(
        """
weight @table: f32[50, 32]
weight @odd: f32[40, 33]
weight @small: f32[2, 2]
weight @bad: f32[40, 32]
graph main(%ids: i64[4], %y: f32[4, 33], %z: f32[4, 2]) {
  %e = embedding(@table, %ids) : f32[4, 32]
  %logits = linear(%e, @table) : f32[4, 50]
  %o = linear(%y, @odd) : f32[4, 40]
  %s = linear(%z, @small) : f32[4, 2]
  %b = linear(%e, @bad) : f32[4, 40]
  return logits=%logits, o=%o, s=%s, b=%b
}""",
        bad=bad,
    )
    result, _, rules = run(module, "bits=4, dim=2")
    assert result == module
    assert set(rules[0]["rejected"]) == {
        "@table is also read by embedding, and a second copy would grow the weights",
        "the 33 input channels of @odd are no multiple of 2, the size of a vector",
        "indices and table of @small would take 130 bytes, not less than the 16 now",
        "@bad has elements that are NaN or infinite",
    }


@pytest.mark.parametrize("options", ["bits=9", "bits=0", "dim=0", "candidates=0"])
def test_wrong_options(options: str) -> None:
    with pytest.raises(UsageError, match="palettize"):
        PassManager(f"{NAME}{{{options}}}")


def test_a_limit_stops_after_so_many_layers() -> None:
    module = read(MLP)
    assert Palettize().run(module, Context(rewrites=Rewrites(limit=1)))
    assert sum(isinstance(op, ops.Embedding) for op in module.walk()) == 1


def test_a_compiled_model_agrees_with_the_interpreter() -> None:
    from trimtab.compiler import find_backend

    if not find_backend("tvm").status().works:
        pytest.skip("TVM is not installed")
    from tvm_harness import Compiled

    x = random(5, 32)
    for passes in ("palettize", "palettize{bits=8, dim=2}", "quantize-weights{group=16, symmetric=false}"):
        module = trimtab.optimize(read(MLP), passes, check="never").module
        (expected,) = interpret(module, [x])
        (found,) = Compiled(module)(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
