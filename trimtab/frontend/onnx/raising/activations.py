"""GELU, in its erf and tanh forms, and SiLU."""

from __future__ import annotations

import math

from trimtab.frontend.onnx.raising.matching import Site, close, either_way, plus_constant, produced_by, read_once, same
from trimtab.ir.core import Value
from trimtab.ir.ops import Add, Div, Erf, Gelu, Mul, Pow, Sigmoid, Silu, Tanh

MAX_TERMS = 8


def raise_silu(op: Mul, site: Site) -> Value | None:
    """``x * sigmoid(x)``"""
    for x, gate in either_way(op):
        sigmoid = produced_by(gate, Sigmoid)
        if sigmoid is not None and sigmoid.x is x:
            return site.insert(Silu(x))
    return None


def raise_gelu(op: Mul | Div, site: Site) -> Value | None:
    """``0.5 * x * (1 + erf(x / sqrt 2))`` or ``0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))``.

    The factors may come in any order and grouping.
    """
    constant, factors = _product(op.result, site)
    if len(factors) != 2 or not close(constant, 0.5, op.result.type.dtype):
        return None
    for x, gate in (factors, factors[::-1]):
        shifted = plus_constant(gate, site)
        if shifted is None or shifted[1] != 1.0 or x.type != op.result.type:
            continue
        erf, tanh = produced_by(shifted[0], Erf), produced_by(shifted[0], Tanh)
        inner = erf or tanh
        terms = _polynomial(inner.x, x, site) if inner is not None else None
        if terms is None:
            continue
        dtype = x.type.dtype
        if erf is not None and set(terms) == {1} and close(terms[1], math.sqrt(0.5), dtype):
            return site.insert(Gelu(x))
        slope = math.sqrt(2 / math.pi)
        wanted = {1: slope, 3: slope * 0.044715}
        if tanh is not None and set(terms) == {1, 3} and all(close(terms[n], wanted[n], dtype) for n in wanted):
            return site.insert(Gelu(x, approximate="tanh"))
    return None


def _product(value: Value, site: Site) -> tuple[float, list[Value]]:
    """``value`` as a constant times factors. Looks through products that nothing else reads."""
    constant = 1.0
    factors: list[Value] = []
    waiting = [value]
    while waiting and len(factors) < MAX_TERMS:
        current = waiting.pop()
        scalar = site.scalar(current)
        product, quotient = produced_by(current, Mul), produced_by(current, Div)
        inside = current is value or read_once(current)
        if scalar is not None:
            constant *= scalar
        elif product is not None and inside:
            waiting.extend((product.y, product.x))
        elif quotient is not None and inside and (divisor := site.scalar(quotient.y)):
            constant /= divisor
            waiting.append(quotient.x)
        else:
            factors.append(current)
    return constant, factors + waiting


def _polynomial(value: Value, x: Value, site: Site, depth: int = 0) -> dict[int, float] | None:
    """``value`` as a polynomial in ``x``: coefficients by power; None when it is none, or one of a high degree."""
    if same(value, x):
        return {1: 1.0}
    scalar = site.scalar(value)
    if scalar is not None:
        return {0: scalar}
    op = value.producer
    if depth > MAX_TERMS or not isinstance(op, Add | Mul | Div | Pow):
        return None
    left = _polynomial(op.x, x, site, depth + 1)
    if left is None:
        return None
    if isinstance(op, Pow):
        power = site.scalar(op.y)
        if power not in (1.0, 2.0, 3.0):
            return None
        total = left
        for _ in range(int(power) - 1):
            total = _times(total, left)
        return total
    right = _polynomial(op.y, x, site, depth + 1)
    if right is None:
        return None
    if isinstance(op, Add):
        return {power: left.get(power, 0.0) + right.get(power, 0.0) for power in left | right}
    if isinstance(op, Div):
        return {p: c / right[0] for p, c in left.items()} if set(right) == {0} and right[0] else None
    return _times(left, right)


def _times(left: dict[int, float], right: dict[int, float]) -> dict[int, float]:
    total: dict[int, float] = {}
    for a, x in left.items():
        for b, y in right.items():
            total[a + b] = total.get(a + b, 0.0) + x * y
    return total
