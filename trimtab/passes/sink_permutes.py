"""Permutes where they move the fewest bytes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Graph, Module, Value
from trimtab.ir.dims import Dim, bounds, evaluate
from trimtab.ir.op import Op
from trimtab.ir.printer import print_op
from trimtab.ir.rewrite import NearMiss, Rewrites
from trimtab.ir.rewrite.constants import is_constant
from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.fusion_model import typical_sizes
from trimtab.passes.local_rewrite import rewrite_each
from trimtab.passes.simplify_permutes import simplified_permute

_REDUCTIONS = (ops.Sum, ops.Mean, ops.Prod, ops.Amax, ops.Amin, ops.Any, ops.All)
_ALONG_ONE = (ops.Softmax, ops.LogSoftmax, ops.Cumsum, ops.Concat, ops.Slice)
_FOLDED_BYTES = 4096
"""Constants up to this size are permuted once and for all, whoever else reads them."""


@dataclass(frozen=True)
class SinkPermutes(Pass):
    """Move permutes through ops that compute on any order of axes, where fewer bytes are permuted in the end.

    Between permutes, elementwise ops, softmax, linear layers, and norms and reductions of other axes can compute on the
    value before a permute as well as on the one behind it. For each order of axes, the ops that should are found by a
    minimum cut, in which an edge costs the bytes that would be permuted on it. Permutes that meet their inverse there,
    or a constant, disappear; whatever the sizes, the bytes that are permuted do not grow.

    A reduction reads the value before a permute, and a product of two transposes becomes the transpose of the product.
    """

    name: ClassVar[str] = "sink-permutes"
    contract: ClassVar[Contract] = Exact(rounding=True)

    def run(self, module: Module, ctx: Context) -> Changed:
        changed = False
        # Each round leaves fewer bytes to permute, and may bring other permutes together.
        while self._round(module, ctx.rewrites):
            changed = True
        return changed

    def _round(self, module: Module, rewrites: Rewrites) -> bool:
        changed = rewrite_each(module, _read_before_permutes, self.name, rewrites)
        for graph in list(module.all_graphs()):
            for dims in dict.fromkeys(op.dims for op in graph.ops if isinstance(op, ops.Permute)):
                turned = False
                for region in _regions(module, graph, dims):
                    best = region.best(rewrites)
                    if best and rewrites.permit(self.name, region.carriers[0]):
                        _turn(module, graph, dims, [op for op in graph.ops if op in best])
                        turned = True
                if turned:
                    _clean_up(module, graph)
                changed |= turned
        return changed


# -- ops that read a permuted value ------------------------------------------------------------------------------


def _read_before_permutes(op: Op, build: Builder) -> Value | None:
    if isinstance(op, ops.Matmul):
        return _transposed_product(op, build)
    if isinstance(op, _REDUCTIONS) and isinstance(op.x.producer, ops.Permute):
        return _reduced_before(op, op.x.producer, build)
    return None


def _reduced_before(op: Any, permute: ops.Permute, build: Builder) -> Value | None:
    """A reduction of the value before a permute, with a permute of what is left if that is not in order."""
    dims = tuple(sorted(permute.dims[dim] for dim in op.dims))
    left = [dim for i, dim in enumerate(permute.dims) if op.keepdim or i not in op.dims]
    order = tuple(sorted(left).index(dim) for dim in left)
    in_order = order == tuple(range(len(order)))
    if not in_order and len(permute.result.uses) > 1:
        return None
    reduced = build(op.rebuilt([permute.x], dims=dims))
    return reduced if in_order else build(ops.Permute(reduced, dims=order))


def _transposed_product(op: ops.Matmul, build: Builder) -> Value | None:
    """``x^T y^T`` as ``(y x)^T``, where nothing else reads the transposes."""
    turned = list(_transposes(op))
    if len(turned) != 2 or any(len(value.uses) != 1 for value in op.operands):
        return None
    product = build(ops.Matmul(turned[1].x, turned[0].x))
    rank = product.type.rank
    return build(ops.Permute(product, dims=(*range(rank - 2), rank - 1, rank - 2)))


def _transposes(op: ops.Matmul) -> Iterator[ops.Permute]:
    """The operands of a product that are matrix transposes of something that is not constant."""
    for value in op.operands:
        found, rank = value.producer, value.type.rank
        swapped = (*range(rank - 2), rank - 1, rank - 2)
        if isinstance(found, ops.Permute) and found.dims == swapped and not is_constant(found.x):
            yield found


# -- ops that compute on any order of axes -----------------------------------------------------------------------


def _turned_attributes(op: Op, dims: tuple[int, ...]) -> dict[str, Any] | None:
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
    if isinstance(op, _REDUCTIONS) and op.keepdim:
        return {"dims": tuple(sorted(dims[dim] for dim in op.dims))}
    whole = op.axes if isinstance(op, ops.LayerNorm | ops.RmsNorm) else 1 if isinstance(op, ops.Linear) else 0
    return {} if whole and dims[-whole:] == tuple(range(rank - whole, rank)) else None


def _moving(op: Op) -> Sequence[Value]:
    """The operands with the axes of the result."""
    return op.operands if op.elementwise or isinstance(op, ops.Concat) else op.operands[:1]


def _inverse(dims: Sequence[int]) -> tuple[int, ...]:
    return tuple(dims.index(axis) for axis in range(len(dims)))


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
class _Region:
    """Connected ops that may compute before or behind a permute by ``dims``."""

    module: Module
    dims: tuple[int, ...]
    carriers: Sequence[Op]

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
            elif isinstance(user, ops.Permute):
                # Any other permute is one before and one afterwards.
                readers += ["turned"] if user.dims == _inverse(self.dims) else []
            else:
                readers.append("plain")
        return readers

    def best(self, rewrites: Rewrites) -> set[Op]:
        """The carriers that should compute on values before the permute; none if that saves nothing."""
        log = rewrites.of(SinkPermutes.name)
        log.tried += 1
        flows = self.flows()
        sizes = typical_sizes({symbol for flow in flows for symbol in flow.value.type.symbols})
        turned = self._minimum_cut(flows, sizes)
        saved = _permuted_bytes(flows, set()) - _permuted_bytes(flows, turned) - sum(map(self._constants, turned))
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
        for flow in flows:
            price = int(evaluate(flow.value.type.bytes, sizes))
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


def _permuted_bytes(flows: Sequence[_Flow], turned: Collection[Op]) -> Dim:
    """Bytes that are permuted when the carriers in ``turned`` compute before the permute."""
    total: Dim = 0
    for flow in flows:
        sides = {end if isinstance(end, str) else "turned" if end in turned else "plain" for end in flow.readers}
        maker = flow.maker if isinstance(flow.maker, str) else "turned" if flow.maker in turned else "plain"
        total = total + flow.value.type.bytes * len(sides - {maker})
    return total


def _regions(module: Module, graph: Graph, dims: tuple[int, ...]) -> Iterator[_Region]:
    """Carriers that are connected with a permute by ``dims`` through carriers."""
    seen: set[Op] = set()
    for start in [op for op in graph.ops if isinstance(op, ops.Permute) and op.dims == dims]:
        carriers, waiting = [], list(start.result.users)
        while waiting:
            op = waiting.pop()
            if op in seen or op.graph is not graph or _turned_attributes(op, dims) is None:
                continue
            seen.add(op)
            carriers.append(op)
            waiting += op.results[0].users
            waiting += [value.producer for value in _moving(op) if value.producer is not None]
        if carriers:
            yield _Region(module, dims, carriers)


# -- turning them ------------------------------------------------------------------------------------------------


def _turn(module: Module, graph: Graph, dims: tuple[int, ...], carriers: Sequence[Op]) -> None:
    """Let ``carriers``, in order of execution, compute before a permute by ``dims``, with permutes on all sides."""
    for op in carriers:
        attributes = _turned_attributes(op, dims)
        assert attributes is not None
        build = Builder(module, graph, before=op, made_by=SinkPermutes.name)
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


def _clean_up(module: Module, graph: Graph) -> None:
    """Join the permutes that met, and remove those that nobody reads any more."""
    for op in graph.ops:
        if isinstance(op, ops.Permute):
            value = simplified_permute(op, Builder(module, graph, before=op, made_by=SinkPermutes.name))
            if value is not None:
                op.result.replace_all_uses_with(value)
                graph.ops.remove(op)
    for op in reversed(graph.ops):
        if isinstance(op, ops.Permute | ops.Reshape) and not op.result.uses:
            graph.ops.remove(op)
