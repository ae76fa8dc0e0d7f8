"""Products in bfloat16, or weights of products in float16."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar, Literal

from trimtab.ir import ops
from trimtab.ir.core import Graph, Module, Use, Value
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op
from trimtab.ir.printer import print_op, value_in_words
from trimtab.ir.rewrite import NearMiss
from trimtab.passes import half_storage
from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.contracts import Close

_CONVOLUTIONS = (ops.Conv1d, ops.Conv2d, ops.Conv3d, ops.ConvTranspose1d, ops.ConvTranspose2d)
_PRODUCTS = (ops.Linear, ops.Matmul, ops.Einsum, ops.Attention, *_CONVOLUTIONS)
# Ops whose result elements are elements of their data operands, zeros or the larger of several, so that it makes no
# difference whether rounding comes before or after them.
_MOVES = (
    ops.Reshape, ops.Permute, ops.Expand, ops.Slice, ops.Select, ops.Split, ops.Concat, ops.Tile, ops.Flip, ops.Roll,
    ops.Tril, ops.Triu, ops.Embedding, ops.IndexSelect, ops.Gather, ops.Index, ops.Relu, ops.MaxPool2d,
)  # fmt: skip
_LOWEST = -3.3895313892515355e38
"""The lowest finite number of bfloat16; that of float32, which masks use, would round to minus infinity."""
_EXACT_INTEGERS = (DType.BOOL, DType.I8, DType.U8)
"""Their values are numbers of bfloat16, which holds the integers up to 256."""


@dataclass(frozen=True)
class CastPrecision(Pass):
    """Compute matrix products in bfloat16 with sums in float32, or store their weights in float16.

    ``to=bf16``: linear, matmul, einsum, attention and convolutions read operands rounded to bfloat16 and round their
    result to it; everything else stays in float32: the residual stream, norms, softmax outside of attention, and what
    is between two products. A value is rounded where a product reads it, once, and before what only moves it.

    ``to=f16-storage``: weights of linear, matmul, einsum and convolutions are stored in float16 and widened before they
    are used; all arithmetic stays in float32.

    A weight is stored once: what else reads it reads the rounded one. ``embeddings`` rounds the tables that are only
    looked up as well; without it they stay in float32, because their rows go into the residual stream.
    """

    name: ClassVar[str] = "cast-precision"
    # 8 units of bfloat16's rounding, 2^-8; for modules that amplify their own rounding see Close.
    contract: ClassVar[Close] = Close(rtol=2**-5, atol=1e-6, unit=2**-8)
    to: Literal["bf16", "f16-storage"] = "bf16"
    embeddings: bool = False

    @property
    def dtype(self) -> DType:
        """The 16-bit type."""
        return DType.BF16 if self.to == "bf16" else DType.F16

    def run(self, module: Module, ctx: Context) -> Changed:
        plan = _Plan(self, module, ctx)
        if not plan.products and not plan.weights:
            return False
        rewrite = _Rewrite(module, plan, self.dtype)
        for graph in module.graphs.values():
            rewrite.graph(graph)
        rewrite.drop_unread_casts()
        module.drop_unused_weights()
        counts = Counter(op.name for op in plan.products)
        ctx.note(", ".join([*(f"{n} {kind}" for kind, n in counts.most_common()), f"{len(plan.weights)} weights"]))
        return True


class _Plan:
    """What is rounded.

    Attributes:
        products: the products to compute in bfloat16.
        weights: ids of the weights to store.
        wanted: the values that nothing but products reads, possibly moved.
        masks: the values that masks of attention are made of by moving.
    """

    def __init__(self, options: CastPrecision, module: Module, ctx: Context) -> None:
        self._module = module
        self._dtype = options.dtype
        self._grouped = {op for outer in module.walk() if isinstance(outer, ops.Fused) for op in outer.body.ops}
        self._outside = {
            inner: outer
            for op in module.walk()
            if isinstance(op, ops.Repeat)
            for outer, inner in zip(op.operands[len(op.carried) :], op.body.inputs[len(op.carried) :], strict=True)
        }
        self._unfit: dict[str, str] = {}
        self._wanted: dict[Value, bool] = {}
        self.products: dict[Op, None] = {}
        self.weights: dict[str, None] = {}
        self.masks: set[Value] = set()
        log = ctx.rewrites.of(options.name)
        choose = self._choose_product if options.to == "bf16" else self._choose_weights
        for op in module.walk():
            if ctx.rewrites.exhausted:
                return
            if isinstance(op, _PRODUCTS) and all(v.type.dtype is DType.F32 for v in _factors(op)):
                log.tried += 1
                reason, weights = choose(op)
                if reason:
                    log.reject(NearMiss(1, 1, print_op(op), str(op.location or ""), reason))
                if weights is None:
                    continue
                log.matched += 1
                ctx.rewrites.permit(options.name, op)
                self.weights |= dict.fromkeys(weights)
                if options.to == "bf16":
                    self.products[op] = None
        for op in self.products:
            if isinstance(op, ops.Attention) and op.mask is not None:
                self.masks.update(self._moved(op.mask))
        if options.embeddings:
            self._add_tables()

    def _choose_product(self, op: Op) -> tuple[str, list[str] | None]:
        """Why a product stays in float32, or what to store when it does not: its weights, bias and mask included."""
        factors = [id for value in _factors(op) for id in self._sources(value)]
        reasons = (reason for reason in (self._refusal(op), *map(self._unfitness, factors)) if reason)
        if reason := next(reasons, ""):
            return reason, None
        others = [id for v in op.operands if v.type.dtype is DType.F32 for id in self._sources(v)]
        return "", [id for id in dict.fromkeys(others) if not self._unfitness(id)]

    def _choose_weights(self, op: Op) -> tuple[str, list[str] | None]:
        """Why a weight of a product stays in float32, and which of them to store, if any."""
        if isinstance(op, ops.Attention):
            return "", None
        found = [id for value in _factors(op) for id in self._sources(value) if id not in self.weights]
        reason = next(filter(None, map(self._unfitness, found)), "")
        return reason, [id for id in found if not self._unfitness(id)] or None

    def wanted(self, value: Value) -> bool:
        """Whether nothing but products reads ``value``, possibly moved: then rounding it loses nothing else."""
        if value not in self._wanted:
            self._wanted[value] = bool(value.uses) and all(map(self._rounds, value.uses))
        return self._wanted[value]

    def _rounds(self, use: Use) -> bool:
        op = use.user
        if isinstance(op, Graph):
            return False
        if isinstance(op, _MOVES):
            return op.operands[use.index] in data_of(op) and all(map(self.wanted, op.results))
        if isinstance(op, ops.Repeat):
            return use.index >= len(op.carried) and self.wanted(op.body.inputs[use.index])
        return op in self.products

    def _refusal(self, op: Op) -> str:
        """Why a product stays in float32, apart from its weights."""
        if op in self._grouped:
            return "it is in a group: groups are formed last"
        if isinstance(op, ops.Matmul) and op.x.type.shape[-1] == 1:
            return "it sums nothing: an outer product, of which positions and frequencies are made"
        for value in _factors(op):
            for moved in self._moved(value):
                if _is_made_of_integers(moved):
                    return f"{value_in_words(value)} holds integers, which above 256 are no numbers of bf16"
        return ""

    def _unfitness(self, id: str) -> str:
        """Why the weight ``id`` stays in float32; "" when it need not."""
        if id not in self._unfit:
            other = next((use for use in self._module.readers(id) if not self._reads_rounded(use)), None)
            weight = self._module.weights[id]
            if weight.type.dtype is not DType.F32:
                self._unfit[id] = f"@{id} is {weight.type.dtype}, not f32"
            elif other is not None:
                self._unfit[id] = f"@{id} is also read by {_reader(other)}, and a second copy would grow the weights"
            else:
                self._unfit[id] = half_storage.refusal(weight, self._dtype)
        return self._unfit[id]

    def _reads_rounded(self, use: Use) -> bool:
        """Whether the reader of a weight may read it rounded: products, masks included, and what moves it."""
        op = use.user
        if isinstance(op, Graph) or op in self._grouped:
            return False
        if isinstance(op, ops.Repeat):
            return use.index >= len(op.carried) and all(map(self._reads_rounded, op.body.inputs[use.index].uses))
        return isinstance(op, _PRODUCTS) or (isinstance(op, _MOVES) and op.operands[use.index] in data_of(op))

    def _sources(self, value: Value) -> Iterator[str]:
        """The weights that ``value`` is, or is made of by moving."""
        return (moved.weight for moved in self._moved(value) if moved.is_weight)

    def _moved(self, value: Value) -> Iterator[Value]:
        """``value`` and all that it is made of by moving."""
        yield value
        if value in self._outside:
            yield from self._moved(self._outside[value])
        elif isinstance(value.producer, _MOVES):
            for operand in data_of(value.producer):
                yield from self._moved(operand)

    def _add_tables(self) -> None:
        for id, weight in self._module.weights.items():
            looked_up = [isinstance(u.user, ops.Embedding) and u.index == 0 for u in self._module.readers(id)]
            if looked_up and all(looked_up) and weight.type.dtype is DType.F32 and not self._unfitness(id):
                self.weights[id] = None


class _Rewrite:
    """Rewrites graphs op by op, in order of execution, and remembers which values are held in the 16-bit type."""

    def __init__(self, module: Module, plan: _Plan, dtype: DType) -> None:
        self._module = module
        self._plan = plan
        self._dtype = dtype
        self._stored = {id: half_storage.store(module, module.weights[id], dtype) for id in plan.weights}
        self._held: dict[Value, Value] = {}
        self._rounded: dict[Value, Value] = {}
        self._made: list[tuple[Graph, Op]] = []

    def graph(self, graph: Graph) -> None:
        """Rewrite ``graph`` and the bodies inside it."""
        stored = {v: graph.weight(self._stored[v.weight]) for v in graph.weights if v.weight in self._stored}
        self._held |= stored
        for op in list(graph.ops):
            if isinstance(op, ops.Repeat):
                self._repeat(graph, op)
            elif op in self._plan.products:
                self._replace(graph, op, [self._half(graph, v) for v in op.operands])
            elif isinstance(op, _MOVES) and all(v.type.dtype is DType.F32 for v in data_of(op)):
                data = data_of(op)
                exact = all(v in self._held for v in data)
                if exact or (self._dtype is DType.BF16 and all(map(self._plan.wanted, op.results))):
                    self._replace(graph, op, [self._half(graph, v) if v in data else v for v in op.operands])
        for value, half in stored.items():
            if value.uses:
                first = reduce(lambda a, b: a if a.is_before(b) else b, value.users) if value.users else None
                value.replace_all_uses_with(self._widened(graph, half, before=first))

    def drop_unread_casts(self) -> None:
        """Remove the casts that nobody came to read."""
        for graph, op in reversed(self._made):
            if not any(result.uses for result in op.results):
                graph.ops.remove(op)

    def _replace(self, graph: Graph, op: Op, operands: Sequence[Value]) -> None:
        """Put ``op`` on 16-bit operands in the place of ``op``, and widen its results for those who read them."""
        half = op.rebuilt(operands)
        half.made_by = CastPrecision.name
        graph.ops.insert_before(op, half)
        for old, new in zip(op.results, half.results, strict=True):
            new.name = old.name
            if old.type.dtype is DType.F32:
                old.replace_all_uses_with(self._widened(graph, new))
        graph.ops.remove(op)

    def _half(self, graph: Graph, value: Value) -> Value:
        """``value`` in the 16-bit type: as it is held, or rounded behind the op that makes it."""
        if value.type.dtype is not DType.F32:
            return value
        if value in self._held:
            return self._held[value]
        if value not in self._rounded:
            bounded = value in self._plan.masks and not _fits(value)
            source = self._bounded(graph, value) if bounded else value
            self._rounded[value] = self._insert(graph, ops.Cast(source, self._dtype), source).result
        return self._rounded[value]

    def _bounded(self, graph: Graph, mask: Value) -> Value:
        """``mask`` with its finite numbers in the range of bfloat16, and its infinities as they are."""
        clamped = self._insert(graph, ops.Clamp(mask, min=_LOWEST, max=-_LOWEST), mask).result
        infinite = self._insert(graph, ops.IsInf(mask), clamped).result
        return self._insert(graph, ops.Where(infinite, mask, clamped), infinite).result

    def _widened(self, graph: Graph, half: Value, before: Op | None = None) -> Value:
        """``half`` in float32."""
        wide = self._insert(graph, ops.Cast(half, DType.F32), half, before).result
        self._held[wide] = half
        return wide

    def _insert(self, graph: Graph, op: Op, source: Value, before: Op | None = None) -> Op:
        """Put ``op`` before an op or, by default, right behind what makes ``source``."""
        op.made_by = CastPrecision.name
        if source.producer is not None:
            op.location = source.producer.location
            graph.ops.insert_after(source.producer, op)
        elif before is not None or graph.ops.first is not None:
            graph.ops.insert_before(before or graph.ops.first, op)  # type: ignore[arg-type]
        else:
            graph.ops.append(op)
        self._made.append((graph, op))
        return op

    def _repeat(self, graph: Graph, op: ops.Repeat) -> None:
        """Hand a body its stacked values and invariants in the 16-bit type where it wants them so."""
        for index in range(len(op.carried), len(op.operands)):
            outer, inner = op.operands[index], op.body.inputs[index]
            stored = outer.is_weight and outer.weight in self._stored
            if inner.type.dtype is DType.F32 and (stored or (self._dtype is DType.BF16 and self._plan.wanted(inner))):
                half = Value(inner.type.with_dtype(self._dtype), index=index, name=inner.name)
                op.set_operand(index, self._half(graph, outer))
                op.body.inputs[index] = half
                inner.replace_all_uses_with(self._widened(op.body, half))
        self.graph(op.body)


def rounds_values(module: Module) -> bool:
    """Whether an op of ``module`` computes a 16-bit floating value, rather than move or widen one that is stored."""
    return any(
        value.type.dtype in (DType.BF16, DType.F16)
        for op in module.walk()
        if not isinstance(op, (*_MOVES, ops.Repeat, ops.Fused))
        for value in op.results
    )


def data_of(op: Op) -> tuple[Value, ...]:
    """The operands of a move whose elements are those of its result."""
    if isinstance(op, ops.Embedding):
        return (op.table,)
    return op.values if isinstance(op, ops.Concat) else (op.operands[0],)


def _factors(op: Op) -> tuple[Value, ...]:
    """What a product multiplies: its operands without bias and mask."""
    if isinstance(op, ops.Einsum):
        return op.operands_list
    if isinstance(op, ops.Attention):
        return (op.q, op.k, op.v)
    return op.operands[:2]


def _fits(value: Value) -> bool:
    """Whether the finite numbers of a mask are known to be in the range of bfloat16."""
    maker = value.producer
    if isinstance(maker, ops.Full):
        return abs(maker.value) <= -_LOWEST or abs(maker.value) == float("inf")
    return isinstance(maker, ops.Where) and _fits(maker.x) and _fits(maker.y)


def _is_made_of_integers(value: Value) -> bool:
    """Whether ``value`` is a range, or converted from integers that may be large."""
    maker = value.producer
    if isinstance(maker, ops.Cast):
        return not maker.x.type.dtype.is_floating and maker.x.type.dtype not in _EXACT_INTEGERS
    return isinstance(maker, ops.Arange)


def _reader(use: Use) -> str:
    return "the caller" if isinstance(use.user, Graph) else use.user.name
