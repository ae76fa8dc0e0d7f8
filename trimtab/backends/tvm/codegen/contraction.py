"""Recognising matrix products, batched products and convolutions among the stages of a function.

A contraction is a sum of products ``A(batch, m, k) * B(batch, n, k)`` where each output axis is read by both factors
(batch), by the first only (m) or by the second only (n).  The second factor is the one read along the innermost
output axis: its values fill vectors, while those of the first are broadcast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm import tirx
from tvm.sym import Analyzer, detect_linear_equation

from trimtab.backends.tvm.codegen.expression import (
    Expr,
    as_index,
    int_value,
    loads_of,
    product,
    rewrite,
    variables_of,
    visit_nodes,
)
from trimtab.backends.tvm.codegen.loops import divide, flat_offset, index
from trimtab.backends.tvm.codegen.program import Stage

Axes = list[tuple[Any, Expr]]


@dataclass
class Contraction:
    """A matrix product found in a stage.

    Attributes:
        stage: the reduction stage.
        batch, m, n, k: axes of each role with their extents.
        a, b: the two factors as expressions of the axes.
        output: the pointwise stage applied to the product, or None when the product itself is the result.
        places: for each axis of the product the axis of the output at its position; its own without an output.
    """

    stage: Stage
    batch: Axes
    m: Axes
    n: Axes
    k: Axes
    a: Expr
    b: Expr
    output: Stage | None = None
    places: list[Any] = field(default_factory=list)

    @property
    def rows(self) -> Expr:
        return product([extent for _, extent in self.m])

    @property
    def columns(self) -> Expr:
        return product([extent for _, extent in self.n])

    @property
    def depth(self) -> Expr:
        return product([extent for _, extent in self.k])


def find_contraction(stage: Stage) -> Contraction | None:
    """The contraction a stage computes, or None."""
    if stage.combine != "add" or not isinstance(stage.value, tirx.Mul) or not _is_zero(stage.init):
        return None
    axes = list(zip(stage.axes, stage.extents, strict=True))
    first, second = stage.value.a, stage.value.b
    if not loads_of(first) or not loads_of(second):
        return None
    in_first, in_second = variables_of(first), variables_of(second)
    wide = [(axis, extent) for axis, extent in axes if int_value(extent) != 1]
    if not wide:
        inner_in_first = False
    else:
        inner = wide[-1][0]
        if (inner in in_first) == (inner in in_second):
            return None
        inner_in_first = inner in in_first
    a, b = (second, first) if inner_in_first else (first, second)
    in_a, in_b = (in_second, in_first) if inner_in_first else (in_first, in_second)
    roles: dict[str, Axes] = {"batch": [], "m": [], "n": []}
    for axis, extent in axes:
        both_or_none = (axis in in_a) == (axis in in_b)
        roles["batch" if both_or_none else "m" if axis in in_a else "n"].append((axis, extent))
    if not roles["n"] or any(axis not in in_a or axis not in in_b for axis, _ in stage.reduce_axes):
        return None
    return Contraction(stage, roles["batch"], roles["m"], roles["n"], list(stage.reduce_axes), a, b, places=stage.axes)


def _is_zero(expr: Expr) -> bool:
    return getattr(expr, "value", None) == 0


class Flattener:
    """Turns groups of axes into one index, without divisions where every access allows it."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self.extent = product([extent for _, extent in axes])
        self._wide = [(axis, extent) for axis, extent in axes if int_value(extent) != 1]

    def is_linear(self, accesses: Sequence[tuple[Any, Sequence[Expr]]]) -> bool:
        """Whether every access ``(buffer, indices)`` moves by a fixed step when the flat index moves by one."""
        if len(self._wide) <= 1:
            return True
        names = [axis for axis, _ in self._wide]
        for buffer, indices in accesses:
            position = Analyzer().simplify(flat_offset(buffer.shape, indices))
            if not variables_of(position) & set(names):
                continue
            coefficients = list(detect_linear_equation(position, names))
            if len(coefficients) != len(names) + 1:
                return False
            analyzer = Analyzer()
            for left, right, (_, extent) in zip(coefficients, coefficients[1:-1], self._wide[1:], strict=False):
                if not analyzer.can_prove_equal(as_index(left), as_index(right) * as_index(extent)):
                    return False
        return True

    def at(self, flat: Expr, linear: bool) -> dict[Any, Expr]:
        """Values of the axes at a flat index. With ``linear`` the innermost axis takes the whole index."""
        values: dict[Any, Expr] = {axis: index(0) for axis, _ in self.axes}
        if not self._wide:
            return values
        if linear or len(self._wide) == 1:
            values[self._wide[-1][0]] = flat
            return values
        for position, (axis, extent) in reversed(list(enumerate(self._wide))):
            quotient, remainder = divide(flat, as_index(extent))
            values[axis] = remainder if position else flat
            flat = quotient
        return values


def accesses_of(*expressions: Expr) -> list[tuple[Any, Sequence[Expr]]]:
    """Buffer accesses of expressions as pairs for :meth:`Flattener.is_linear`."""
    return [(load.source, load.indices) for expr in expressions for load in loads_of(expr)]


def has_only_loads_as_users(expr: Expr, axes: Axes) -> bool:
    """Whether the axes appear in buffer indices only, never in arithmetic on values or conditions."""
    names = {axis for axis, _ in axes}
    masked = rewrite(expr, load=lambda buffer, indices: tirx.const(0, str(buffer.dtype)))
    return not any(node in names for node in visit_nodes(masked) if isinstance(node, tirx.Var))
