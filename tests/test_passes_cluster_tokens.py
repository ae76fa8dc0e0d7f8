"""Clustering of tokens as a pass, against the same model in torch with clustering by the formulas."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_tokens_clustering import cluster_by_formula, weights_by_formula
from torch import Tensor, nn

import trimtab
from trimtab.errors import PassError, UsageError
from trimtab.ir import Module, interpret, verify
from trimtab.passes.base import Context
from trimtab.passes.cluster_tokens import ClusterTokens
from trimtab.passes.drop import Drop
from trimtab.passes.samples import count_macs, smallest_sizes

WIDTH, HEADS, PATCH, LAYERS = 16, 2, 2, 3


class _Layer(nn.Module):
    def __init__(self, bias: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.bias = nn.Parameter(torch.randn(bias)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.first(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, self.bias)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


class Vision(nn.Module):
    """Layers between a class token in front of patches and a head.

    ``head``: ``class``, ``mean``, ``dense`` for the tokens after a norm, ``maps`` for feature maps of the tokens behind
    each layer.
    """

    def __init__(self, head: str, grid: tuple[int, int] = (4, 4), layers: int = LAYERS, biased: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.grid = head, grid
        tokens = grid[0] * grid[1] + 1
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.places = nn.Parameter(torch.randn(1, tokens, WIDTH))
        self.layers = nn.ModuleList([_Layer((1, HEADS, tokens, tokens) if biased else ()) for _ in range(layers)])
        self.norm, self.classes, self.map = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5), nn.Conv2d(WIDTH, 4, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.run(pixels, lambda number, x: x, lambda x: x)

    def run(
        self, pixels: Tensor, before: Callable[[int, Tensor], Tensor], whole: Callable[[Tensor], Tensor]
    ) -> Tensor | tuple[Tensor, ...]:
        """The model with the tokens before each layer as ``before`` changes them, and dense heads on ``whole``."""
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        maps = []
        for number, layer in enumerate(self.layers):
            x = layer(before(number, x))
            if self.head == "maps":
                rows = whole(x)[:, 1:]
                maps.append(self.map(rows.transpose(1, 2).reshape(-1, WIDTH, *self.grid)))
        if self.head == "maps":
            return tuple(maps)
        if self.head == "dense":
            states = self.norm(whole(x))
            return states, self.classes(states[:, 0])
        states = self.norm(x)
        return self.classes(states[:, 0] if self.head == "class" else self.pooled(states))

    def pooled(self, x: Tensor) -> Tensor:
        return x[:, 1:].mean(1)


def pixels(model: Vision, batch: int) -> Tensor:
    shape = (batch, 3, PATCH * model.grid[0], PATCH * model.grid[1])
    return torch.randn(shape, generator=torch.Generator().manual_seed(batch))


@cache
def vision(head: str, grid: tuple[int, int] = (4, 4), layers: int = LAYERS) -> Vision:
    return Vision(head, grid, layers).eval()


@cache
def _trace(model: Vision) -> Module:
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    return trimtab.trace(model, (pixels(model, 2),), dynamic_shapes=shapes)


def traced(model: Vision) -> Module:
    return _trace(model).copy()


def clustered(model: Vision, **options: Any) -> Module:
    module = traced(model)
    assert ClusterTokens(**options).run(module, Context()) is True
    verify(module)
    return module


def by_formula(model: Vision, image: Tensor, after: int, clusters: tuple[int, int], **options: Any) -> list[Tensor]:
    """The outputs with the tokens clustered behind layer ``after``, in float64."""
    model = deepcopy(model).double()
    counts: list[Tensor] = []
    matrices: list[Tensor] = []

    def before(number: int, x: Tensor) -> Tensor:
        if number != after + 1:
            return x
        parts, weights, totals = [], [], []
        for row in x[:, 1:].numpy():
            centers, _, total = cluster_by_formula(row, model.grid, clusters)
            parts.append(centers)
            totals.append(total)
            weights.append(weights_by_formula(row, centers, **options))
        counts.append(torch.from_numpy(np.array(totals)))
        matrices.append(torch.from_numpy(np.array(weights)))
        return torch.cat([x[:, :1], torch.from_numpy(np.array(parts))], 1)

    def whole(x: Tensor) -> Tensor:
        return torch.cat([x[:, :1], matrices[0] @ x[:, 1:]], 1) if matrices else x

    if model.head == "mean":
        model.pooled = (
            lambda x: (  # type: ignore[method-assign]
                (x[:, 1:] * counts[0][:, :, None]).sum(1) / counts[0].sum(1, keepdim=True)
            )
        )
    with torch.no_grad():
        found = model.run(image.double(), before, whole)
    return list(found) if isinstance(found, tuple) else [found]


@pytest.mark.parametrize(
    ("head", "grid", "after", "clusters", "options"),
    [
        ("dense", (4, 4), 0, (2, 2), {}),
        ("dense", (4, 4), 1, (3, 3), {"k": 3, "normalize": "l1"}),
        ("dense", (3, 5), 0, (2, 2), {"k": 2}),
        ("maps", (4, 4), 0, (2, 3), {"normalize": "l1"}),
        ("class", (4, 4), 0, (2, 2), {}),
        ("mean", (4, 4), 0, (3, 2), {}),
    ],
)
def test_the_model_runs_on_clusters_and_gives_back_what_a_dense_head_needs(
    head: str, grid: tuple[int, int], after: int, clusters: tuple[int, int], options: Any
) -> None:
    model = vision(head, grid)
    module = clustered(model, after=after, clusters=clusters, grid=grid, **options)
    for batch in (1, 8):
        image = pixels(model, batch)
        found = interpret(module, [image], precision=torch.float64)
        for one, other in zip(found, by_formula(model, image, after, clusters, **options), strict=True):
            np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-6, atol=1e-6)


def test_what_is_read_before_or_at_the_clustering_stays_as_it_was() -> None:
    model = vision("maps")
    image = pixels(model, 3)
    original = interpret(traced(model), [image])
    found = interpret(clustered(model, after=1), [image])
    for number in (0, 1):
        torch.testing.assert_close(found[number], original[number], rtol=0, atol=1e-6)
    assert not torch.allclose(found[2], original[2], atol=1e-3)


def test_a_class_token_model_reconstructs_nothing() -> None:
    """The cluster step of a dense model takes more: the weights and their product with the clusters."""
    module = clustered(vision("class"))
    sizes = [op.result.type.shape for op in module.main.ops if op.name == "softmax"]
    assert (17, 4) not in [shape[1:] for shape in sizes]
    assert all(op.name != "topk" for op in module.main.ops)
    original = traced(vision("class"))
    assert count_macs(module, smallest_sizes(module.main)) < count_macs(original, smallest_sizes(original.main))


def test_the_default_clusters_half_of_each_side_behind_a_third_of_the_layers() -> None:
    module = traced(vision("dense"))
    assert ClusterTokens().run(module, Context())
    keys = [op.operands[1].type.shape[2] for op in module.main.ops if op.name == "attention"]
    assert keys == [17, 5, 5]


def test_clusters_by_a_budget_or_a_bound_on_the_drop() -> None:
    model = vision("dense")
    image = pixels(model, 2)
    module = traced(model)
    full = count_macs(module, smallest_sizes(module.main))
    shares = []
    for budget in (0.8, 0.95):
        reduced = module.copy()
        assert ClusterTokens(after=0, budget=budget).run(reduced, Context())
        shares.append(count_macs(reduced, smallest_sizes(reduced.main)) / full)
        assert shares[-1] <= budget
    assert shares[0] < shares[1]
    with pytest.raises(UsageError, match="the budget cannot be met"):
        ClusterTokens(after=1, budget=0.1).run(module.copy(), Context())
    ctx = Context(calibration=[[image]])
    drop, reduced = Drop(module, ctx, "cluster-tokens"), module.copy()
    assert ClusterTokens(after=1, max_drop=0.8, normalize="l1").run(reduced, ctx)
    assert 0 < drop(reduced) <= 0.8
    assert not ClusterTokens(after=1, max_drop=1e-6, normalize="l1").run(module.copy(), ctx)


def test_compiled_code_agrees_for_any_batch(tmp_path: Path) -> None:
    model = vision("maps")
    module = clustered(model, k=3, iterations=2)
    path = tmp_path / "model.trim"
    trimtab.compile(module, target="native").save(path)
    with trimtab.load(path) as session:
        for batch in (1, 8):
            image = pixels(model, batch)
            found = session(image.numpy())
            for one, other in zip(
                found.values() if isinstance(found, dict) else found, interpret(module, [image]), strict=True
            ):
                np.testing.assert_allclose(np.asarray(one), other.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", ["maps", "mean"])
def test_gradients_reach_all_weights(head: str) -> None:
    model = vision(head)
    network = trimtab.to_torch(clustered(model, clusters=(3, 3), k=4, window=3, temperature=0.1))
    outputs = network(pixels(model, 2))
    outputs = (
        [outputs] if isinstance(outputs, Tensor) else list(outputs.values() if isinstance(outputs, dict) else outputs)
    )
    sum(output.square().sum() for output in outputs).backward()
    gradients = {name: weight.grad for name, weight in network.named_parameters() if weight.requires_grad}
    assert len(gradients) > 10
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert torch.isfinite(gradient).all(), name
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())


def test_a_bias_for_each_pair_of_tokens_is_refused_with_its_line() -> None:
    model = Vision("dense", biased=True).eval()
    module = traced(model)
    before = str(module)
    with pytest.raises(PassError, match="bias for each pair of tokens") as error:
        ClusterTokens().run(module, Context())
    assert "test_passes_cluster_tokens.py" in str(error.value)
    assert "leave the pass out" in str(error.value)
    assert str(module) == before


def test_layers_that_can_run_on_clusters_behind_others_that_cannot() -> None:
    model = Vision("dense", layers=4).eval()
    model.layers[1].bias = nn.Parameter(torch.randn(1, HEADS, 17, 17))
    module = traced(model)
    with pytest.raises(PassError, match="after=1"):
        ClusterTokens(after=0).run(module, Context())
    assert ClusterTokens(after=1).run(module, Context())
    verify(module)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"after": 2}, "after=0 to after=1"),
        ({"clusters": (4, 4)}, r"clusters=\[2, 2\]"),
        ({"clusters": (5, 1)}, r"clusters=\[2, 2\]"),
        ({"grid": (3, 5)}, r"the 16 tokens .* give grid"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(options: Any, message: str) -> None:
    model = vision("dense")
    with pytest.raises(UsageError, match=message):
        ClusterTokens(**options).run(traced(model), Context())


def test_a_grid_that_is_not_square_is_asked_for() -> None:
    model = vision("dense", (3, 5))
    with pytest.raises(UsageError, match="give grid"):
        ClusterTokens().run(traced(model), Context())


def test_one_layer_has_none_behind_it() -> None:
    model = vision("dense", layers=1)
    with pytest.raises(PassError, match="for those after it"):
        ClusterTokens().run(traced(model), Context())


def test_without_unmerge_a_dense_output_is_refused() -> None:
    model = vision("dense")
    with pytest.raises(PassError, match="has a row for each token"):
        ClusterTokens(unmerge=False).run(traced(model), Context())


@pytest.mark.parametrize(
    "options",
    [{"layers": (1,)}, {"clusters": (2,)}, {"grid": (0, 4)}, {"after": -2}, {"iterations": 0}, {"k": 0}, {"window": 0},
     {"temperature": 0.0}],
)  # fmt: skip
def test_wrong_options(options: Any) -> None:
    with pytest.raises(UsageError, match="cluster-tokens"):
        ClusterTokens(**options)
