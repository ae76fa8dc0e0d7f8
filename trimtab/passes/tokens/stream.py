"""Finding the tokens of a model by structure: the residual stream, its attention layers, and what prevents that there
are fewer tokens behind one of them.

A layer is an attention whose result, through ops that treat tokens one by one, is added to a residual that the queries
were computed from.  The place where its tokens may be reduced, the *site*, is the sum, or the norm of the sum where
nothing else reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from trimtab.errors import Location, PassError
from trimtab.ir import ops
from trimtab.ir.core import Graph, Module, Value
from trimtab.ir.op import Op
from trimtab.passes.tokens.axis import Axis, Tokens, follow

_MOST_READ_BY_POSITION = 8
"""Tokens that are read by their position count as protected up to this many; behind it is no place for class tokens."""


@dataclass(frozen=True)
class Blocker:
    """Why there cannot be fewer tokens: an op behind a site that needs all of them in their places, or an output that
    has a row for each.

    Attributes:
        op: the op; None for an output.
        reason: in words.
        output: name of the output.
    """

    op: Op | None
    reason: str
    output: str = ""

    @property
    def location(self) -> Location | None:
        """The user's line."""
        return self.op.location if self.op is not None else None

    def __str__(self) -> str:
        place = f" ({self.location})" if self.location is not None else ""
        return f"{self.reason}{place}"


@dataclass(frozen=True)
class Layer:
    """One attention layer of the residual stream.

    Attributes:
        attention: its attention.
        q, k, v: what the attention reads, ``[B, H, N, D]``; kept here, as a rewriting may change what it reads.
        residual: the tokens ``[B, N, C]`` that the attention's result is added to.
        site: ``[B, N, C]``, where tokens can be reduced between attention and MLP.
        blockers: what needs all tokens of the site; empty when they can be reduced.
        entry_blockers: what needs all tokens of the residual; empty when they can be reduced before the layer.
    """

    attention: ops.Attention
    q: Value
    k: Value
    v: Value
    residual: Value
    site: Value
    blockers: tuple[Blocker, ...] = ()
    entry_blockers: tuple[Blocker, ...] = ()

    @property
    def tokens(self) -> int:
        """N."""
        size = self.site.type.shape[1]
        assert isinstance(size, int)
        return size


@dataclass(frozen=True)
class Stream:
    """The tokens of a model.

    Attributes:
        layers: those with a site, in order of execution.
        protected: leading tokens that are read by their position, or do not come from the input: class, distillation
            and register tokens.
        refused: attentions without a site, each with the reason.
    """

    layers: tuple[Layer, ...]
    protected: int
    refused: tuple[Blocker, ...] = ()
    varying: frozenset[Value] = field(default=frozenset(), repr=False)

    @property
    def tokens(self) -> int:
        """N of the first layer; 0 where there is none."""
        return self.layers[0].tokens if self.layers else 0

    def counting(self, after: int | None = None, protected: int | None = None) -> Tokens:
        """The counts that the rules of :mod:`~trimtab.passes.tokens.axis` ask for."""
        return Tokens(
            self.tokens,
            self.tokens if after is None else after,
            self.protected if protected is None else protected,
            self.varying.__contains__,
        )

    def describe(self) -> list[str]:
        """What was found, a line each."""
        lines = [
            f"{len(self.layers)} attention layers in a residual stream of {self.tokens} tokens, "
            f"{self.protected} of them protected"
        ]
        for number, layer in enumerate(self.layers):
            what = "can be reduced" if not layer.blockers else "; ".join(map(str, layer.blockers[:3]))
            lines.append(f"layer {number}, {layer.tokens} tokens, {layer.site!r}: {what}")
        lines += [f"no layer: {blocker}" for blocker in self.refused]
        return lines


