"""Where the axis of tokens goes through an op, and what the op must change when there are fewer of them.

One rule an op class serves both sides: the analysis, which asks whether an op treats tokens one by one, and the
rewriting, which builds the op again for fewer tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from trimtab.ir import ops
from trimtab.ir.core import Value
from trimtab.ir.dims import Dim, product
from trimtab.ir.op import Op


@dataclass(frozen=True)
class Axis:
    """Axis ``dim`` of a value holds a row for each of the tokens ``first``, ``first + 1``, ..."""

    dim: int
    first: int = 0


@dataclass(frozen=True)
class Tokens:
    """How many tokens there are, before and after a reduction, and which of them keep their places.

    Attributes:
        before: N of the original graph.
        after: how many are left where the op is; N for the analysis.
        protected: leading tokens that stay where they are.
        varying: tells whether a value depends on the module's inputs, not on weights alone.
    """

    before: int
    after: int
    protected: int
    varying: Callable[[Value], bool]


@dataclass(frozen=True)
class Effect:
    """What an op does to the axis.

    Attributes:
        results: where the axis is in each result; None for a result without it.
        changes: attributes that have other values with ``Tokens.after`` tokens.
        sides: by operand number, the axis of operands that have a row for each token without being computed from
            tokens, such as a mask: they are reduced in the same way.
        averages: the op adds tokens up, so each counts as often as it stands for original ones.
    """

    results: tuple[Axis | None, ...]
    changes: Mapping[str, Any] = field(default_factory=dict)
    sides: Mapping[int, Axis] = field(default_factory=dict)
    averages: bool = False


Axes: TypeAlias = Mapping[int, Axis]
"""The axis of those operands, by number, that are computed from tokens."""
Rule: TypeAlias = Callable[[Any, Axes, Tokens], "Effect | str"]


def follow(op: Op, axes: Axes, tokens: Tokens) -> Effect | str:
    """The effect of ``op`` on the axis of tokens, or why it cannot be computed with fewer of them."""
    rule = _RULES.get(type(op)) or (_elementwise if op.elementwise else None)
    if rule is None:
        return f"{op.name} is not known to treat tokens one by one"
    return rule(op, axes, tokens)


def _one(axes: Axes) -> Axis | None:
    """The axis of operand 0, where no other operand is computed from tokens."""
    return axes.get(0) if len(axes) == 1 else None


def _elementwise(op: Op, axes: Axes, tokens: Tokens) -> Effect | str:
    """Operands are aligned at their last axes."""
    places = {(op.operands[index].type.rank - axis.dim, axis.first) for index, axis in axes.items()}
    if len(places) > 1:
        return f"{op.name} combines tokens along one axis with tokens along another"
    (from_end, first), *_ = places
    sides = {}
    for index, value in enumerate(op.operands):
        rank = value.type.rank
        if index in axes or rank < from_end or value.type.shape[rank - from_end] == 1:
            continue
        if not isinstance(op, ops.Add | ops.Sub) and not tokens.varying(value):
            return f"{op.name} has a constant for each token, {value.type}"
        sides[index] = Axis(rank - from_end, first)
    return Effect((Axis(op.results[0].type.rank - from_end, first),), sides=sides)


def _linear(op: ops.Linear, axes: Axes, tokens: Tokens) -> Effect | str:
    axis = _one(axes)
    if axis is None or axis.dim == op.x.type.rank - 1:
        return "linear mixes tokens"
    return Effect((axis,))


def _matmul(op: ops.Matmul, axes: Axes, tokens: Tokens) -> Effect | str:
    if len(axes) > 1:
        return "matmul combines tokens with tokens, as an attention that was not recognised does"
    ((index, axis),) = axes.items()
    rank, other = op.operands[index].type.rank, op.operands[1 - index].type
    kept = rank - 2 if index == 0 else rank - 1
    from_end = rank - axis.dim
    if rank > 2 and from_end > 2 and (other.rank < from_end or other.shape[other.rank - from_end] == 1):
        return Effect((Axis(op.result.type.rank - from_end, axis.first),))
    if rank < 2 or axis.dim != kept:
        return "matmul sums over tokens, or has a matrix for each of them"
    return Effect((Axis(op.result.type.rank - (2 if index == 0 else 1), axis.first),))


def _normalized(op: ops.LayerNorm | ops.RmsNorm, axes: Axes, tokens: Tokens) -> Effect | str:
    axis = _one(axes)
    if axis is None or axis.dim >= op.x.type.rank - op.axes:
        return f"{op.name} normalises over tokens"
    return Effect((axis,))


def _along(op: Any, axes: Axes, tokens: Tokens) -> Effect | str:
    """Ops that combine what lies along ``op.dim``."""
    axis = axes[0]
    return f"{op.name} goes over tokens" if axis.dim == op.dim else Effect((axis,))


def _argument(op: ops.Argmax | ops.Argmin, axes: Axes, tokens: Tokens) -> Effect | str:
    axis = axes[0]
    if axis.dim == op.dim:
        return f"{op.name} gives the position of a token"
    kept = op.result.type.rank == op.x.type.rank
    return Effect((Axis(axis.dim - (not kept and op.dim < axis.dim), axis.first),))


def _permute(op: ops.Permute, axes: Axes, tokens: Tokens) -> Effect | str:
    axis = axes[0]
    return Effect((Axis(op.dims.index(axis.dim), axis.first),))


def _reshape(op: ops.Reshape, axes: Axes, tokens: Tokens) -> Effect | str:
    axis = axes[0]
    old = op.x.type.shape
    size, outer = old[axis.dim], product(old[: axis.dim])
    for dim, wanted in enumerate(op.shape):
        if wanted == size and product(op.shape[:dim]) == outer:
            return Effect((Axis(dim, axis.first),), {"shape": _with(op.shape, dim, tokens.after - axis.first)})
    shapes = f"{list(map(str, old))} becomes {list(map(str, op.shape))}"
    return f"reshape splits the axis of tokens, or joins it with another, as for a grid or windows: {shapes}"


def _expand(op: ops.Expand, axes: Axes, tokens: Tokens) -> Effect | str:
    axis = axes[0]
    dim = axis.dim + len(op.shape) - op.x.type.rank
    return Effect((Axis(dim, axis.first),), {"shape": _with(op.shape, dim, tokens.after - axis.first)})


def _slice(op: ops.Slice, axes: Axes, tokens: Tokens) -> Effect | str:
    axis = axes[0]
    if op.dim != axis.dim:
        return Effect((axis,))
    size = op.x.type.shape[axis.dim]
    part = _part(axis, op.start, op.stop, size, tokens) if op.step == 1 else "tokens at every other position are read"
    if isinstance(part, str):
        return part
    return Effect((part,), {"stop": tokens.after - axis.first} if part is not None else {})


def _select(op: ops.Select, axes: Axes, tokens: Tokens) -> Effect | str:
    axis = axes[0]
    if op.dim != axis.dim:
        return Effect((Axis(axis.dim - (op.dim < axis.dim), axis.first),))
    if isinstance(op.index, int) and axis.first + op.index < tokens.protected:
        return Effect((None,))
    return f"the token at position {op.index} is read"


def _split(op: ops.Split, axes: Axes, tokens: Tokens) -> Effect | str:
    axis = axes[0]
    if op.dim != axis.dim:
        return Effect((axis,) * len(op.sizes))
    size, start = op.x.type.shape[axis.dim], 0
    results: list[Axis | None] = []
    sizes: list[Dim] = []
    for length in op.sizes:
        if not isinstance(length, int):
            return "split cuts tokens at positions that are not numbers"
        part = _part(axis, start, start + length, size, tokens)
        if isinstance(part, str):
            return part
        results.append(part)
        sizes.append(length if part is None else tokens.after - axis.first - start)
        start += length
    return Effect(tuple(results), {"sizes": tuple(sizes)})


def _part(axis: Axis, start: Dim, stop: Dim, size: Dim, tokens: Tokens) -> Axis | str | None:
    """The axis of the rows from ``start`` to ``stop`` of ``size``; None where all of them are protected tokens."""
    if not isinstance(start, int) or not isinstance(stop, int):
        return "tokens at positions that are not numbers are read"
    if axis.first + stop <= tokens.protected:
        return None
    if stop == size and axis.first + start <= tokens.protected:
        return Axis(axis.dim, axis.first + start)
    return f"the tokens from position {axis.first + start} to {axis.first + stop} are read"


def _index_select(op: ops.IndexSelect, axes: Axes, tokens: Tokens) -> Effect | str:
    axis = _one(axes)
    if axis is None or op.dim == axis.dim:
        return "tokens are picked by index"
    added = op.indices.type.rank - 1
    return Effect((Axis(axis.dim + (added if op.dim < axis.dim else 0), axis.first),))


def _concat(op: ops.Concat, axes: Axes, tokens: Tokens) -> Effect | str:
    found = set(axes.values())
    axis = next(iter(found))
    if len(found) > 1 or op.dim == axis.dim:
        return "concat puts other tokens beside these"
    return Effect((axis,), sides={index: axis for index in range(len(op.operands)) if index not in axes})


def _pad(op: ops.Pad, axes: Axes, tokens: Tokens) -> Effect | str:
    axis = axes[0]
    return "pad adds tokens" if op.before[axis.dim] or op.after[axis.dim] else Effect((axis,))


def _tile(op: ops.Tile, axes: Axes, tokens: Tokens) -> Effect | str:
    axis = axes[0]
    dim = axis.dim + len(op.repeats) - op.x.type.rank
    return "tile repeats tokens" if op.repeats[dim] != 1 else Effect((Axis(dim, axis.first),))


def _reordered(op: ops.Roll | ops.Flip, axes: Axes, tokens: Tokens) -> Effect | str:
    return f"{op.name} moves tokens" if axes[0].dim in op.dims else Effect((axes[0],))


def _reduced(op: Any, axes: Axes, tokens: Tokens) -> Effect | str:
    axis = axes[0]
    if axis.dim not in op.dims:
        dropped = 0 if op.keepdim else sum(dim < axis.dim for dim in op.dims)
        return Effect((Axis(axis.dim - dropped, axis.first),))
    if isinstance(op, ops.Sum | ops.Mean):
        if len(op.dims) > 1:
            return f"{op.name} goes over tokens and other axes at once"
        return Effect((None,), averages=True)
    return f"{op.name} goes over tokens" if isinstance(op, ops.Prod) else Effect((None,))


def _attention(op: ops.Attention, axes: Axes, tokens: Tokens) -> Effect | str:
    rank = op.q.type.rank
    if rank != 4:
        return f"attention has operands of {rank} axes instead of batch, head, token and channel"
    if any(axis != Axis(op.operands[index].type.rank - 2) for index, axis in axes.items() if index < 3):
        return "the tokens of attention are not its last axis but one"
    queries, keys = 0 in axes, 1 in axes
    if keys != (2 in axes):
        return "the keys and values of attention do not belong to the same tokens"
    if op.causal and queries and keys:
        return "attention is causal, so the order of tokens matters"
    sides = {}
    if op.mask is not None and 3 not in axes:
        shape = op.mask.type.shape
        if queries and len(shape) >= 2 and shape[-2] != 1:
            kind = "a mask or relative position bias" if tokens.varying(op.mask) else "a relative position bias"
            return f"attention has {kind} for each pair of tokens, {op.mask.type}"
        if keys and shape[-1] != 1:
            sides[3] = Axis(len(shape) - 1)
    return Effect((Axis(rank - 2) if queries else None,), sides=sides)


def _rotary(op: ops.RotaryEmbedding, axes: Axes, tokens: Tokens) -> Effect | str:
    axis = _one(axes)
    if axis is None:
        return "rotary_embedding turns by angles that are computed from tokens"
    from_end = op.x.type.rank - axis.dim
    tables = (op.cos.type, op.sin.type)
    if any(table.rank >= from_end and table.shape[table.rank - from_end] != 1 for table in tables):
        return "rotary_embedding turns each token by its position, which a merged token does not have"
    return Effect((axis,))


def _with(shape: tuple[Dim, ...], dim: int, size: Dim) -> tuple[Dim, ...]:
    return (*shape[:dim], size, *shape[dim + 1 :])


_RULES: Mapping[type[Op], Rule] = {
    ops.Linear: _linear,
    ops.Matmul: _matmul,
    ops.LayerNorm: _normalized,
    ops.RmsNorm: _normalized,
    ops.Softmax: _along,
    ops.LogSoftmax: _along,
    ops.Cumsum: _along,
    ops.Argmax: _argument,
    ops.Argmin: _argument,
    ops.Permute: _permute,
    ops.Reshape: _reshape,
    ops.Expand: _expand,
    ops.Slice: _slice,
    ops.Select: _select,
    ops.Split: _split,
    ops.IndexSelect: _index_select,
    ops.Concat: _concat,
    ops.Pad: _pad,
    ops.Tile: _tile,
    ops.Roll: _reordered,
    ops.Flip: _reordered,
    ops.Sum: _reduced,
    ops.Mean: _reduced,
    ops.Prod: _reduced,
    ops.Amax: _reduced,
    ops.Amin: _reduced,
    ops.Any: _reduced,
    ops.All: _reduced,
    ops.Attention: _attention,
    ops.RotaryEmbedding: _rotary,
}
