"""Writing what a kernel computed by tiles: the pointwise stage behind it is applied to each element on its way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from tvm import tirx

from trimtab.backends.tvm.codegen.expression import Expr, rewrite
from trimtab.backends.tvm.codegen.loops import Stmt, store
from trimtab.backends.tvm.codegen.program import Stage
from trimtab.backends.tvm.codegen.vector_math import lowering_of


class Tiled(Protocol):
    """A stage computed by tiles.

    Attributes:
        stage: the stage.
        output: the pointwise stage applied to its elements, or None when they are the result.
        places: for each axis of the stage the axis of the output at its position; its own without an output.
    """

    stage: Stage
    output: Stage | None
    places: list[Any]


def store_result(tiled: Tiled, axes: Mapping[Any, Expr], value: Expr) -> Stmt:
    """Apply the output stage to ``value``, the element of the stage at ``axes``, and store what it gives."""
    stage, out = tiled.stage, tiled.output
    if out is None:
        return store(stage.buffer, [axes[axis] for axis in stage.axes], value)
    names = {place: axes[axis] for place, axis in zip(tiled.places, stage.axes, strict=True)}
    var = tirx.Var("product", value.ty)

    def own(buffer: Any, indices: list[Expr]) -> Expr | None:
        return var if buffer.same_as(stage.buffer) else None

    result = rewrite(out.value, names, own, lowering_of(out.value))
    return store(out.buffer, [names[axis] for axis in out.axes], tirx.Let(var, value, result))
