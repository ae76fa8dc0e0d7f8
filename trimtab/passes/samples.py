"""Sample inputs made from a module's signature, on which contracts are checked when the user gave no data.

Sizes are small: every symbol gets its smallest value in one sample, and a different small odd number in another, so
that rewrites that only hold for one size, or mix up two axes, show.  Integers that reach an index operand stay below
the size of the axis they index, and those that reach a divisor are not 0; other integers are 0 or 1, the values of
masks and types.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimtab.errors import InputError
from trimtab.ir.analysis.statistics import executions
from trimtab.ir.core import Graph, Module, Value
from trimtab.ir.dims import Dim, Symbol, evaluate
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op
from trimtab.ir.ops import (
    Div,
    Embedding,
    Fmod,
    Fused,
    Gather,
    Index,
    IndexPut,
    IndexSelect,
    Remainder,
    Scatter,
)
from trimtab.ir.types import TensorType
from trimtab.passes.base import Context

if TYPE_CHECKING:
    import torch

SMALL_MACS = 1e9
"""Multiply-accumulates of an evaluation that takes about a tenth of a second on one core."""
_RAGGED_SIZES = (3, 5, 7, 11, 13, 17, 19, 23)
_SPECIAL_VALUES = (0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1.0, -1.0, 1e30, 1e-40)


@dataclass(frozen=True)
class Sample:
    """Inputs to evaluate a module on.

    Attributes:
        name: what messages call it.
        inputs: a tensor per graph input.
        macs: multiply-accumulates of one evaluation.
        special: whether infinities and NaNs are among the values, so that only bit-for-bit comparison makes sense.
    """

    name: str
    inputs: tuple[torch.Tensor, ...]
    macs: int
    special: bool = False


def generate_samples(module: Module, ctx: Context, mac_limit: float) -> list[Sample]:
    """Samples whose evaluation takes at most ``mac_limit`` multiply-accumulates; the cheapest one if none does.

    Small models get one more with infinities, NaN, signed zeros and denormals among the values.
    """
    graph = module.main
    generator = ctx.generator("samples")
    bindings = {"ragged sizes": _ragged(graph), "smallest sizes": smallest_sizes(graph)}
    if bindings["ragged sizes"] == bindings["smallest sizes"]:
        del bindings["ragged sizes"]
    costs = {name: count_macs(module, sizes) for name, sizes in bindings.items()}
    fitting = [name for name in bindings if costs[name] <= mac_limit] or [min(bindings, key=lambda n: costs[n])]
    samples = []
    for name in fitting:
        inputs = _inputs(module, bindings[name], generator, costs[name] <= SMALL_MACS)
        samples.append(Sample(name, inputs, costs[name]))
    first = samples[0]
    if first.macs > SMALL_MACS:
        return samples
    special = tuple(_sprinkle(tensor, generator) for tensor in first.inputs)
    samples.append(Sample(f"{first.name}, with zeros, infinities and NaN", special, first.macs, special=True))
    return samples


def _inputs(
    module: Module, sizes: Mapping[str, int], generator: torch.Generator, try_out: bool
) -> tuple[torch.Tensor, ...]:
    """Random inputs that the module can be evaluated on, which is tried where it is in doubt and ``try_out``."""
    import torch

    from trimtab.ir.interpreter import interpret

    graph = module.main
    limits, divisors = index_limits(graph, sizes), _divisors(graph)
    inputs = tuple(
        _draw(v.type, sizes, limits.get(v, 4 if v in divisors else 2), v in divisors, generator) for v in graph.inputs
    )
    if not (try_out and _computes_indices(graph)):
        return inputs
    try:
        interpret(module, inputs)
    except InputError:  # what is computed from small numbers may be too large; 0 is as small as they can be
        pairs = zip(graph.inputs, inputs, strict=True)
        return tuple(torch.zeros_like(data) if value in limits else data for value, data in pairs)
    return inputs


def _computes_indices(graph: Graph) -> bool:
    """Whether an index is the result of an op on integers."""
    sizes = smallest_sizes(graph)
    return any(value.producer is not None for op in graph.ops for value, _ in _indexed_axes(op, sizes))


def _divisors(graph: Graph) -> set[Value]:
    """The integer inputs that reach a divisor through integers."""
    reached: set[Value] = set()
    for op in reversed(graph.ops):
        if isinstance(op, Div | Fmod | Remainder) and op.y.type.dtype.is_integer:
            reached.add(op.y)
        if isinstance(op, Fused):
            inside = _divisors(op.body)
            reached.update(v for v, own in zip(op.inputs, op.body.inputs, strict=True) if own in inside)
        if any(result in reached for result in op.results):
            reached.update(value for value in op.operands if value.type.dtype.is_integer)
    return reached & set(graph.inputs)


def count_macs(module: Module, sizes: Mapping[str, int]) -> int:
    """Multiply-accumulates of one evaluation of ``module.main`` with the symbols at ``sizes``."""

    return sum(int(evaluate(op.macs(), sizes)) * times for op, times in executions(module.main))


def sizes_of(graph: Graph, inputs: tuple[torch.Tensor, ...]) -> dict[str, int]:
    """The values that ``inputs`` give to the symbols of ``graph``."""
    from trimtab.ir.interpreter import bind_symbols

    return bind_symbols(graph, inputs)


def index_limits(graph: Graph, sizes: Mapping[str, int]) -> dict[Value, int]:
    """For each integer input that reaches an index operand through integer values: the smallest axis it indexes."""
    reached: dict[Value, int] = {}
    for op in reversed(graph.ops):
        here = dict(_indexed_axes(op, sizes))
        results = [reached[result] for result in op.results if result in reached]
        for value in op.operands:
            if value.type.dtype.is_integer:
                limits = [*results] if value not in here else [int(evaluate(here[value], sizes)), *results]
                if limits:
                    reached[value] = min(*limits, reached.get(value, limits[0]))
    return {value: limit for value, limit in reached.items() if value in set(graph.inputs)}


def _indexed_axes(op: Op, sizes: Mapping[str, int]) -> Iterator[tuple[Value, Dim]]:
    """Index operands of ``op`` with the size of the axis that each one indexes."""
    match op:
        case Fused():
            inside = index_limits(op.body, sizes)
            yield from ((v, inside[i]) for v, i in zip(op.inputs, op.body.inputs, strict=True) if i in inside)
        case Embedding():
            yield op.indices, op.table.type.shape[0]
        case IndexSelect() | Gather() | Scatter():
            yield op.indices, op.x.type.shape[op.dim]
        case Index():
            yield from zip(op.indices, op.x.type.shape[op.dim :], strict=False)
        case IndexPut():
            yield from zip(op.indices, op.x.type.shape, strict=False)


def smallest_sizes(graph: Graph) -> dict[str, int]:
    """The smallest value of each symbol of ``graph``, at least 1."""
    return {name: max(symbol.min, 1) for name, symbol in graph.symbols().items()}


def _ragged(graph: Graph) -> dict[str, int]:
    def clip(symbol: Symbol, size: int) -> int:
        return max(symbol.min, size if symbol.max is None else min(size, symbol.max))

    symbols = graph.symbols().items()
    sizes = zip(symbols, _RAGGED_SIZES * (len(symbols) // len(_RAGGED_SIZES) + 1), strict=False)
    return {name: clip(symbol, symbol.min + size - 1 if symbol.min > 3 else size) for (name, symbol), size in sizes}


def _draw(
    type: TensorType, sizes: Mapping[str, int], limit: int, is_divisor: bool, generator: torch.Generator
) -> torch.Tensor:
    import torch

    shape: Any = type.bind(sizes).shape
    dtype = type.dtype.to_torch()
    if type.dtype.is_floating:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
    if is_divisor:
        return torch.randint(1, max(limit, 2), shape, generator=generator, dtype=torch.int64).to(dtype)
    if type.dtype in (DType.I8, DType.U8):
        low, high = (-128, 128) if type.dtype is DType.I8 else (0, 256)
        if limit > 2:
            low, high = 0, min(limit, high)
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int64).to(dtype)
    return torch.randint(0, max(limit, 1), shape, generator=generator, dtype=torch.int64).to(dtype)


def _sprinkle(data: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """``data`` with a quarter of its floating elements, and at least one for each special value where there is room,
    replaced by zeros, infinities, NaN and extreme numbers."""
    import torch

    if not data.dtype.is_floating_point or not data.numel():
        return data
    count = max(data.numel() // 4, min(data.numel(), len(_SPECIAL_VALUES)))
    places = torch.randperm(data.numel(), generator=generator)[:count]
    values = torch.tensor(_SPECIAL_VALUES, dtype=torch.float64).to(data.dtype)
    flat = data.reshape(-1).clone()
    flat[places] = values[torch.arange(count) % len(values)]
    return flat.reshape(data.shape)
