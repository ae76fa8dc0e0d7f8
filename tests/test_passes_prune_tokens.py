"""prune-tokens on whole models, against a transcription of EViT that runs inside of the model in torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from reduced_encoder import LENGTH, Reduce, deit_s_module, run_images, run_text, sentences, tiny_text
from tiny_vit import Head, images, tiny_vit, traced
from torch import Tensor
from tvm_harness import Compiled

import trimtab
from trimtab.errors import PassError, UsageError
from trimtab.ir import interpret, print_module
from trimtab.passes.prune_tokens import PruneTokens
from trimtab.passes.samples import count_macs, smallest_sizes
from trimtab.passes.tokens.reduction import with_attention
from trimtab.passes.tokens.stream import find_stream


def evit(keep: float, protected: int, layers: tuple[int, ...], score: str, fuse: str) -> Reduce:
    """The formulas of arXiv 2202.07800 token by token; padding, of size 0, goes first and is not fused."""

    def reduce(number: int, x: Tensor, attention: Tensor, keys: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        own = range(protected, len(x))
        kept = math.ceil(keep * len(own))
        if number not in layers or len(own) - kept <= (fuse != "drop"):
            return x, sizes
        queries = [0] if score == "class" else [i for i in range(len(x)) if sizes[i] > 0]
        paid = {j: float(sum(a[i, j] for a in attention for i in queries)) / len(attention) / len(queries) for j in own}
        order = sorted(own, key=lambda j: (bool(sizes[j] == 0), -paid[j]))  # stable
        best, others = order[:kept], [j for j in order[kept:] if sizes[j] > 0]
        rows, counts = [*x[:protected], *(x[j] for j in best)], [*sizes[:protected], *(sizes[j] for j in best)]
        total = sum((sizes[j] for j in others), torch.zeros((), dtype=x.dtype))
        if fuse == "drop":
            present = sum(counts[protected:]) or 1  # padding alone is left as it is
            counts = [*counts[:protected], *(size * (present + total) / present for size in counts[protected:])]
            return torch.stack(rows), torch.stack(counts)
        weights = {j: paid[j] if fuse == "attention" else sizes[j] / total for j in others}
        fused = sum((weights[j] * x[j] for j in others), torch.zeros_like(x[0]))
        return torch.stack([*rows, fused]), torch.stack([*counts, total])

    return reduce


LENGTHS = [LENGTH, LENGTH - 1, 8, 7, 6, 4, 2, 1]
"""Of sentences: from those without padding to such where kept tokens are padding as well."""


@cache
def images_module(head: Head, size: int = 16) -> trimtab.Module:
    """For three images; types of fixed sizes are inferred much faster."""
    return trimtab.trace(tiny_vit(head, size=size), (images(3, size),))


@cache
def text_module(class_too: bool, additive: bool = False) -> trimtab.Module:
    return trimtab.trace(tiny_text(class_too, additive), sentences(LENGTHS))


def pruned(module: trimtab.Module, options: str) -> trimtab.Module:
    return trimtab.optimize(module, f"prune-tokens{{{options}}}", check="never").module


def check(module: trimtab.Module, inputs: Sequence[Tensor], expected: Tensor) -> None:
    """In float64, so that nearly equal scores rank as in the transcription."""
    (found,) = interpret(module, inputs, precision=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fuse", ["attention", "mean", "drop"])
@pytest.mark.parametrize(("head", "size", "score"), [("class", 16, "class"), ("distilled", 12, "received")])
def test_images_follow_the_formulas(head: Head, size: int, score: str, fuse: str) -> None:
    model, image = tiny_vit(head, size=size), images(3, size)
    module = pruned(images_module(head, size), f"keep=0.6,score={score},fuse={fuse}")
    check(module, [image], run_images(model, image, evit(0.6, model.special, (0, 1, 2), score, fuse)))


@pytest.mark.parametrize("fuse", ["attention", "mean", "drop"])
def test_a_mean_over_tokens_counts_every_original_one(fuse: str) -> None:
    module = pruned(images_module("mean"), f"keep=0.5,fuse={fuse},layers=[0, 2]")
    image = images(3, 16)
    check(module, [image], run_images(tiny_vit("mean", size=16), image, evit(0.5, 0, (0, 2), "received", fuse)))


@pytest.mark.parametrize(
    ("fuse", "class_too", "additive"),
    [("attention", True, False), ("attention", False, True), ("mean", False, False), ("drop", True, True)],
)
def test_padding_goes_first_and_counts_for_nothing(fuse: str, class_too: bool, additive: bool) -> None:
    model, score = tiny_text(class_too, additive), "class" if class_too else "received"
    module = pruned(text_module(class_too, additive), f"keep=0.5,fuse={fuse},layers=[0, 1]")
    expected = run_text(model, *sentences(LENGTHS), evit(0.5, int(class_too), (0, 1), score, fuse))
    for padding in (0, 5):  # what stands there makes no difference
        check(module, sentences(LENGTHS, padding), expected)
    with torch.no_grad():
        whole = tiny_text(class_too, additive).double()(*sentences(LENGTHS))
    torch.testing.assert_close(expected[-3:], whole[-3:])  # of these, nothing but padding is pruned
    assert (expected[:4] - whole[:4]).abs().amax(1).min() > 1e-3


def test_all_kept_leaves_the_module_as_it_is() -> None:
    module = images_module("class")
    for options in ("keep=1.0", "keep=0.95,layers=[1]"):  # one of 16 may go, which fusing would replace by itself
        result = trimtab.optimize(module, f"prune-tokens{{{options}}}")
        assert print_module(result.module) == print_module(module)
        assert not result.report.rows[0].changed


def test_layers_and_numbers_of_the_original() -> None:
    stream = find_stream(with_attention(images_module("class")))
    quarters = {depth: PruneTokens().default_layers(replace(stream, layers=stream.layers[:1] * depth))
                for depth in (1, 2, 3, 6, 12)}  # fmt: skip
    assert quarters == {1: [0], 2: [0, 1], 3: [0, 1, 2], 6: [1, 3, 4], 12: [3, 6, 9]}
    assert PruneTokens(keep=0.5).removals(stream, [0, 1, 2]) == (7, 3, 2)  # 16 patches, then 9, 6 and 4
    assert PruneTokens(keep=0.5, fuse="drop").removals(stream, [0, 1, 2]) == (8, 4, 2)


def test_a_budget_chooses_how_many_to_prune() -> None:
    module = images_module("class", 20)
    full = count_macs(module, smallest_sizes(module.main))
    smaller = pruned(module, "budget=0.7")
    assert 0.64 < count_macs(smaller, smallest_sizes(smaller.main)) / full <= 0.7


def test_errors_say_what_to_do() -> None:
    for keep in ("0.0", "1.2", "-0.5"):
        with pytest.raises(UsageError, match="keep is above 0"):
            pruned(images_module("class"), f"keep={keep}")
    with pytest.raises(PassError, match="score=received"):
        pruned(images_module("mean"), "score=class")
    with pytest.raises(PassError, match="merge or fuse"):
        pruned(images_module("dense"), "fuse=drop,unmerge=true")
    with pytest.raises(PassError, match="unmerge=true"):
        pruned(images_module("dense"), "")


def test_dense_outputs_get_the_fused_token_back() -> None:
    module = pruned(images_module("dense"), "keep=0.5,unmerge=true,layers=[2]")
    both = (module, images_module("dense"))
    found, plain = (interpret(m, [images(3, 16)], precision=torch.float64)[0][0] for m in both)
    kept = [i for i in range(17) if torch.allclose(found[i], plain[i], atol=1e-9)]
    assert len(kept) == 9  # the class token and 8 of 16
    (first, *others) = [i for i in range(17) if i not in kept]
    assert all(torch.equal(found[i], found[first]) for i in others)


@pytest.mark.parametrize("batch", [1, 8])
def test_compiled_code_agrees(symbolic: tuple[trimtab.Module, Compiled], batch: int) -> None:
    module, compiled = symbolic
    model, image = tiny_vit(size=16), images(batch, 16)
    check(module, [image], run_images(model, image, evit(0.6, 1, (1,), "class", "attention")))
    expected = interpret(module, [image])
    torch.testing.assert_close(compiled(image), list(expected), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def symbolic() -> tuple[trimtab.Module, Compiled]:
    """A module with a batch of any size, and its code."""
    module = pruned(traced(tiny_vit(size=16), 16), "keep=0.6,layers=[1]")
    return module, compiled(module)


def compiled(module: trimtab.Module) -> Compiled:
    return Compiled(trimtab.optimize(module, "cleanup,fuse", check="never").module)


def test_compiled_code_agrees_with_padding() -> None:
    model, inputs = tiny_text(depth=2), sentences(LENGTHS)
    module = pruned(trimtab.trace(model, inputs), "keep=0.5,fuse=drop,layers=[0]")
    torch.testing.assert_close(compiled(module)(*inputs), list(interpret(module, inputs)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fuse", ["attention", "mean", "drop"])
def test_gradients_with_padding_are_finite_and_reach_all_weights(fuse: str) -> None:
    network = trimtab.to_torch(pruned(text_module(fuse != "mean"), f"keep=0.5,fuse={fuse},layers=[0, 1]"))
    network(*sentences(LENGTHS)).square().sum().backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)
    assert all(bool(gradient.any()) for gradient in gradients)


def test_work_is_that_of_the_table() -> None:
    """Multiply-accumulates that arXiv 2202.07800 has for DeiT-S, in units of 1e9."""
    module = deit_s_module()
    assert count_macs(module, {}) / 1e9 == pytest.approx(4.60, rel=0.01)
    for keep, expected in ((0.9, 4.02), (0.7, 3.03), (0.5, 2.31)):
        assert count_macs(pruned(module, f"keep={keep}"), {}) / 1e9 == pytest.approx(expected, rel=0.01)
