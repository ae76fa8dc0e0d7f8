"""Finding the parts of a graph that treat tokens one by one and take multiply-accumulates: the linear layers around an
attention and the MLP.

Such a region begins at one value with a row for each token and ends where its last matrix products end. What row i of
an end is depends on row i of the beginning alone, so any rows can be computed without the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from trimtab.ir import ops
from trimtab.ir.core import Graph, Module, Value
from trimtab.ir.op import Op
from trimtab.passes.tokens.axis import Axis, Tokens, follow
from trimtab.passes.tokens.stream import Blocker, Stream

_ROWS, _SAMPLES = Axis(1), Axis(0)


@dataclass(frozen=True)
class Region:
    """Ops that treat tokens one by one.

    Attributes:
        layer: the number of the layer whose residual it comes after.
        source: where it begins, ``[B, N, C]``.
        ops: in order of execution; of their operands only those that come from ``source`` depend on inputs.
        ends: ``[B, N, C']`` each, what other ops or the caller read of it.
    """

    layer: int
    source: Value
    ops: tuple[Op, ...]
    ends: tuple[Value, ...]

    def rebuilt(self, op: Op, operands: list[Value], rows: int) -> Op:
        """``op``, one of :attr:`ops`, for so many rows of its operands."""
        tokens = self.source.type.shape[1]
        assert isinstance(tokens, int)
        counts = Tokens(tokens, rows, 0, lambda value: True)
        axes = {index: _ROWS for index, value in enumerate(op.operands) if value is not operands[index]}
        effect = follow(op, axes, counts)
        assert not isinstance(effect, str), effect
        return op.rebuilt(operands, **effect.changes)


def find_regions(module: Module, stream: Stream) -> tuple[list[Region], list[Blocker]]:
    """The regions in and behind the layers of ``stream``, in order, and the matrix products there that are in none.

    Regions do not overlap, and no attention is in one.
    """
    graph = module.main
    token_axes, layer_of = _token_axes(graph, stream), _layers(graph, stream)
    rows = _Rows(stream)
    regions: list[Region] = []
    refused: list[Blocker] = []
    taken: set[Op] = set()
    for op in graph.ops:
        if op in taken or not isinstance(op, ops.Linear | ops.Matmul | ops.Einsum):
            continue
        read = [value for value in dict.fromkeys(op.operands) if value in token_axes]
        if not read or read[0] not in layer_of:
            continue
        source = read[0]
        fits = rows.fit(source) and token_axes[source] == _ROWS
        reason = rows.problem(op, {source}) if fits else f"{source.type} is not batch, token, channel"
        if reason:
            refused.append(Blocker(op, reason))
            continue
        members = tuple(_up_to_products(list(rows.grown(graph, source, taken))))
        taken.update(members)
        results = [result for member in members for result in member.results]
        ends = tuple(value for value in results if value.is_output or any(user not in members for user in value.users))
        regions.append(Region(layer_of[source], source, members, ends))
    return regions, refused


class _Rows:
    """Whether ops compute ``[B, N, C]`` row by row."""

    def __init__(self, stream: Stream) -> None:
        self._varying = stream.varying
        self._shape = stream.layers[0].residual.type.shape[:2]
        self._counts = Tokens(stream.tokens, stream.tokens, 0, stream.varying.__contains__)

    def fit(self, value: Value) -> bool:
        return value.type.rank == 3 and value.type.shape[:2] == self._shape

    def problem(self, op: Op, inside: set[Value]) -> str:
        """Why ``op`` does not compute rows from the rows of the values ``inside`` and constants alone, or ""."""
        if isinstance(op, ops.Attention) or op.regions:
            return f"{op.name} mixes tokens"
        if any(value in self._varying and value not in inside for value in op.operands):
            return f"{op.name} also reads what does not come from the same tokens"
        if not all(self.fit(result) for result in op.results):
            return f"{op.name} gives {op.results[0].type}, not a row for each token"
        plain = isinstance(op, ops.Matmul) and op.operands[1].type.rank == 2  # one matrix for all samples
        for axis in (_ROWS,) if plain else (_ROWS, _SAMPLES):
            axes = {index: axis for index, value in enumerate(op.operands) if value in inside}
            effect = follow(op, axes, self._counts)
            if isinstance(effect, str):
                return effect
            if effect.sides or any(result != axis for result in effect.results):
                return f"{op.name} does not treat tokens one by one"
        return ""

    def grown(self, graph: Graph, source: Value, taken: set[Op]) -> Iterator[Op]:
        """All ops outside of ``taken`` that compute rows from those of ``source`` alone."""
        inside = {source}
        for op in graph.ops:
            reads = any(value in inside for value in op.operands)
            if reads and op not in taken and not self.problem(op, inside):
                inside.update(op.results)
                yield op


def _up_to_products(members: list[Op]) -> list[Op]:
    """Without the ops behind the last matrix products: they are cheap for all tokens, and what is remembered is the
    result of a product."""
    kept: list[Op] = []
    needed: set[Value] = set()
    for op in reversed(members):
        if isinstance(op, ops.Linear | ops.Matmul | ops.Einsum) or any(result in needed for result in op.results):
            kept.append(op)
            needed.update(op.operands)
    return kept[::-1]


def _token_axes(graph: Graph, stream: Stream) -> dict[Value, Axis]:
    """Where the tokens are in the values in and behind the layers."""
    axes: dict[Value, Axis] = {}
    for layer in stream.layers:
        axes.update({layer.residual: _ROWS, layer.site: _ROWS, layer.attention.result: Axis(2)})
    counts = stream.counting()
    for op in graph.ops:
        here = {index: axes[value] for index, value in enumerate(op.operands) if value in axes}
        effect = follow(op, here, counts) if here else ""
        if not isinstance(effect, str):
            for result, axis in zip(op.results, effect.results, strict=True):
                if axis is not None:
                    axes.setdefault(result, axis)
    return axes


def _layers(graph: Graph, stream: Stream) -> dict[Value, int]:
    """The number of the last layer whose residual a value depends on."""
    starts = {layer.residual: number for number, layer in enumerate(stream.layers)}
    found = {value: starts[value] for value in graph.inputs if value in starts}
    for op in graph.ops:
        here = [found[value] for value in op.operands if value in found]
        for result in op.results:
            if here or result in starts:
                found[result] = max([*here, starts.get(result, 0)])
    return found
