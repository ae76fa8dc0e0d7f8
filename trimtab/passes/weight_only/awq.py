"""Scaling of input channels before rounding, so that those with large inputs lose less.

From the formulas of Lin et al., AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration, arXiv
2306.00978: with ``s = mean|X|^a``, a layer computes ``(X / s) (W s)^T``, where W s is rounded; a is searched for. The
division is done by what makes X: a norm's weight, or the output channels of a linear layer. Where a residual reads the
norm too, as in BERT, the linear layers get a norm of their own, which costs little beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Module, Value
from trimtab.ir.op import Op
from trimtab.ir.printer import print_op
from trimtab.ir.rewrite import Match, NearMiss
from trimtab.ir.rewrite.log import RuleLog
from trimtab.ir.weights import TorchSource, Weight
from trimtab.passes.folding import Site, consumers, producer
from trimtab.passes.weight_only.grouping import Grid, round_to_nearest
from trimtab.passes.weight_only.layers import Layer
from trimtab.passes.weight_only.moments import Moments, gather

EXPONENTS = tuple(step / 20 for step in range(20))
"""The exponents a that are tried: 0 stands for no scaling."""
_LEAST = 1e-4
"""Of a mean magnitude, relative to the largest: channels that are nearly always 0 do not get endless scales."""
_HELD_BYTES = 256 << 20
"""Sums over the data that are held at a time; for more, the data is read several times."""


@dataclass(frozen=True)
class Place:
    """Linear layers whose input channels can be scaled, and what makes them.

    Attributes:
        linears: all that reads these channels; each reads channel k at index k.
        maker: the norm, or the output channels of a linear layer, in which to divide: ``rows[k]`` is the one of k.
        rows: i64 ``[..., K]``; more than one where groups of output channels are read one after the other.
        shared: whether other ops read the norm and are not to see the division.
    """

    linears: tuple[ops.Linear, ...]
    maker: ops.LayerNorm | ops.RmsNorm | ops.Linear
    rows: torch.Tensor
    shared: bool = False


def find_places(module: Module, layers: Sequence[Layer], log: RuleLog) -> list[Place]:
    """Where inputs of ``layers`` can be scaled, in order of execution; ``log`` is told why others cannot."""
    places: list[Place] = []
    seen: set[ops.Linear] = set()
    for linear in (linear for layer in layers for linear in layer.linears):
        if linear in seen:
            continue
        log.tried += 1
        found = _place(module, linear)
        if isinstance(found, str):
            log.reject(NearMiss(1, 1, print_op(linear), str(linear.location or ""), found))
        else:
            log.matched += 1
            seen.update(found.linears)
            places.append(found)
    return places


def find_scales(weights: Sequence[torch.Tensor], moments: Sequence[Moments], grid: Grid) -> torch.Tensor:
    """The scales s f64 ``[K]`` with which the rounded layers err least; all 1 when nothing is better.

    Args:
        weights: f64 ``[N, K]`` of the layers that read the same channels; N may differ.
        moments: of the input of each of them.
        grid: what they are rounded to.
    """
    magnitudes = sum(m.magnitudes for m in moments)
    assert isinstance(magnitudes, torch.Tensor)
    best = torch.ones_like(magnitudes)
    if not bool(magnitudes.any()):
        return best
    relative = (magnitudes / magnitudes.max()).clamp(min=_LEAST)
    least = float("inf")
    for exponent in EXPONENTS:
        scales = relative**exponent
        # Around 1, as in the paper's code; float32, so that what is divided is what was multiplied with.
        scales = (scales / (scales.max() * scales.min()).sqrt()).float().double()
        error = 0.0
        for weight, its in zip(weights, moments, strict=True):
            rounded = round_to_nearest(weight * scales, grid).values() / scales
            error += float(its.error(rounded - weight).sum())
        if error < least:
            best, least = scales, error
    return best


def scale_inputs(
    module: Module, places: Sequence[Place], batches: Sequence[Sequence[torch.Tensor]], grid: Grid, made_by: str
) -> None:
    """Scale the input channels of all ``places`` as :func:`find_scales` says, by the weights of the float module.

    In real arithmetic the module computes what it did before; each weight is rounded to f32 once more.
    """
    found: list[torch.Tensor] = []
    for batch in _held(places):
        linears = [linear for place in batch for linear in place.linears]
        moments = dict(zip(linears, gather(module, linears, batches), strict=True))
        for place in batch:
            weights = [_double(module, linear.weight) for linear in place.linears]
            found.append(find_scales(weights, [moments[linear] for linear in place.linears], grid))
    for place, scales in zip(places, found, strict=True):
        if bool((scales != 1).any()):
            _apply(module, place, scales, made_by)


# -- places -----------------------------------------------------------------------------------------------------------


def _place(module: Module, linear: ops.Linear) -> Place | str:
    """Where the input of ``linear`` can be scaled; or, in words, why not."""
    x = linear.x
    norm = x.producer
    while isinstance(norm, ops.Reshape):
        norm = norm.x.producer
    if isinstance(norm, ops.LayerNorm | ops.RmsNorm):
        return _behind_norm(module, norm, linear)
    reason = ""
    for value, reader in _same_scale(x, linear):
        assert linear.graph is not None
        match = Match(module, linear.graph, (linear.result,), (linear,), (), {})
        site = producer(match, value, (value.type.shape[-1],), reader=reader)
        if isinstance(site, Site) and isinstance(site.op, ops.Linear):
            return Place((linear,), site.op, site.channels.numbers())
        reason = reason or (site if isinstance(site, str) else f"its input is made by {site.op.name}")
    return reason


def _behind_norm(module: Module, norm: ops.LayerNorm | ops.RmsNorm, linear: ops.Linear) -> Place | str:
    assert norm.graph is not None
    if norm.axes != 1:
        return f"the norm is over the last {norm.axes} axes"
    for value in (norm.weight, norm.bias if isinstance(norm, ops.LayerNorm) else None):
        if value is not None and not value.is_weight:
            return "the weight of the norm is computed"
        if value is not None and not _is_only_reader(module, value):
            return f"the weight @{value.weight} of the norm is shared"
    size = norm.result.type.shape[-1]
    assert isinstance(size, int)
    order = torch.arange(size)
    match = Match(module, norm.graph, (norm.result,), (norm,), (), {})
    sites = consumers(match, norm.result, norm.result.type.rank - 1, shifted=False)
    if isinstance(sites, str):
        return _beside_others(module, norm, linear, order) or sites
    linears = [site.op for site in sites if isinstance(site.op, ops.Linear)]
    in_order = all(torch.equal(site.channels.numbers().reshape(-1), order) for site in sites)
    if len(linears) != len(sites) or not in_order or linear not in linears:
        return "the channels of the norm are moved on their way"
    return Place(tuple(linears), norm, order)


def _beside_others(
    module: Module, norm: ops.LayerNorm | ops.RmsNorm, linear: ops.Linear, order: torch.Tensor
) -> Place | None:
    """The linear layers that read ``norm`` directly, among other readers of it."""
    users = [user for user in norm.result.users if isinstance(user, ops.Linear) and user.x is norm.result]
    linears = [user for user in users if user.weight.is_weight and _is_only_reader(module, user.weight)]
    return Place(tuple(linears), norm, order, shared=True) if linear in linears else None


def _is_only_reader(module: Module, value: Value) -> bool:
    return sum(1 for _ in module.readers(value.weight)) == 1


def _same_scale(value: Value, reader: Op) -> Iterator[tuple[Value, Op]]:
    """``value``, and what it is a multiple of, each with its only reader: factors, and what a relu is applied to."""
    yield value, reader
    op = value.producer
    if isinstance(op, ops.Mul | ops.Relu) and len(value.uses) == 1:
        for operand in op.operands:
            if operand.type == value.type and op.operands.count(operand) == 1:
                yield from _same_scale(operand, op)


# -- scaling ----------------------------------------------------------------------------------------------------------


def _held(places: Sequence[Place]) -> Iterator[list[Place]]:
    """``places`` in runs whose sums over the data fit into ``_HELD_BYTES``, or that have one place."""
    run: list[Place] = []
    held = 0
    for place in places:
        size = 8 * place.rows.shape[-1] ** 2 * len({linear.x for linear in place.linears})
        if run and held + size > _HELD_BYTES:
            yield run
            run, held = [], 0
        run.append(place)
        held += size
    if run:
        yield run


def _apply(module: Module, place: Place, scales: torch.Tensor, made_by: str) -> None:
    for linear in place.linears:
        _set(module, linear.weight, _double(module, linear.weight) * scales)
    maker = place.maker
    if isinstance(maker, ops.Linear):
        divisors = torch.ones(maker.weight.type.shape[0], dtype=torch.float64)  # type: ignore[arg-type]
        divisors[place.rows] = scales
        _set(module, maker.weight, _double(module, maker.weight) / divisors[:, None])
        if maker.bias is not None:
            _set(module, maker.bias, _double(module, maker.bias) / divisors)
        return
    bias = maker.bias if isinstance(maker, ops.LayerNorm) else None
    gain = None if maker.weight is None else _double(module, maker.weight)
    if gain is not None and not place.shared:
        _set(module, maker.weight, gain / scales)  # type: ignore[arg-type]
        if bias is not None:
            _set(module, bias, _double(module, bias) / scales)
        return
    assert maker.graph is not None
    build = Builder(module, maker.graph, before=maker, made_by=made_by)
    dtype = maker.x.type.dtype.to_torch()
    parts = {"x": maker.x, "weight": build.weight("norm.scaled", ((1 if gain is None else gain) / scales).to(dtype))}
    if bias is not None:
        parts["bias"] = build.weight("norm.scaled", (_double(module, bias) / scales).to(dtype))
    divided = build(type(maker)(**parts, **maker.attributes))
    for linear in place.linears if place.shared else ():
        linear.set_operand(0, divided)
    if not place.shared:
        maker.result.replace_all_uses_with(divided)
        maker.graph.ops.remove(maker)


def _double(module: Module, value: Value) -> torch.Tensor:
    return module.weights[value.weight].tensor().double()


def _set(module: Module, value: Value, data: torch.Tensor) -> None:
    """Other numbers for the weight that ``value`` is, under the same id: nothing else reads it."""
    old = module.weights[value.weight]
    source = TorchSource(data.to(old.type.dtype.to_torch()))
    module.weights[old.id] = Weight(old.id, old.type, source, trainable=old.trainable)
