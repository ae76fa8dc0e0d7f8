"""Clustering of tokens on a grid, and their reconstruction for dense outputs: Expediting."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

from trimtab.errors import PassError, UsageError
from trimtab.ir import ops
from trimtab.ir.core import Graph, Module, Value
from trimtab.ir.op import Op
from trimtab.passes.base import Changed, Context
from trimtab.passes.drop import Drop
from trimtab.passes.samples import count_macs, smallest_sizes
from trimtab.passes.tokens.axis import Axis, follow
from trimtab.passes.tokens.clustering import ClusterStep, Norm, Side
from trimtab.passes.tokens.reduction import TokenReduction, with_attention
from trimtab.passes.tokens.schedules import Removals
from trimtab.passes.tokens.shortening import Place, Plan, Watch
from trimtab.passes.tokens.stream import Blocker, Layer, Stream, find_stream


@dataclass(frozen=True)
class ClusterTokens(TokenReduction):
    """Cluster the tokens of an image behind one layer, and make all of them of the clusters again where a dense output
    needs them.

    The tokens ``[B, H W, C]`` between the first ``after + 1`` layers and the others become h w clusters of similar
    tokens nearby, by a few rounds of soft clustering; the layers behind run on those. The first tokens, which are read
    by their position, stay as they are in front. A later feature map or an output with a row for each token is given
    all rows again: each the sum of the refined clusters nearest to what the token was when it was clustered. What is
    read from before the clustering stays as it was. Nothing is reconstructed for a model that reads its class token
    only; means over tokens count each cluster for as many tokens as it stands for. From Liang et al., Expediting
    Large-Scale Vision Transformer for Dense Prediction without Fine-tuning, arXiv 2210.01035.

    - ``after``: number of the layer behind which tokens are clustered, from 0; -1 for about a third of the layers.
    - ``clusters``: h, w; none for half of the grid each way. With ``budget`` or ``max_drop``, which choose their
      number, they give the ratio of the sides alone.
    - ``grid``: H, W of the tokens that are not protected; none for a square.
    - ``iterations``: rounds of clustering.
    - ``temperature``: how strongly the squared distance counts, in clustering and reconstruction.
    - ``window``: a token goes to clusters in a square of so many by so many cells around its own.
    - ``k``: of how many clusters a token is made again.
    - ``normalize``: what the weights of those are divided by. ``l2``, as in the code published with the paper, makes
      their squares add up to 1: a token that is near to one cluster alone becomes that cluster, but one that is equally
      near to n of them becomes sqrt(n) times their mean, which a norm behind takes back and other ops do not. ``l1``,
      as the paper's formula reads, makes it the mean.
    """

    name: ClassVar[str] = "cluster-tokens"
    unmerge: bool = True
    after: int = -1
    clusters: tuple[int, ...] = ()
    grid: tuple[int, ...] = ()
    iterations: int = 5
    temperature: float = 0.01
    window: int = 5
    k: int = 20
    normalize: Norm = "l2"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers:
            raise UsageError(
                "cluster-tokens got layers",
                values={"layers": list(self.layers)},
                rule="tokens are clustered once",
                fix=f"say behind which layer with after={max(0, self.layers[0] - 1)}",
            )
        for name, sides in (("clusters", self.clusters), ("grid", self.grid)):
            if sides and (len(sides) != 2 or min(sides) < 1):
                raise UsageError(
                    f"cluster-tokens got a wrong {name}",
                    values={name: list(sides)},
                    rule=f"{name} has two sides, rows and columns, of 1 or more",
                    fix=f"for example {name}=[{'7, 7' if name == 'clusters' else '14, 14'}]",
                )
        for name, smallest in (("after", -1), ("iterations", 1), ("window", 1), ("k", 1)):
            if getattr(self, name) < smallest:
                raise UsageError(
                    f"cluster-tokens got too small a number for {name}",
                    values={name: getattr(self, name)},
                    rule=f"{name} is {smallest} or more",
                )
        if not self.temperature > 0 or not math.isfinite(self.temperature):
            raise UsageError(
                "cluster-tokens got a wrong temperature",
                values={"temperature": self.temperature},
                rule="the temperature is positive and finite",
                fix="for example temperature=0.01",
            )

    def removals(self, stream: Stream, layers: Sequence[int]) -> Removals:
        grid = self._grid(stream)
        clusters = self._clusters(grid)
        return (grid[0] * grid[1] - clusters[0] * clusters[1],)

    def reduce(self, place: Place, removed: int) -> ClusterStep:
        grid = self._sides(place.tokens, place.protected)
        return ClusterStep(
            place,
            grid,
            self._clusters(grid),
            iterations=self.iterations,
            temperature=self.temperature,
            window=self.window,
            k=self.k,
            normalize=self.normalize,
        )

    def plan(self, stream: Stream, removals: Removals, layers: Sequence[int]) -> Plan:
        (number,), (removed,) = layers, removals
        place = stream.layers[number].residual
        whole = frozenset(_taps(stream, number)) if self.unmerge else frozenset[Op]()
        return Plan({place: (number, lambda place: self.reduce(place, removed))}, {}, self.unmerge, whole)

    def blockers(self, layer: Layer) -> tuple[Blocker, ...]:
        return layer.entry_blockers

    def rewrite(self, module: Module, ctx: Context, watch: Watch | None = None) -> Changed:
        if not self.budget and not self.max_drop:
            return super().rewrite(module, ctx, watch)
        chosen = self._within_bound(module, ctx)
        if chosen is None:
            ctx.note(f"no number of clusters keeps the drop to {self.max_drop:g}")
            return False
        ctx.note(f"{chosen.clusters[0]} x {chosen.clusters[1]} clusters")
        return chosen.rewrite(module, ctx, watch)

    def _usable(self, stream: Stream, ctx: Context) -> list[int]:
        """The layer before which tokens are clustered."""
        count = len(stream.layers)
        after = self.after if self.after >= 0 else (count - 1) // 3
        if count == 1:
            others = stream.refused[0] if stream.refused else None
            raise PassError(
                "tokens cannot be clustered",
                values={"layers of tokens": 1, "no layer": others or "none"},
                rule="tokens are clustered behind one layer, for those after it",
                fix="leave the pass out for this model",
                location=others.location if others is not None else None,
            )
        if after > count - 2:
            raise UsageError(
                "cluster-tokens has no layers to work for",
                values={"after": after, "layers": count},
                rule="tokens are clustered behind one layer, for those after it",
                fix=f"give after=0 to after={count - 2}",
            )
        self._grid(stream)
        number = after + 1
        layer = stream.layers[number]
        if self.unmerge:
            _refuse_inside(stream, number)
        elif layer.entry_blockers:
            blocker = layer.entry_blockers[0]
            raise PassError(
                "tokens cannot be clustered",
                values={"because": blocker.reason, "after": after},
                rule=f"that needs all {stream.tokens} tokens",
                fix="leave out unmerge=false, so that they are made of the clusters again",
                location=blocker.location,
            )
        return [number]

    def _grid(self, stream: Stream) -> Side:
        return self._sides(stream.tokens, stream.protected)

    def _sides(self, tokens: int, protected: int) -> Side:
        """H, W."""
        count = tokens - protected
        side = math.isqrt(count)
        if self.grid:
            rows, columns = self.grid
        elif side * side == count:
            rows = columns = side
        else:
            rows = columns = 0
        if rows * columns != count or not count:
            raise UsageError(
                "cluster-tokens does not know the grid of the tokens",
                values={"tokens": tokens, "protected": protected, "grid": list(self.grid) or "a square"},
                rule=f"the {count} tokens that are not protected are a grid of H x W",
                fix="give grid=[H, W]: the image's height and width, each over the size of a patch",
            )
        return rows, columns

    def _clusters(self, grid: Side) -> Side:
        """h, w."""
        rows, columns = self.clusters or tuple((side + 1) // 2 for side in grid)
        if rows > grid[0] or columns > grid[1] or (rows, columns) == grid:
            raise UsageError(
                "so many clusters do not reduce tokens",
                values={"clusters": [rows, columns], "grid": list(grid)},
                rule="there are at most as many clusters each way as tokens, and fewer in all",
                fix=f"for example clusters=[{(grid[0] + 1) // 2}, {(grid[1] + 1) // 2}]",
            )
        return rows, columns

    def _within_bound(self, module: Module, ctx: Context) -> ClusterTokens | None:
        """This pass with as many clusters as ``budget`` allows, or as few as ``max_drop`` does."""
        raised = with_attention(module)
        stream = find_stream(raised)
        layers = self._usable(stream, ctx)
        choices = [
            replace(self, clusters=clusters, budget=0.0, max_drop=0.0)
            for clusters in _sides_up_to(self._grid(stream), self.clusters)
        ]

        def reduced(choice: ClusterTokens) -> Module:
            return choice._reduced(raised, choice.removals(stream, layers), layers)

        if self.max_drop:
            drop = Drop(raised, ctx, self.name, "or budget= instead of max_drop=")
            number = _first(len(choices), lambda index: drop(reduced(choices[index])) <= self.max_drop)
            return choices[number] if number < len(choices) else None
        full = count_macs(raised, smallest_sizes(raised.main))

        def share(index: int) -> float:
            copy = reduced(choices[index])
            return count_macs(copy, smallest_sizes(copy.main)) / full

        number = _first(len(choices), lambda index: share(index) > self.budget)
        if number == 0:
            least = share(0)
            raise UsageError(
                "the budget cannot be met",
                values={"budget": self.budget, "least": f"{least:.3f}", "after": layers[0] - 1},
                rule="the layers before the clustering run on all tokens, and reconstruction takes its share",
                fix=f"give a budget of {math.ceil(1000 * least) / 1000:.3f} or more, or a smaller after",
            )
        return choices[number - 1]


def _sides_up_to(grid: Side, ratio: Sequence[int]) -> list[Side]:
    """Sides of fewer clusters than ``grid`` has, rising, nearly in ``ratio`` (none: that of the grid)."""
    rows, columns = ratio or grid
    scale = min(Fraction(grid[0], rows), Fraction(grid[1], columns))
    steps = 2 * max(grid)  # one side grows after the other
    sides = [
        (math.ceil(rows * scale * step / steps), max(1, int(columns * scale * step / steps)))
        for step in range(1, steps + 1)
    ]
    return [side for side in dict.fromkeys(sides) if side != grid]


def _first(count: int, holds: Callable[[int], bool]) -> int:
    """The first of 0 .. count - 1 from which on ``holds``, found by halving; count where it never does."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _refuse_inside(stream: Stream, number: int) -> None:
    """Refuse where all tokens are needed not behind the layers but between them: to make them again for every layer
    takes more than clusters save.

    Raises:
        PassError: an op between layer ``number`` and the end of the last one needs all tokens.
    """
    inside = _before(_end(stream))
    latest = [any(blocker.op in inside for blocker in layer.entry_blockers) for layer in stream.layers].count(True) - 1
    later = latest + 1 < len(stream.layers)
    for blocker in stream.layers[number].entry_blockers:
        if blocker.op in inside:
            raise PassError(
                "tokens cannot be clustered",
                values={"because": blocker.reason, "layers on clusters": f"{number} to {len(stream.layers) - 1}"},
                rule="every layer that runs on clusters treats tokens alike wherever they are",
                fix=f"cluster behind them with after={latest}" if later else "leave the pass out for this model",
                location=blocker.location,
            )