def find_stream(module: Module) -> Stream:
    """The tokens of ``module.main``, whose attention has been raised.

    Where attentions run on different numbers of tokens, as in a pyramid, the first number counts.

    Raises:
        PassError: there is no attention at all, or none has a site; the message has the reasons.
    """
    graph = module.main
    attentions = [op for op in graph.ops if isinstance(op, ops.Attention)]
    if not attentions:
        raise PassError(
            "there are no tokens to reduce",
            values={"attention ops": 0, "ops": len(graph.ops)},
            rule="tokens are found by the attention that mixes them",
            fix="run the group `raise` first; if that finds no attention, the model has none of a form that is known",
        )
    stream = Stream((), 0, (), frozenset(_from_inputs(graph)))
    layers: list[Layer] = []
    refused: list[Blocker] = []
    for attention in attentions:
        found = _layer(attention, stream)
        if isinstance(found, Layer) and layers and found.tokens != layers[0].tokens:
            found = Blocker(attention, f"attention runs on {found.tokens} tokens, not on {layers[0].tokens}")
        if isinstance(found, Layer):
            layers.append(found)
        else:
            refused.append(found)
    if not layers:
        raise PassError(
            "tokens cannot be reduced",
            values={f"attention {number}": blocker.reason for number, blocker in enumerate(refused[:4])},
            rule="a layer is an attention among all tokens whose result is added to the residual that it came from",
            fix="leave the pass out for this model",
            location=refused[0].location,
        )
    stream = replace(stream, layers=tuple(layers), refused=tuple(refused))
    stream = replace(stream, protected=max(_leading_constants(layers[0].residual, stream), _read_by_position(stream)))
    return replace(stream, layers=tuple(_with_blockers(stream)))


def _from_inputs(graph: Graph) -> Iterator[Value]:
    """The values that depend on the graph's inputs."""
    found = set(graph.inputs)
    yield from found
    for op in graph.ops:
        if any(value in found for value in op.operands) or op.regions:
            found.update(op.results)
            yield from op.results


def _layer(attention: ops.Attention, stream: Stream) -> Layer | Blocker:
    problem = _unsuitable(attention)
    if problem:
        return Blocker(attention, problem)
    size = attention.k.type.shape[-2]
    assert isinstance(size, int)
    tokens = Tokens(size, size, size, stream.varying.__contains__)
    value, axis = attention.result, Axis(attention.result.type.rank - 2)
    while True:
        if value.is_output or len(value.users) != 1:
            return Blocker(attention, "the result of attention is read by more than a residual sum")
        (op,) = value.users
        indices = [use.index for use in value.uses]
        if isinstance(op, ops.Add) and len(indices) == 1:
            other = op.operands[1 - indices[0]]
            if other.type == value.type and _computed_from(attention, other):
                return _at_sum(op, other, axis)
        effect = follow(op, dict.fromkeys(indices, axis), tokens)
        if isinstance(effect, str):
            return Blocker(op, effect)
        if len(op.results) != 1 or effect.results[0] is None:
            return Blocker(op, f"{op.name} ends the path from attention to the residual")
        value, axis = op.result, effect.results[0]


def _unsuitable(attention: ops.Attention) -> str:
    """Why ``attention`` is not one among all tokens, or ""."""
    queries, keys = attention.q.type, attention.k.type
    if attention.causal:
        return "attention is causal, so the order of tokens matters"
    if queries.rank != 4:
        return f"attention has operands of {queries.rank} axes instead of batch, head, token and channel"
    if not isinstance(keys.shape[2], int):
        return f"the number of tokens is the symbol {keys.shape[2]}; trace the model with a fixed number"
    if queries.shape[2] != keys.shape[2]:
        return f"{queries.shape[2]} queries attend to {keys.shape[2]} keys"
    return ""


def _at_sum(add: ops.Add, residual: Value, axis: Axis) -> Layer | Blocker:
    site = add.result
    attention = _attention_before(add, residual)
    if site.type.rank != 3 or axis.dim != 1:
        return Blocker(add, f"the residual stream is {site.type}, not batch, token and channel")
    if not site.is_output and len(site.users) == 1 and isinstance(site.users[0], ops.LayerNorm | ops.RmsNorm):
        site = site.users[0].results[0]
    return Layer(attention, attention.q, attention.k, attention.v, residual, site)


def _attention_before(add: ops.Add, residual: Value) -> ops.Attention:
    """The attention on the branch of ``add`` that is not the residual; the path there was just walked."""
    (branch,) = (value for value in add.operands if value is not residual)
    op = branch.producer
    while not isinstance(op, ops.Attention):
        assert op is not None
        op = next(value.producer for value in op.operands if value.producer is not None and not value.is_weight)
    return op


def _computed_from(op: Op, value: Value) -> bool:
    """Whether ``op`` reads ``value``, through any ops between."""
    start = value.producer
    waiting, seen = list(op.operands), set[Value]()
    while waiting:
        operand = waiting.pop()
        if operand is value:
            return True
        maker = operand.producer
        if operand in seen or maker is None or (start is not None and maker.is_before(start)):
            continue
        seen.add(operand)
        waiting += maker.operands
    return False


