"""Gates and buffers that compute again only those tokens that changed since the last frame of a video.

From the formulas of Eventful Transformers (Dutson et al., Eventful Transformers: Leveraging Temporal Redundancy in
Vision Transformers, arXiv 2308.13494).

A gate remembers, for each token, the row that was computed last; a buffer remembers what was computed from it. What is
remembered goes in and out of the graph: an input ``state.*`` for what an output ``next.*`` of the last frame held.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from trimtab.errors import UsageError
from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.dtypes import DType
from trimtab.ir.ops import Cast, Mul, Sub, Sum
from trimtab.passes.tokens.rows import put, ranking, span, take, token_count

STATE, NEXT = "state.", "next."
"""How the names of inputs with the state of the last frame and of outputs with that for the next one begin."""

T = TypeVar("T")


@dataclass(frozen=True)
class TokenGate:
    """The tokens of a frame that are computed again.

    Attributes:
        rows: their positions, i64 ``[B, r]``, those that moved furthest first.
        tokens: their rows ``[B, r, C]``.
        reference: ``[B, N, C]``, what the next frame is compared with.
    """

    rows: Value
    tokens: Value
    reference: Value


def token_gate(build: Builder, c: Value, reference: Value, r: int) -> TokenGate:
    """Let the r tokens pass that are furthest from what passed last: ``index = top-r of ||c - p||_2``.

    Among equal distances the token at the smaller position passes. Tokens that do not pass keep their reference, so
    that small changes add up until they do.

    Args:
        build: where ops go.
        c: tokens of this frame ``[B, N, C]``.
        reference: p, ``[B, N, C]``.
        r: how many pass, 1 <= r <= N.

    Raises:
        UsageError: r is out of range, or N is a symbol.
    """
    check_passing(r, token_count(c))
    rows = span(build, ranking(build, _squared_distances(build, c, reference)), 0, r)
    tokens = take(build, c, rows)
    return TokenGate(rows, tokens, put(build, reference, rows, tokens))


def token_buffer(build: Builder, gate: TokenGate, buffer: Value, updates: Value) -> Value:
    """What was computed for all tokens, ``buffer`` ``[B, N, C]``, with ``updates`` ``[B, r, C]`` put in."""
    return put(build, buffer, gate.rows, updates)


def check_passing(r: int, tokens: int) -> None:
    """Raises UsageError unless r of N ``tokens`` can pass a gate."""
    if not 1 <= r <= tokens:
        raise UsageError(
            "so many tokens cannot pass a gate",
            values={"r": r, "tokens": tokens},
            rule=f"1 <= r <= {tokens}, the number of tokens",
        )


def next_state(names: Iterable[str], outputs: Iterable[T]) -> dict[str, T]:
    """The state inputs of the next frame by name, from all outputs of this one.

    The output ``next.0.gate.0`` is the input ``state.0.gate.0`` of the next frame.

    Args:
        names: of the outputs, as ``module.main.output_names`` or ``outputs.names`` of a session's call.
        outputs: arrays or tensors.
    """
    named = zip(names, outputs, strict=True)
    return {STATE + name.removeprefix(NEXT): value for name, value in named if name.startswith(NEXT)}


def _squared_distances(build: Builder, c: Value, reference: Value) -> Value:
    """``[B, N]``. Squares have the order of the distances themselves."""
    moved = build(Sub(c, reference))
    if moved.type.dtype in (DType.F16, DType.BF16):
        moved = build(Cast(moved, dtype=DType.F32))
    return build(Sum(build(Mul(moved, moved)), dims=(2,)))