def _taps(stream: Stream, number: int) -> Iterator[Op]:
    """The ops outside of the layers that read tokens before layer ``number`` or one behind it, or behind the last, and
    lead to something that needs all tokens.

    Rows are made again there, and not at the first op behind that cannot do without: a norm between the two is to see
    whole rows, whose length the weights of a reconstruction change, and what is read where tokens are clustered is
    there as it was.
    """
    end = _end(stream)
    inside = _before(end)
    residuals = [layer.residual for layer in stream.layers[number:]]
    ends = {*residuals, end}
    blockers = stream.layers[number].entry_blockers
    needing = {blocker.op for blocker in blockers}
    graph = _graph(stream)
    outputs = dict(zip(graph.output_names, graph.outputs, strict=True))
    wanted = {outputs[blocker.output] for blocker in blockers if blocker.op is None}
    for op, here in reversed(list(_readers(stream, residuals))):
        if op in needing or any(result in wanted for result in op.results):
            rows = {op.operands[index] for index in here}
            wanted |= rows
            if op not in inside and rows & ends:
                yield op


def _end(stream: Stream) -> Value:
    """The tokens behind the last layer: the first sum of tokens with tokens behind its site, or the site."""
    site = stream.layers[-1].site
    for op, here in _readers(stream, [site]):
        if isinstance(op, ops.Add) and len(here) == 2 and op.result.type == site.type:
            return op.result
    return site


def _readers(stream: Stream, sources: Iterable[Value]) -> Iterator[tuple[Op, Mapping[int, Axis]]]:
    """The ops that read rows of the tokens ``sources``, each with the axes of those operands."""
    reached = dict.fromkeys(sources, Axis(1))
    for op in _graph(stream).ops:
        here = {index: reached[value] for index, value in enumerate(op.operands) if value in reached}
        if here:
            yield op, here
            effect = follow(op, here, stream.counting())
            if not isinstance(effect, str):
                axes = zip(op.results, effect.results, strict=True)
                reached.update({result: axis for result, axis in axes if axis is not None})


def _graph(stream: Stream) -> Graph:
    graph = stream.layers[0].attention.graph
    assert graph is not None
    return graph


def _before(value: Value) -> set[Op]:
    """The ops that ``value`` is computed by."""
    found: set[Op] = set()
    waiting = [value]
    while waiting:
        op = waiting.pop().producer
        if op is not None and op not in found:
            found.add(op)
            waiting += op.operands
    return found