def _leading_constants(value: Value, stream: Stream) -> int:
    """How many rows at the start of the tokens ``value`` do not come from the module's inputs."""
    op = value.producer
    if op is None or value not in stream.varying:
        return 0
    match op:
        case ops.Concat(dim=1):
            total = 0
            for part in op.operands:
                size = part.type.shape[1]
                if isinstance(size, int) and (part not in stream.varying or _protected_part(part, stream)):
                    total += size
                else:
                    return total + (_leading_constants(part, stream) if total == 0 else 0)
            return total
        case ops.LayerNorm() | ops.RmsNorm() | ops.Linear():
            return _leading_constants(op.operands[0], stream)
        case _ if op.elementwise:
            tokens = [x for x in op.operands if x in stream.varying and x.type.shape == value.type.shape]
            return min((_leading_constants(x, stream) for x in tokens), default=0)
    return 0


def _protected_part(part: Value, stream: Stream) -> bool:
    """Whether ``part`` is a slice of rows at the start of tokens that do not come from the inputs."""
    op = part.producer
    return (
        isinstance(op, ops.Slice)
        and op.dim == 1
        and isinstance(op.stop, int)
        and op.stop <= _leading_constants(op.x, stream)
    )


def _read_by_position(stream: Stream) -> int:
    """How many leading tokens are read by their position anywhere behind the first site."""
    limit = min(_MOST_READ_BY_POSITION, stream.tokens)
    tokens = stream.counting(protected=limit)
    furthest = 0
    for op, axes in _readers([layer.site for layer in stream.layers], tokens):
        axis = axes.get(0)
        if axis is None:
            continue
        match op:
            case ops.Select(dim=axis.dim, index=int(index)) if axis.first + index < limit:
                furthest = max(furthest, axis.first + index + 1)
            case ops.Slice(dim=axis.dim, stop=int(stop), step=1) if axis.first + stop <= limit:
                furthest = max(furthest, axis.first + stop)
            case ops.Slice(dim=axis.dim, start=int(start), step=1) if axis.first + start <= limit:
                furthest = max(furthest, axis.first + start)
            case ops.Split(dim=axis.dim, sizes=(int(size), *_)) if axis.first + size <= limit:
                furthest = max(furthest, axis.first + size)
    return furthest


def _readers(sources: Iterable[Value], tokens: Tokens) -> Iterator[tuple[Op, dict[int, Axis]]]:
    """The ops behind ``sources``, tokens on axis 1, that read tokens, each with the axes of its operands.

    Nothing is followed through an op whose rule refuses.
    """
    axes = dict.fromkeys(sources, Axis(1))
    if not axes:
        return
    graph = next(iter(axes)).producer.graph  # type: ignore[union-attr]  # sites are results
    assert graph is not None
    for op in graph.ops:
        here = {index: axes[value] for index, value in enumerate(op.operands) if value in axes}
        if not here:
            continue
        yield op, here
        effect = follow(op, here, tokens)
        if not isinstance(effect, str):
            for result, axis in zip(op.results, effect.results, strict=True):
                if axis is not None:
                    axes.setdefault(result, axis)


def _with_blockers(stream: Stream) -> Iterator[Layer]:
    """The layers with what blocks each place: what lies between it and the next one, and whatever blocks that."""
    tokens = stream.counting()
    graph = stream.layers[0].attention.graph
    assert graph is not None
    place: dict[Value, int] = {}
    for number, layer in enumerate(stream.layers):
        place.setdefault(layer.residual, 2 * number)
        place.setdefault(layer.site, 2 * number + 1)
    found: list[list[Blocker]] = [[] for _ in range(2 * len(stream.layers))]
    latest = {value: (place[value], Axis(1)) for value in graph.inputs if value in place}
    for op in graph.ops:
        here = {index: latest[value] for index, value in enumerate(op.operands) if value in latest}
        if here:
            number = max(number for number, _ in here.values())
            effect = follow(op, {index: axis for index, (_, axis) in here.items()}, tokens)
            if isinstance(effect, str):
                for source in {source for source, _ in here.values()}:
                    found[source].append(Blocker(op, effect))
            else:
                for result, axis in zip(op.results, effect.results, strict=True):
                    if axis is not None:
                        latest[result] = (number, axis)
        for result in op.results:
            if result in place:
                latest[result] = (place[result], Axis(1))
    for name, value in zip(graph.output_names, graph.outputs, strict=True):
        if value in latest:
            dense = Blocker(None, f"the output {name}, {value.type}, has a row for each token", name)
            found[latest[value][0]].append(dense)

    def behind(number: int) -> tuple[Blocker, ...]:
        return tuple(dict.fromkeys(blocker for blockers in found[number:] for blocker in blockers))

    for number, layer in enumerate(stream.layers):
        yield replace(layer, blockers=behind(2 * number + 1), entry_blockers=behind(2 * number))
