"""The order of the products in a chain of matrices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from trimtab.ir.builder import Builder
from trimtab.ir.core import Graph, Module, Value
from trimtab.ir.dims import Dim, bounds, evaluate, product, symbols_of
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op
from trimtab.ir.ops import Add, Linear, Matmul, Permute
from trimtab.ir.printer import print_op
from trimtab.ir.rewrite import Constant, Match, NearMiss, Pattern, Rule, RuleLog, Var, apply_rules, maybe, op
from trimtab.ir.types import TensorType
from trimtab.ir.weights import ComputedSource, Weight
from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.contracts import Contract, Exact

if TYPE_CHECKING:
    import torch

MAX_FACTORS = 12
_LARGE = 4096
"""Stands for a size without an upper limit when orders are compared; whether one saves is proved for all sizes."""

_FINE = (DType.F32, DType.F64)
"""Types of weights that may be rounded once more; half-precision ones are too coarse."""

Order: TypeAlias = "int | tuple[Order, Order]"
"""A factor by its place in the chain, or the product of two orders."""


@dataclass(frozen=True)
class ReassociateMatmuls(Pass):
    """Multiply the matrices of a chain in the order that takes the fewest multiply-accumulates.

    A chain is a tree of matrix products, linear layers without bias among them, whose inner products nothing else
    reads. The best order is found by dynamic programming over its intervals (Godbole, IEEE Transactions on Computers
    C-22, 1973); products of weights cost nothing, and become a weight where that takes no more bytes than its factors.
    Where sizes are symbolic, the saving must hold for every value of the symbols.

    Linear attention without softmax, ``(q k^T) v``, becomes ``q (k^T v)`` where there are more tokens than features.
    Two linear layers in a row, with biases, become one where that takes fewer multiply-accumulates and bytes.
    """

    name: ClassVar[str] = "reassociate-matmuls"
    contract: ClassVar[Contract] = Exact(rounding=True)

    def run(self, module: Module, ctx: Context) -> Changed:
        changed = apply_rules(module, (StackedLinears(),), ctx.rewrites) > 0
        reads = Counter(v.weight for graph in module.all_graphs() for v in graph.weights for _ in v.uses)
        for graph in list(module.all_graphs()):
            for root in reversed(graph.ops):
                chain = _chain(root, reads) if _is_link(root) and not _is_inner(root) else None
                if chain is None:
                    continue
                order = _better_order(chain, ctx.rewrites.of(self.name))
                if order is not None and ctx.rewrites.permit(self.name, root):
                    _rebuild(module, graph, chain, order)
                    changed = True
        return changed


class StackedLinears(Rule):
    """``linear(linear(x, V, a), W, b)`` to ``linear(x, W V, W a + b)``"""

    def pattern(self, x: Var, v: Constant, a: Constant, w: Constant, b: Constant) -> Pattern:
        return op.linear(op.linear(x, v, a), w, maybe(b))

    def check(self, m: Match) -> str | None:
        for value in (m.v, m.a, m.w):
            if not value.is_weight or len(list(m.module.readers(value.weight))) > 1:
                return "a weight is read elsewhere, and stays"
            if value.type.dtype not in _FINE:
                return f"weights of type {value.type.dtype} are too coarse to be rounded once more"
        if m.v.type.rank != 2 or m.w.type.rank != 2:
            return "a weight is no matrix"
        (hidden, inputs), (outputs, _) = m.v.type.shape, m.w.type.shape
        apart, joined = hidden * (inputs + outputs), inputs * outputs
        if joined >= apart:
            return f"one matrix has {joined} elements, the two have {apart}"
        if m.b is None and joined + outputs > apart + hidden:
            return "the bias of the product takes more bytes than are saved"
        return None

    def rewrite(self, m: Match, build: Builder) -> Value:
        weight = _product_of_weights(m.module, m.graph, _Product(m.w, False), _Product(m.v, False))
        w, a, b = m.weight(m.w), m.weight(m.a), m.b and m.weight(m.b)
        source = ComputedSource(lambda: _shifted(w, a, b))
        bias = m.add_weight(f"{(b or a).id}.shifted", a.type.with_shape(w.type.shape[0]), source, trainable=a.trainable)
        return build(Linear(m.x, weight, bias))


def _shifted(w: Weight, a: Weight, b: Weight | None) -> torch.Tensor:
    """``W a + b`` in float64, rounded once."""
    product = w.tensor().double() @ a.tensor().double()
    return (product if b is None else product + b.tensor().double()).to(a.tensor().dtype)


@dataclass(frozen=True)
class _Factor:
    """A matrix of a chain.

    Attributes:
        value: the tensor; a weight is constant.
        turned: whether the factor is the transpose of the tensor, as in a linear layer.
        batch, rows, columns: the shape of the factor.
        elements: of a weight that nothing else reads; 0 for others, which stay whatever happens to the chain.
    """

    value: Value
    turned: bool
    batch: tuple[Dim, ...]
    rows: Dim
    columns: Dim
    elements: int

    @property
    def is_constant(self) -> bool:
        return self.value.is_weight


@dataclass(frozen=True)
class _Chain:
    """A maximal tree of products: its root, its factors from left to right, and the order in which it multiplies."""

    root: Op
    factors: Sequence[_Factor]
    order: Order

    def batch(self, first: int, last: int) -> tuple[Dim, ...]:
        """The leading axes of the product of the factors ``first`` to ``last``: those of all of them, broadcast."""
        rank = max(len(factor.batch) for factor in self.factors[first : last + 1])
        shapes = [(1,) * (rank - len(f.batch)) + f.batch for f in self.factors[first : last + 1]]
        return tuple(next((size for size in sizes if size != 1), 1) for sizes in zip(*shapes, strict=True))

    def is_constant(self, first: int, last: int) -> bool:
        return all(factor.is_constant for factor in self.factors[first : last + 1])

    def step(self, first: int, middle: int, last: int) -> Dim | None:
        """Multiply-accumulates to join two neighbouring products; None where that would store more weights."""
        left, right = self.factors[first], self.factors[last]
        if not self.is_constant(first, last):
            inner = self.factors[middle].columns
            return product([*self.batch(first, last), left.rows, inner, right.columns])
        if left.value.type.dtype not in _FINE or left.batch or right.batch:
            return None
        freed = sum(factor.elements for factor in self.factors[first : last + 1])
        size = product([left.rows, right.columns])
        return 0 if isinstance(size, int) and size <= freed else None

    def cost(self, order: Order) -> Dim | None:
        """Multiply-accumulates of the whole chain in this order."""
        if isinstance(order, int):
            return 0
        parts = (self.cost(order[0]), self.cost(order[1]), self.step(_first(order), _last(order[0]), _last(order)))
        total: Dim = 0
        for part in parts:
            if part is None:
                return None
            total = total + part
        return total


def _is_link(op: Op) -> bool:
    if isinstance(op, Matmul):
        return all(value.type.rank >= 2 for value in op.operands)
    return isinstance(op, Linear) and op.x.type.rank >= 2 and op.weight.is_weight and op.weight.type.rank == 2


def _is_inner(op: Op) -> bool:
    """Whether a larger chain takes the op in: one product reads its result, and nothing is added before."""
    value = op.results[0]
    if len(value.uses) != 1 or value.is_output or (isinstance(op, Linear) and op.bias is not None):
        return False
    user, index = value.uses[0]
    return isinstance(user, Op) and _is_link(user) and (isinstance(user, Matmul) or index == 0)


def _chain(root: Op, reads: Counter[str]) -> _Chain | None:
    """The chain that ends in ``root``; None when it has too few or too many factors to have a choice."""
    factors: list[_Factor] = []

    def flatten(value: Value, turned: bool = False) -> Order:
        op = value.producer
        if op is not None and not turned and (op is root or (_is_link(op) and _is_inner(op))):
            left = flatten(op.operands[0])
            return left, flatten(op.operands[1], turned=isinstance(op, Linear))
        *batch, rows, columns = value.type.shape
        rows, columns = (columns, rows) if turned else (rows, columns)
        alone = value.is_weight and reads[value.weight] == 1
        elements = value.type.elements if alone else 0
        assert isinstance(elements, int)  # weights have static types
        factors.append(_Factor(value, turned, tuple(batch), rows, columns, elements))
        return len(factors) - 1

    order = flatten(root.results[0])
    return _Chain(root, factors, order) if 3 <= len(factors) <= MAX_FACTORS else None


def _better_order(chain: _Chain, log: RuleLog) -> Order | None:
    """An order that saves multiply-accumulates for all sizes, or None; the log gets the reason."""
    log.tried += 1
    given = sum((op.macs() for op in _inside(chain.root)), 0)
    candidates = dict.fromkeys(_best_order(chain, sizes) for sizes in _samples(chain))
    saves_somewhere = False
    for order in candidates:
        cost = chain.cost(order)
        if order == chain.order or cost is None:
            continue
        least, most = bounds(given - cost)
        if least > 0:
            log.matched += 1
            return order
        saves_somewhere |= most > 0
    if saves_somewhere:
        root = chain.root
        reason = "another order saves multiply-accumulates for some sizes only"
        size = len(chain.factors) - 1
        log.reject(NearMiss(size, size, print_op(root), str(root.location or ""), reason))
    return None


def _inside(root: Op) -> Iterator[Op]:
    """The products of a chain."""
    yield root
    for value in root.operands:
        if value.producer is not None and _is_link(value.producer) and _is_inner(value.producer):
            yield from _inside(value.producer)


def _samples(chain: _Chain) -> list[dict[str, int]]:
    """Sizes for which the best order is looked for: the symbols at their smallest and at their largest."""
    shapes = (d for factor in chain.factors for d in (*factor.batch, factor.rows, factor.columns))
    symbols = sorted({symbol for dim in shapes for symbol in symbols_of(dim)}, key=lambda symbol: symbol.name)
    if not symbols:
        return [{}]
    return [{s.name: s.min for s in symbols}, {s.name: s.max or max(_LARGE, s.min) for s in symbols}]


def _best_order(chain: _Chain, sizes: Mapping[str, int]) -> Order:
    """The cheapest order for given sizes, by dynamic programming over intervals of the chain."""
    count = len(chain.factors)
    best: dict[tuple[int, int], tuple[float, Order]] = {(i, i): (0.0, i) for i in range(count)}
    for width in range(1, count):
        for first in range(count - width):
            last = first + width
            ways: list[tuple[float, Order]] = []
            for middle in range(first, last):
                step = chain.step(first, middle, last)
                (left, a), (right, b) = best[first, middle], best[middle + 1, last]
                price = float("inf") if step is None else float(evaluate(step, sizes))
                ways.append((left + right + price, (a, b)))
            best[first, last] = min(ways, key=lambda way: way[0])
    return best[0, count - 1][1]


def _first(order: Order) -> int:
    return order if isinstance(order, int) else _first(order[0])


def _last(order: Order) -> int:
    return order if isinstance(order, int) else _last(order[1])


# -- building --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Product:
    """A product that has been built: its value, and whether the product is the transpose of it."""

    value: Value
    turned: bool


def _rebuild(module: Module, graph: Graph, chain: _Chain, order: Order) -> None:
    root = chain.root
    build = Builder(module, graph, before=root, made_by=ReassociateMatmuls.name)
    bias = root.bias if isinstance(root, Linear) else None
    replaced = list(_inside(root))
    result = _join(module, graph, chain, build, order).value
    if bias is not None and isinstance(result.producer, Linear):
        inner = result.producer
        result = build(Linear(inner.x, inner.weight, bias))
        graph.ops.remove(inner)
    elif bias is not None:
        result = build(Add(result, bias))
    root.results[0].replace_all_uses_with(result)
    for old in replaced:
        graph.ops.remove(old)


def _join(module: Module, graph: Graph, chain: _Chain, build: Builder, order: Order) -> _Product:
    if isinstance(order, int):
        factor = chain.factors[order]
        return _Product(factor.value, factor.turned)
    left, right = (_join(module, graph, chain, build, part) for part in order)
    if left.value.is_weight and right.value.is_weight:
        return _Product(_product_of_weights(module, graph, left, right), False)
    first = build(Permute(left.value, dims=(1, 0))) if left.turned else left.value
    return _Product(build((Linear if right.turned else Matmul)(first, right.value)), False)


def _product_of_weights(module: Module, graph: Graph, left: _Product, right: _Product) -> Value:
    """A weight that holds the product of two."""
    a, b = module.weights[left.value.weight], module.weights[right.value.weight]
    rows, columns = a.type.shape[-1 if left.turned else 0], b.type.shape[0 if right.turned else -1]
    source = ComputedSource(lambda: _multiplied(a, left.turned, b, right.turned))
    type = TensorType(a.type.dtype, (rows, columns))
    id = module.fresh_weight_id(f"{a.id}.{b.id}")
    return graph.weight(module.add_weight(Weight(id, type, source, trainable=a.trainable or b.trainable)))


def _multiplied(a: Weight, a_turned: bool, b: Weight, b_turned: bool) -> torch.Tensor:
    """The product in float64, rounded once."""
    left, right = a.tensor().double(), b.tensor().double()
    return ((left.T if a_turned else left) @ (right.T if b_turned else right)).to(a.tensor().dtype)
