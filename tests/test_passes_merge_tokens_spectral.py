"""merge-tokens-spectral on whole models, against a transcription of PiToMe that runs inside of the model in torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from trimtab.passes.samples import count_macs, smallest_sizes

LENGTHS = [LENGTH, LENGTH - 1, 9, 7, 5, 4, 2, 1]
"""Of sentences: from those without padding to such of little else."""


def pitome(
    keep: float,
    protected: int,
    bipartite: Sequence[bool],
    margin: float = 0.75,
    fall: float = 0.75,
    gaussian: bool = False,
) -> Reduce:
    """The formulas of arXiv 2405.16148 token by token; padding, of size 0, comes before all energies."""
    depth = len(bipartite)

    def reduce(number: int, x: Tensor, attention: Tensor, keys: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        limit = margin - fall * number / depth
        own = list(range(protected, len(x)))
        r = math.floor(len(own) - len(own) * keep)
        mean = keys.mean(0)
        unit = [row / row.norm() for row in mean]

        def cosine(i: int, j: int) -> float:
            if sizes[i] == 0 or sizes[j] == 0:
                return float(sizes[i] == sizes[j])
            return float(unit[i] @ unit[j])

        def term(c: float) -> float:
            if gaussian:
                sigma = 1 - limit
                return math.exp(-0.5 * ((1 - c) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
            return c - limit if c > limit else math.expm1(c - limit)

        energy = {i: math.inf if sizes[i] == 0 else sum(term(cosine(i, j)) for j in own) / len(own) for i in own}
        order = sorted(own, key=lambda i: -energy[i])  # stable
        if bipartite[number]:
            a, b, alone = order[0::2], order[1::2], []
        elif gaussian:
            a, b, alone = order[:r], order[r : 2 * r], order[2 * r :]
        else:
            a, b, alone = order[0 : 2 * r : 2], order[1 : 2 * r : 2], order[2 * r :]
        partner = {i: max(b, key=lambda j: cosine(i, j)) for i in a}
        merged = sorted(a, key=lambda i: -cosine(i, partner[i]))[:r]
        groups = [[i] for i in (*range(protected), *alone, *(i for i in a if i not in merged))]
        groups += [[j, *(i for i in merged if partner[i] == j)] for j in b]
        counts = torch.stack([sum(sizes[i] for i in group) for group in groups])
        rows = [sum(x[i] * sizes[i] for i in g) / (count or 1) for g, count in zip(groups, counts, strict=True)]
        return torch.stack(rows), counts

    return reduce


@cache
def images_module(head: Head, size: int = 16) -> trimtab.Module:
    """For three images; types of fixed sizes are inferred much faster."""
    return trimtab.trace(tiny_vit(head, size=size), (images(3, size),))


@cache
def text_module(class_too: bool, additive: bool = False) -> trimtab.Module:
    return trimtab.trace(tiny_text(class_too, additive), sentences(LENGTHS))


def merged(module: trimtab.Module, options: str) -> trimtab.Module:
    return trimtab.optimize(module, f"merge-tokens-spectral{{{options}}}", check="never").module


def check(module: trimtab.Module, inputs: Sequence[Tensor], expected: Tensor) -> None:
    """In float64, so that nearly equal energies rank as in the transcription."""
    (found,) = interpret(module, inputs, precision=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("head", "size", "options", "layers"),
    [
        ("class", 16, "", [True, True, False]),
        ("mean", 12, "variant=mae,keep=0.7", [False, False, True]),
        ("distilled", 16, "variant=energy,keep=0.6", [False] * 3),
        ("class", 20, "variant=bipartite,keep=0.5", [True] * 3),
    ],
)
def test_images_follow_the_formulas(head: Head, size: int, options: str, layers: Sequence[bool]) -> None:
    model, image = tiny_vit(head, size=size), images(3, size)
    keep = float(options.split("keep=")[1]) if options else 0.925
    check(
        merged(images_module(head, size), options),
        [image],
        run_images(model, image, pitome(keep, model.special, layers)),
    )


def test_margins_and_proportional_attention_follow_the_formulas() -> None:
    model, image = tiny_vit("mean", size=16), images(3, 16)
    module = merged(images_module("mean"), "keep=0.8,margin=0.9,fall=0.3,proportional=true")
    reduce = pitome(0.8, 0, [True, True, False], 0.9, 0.3)
    check(module, [image], run_images(model, image, reduce, proportional=True))


@pytest.mark.parametrize(
    ("options", "class_too", "additive", "layers"),
    [
        ("kernel=gaussian,variant=energy,margin=0.9,fall=0.25", True, False, [False] * 3),
        ("kernel=gaussian,variant=bipartite,margin=0.9,fall=0.25", False, True, [True] * 3),
        ("variant=energy,margin=0.9,fall=0.25", False, False, [False] * 3),
    ],
)
def test_padding_is_merged_first_and_counts_for_nothing(
    options: str, class_too: bool, additive: bool, layers: Sequence[bool]
) -> None:
    model = tiny_text(class_too, additive)
    module = merged(text_module(class_too, additive), f"keep=0.7,{options}")
    reduce = pitome(0.7, int(class_too), layers, 0.9, 0.25, "gaussian" in options)
    expected = run_text(model, *sentences(LENGTHS), reduce)
    for padding in (0, 5):  # what stands there makes no difference
        check(module, sentences(LENGTHS, padding), expected)
    with torch.no_grad():
        whole = model.double()(*sentences(LENGTHS))
    torch.testing.assert_close(expected[-3:], whole[-3:])  # of these, nothing but padding is merged
    assert (expected[:2] - whole[:2]).abs().amax(1).min() > 1e-3


def test_all_kept_leaves_the_module_as_it_is() -> None:
    module = images_module("class")
    result = trimtab.optimize(module, "merge-tokens-spectral{keep=1.0}")
    assert print_module(result.module) == print_module(module)
    assert not result.report.rows[0].changed


def test_a_budget_chooses_how_many_to_merge() -> None:
    module = images_module("class", 20)
    full = count_macs(module, smallest_sizes(module.main))
    smaller = merged(module, "budget=0.7")
    assert 0.64 < count_macs(smaller, smallest_sizes(smaller.main)) / full <= 0.7


def test_errors_say_what_to_do() -> None:
    for keep in ("0.49", "1.1", "-1.0"):
        with pytest.raises(UsageError, match=r"keep is 0.5 to 1.*budget=0.6"):
            merged(images_module("class"), f"keep={keep}")
    for margins in ("margin=1.0", "margin=0.9,fall=-0.2"):
        with pytest.raises(UsageError, match="are below 1"):
            merged(images_module("class"), margins)
    with pytest.raises(PassError, match="unmerge=true"):
        merged(images_module("dense"), "")


@pytest.fixture(scope="module")
def symbolic() -> tuple[trimtab.Module, Compiled]:
    """A module with a batch of any size, and its code."""
    module = merged(traced(tiny_vit(size=16, depth=2), 16), "keep=0.7")
    return module, Compiled(trimtab.optimize(module, "cleanup,fuse", check="never").module)


@pytest.mark.parametrize("batch", [1, 8])
def test_compiled_code_agrees(symbolic: tuple[trimtab.Module, Compiled], batch: int) -> None:
    module, compiled = symbolic
    model, image = tiny_vit(size=16, depth=2), images(batch, 16)
    check(module, [image], run_images(model, image, pitome(0.7, 1, [True, False])))
    torch.testing.assert_close(compiled(image), list(interpret(module, [image])), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", ["", "kernel=gaussian,proportional=true"])
def test_gradients_with_padding_are_finite_and_reach_all_weights(options: str) -> None:
    network = trimtab.to_torch(merged(text_module(False), f"keep=0.7,{options}".strip(",")))
    network(*sentences(LENGTHS)).square().sum().backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)
    assert all(bool(gradient.any()) for gradient in gradients)


@pytest.mark.parametrize(("keep", "expected"), [(0.95, 3.44), (0.925, 2.99), (0.9, 2.59)])
def test_work_is_that_of_the_table(keep: float, expected: float) -> None:
    """Multiply-accumulates of DeiT-S, in units of 1e9; those of the energies are at most 0.8 % more."""
    macs = count_macs(merged(deit_s_module(), f"keep={keep}"), {}) / 1e9
    assert macs == pytest.approx(expected, rel=0.01)
