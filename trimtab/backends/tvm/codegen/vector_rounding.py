"""Rounding to bfloat16 in vectorised loops, by the processor's own instruction where it has one.

TVM has no such type in its LLVM code: it rounds by integer arithmetic, seven instructions a vector.  Here each rounding
in a vectorised loop becomes a call of a function of LLVM text on a whole vector, which TVM cannot make of a call for
one element.  So the loop is divided at the call, and what goes from one part to the next stays in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import ir, tirx

from trimtab.backends.tvm.codegen.expression import Expr, dtype_of, rewrite, visit_nodes
from trimtab.backends.tvm.codegen.machine import Machine
from trimtab.backends.tvm.microkernels import vector_rounding, vector_rounding_name

Stmt = Any


def is_rounding(expr: Expr) -> bool:
    """Whether ``expr`` rounds a float32 that is not a constant to bfloat16."""
    is_cast = isinstance(expr, tirx.Cast) and dtype_of(expr) == "bfloat16"
    return is_cast and dtype_of(expr.value) == "float32" and not isinstance(expr.value, tirx.FloatImm)


def rounds(values: Sequence[Expr]) -> bool:
    """Whether anything in ``values`` is rounded to bfloat16."""
    return any(is_rounding(node) for value in values for node in visit_nodes(value))


def divide_at_roundings(statements: Sequence[Any], lane: Expr, width: int) -> tuple[list[Stmt], list[Stmt | list[Any]]]:
    """The body of a vectorised loop with its roundings as operations on all lanes.

    Args:
        statements: the stores that the body consists of.
        lane: the loop's variable, which runs to ``width``.

    Returns:
        Allocations, and what to do after them in order: statements, and lists of stores to do for each lane.
    """
    allocations: list[Stmt] = []
    parts: list[Stmt | list[Any]] = [[]]
    lanes = tirx.Ramp(tirx.const(0, "int64"), tirx.const(1, "int64"), width)

    def rounded(dtype: str, value: Expr) -> Expr | None:
        if not is_rounding(tirx.Cast(dtype, value)):
            return None
        wide = tirx.decl_buffer([width], "float32", name="exact", data_alignment=64)
        narrow = tirx.decl_buffer([width], "bfloat16", name="rounded", data_alignment=64)
        bits = tirx.call_pure_extern(f"uint16x{width}", vector_rounding_name(width), tirx.BufferLoad(wide, [lanes]))
        allocations.extend([tirx.AllocBuffer(wide), tirx.AllocBuffer(narrow)])
        parts[-1].append(tirx.BufferStore(wide, value, [lane]))
        parts.extend([tirx.BufferStore(narrow, tirx.reinterpret(f"bfloat16x{width}", bits), [lanes]), []])
        return tirx.BufferLoad(narrow, [lane])

    for statement in statements:
        value = rewrite(statement.value, cast=rounded)
        parts[-1].append(tirx.BufferStore(statement.buffer, value, list(statement.indices)))
    return allocations, parts


def with_roundings(machine: Machine, body: Stmt) -> Stmt:
    """``body`` with the code of the functions that :func:`divide_at_roundings` calls."""
    return tirx.AttrStmt(
        tirx.const(0, "int64"), "pragma_import_llvm", ir.StringImm(vector_rounding(machine.rounds_to_bf16)), body
    )
