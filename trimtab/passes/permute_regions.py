"""Connected ops that may compute before or behind a permute, and which of them should: a minimum cut.

Elementwise ops, softmax, linear layers, and norms and reductions of other axes compute on the value before a permute as
well as on the one behind it.  A value costs its bytes where its maker and one of its readers want different orders.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Graph, Module, Value
from trimtab.ir.dims import Dim, bounds, evaluate
from trimtab.ir.op import Op
from trimtab.ir.printer import print_op
from trimtab.ir.rewrite import NearMiss, RuleLog
from trimtab.ir.rewrite.constants import is_constant
from trimtab.passes.base import Context
from trimtab.passes.fusion_model import typical_sizes
from trimtab.passes.simplify_permutes import simplified_permute

REDUCTIONS = (ops.Sum, ops.Mean, ops.Prod, ops.Amax, ops.Amin, ops.Any, ops.All)
_ALONG_ONE = (ops.Softmax, ops.LogSoftmax, ops.Cumsum, ops.Concat, ops.Slice)
_FOLDED_BYTES = 4096
"""Constants up to this size are permuted once and for all, whoever else reads them."""

# -- ops that compute on any order of axes -----------------------------------------------------------------------


def turned_attributes(op: Op, dims: tuple[int, ...]) -> dict[str, Any] | None:
    """What changes about ``op`` when it computes on operands before a permute by ``dims``; None when it cannot."""
    rank = len(dims)
    if len(op.results) != 1 or op.results[0].type.rank != rank:
        return None
    if any(value.type.rank != rank and not is_constant(value) for value in _moving(op)):
        return None
    if op.elementwise:
        return {}
    if isinstance(op, _ALONG_ONE):
        return {"dim": dims[op.attributes["dim"]]}
    if isinstance(op, REDUCTIONS) and op.keepdim:
        return {"dims": tuple(sorted(dims[dim] for dim in op.dims))}
    whole = op.axes if isinstance(op, ops.LayerNorm | ops.RmsNorm) else 1 if isinstance(op, ops.Linear) else 0
    return {} if whole and dims[-whole:] == tuple(range(rank - whole, rank)) else None


def reduced_before(op: Op, build: Builder) -> Value | None:
    """The result of a reduction computed from the value before a permute, with a permute of what is left if that is not
    in order; None for other ops."""
    if not isinstance(op, REDUCTIONS) or not isinstance(op.x.producer, ops.Permute):
        return None
    permute = op.x.producer
    order = _order_of_reduced(op, permute.dims)
    in_order = _is_sorted(order)
    if not in_order and len(permute.result.uses) > 1:
        return None
    dims = tuple(sorted(permute.dims[dim] for dim in op.dims))
    reduced = build(op.rebuilt([permute.x], dims=dims))
    return reduced if in_order else build(ops.Permute(reduced, dims=order))


def _order_of_reduced(op: Any, dims: Sequence[int]) -> tuple[int, ...]:
    """Where each axis of a reduction's result is if it reads the value before a permute by ``dims``."""
    left = [dim for i, dim in enumerate(dims) if op.keepdim or i not in op.dims]
    return tuple(sorted(left).index(dim) for dim in left)


def _moving(op: Op) -> Sequence[Value]:
    """The operands with the axes of the result."""
    return op.operands if op.elementwise or isinstance(op, ops.Concat) else op.operands[:1]


def _inverse(dims: Sequence[int]) -> tuple[int, ...]:
    return tuple(dims.index(axis) for axis in range(len(dims)))


def _permuted_size(value: Value, dims: Sequence[int]) -> Dim:
    """Bytes that a permute of ``value``, or its inverse, moves: none where only axes of size 1 change places."""
    wide = [axis for axis, size in zip(dims, (value.type.shape[axis] for axis in dims), strict=True) if size != 1]
    return 0 if _is_sorted(wide) else value.type.bytes


def _is_sorted(axes: Sequence[int]) -> bool:
    return list(axes) == sorted(axes)


# -- which of them should ----------------------------------------------------------------------------------------

_End: TypeAlias = "Op | Literal['plain', 'turned', 'either']"
"""Who makes or reads a value, and in which order of axes: a carrier, which may do both, or somebody who may not."""


