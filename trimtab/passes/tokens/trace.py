"""Where each token went: for every reduction of a pass, the row that each original token is in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab.ir.core import Module
from trimtab.ir.interpreter import interpret
from trimtab.passes.base import Context
from trimtab.passes.tokens.reduction import TokenReduction
from trimtab.passes.tokens.shortening import Place
from trimtab.passes.tokens.steps import Step

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class TracedReduction:
    """One reduction.

    Attributes:
        layer: number of the layer it was made in.
        before: tokens before it.
        after: tokens behind it.
        rows: i64 ``[B, N]``, the row behind the reduction that each of the N original tokens is in, -1 where it was
            dropped. None where this or an earlier reduction mixes every token out of all others.
    """

    layer: int
    before: int
    after: int
    rows: Rows | None


@dataclass(frozen=True)
class TokenTrace:
    """What a pass did to the tokens of a model on some inputs.

    Attributes:
        tokens: N, before the first reduction; 0 where the pass reduced nothing.
        protected: leading tokens that keep their rows.
        reductions: in order of execution.
    """

    tokens: int
    protected: int
    reductions: tuple[TracedReduction, ...]


def trace_tokens(
    module: Module,
    pass_: TokenReduction,
    inputs: Sequence[Any] | Mapping[str, Any],
    ctx: Context | None = None,
) -> TokenTrace:
    """Run ``pass_`` on a copy of ``module``, evaluate it, and follow every token through the reductions.

    Args:
        module: the model before the reduction; it is only read.
        pass_: the reduction.
        inputs: a tensor or array per input of the module, in order or by name.
        ctx: what the pass is offered, such as calibration data for one that chooses its amount by them.

    Raises:
        PassError: the pass cannot reduce the tokens of this model.
        InputError: the inputs do not fit the module.
    """
    copy = module.copy()
    watched: list[tuple[Place, Step, int | None]] = []

    def watch(place: Place, step: Step) -> None:
        graph, target = place.build.graph, step.target(place.build)
        if target is None:
            watched.append((place, step, None))
            return
        # As an output it stays when the rewriting removes ops that nothing reads.
        watched.append((place, step, len(graph.outputs)))
        graph.set_outputs([*graph.outputs, target], [*graph.output_names, f"target.{len(watched)}"])

    if not pass_.rewrite(copy, ctx or Context(), watch) or not watched:
        return TokenTrace(0, 0, ())
    outputs = interpret(copy, inputs)
    found: list[TracedReduction] = []
    rows: Rows | None = None
    for number, (place, step, index) in enumerate(watched):
        target = None if index is None else outputs[index].cpu().numpy().astype(np.int64)
        if number == 0:
            rows = target
        else:
            rows = None if rows is None or target is None else _followed(rows, target)
        found.append(TracedReduction(place.number, place.tokens, step.count, rows))
    first = watched[0][0]
    return TokenTrace(first.tokens, first.protected, tuple(found))


def _followed(rows: Rows, target: Rows) -> Rows:
    """Rows ``[B, N]`` of the original tokens after one more reduction with ``target`` ``[B, n]``."""
    moved = np.take_along_axis(target, np.maximum(rows, 0), axis=1)
    return np.where(rows < 0, -1, moved)
