"""Following tokens through the reductions of a pass, against the sizes and rows that NumPy makes of the targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from tiny_vit import images, tiny_vit, traced

from trimtab.ir import Module
from trimtab.passes.merge_tokens import MergeTokens
from trimtab.passes.tokens.reduction import TokenReduction
from trimtab.passes.tokens.rows import numbers
from trimtab.passes.tokens.schedules import Removals
from trimtab.passes.tokens.selection import Selection
from trimtab.passes.tokens.shortening import Place
from trimtab.passes.tokens.steps import SelectStep, Step
from trimtab.passes.tokens.stream import Stream
from trimtab.passes.tokens.trace import trace_tokens


@pytest.fixture(scope="module")
def vit() -> Module:
    """Three layers, 25 patches and a class token."""
    return traced(tiny_vit())


@dataclass(frozen=True)
class DropLast(TokenReduction):
    """Drops the last tokens of each layer, whatever they hold."""

    name: ClassVar[str] = "drop-last"

    def removals(self, stream: Stream, layers: Sequence[int]) -> Removals:
        return (5,) * len(layers)

    def reduce(self, place: Place, removed: int) -> Step | None:
        rows = numbers(place.build, place.x, place.tokens - removed)
        return SelectStep(Selection(rows, place.tokens), None, None)


@dataclass(frozen=True)
class Mix(DropLast):
    """Says of the second reduction that nobody knows where the tokens are."""

    name: ClassVar[str] = "mix"

    def reduce(self, place: Place, removed: int) -> Step | None:
        step = super().reduce(place, removed)
        if place.number == 1:
            assert step is not None
            step.target = lambda build: None  # type: ignore[method-assign]
        return step


@pytest.mark.parametrize("batch", [1, 8])
def test_rows_are_those_of_groups_merged_one_after_another(vit: Module, batch: int) -> None:
    image = images(batch, seed=3)
    trace = trace_tokens(vit, MergeTokens(r=6), [image])
    assert (trace.tokens, trace.protected) == (26, 1)
    assert [(made.layer, made.before, made.after) for made in trace.reductions] == [
        (0, 26, 20),
        (1, 20, 14),
        (2, 14, 8),
    ]
    for sample in range(batch):
        expected = _groups_by_layer(image[sample : sample + 1], r=6)
        for made, groups in zip(trace.reductions, expected, strict=True):
            assert made.rows is not None
            found = [set(np.flatnonzero(made.rows[sample] == row)) for row in range(made.after)]
            assert found == groups
            assert found[0] == {0}  # the class token is alone
            assert sum(map(len, found)) == 26


def test_one_layer_alone(vit: Module) -> None:
    (made,) = trace_tokens(vit, MergeTokens(r=4, layers=(1,)), [images(2)]).reductions
    assert (made.layer, made.before, made.after) == (1, 26, 22)
    assert made.rows is not None
    assert made.rows.shape == (2, 26)
    assert made.rows.dtype == np.int64


def test_a_model_is_only_read(vit: Module) -> None:
    before = vit.copy()
    trace_tokens(vit, MergeTokens(r=6), [images(2)])
    assert vit == before


def test_the_traced_graph_computes_what_the_pass_makes(vit: Module) -> None:
    """The first sample's rows do not depend on what else is in the batch."""
    image = images(8)
    whole = trace_tokens(vit, MergeTokens(r=6), [image])
    for index in (0, 5):
        alone = trace_tokens(vit, MergeTokens(r=6), {vit.main.inputs[0].name: image[index : index + 1]})
        for made, one in zip(whole.reductions, alone.reductions, strict=True):
            assert made.rows is not None
            assert one.rows is not None
            assert np.array_equal(made.rows[index], one.rows[0])


def test_dropped_tokens_are_nowhere_from_then_on(vit: Module) -> None:
    trace = trace_tokens(vit, DropLast(), [images(2)])
    assert [made.after for made in trace.reductions] == [21, 16, 11]
    for made in trace.reductions:
        expected = np.where(np.arange(26) < made.after, np.arange(26), -1)
        assert made.rows is not None
        assert np.array_equal(made.rows, np.stack([expected, expected]))


def test_nothing_is_known_behind_tokens_that_are_mixed(vit: Module) -> None:
    trace = trace_tokens(vit, Mix(), [images(2)])
    assert [made.rows is None for made in trace.reductions] == [False, True, True]
    assert [made.after for made in trace.reductions] == [21, 16, 11]


def test_a_pass_that_does_nothing(vit: Module) -> None:
    trace = trace_tokens(vit, MergeTokens(r=0), [images(2)])
    assert (trace.tokens, trace.reductions) == (0, ())


def _groups_by_layer(image: torch.Tensor, r: int) -> list[list[set[int]]]:
    """ToMe on one image by loops over sets: for each layer the original tokens of every row behind its merging."""
    model = tiny_vit().double()
    found = []
    with torch.no_grad():
        x = model.embed(image.double())
        groups = [{token} for token in range(x.shape[1])]
        for block in model.blocks:
            sizes = torch.tensor([float(len(group)) for group in groups], dtype=torch.float64)
            keys = block.heads_of(x)[1][0].mean(0).numpy()
            x = block.attend(x, sizes.log()[None, None, None])
            together = _matched(keys / np.linalg.norm(keys, axis=1, keepdims=True), r)
            shares = [sizes[rows] / sizes[rows].sum() for rows in together]
            x = torch.stack([share @ x[0, rows] for share, rows in zip(shares, together, strict=True)])[None]
            x = block.mlp(x)
            groups = [set().union(*(groups[row] for row in rows)) for rows in together]
            found.append(groups)
    return found


def _matched(metric: np.ndarray, r: int) -> list[list[int]]:
    """Which rows each new row is made of: the class token, even rows that stay, then odd rows with what they got."""
    even, odd = range(2, len(metric), 2), range(1, len(metric), 2)
    links = []
    for candidate in even:
        cosine, receiver = max((float(metric[candidate] @ metric[other]), -other) for other in odd)
        links.append((-cosine, candidate, -receiver))
    got: dict[int, list[int]] = {receiver: [receiver] for receiver in odd}
    merged = set()
    for _, candidate, receiver in sorted(links)[:r]:
        got[receiver].append(candidate)
        merged.add(candidate)
    return [[0], *([row] for row in even if row not in merged), *got.values()]
