"""Division of many numbers by one, with the result of an IEEE division and without dividing each element.

A vector division takes as long as ten multiplications. With the reciprocal r of y, rounded to nearest, a quotient q
that is off by at most one unit in the last place becomes the correctly rounded one by ``q + r (x - q y)`` in fused
arithmetic (P. Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990). The
product x r may be off by two, so the step is made twice.
"""

from __future__ import annotations

from tvm import tirx

from trimtab.backends.tvm.codegen.expression import Expr, let
from trimtab.backends.tvm.codegen.machine import Machine

_LARGEST = 2.0**64
"""Quotients beyond this, infinite or not a number, are left as x r gives them: the steps would make NaN of infinity."""


def divided_by_one(x: Expr, y: Expr, machine: Machine) -> Expr:
    """``x / y`` in float32, for a y that all elements are divided by.

    It is the IEEE quotient where 2^-64 < y < 2^64 and the quotient is smaller than 2^64 and not denormal. Larger ones
    are off by two units in the last place at most. For another y it is x times the rounded reciprocal.
    """
    if not machine.has_fma:
        return x / y

    def stepped(q: Expr, r: Expr) -> Expr:
        return _fma(_fma(-q, y, x), r, q)

    def corrected(q: Expr, r: Expr) -> Expr:
        # Named, because TVM takes a select between calls for a branch, and does not vectorise it.
        exact = let(stepped(q, r), lambda once: stepped(once, r), "q")
        return let(exact, lambda e: tirx.Select(tirx.abs(q) < largest, e, q), "q")

    one, largest = tirx.const(1.0, "float32"), tirx.const(_LARGEST, "float32")
    return let(one / y, lambda r: let(x * r, lambda q: corrected(q, r), "q"), "r")


def _fma(a: Expr, b: Expr, c: Expr) -> Expr:
    """``a b + c``, rounded once."""
    return tirx.call_llvm_pure_intrin("float32", "llvm.fma", a, b, c)
