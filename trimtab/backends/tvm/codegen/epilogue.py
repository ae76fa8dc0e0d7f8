"""Writing what a kernel computed by tiles: the pointwise stage behind it is applied to each element on its way.

The op behind a product of bfloat16 may be one that computes in float32.  Its operand, the product as its own op defines
it, is rounded to bfloat16 then; where both are in one kernel, the sum is passed on as it is.  That is what a processor
with wide registers does for free, takes three instructions a vector less, and rounds once less.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from tvm import tirx

from trimtab.backends.tvm.codegen.expression import Expr, dtype_of, loads_of, rewrite, variables_of, visit_nodes
from trimtab.backends.tvm.codegen.loops import Stmt, store
from trimtab.backends.tvm.codegen.program import Stage
from trimtab.backends.tvm.codegen.vector_math import lowering_of
from trimtab.backends.tvm.codegen.vector_rounding import is_rounding, rounds


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
    buffer, indices = result_place(tiled, axes)
    if out is None:
        return store(buffer, indices, value)
    var = tirx.Var("product", value.ty)

    def own(read: Any, at: list[Expr]) -> Expr | None:
        return var if read.same_as(stage.buffer) else None

    result = rewrite(_without_own_rounding(tiled), _names(tiled, axes), own, lowering_of(out.value))
    return store(buffer, indices, tirx.Let(var, value, result))


def result_place(tiled: Tiled, axes: Mapping[Any, Expr]) -> tuple[Any, list[Expr]]:
    """The buffer and the indices to which :func:`store_result` stores the element at ``axes``."""
    if tiled.output is None:
        return tiled.stage.buffer, [axes[axis] for axis in tiled.stage.axes]
    names = _names(tiled, axes)
    return tiled.output.buffer, [names[axis] for axis in tiled.output.axes]


def _names(tiled: Tiled, axes: Mapping[Any, Expr]) -> dict[Any, Expr]:
    """The output's axes at the element of the stage at ``axes``."""
    return {place: axes[axis] for place, axis in zip(tiled.places, tiled.stage.axes, strict=True)}


def _without_own_rounding(tiled: Tiled) -> Expr:
    """The value of the output stage, in which the sums of products of bfloat16 are not rounded to be widened again."""
    assert tiled.output is not None
    value, sums = tiled.output.value, tiled.stage.buffer
    if not _multiplies_bf16(tiled.stage.value):
        return value
    exact: dict[Any, Expr] = {}

    def widened(dtype: str, narrow: Expr) -> Expr | None:
        if dtype != "float32" or not is_rounding(narrow) or rounds([narrow.value]):
            return None
        if exact.keys() & variables_of(narrow) or not any(load.source.same_as(sums) for load in loads_of(narrow)):
            return None
        # A name of its own: what is rounded again behind it was not rounded by the product's op.
        var = tirx.Var("exact", narrow.value.ty)
        exact[var] = narrow.value
        return var

    kept = rewrite(value, cast=widened)
    return rewrite(kept, exact) if exact else value


def _multiplies_bf16(value: Expr) -> bool:
    """Whether both factors of a product are of bfloat16, widened or not."""
    factors = (value.a, value.b) if isinstance(value, tirx.Mul) else ()
    narrow = [any(dtype_of(node) == "bfloat16" for node in visit_nodes(factor)) for factor in factors]
    return bool(narrow) and all(narrow)