@dataclass(frozen=True)
class _Flow:
    """A value that carriers make or read.

    Attributes:
        value: the value.
        maker: where it comes from; ``either`` is another permute, which makes any order at the price of one.
        readers: who reads it.
    """

    value: Value
    maker: _End
    readers: Sequence[_End]


@dataclass(frozen=True)
class Carriers:
    """Which ops may compute before a permute, and why they should.

    Attributes:
        turned: what changes about an op that computes on operands before a permute by the given axes; None for an op
            that cannot.
        gain: what is saved when it does, as bytes that might be permuted in the same time.
    """

    turned: Callable[[Op, tuple[int, ...]], dict[str, Any] | None] = turned_attributes
    gain: Callable[[Op], Dim] = lambda op: 0


@dataclass(frozen=True)
class Region:
    """Connected ops that may compute before or behind a permute by ``dims``."""

    module: Module
    dims: tuple[int, ...]
    carriers: Sequence[Op]
    kind: Carriers

    def flows(self) -> list[_Flow]:
        inside = set(self.carriers)
        values = dict.fromkeys(v for op in self.carriers for v in (*_moving(op), op.results[0]) if not is_constant(v))
        return [_Flow(value, self._maker(value, inside), self._readers(value, inside)) for value in values]

    def _maker(self, value: Value, inside: Collection[Op]) -> _End:
        maker = value.producer
        if maker in inside and maker is not None:
            return maker
        if isinstance(maker, ops.Permute):
            return "turned" if maker.dims == self.dims else "either"
        return "plain"

    def _readers(self, value: Value, inside: Collection[Op]) -> list[_End]:
        readers: list[_End] = []
        for user, index in value.uses:
            if isinstance(user, Graph):
                readers.append("plain")
            elif user in inside and index < len(_moving(user)):
                readers.append(user)
            elif isinstance(user, REDUCTIONS) and _is_sorted(_order_of_reduced(user, self.dims)):
                continue  # it reads either order
            elif isinstance(user, ops.Permute):
                # Any other permute is one before and one afterwards.
                readers += ["turned"] if user.dims == _inverse(self.dims) else []
            else:
                readers.append("plain")
        return readers

    def best(self, log: RuleLog) -> set[Op]:
        """The carriers that should compute on values before the permute; none if that saves nothing."""
        log.tried += 1
        flows = self.flows()
        sizes = typical_sizes({symbol for flow in flows for symbol in flow.value.type.symbols})
        turned = self._minimum_cut(flows, sizes)
        saved = self._permuted_bytes(flows, set()) - self._permuted_bytes(flows, turned)
        saved = saved + sum(self.kind.gain(op) - self._constants(op) for op in turned)
        if not turned or evaluate(saved, sizes) <= 0:
            return set()
        if bounds(saved)[0] < 0:
            first = self.carriers[0]
            reason = "fewer bytes are permuted for some sizes only"
            log.reject(NearMiss(len(turned), len(self.carriers), print_op(first), str(first.location or ""), reason))
            return set()
        log.matched += 1
        return turned

    def _constants(self, op: Op) -> int:
        """Bytes of constants that ``op`` would have permuted in every run, because others read them as they are."""
        weights = [self.module.weights[value.weight] for value in _moving(op) if value.is_weight]
        shared = [w for w in weights if w.nbytes > _FOLDED_BYTES and len(list(self.module.readers(w.id))) > 1]
        return sum(weight.nbytes for weight in shared)

    def _minimum_cut(self, flows: Sequence[_Flow], sizes: Mapping[str, int]) -> set[Op]:
        """The carriers on the side of ``turned``.

        A value costs its bytes when its maker is on one side and any of its readers on the other one.
        """
        import networkx

        network = networkx.DiGraph()
        for op in self.carriers:
            network.add_edge("plain", op, capacity=1 + self._constants(op))  # 1: where nothing is saved, nothing moves
            if gain := int(evaluate(self.kind.gain(op), sizes)):
                network.add_edge(op, "turned", capacity=gain)
        for flow in flows:
            price = int(evaluate(_permuted_size(flow.value, self.dims), sizes))
            turned, plain = (flow.value, "turned"), (flow.value, "plain")
            network.add_edge("plain" if flow.maker == "either" else flow.maker, turned, capacity=price)
            network.add_edge(plain, "turned" if flow.maker == "either" else flow.maker, capacity=price)
            for reader in flow.readers:
                network.add_edge(turned, reader)
                network.add_edge(reader, plain)
        if "turned" not in network:
            return set()
        _, (_, far) = networkx.minimum_cut(network, "plain", "turned")
        return {op for op in self.carriers if op in far}

    def _permuted_bytes(self, flows: Sequence[_Flow], turned: Collection[Op]) -> Dim:
        """Bytes that are permuted when the carriers in ``turned`` compute before the permute."""
        total: Dim = 0
        for flow in flows:
            sides = {end if isinstance(end, str) else "turned" if end in turned else "plain" for end in flow.readers}
            maker = flow.maker if isinstance(flow.maker, str) else "turned" if flow.maker in turned else "plain"
            total = total + _permuted_size(flow.value, self.dims) * len(sides - {maker})
        return total


def regions(
    module: Module, graph: Graph, dims: tuple[int, ...], starts: Iterable[Op], kind: Carriers
) -> Iterator[Region]:
    """Carriers that are connected with one of ``starts`` through carriers."""
    seen: set[Op] = set()
    for start in starts:
        carriers, waiting = [], [start]
        while waiting:
            op = waiting.pop()
            if op in seen or op.graph is not graph or kind.turned(op, dims) is None:
                continue
            seen.add(op)
            carriers.append(op)
            for value in (op.results[0], *(v for v in _moving(op) if not is_constant(v))):
                waiting += [end for end in (value.producer, *value.users) if end is not None]
        if carriers:
            yield Region(module, dims, carriers, kind)


def turn_where_better(
    module: Module, graph: Graph, dims: tuple[int, ...], starts: Iterable[Op], kind: Carriers, ctx: Context, name: str
) -> bool:
    """Let the ops connected with ``starts`` compute before a permute by ``dims`` where that is better.

    Returns:
        Whether anything was changed; ``name`` is the pass that did it.
    """
    turned = False
    for region in regions(module, graph, dims, starts, kind):
        best = region.best(ctx.rewrites.of(name))
        if best and ctx.rewrites.permit(name, region.carriers[0]):
            _turn(region, graph, [op for op in graph.ops if op in best], name)
            turned = True
    if turned:
        _clean_up(module, graph, name)
    return turned


# -- turning them ------------------------------------------------------------------------------------------------


def _turn(region: Region, graph: Graph, carriers: Sequence[Op], name: str) -> None:
    """Let ``carriers``, in order of execution, compute before the region's permute, with permutes on all sides."""
    dims = region.dims
    for op in carriers:
        attributes = region.kind.turned(op, dims)
        assert attributes is not None
        build = Builder(region.module, graph, before=op, made_by=name)
        moving = len(_moving(op))
        operands = [_before(value, dims, op, build) if i < moving else value for i, value in enumerate(op.operands)]
        made = build(op.rebuilt(operands, **attributes), op.results[0].name)
        op.results[0].replace_all_uses_with(build(ops.Permute(made, dims=dims)))
        graph.ops.remove(op)


def _before(value: Value, dims: tuple[int, ...], op: Op, build: Builder) -> Value:
    """What ``op`` reads instead of ``value`` when it computes before a permute by ``dims``."""
    if all(size == 1 for size in value.type.shape):
        return value
    missing, back = len(dims) - value.type.rank, _inverse(dims)
    for reader in value.users:
        if not missing and isinstance(reader, ops.Permute) and reader.dims == back and _is_before(reader, op):
            return reader.result
    full = build(ops.Reshape(value, shape=(1,) * missing + value.type.shape)) if missing else value
    return build(ops.Permute(full, dims=back))


def _is_before(first: Op, second: Op) -> bool:
    return first.graph is second.graph and first.is_before(second)


def _clean_up(module: Module, graph: Graph, name: str) -> None:
    """Join the permutes that met, and remove those that nobody reads any more."""
    for op in graph.ops:
        if isinstance(op, ops.Permute):
            value = simplified_permute(op, Builder(module, graph, before=op, made_by=name))
            if value is not None:
                op.result.replace_all_uses_with(value)
                graph.ops.remove(op)
    for op in reversed(graph.ops):
        if isinstance(op, ops.Permute | ops.Reshape) and not op.result.uses:
            graph.ops.remove(op)
