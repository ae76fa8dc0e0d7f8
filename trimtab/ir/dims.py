"""Dimensions: an int, or an integer expression over named symbols such as ``batch*197`` or ``(seq - 1)//2 + 1``.

Expressions are kept in a normal form, a polynomial with integer coefficients over symbols and irreducible calls
(``//``, ``%``, ``min``, ``max``), so that equal expressions compare equal and ``4*batch*49 == batch*196`` holds
without a solver.  Arithmetic that becomes constant returns a plain ``int``.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeAlias

from trimtab.errors import ParseError


@dataclass(frozen=True)
class Symbol:
    """A named dimension with an inclusive range; ``max=None`` means unbounded."""

    name: str
    min: int = 1
    max: int | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def range_text(self) -> str:
        return f"{self.min}..{'' if self.max is None else self.max}"


@dataclass(frozen=True)
class Call:
    """An irreducible integer function of dimensions: ``floordiv``, ``mod``, ``min`` or ``max``."""

    function: str
    args: tuple[Dim, ...]

    def __str__(self) -> str:
        if self.function in ("floordiv", "mod"):
            left, right = (f"({arg})" if _needs_brackets(arg) else str(arg) for arg in self.args)
            return f"{left}{'//' if self.function == 'floordiv' else '%'}{right}"
        return f"{self.function}({', '.join(map(str, self.args))})"


Atom: TypeAlias = Symbol | Call
Monomial: TypeAlias = tuple[tuple[Atom, int], ...]


class DimExpr:
    """A non-constant dimension in normal form. Immutable and hashable; build one with :func:`symbol` and arithmetic."""

    __slots__ = ("_hash", "terms")
    terms: tuple[tuple[Monomial, int], ...]

    def __init__(self, terms: tuple[tuple[Monomial, int], ...]) -> None:
        self.terms = terms
        self._hash = hash(terms)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DimExpr) and self.terms == other.terms

    def __repr__(self) -> str:
        return f"Dim({self})"

    def __str__(self) -> str:
        text = ""
        for monomial, coefficient in self.terms:
            sign = "-" if coefficient < 0 else "+"
            factors = [
                _factor_text(atom, len(monomial) > 1 or abs(coefficient) != 1) for atom, n in monomial for _ in range(n)
            ]
            if abs(coefficient) != 1 or not factors:
                factors.insert(0, str(abs(coefficient)))
            text += (f" {sign} " if text else "-" if coefficient < 0 else "") + "*".join(factors)
        return text

    def __add__(self, other: Dim) -> Dim:
        return _from_terms((*self.terms, *_terms(other)))

    __radd__ = __add__

    def __neg__(self) -> Dim:
        return self * -1

    def __sub__(self, other: Dim) -> Dim:
        return self + other * -1

    def __rsub__(self, other: Dim) -> Dim:
        return -self + other

    def __mul__(self, other: Dim) -> Dim:
        return _from_terms((_multiply(left, right), a * b) for left, a in self.terms for right, b in _terms(other))

    __rmul__ = __mul__

    def __floordiv__(self, other: Dim) -> Dim:
        return floordiv(self, other)

    def __rfloordiv__(self, other: Dim) -> Dim:
        return floordiv(other, self)

    def __mod__(self, other: Dim) -> Dim:
        return mod(self, other)

    def __rmod__(self, other: Dim) -> Dim:
        return mod(other, self)


Dim: TypeAlias = int | DimExpr


def symbol(name: str, min: int = 1, max: int | None = None) -> DimExpr:
    """A dimension that is the named symbol alone."""
    return _atom(Symbol(name, min, max))


def as_symbol(dim: Dim) -> Symbol | None:
    """The symbol that ``dim`` is, or None when it is an int or a compound expression."""
    if isinstance(dim, DimExpr) and len(dim.terms) == 1:
        ((monomial, coefficient),) = dim.terms
        if coefficient == 1 and len(monomial) == 1 and monomial[0][1] == 1 and isinstance(monomial[0][0], Symbol):
            return monomial[0][0]
    return None


def symbols_of(dim: Dim) -> frozenset[Symbol]:
    """All symbols that occur in ``dim``."""
    if isinstance(dim, int):
        return frozenset()
    found: set[Symbol] = set()
    for monomial, _ in dim.terms:
        for atom, _ in monomial:
            if isinstance(atom, Symbol):
                found.add(atom)
            else:
                for arg in atom.args:
                    found |= symbols_of(arg)
    return frozenset(found)


def floordiv(left: Dim, right: Dim) -> Dim:
    """``left // right``, rounding towards minus infinity."""
    if right == 1:
        return left
    if isinstance(left, int) and isinstance(right, int):
        return left // right
    whole, rest = _divide(left, right)
    if rest == 0 or (isinstance(rest, int) and isinstance(right, int) and 0 <= rest < right):
        return whole
    return whole + _atom(Call("floordiv", (rest, right)))


def mod(left: Dim, right: Dim) -> Dim:
    """``left % right`` with the sign of ``right``."""
    if isinstance(left, int) and isinstance(right, int):
        return left % right
    _, rest = _divide(left, right)
    if isinstance(rest, int) and isinstance(right, int):
        return rest % right
    return _atom(Call("mod", (rest, right)))


def dim_min(*args: Dim) -> Dim:
    return _extremum("min", args)


def dim_max(*args: Dim) -> Dim:
    return _extremum("max", args)


def product(dims: Iterable[Dim]) -> Dim:
    """The product of ``dims``; 1 when empty."""
    return reduce(lambda left, right: left * right, dims, 1)


def evaluate(dim: Dim, bindings: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]] | None = None) -> Any:
    """The value of ``dim`` with symbols replaced by ``bindings`` (ints, other dims, or torch SymInts).

    ``functions`` overrides ``min`` and ``max`` for number types that need their own.
    """
    if isinstance(dim, int):
        return dim
    total: Any = 0
    for monomial, coefficient in dim.terms:
        term: Any = coefficient
        for atom, power in monomial:
            value = bindings[atom.name] if isinstance(atom, Symbol) else _call(atom, bindings, functions)
            for _ in range(power):
                term = term * value
        total = total + term
    return total


def bounds(dim: Dim) -> tuple[int, float]:
    """Smallest and largest value (``inf`` when unbounded) over the symbols' ranges, by interval arithmetic."""
    if isinstance(dim, int):
        return dim, dim
    low, high = 0.0, 0.0
    for monomial, coefficient in dim.terms:
        a, b = 1.0, 1.0
        for atom, power in monomial:
            x, y = _atom_bounds(atom)
            for _ in range(power):
                corners = [_times(a, x), _times(a, y), _times(b, x), _times(b, y)]
                a, b = min(corners), max(corners)
        first, second = _times(a, coefficient), _times(b, coefficient)
        low, high = low + min(first, second), high + max(first, second)
    return (int(low) if math.isfinite(low) else -(2**62)), high


def parse_dim(text: str, symbols: Mapping[str, Symbol]) -> Dim:
    """Read a dimension expression; ``symbols`` gives the ranges of the names in it."""

    def build(node: ast.expr) -> Dim:
        match node:
            case ast.Constant(value=int(value)) if not isinstance(value, bool):
                return value
            case ast.Name(id=name) if name in symbols:
                return _atom(symbols[name])
            case ast.Name(id=name):
                raise ParseError(
                    "unknown symbol in a dimension",
                    values={"symbol": name, "dimension": repr(text)},
                    rule="every symbol is declared with its range in the module's symbols line",
                    fix="declare it, e.g. `symbols batch=1..64`",
                )
            case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _OPERATORS:
                return _OPERATORS[type(operator)](build(left), build(right))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return build(operand) * -1
            case ast.Call(func=ast.Name(id="min"), args=args):
                return dim_min(*map(build, args))
            case ast.Call(func=ast.Name(id="max"), args=args):
                return dim_max(*map(build, args))
        raise ParseError(
            "cannot read a dimension",
            values={"dimension": repr(text)},
            rule="a dimension uses integers, symbols, + - * // % min() and max()",
        )

    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ParseError("cannot read a dimension", values={"dimension": repr(text)}, rule=str(error)) from error
    return build(tree.body)


_OPERATORS: dict[type[ast.operator], Callable[[Dim, Dim], Dim]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: floordiv,
    ast.Mod: mod,
}


def _atom(atom: Atom) -> DimExpr:
    return DimExpr(((((atom, 1),), 1),))


def _terms(dim: Dim) -> tuple[tuple[Monomial, int], ...]:
    if isinstance(dim, int):
        return (((), dim),) if dim else ()
    return dim.terms


def _order(monomial: Monomial) -> tuple[int, str]:
    return (-sum(power for _, power in monomial), "*".join(f"{atom}^{power}" for atom, power in monomial))


def _from_terms(terms: Iterable[tuple[Monomial, int]]) -> Dim:
    collected: dict[Monomial, int] = {}
    for monomial, coefficient in terms:
        collected[monomial] = collected.get(monomial, 0) + coefficient
    kept = sorted(((m, c) for m, c in collected.items() if c), key=lambda term: _order(term[0]))
    if not kept:
        return 0
    if len(kept) == 1 and not kept[0][0]:
        return kept[0][1]
    return DimExpr(tuple(kept))


def _multiply(left: Monomial, right: Monomial) -> Monomial:
    powers = dict(left)
    for atom, power in right:
        powers[atom] = powers.get(atom, 0) + power
    return tuple(sorted(powers.items(), key=lambda item: str(item[0])))


def _divide(left: Dim, right: Dim) -> tuple[Dim, Dim]:
    """Quotient and remainder that hold for all symbol values: the terms ``right`` divides, and the rest."""
    if left == right:
        return 1, 0
    divisor_terms = _terms(right)
    if len(divisor_terms) != 1:
        return 0, left
    ((divisor, scale),) = divisor_terms
    whole: list[tuple[Monomial, int]] = []
    rest: list[tuple[Monomial, int]] = []
    for monomial, coefficient in _terms(left):
        powers = dict(monomial)
        divisible = all(powers.get(atom, 0) >= power for atom, power in divisor)
        if divisible and not divisor:
            # An integer divisor may also take the multiple out of a constant or a coefficient it does not divide.
            quotient, remainder = (
                divmod(coefficient, scale) if not monomial or coefficient % scale == 0 else (0, coefficient)
            )
            whole.append((monomial, quotient))
            rest.append((monomial, remainder))
        elif divisible and coefficient % scale == 0:
            for atom, power in divisor:
                powers[atom] -= power
            left_over = tuple((atom, powers[atom]) for atom, _ in monomial if powers[atom])
            whole.append((left_over, coefficient // scale))
        else:
            rest.append((monomial, coefficient))
    return _from_terms(whole), _from_terms(rest)


def _extremum(name: str, args: tuple[Dim, ...]) -> Dim:
    pick = min if name == "min" else max
    constants = [arg for arg in args if isinstance(arg, int)]
    others = sorted({arg for arg in args if not isinstance(arg, int)}, key=str)
    if constants:
        best = pick(constants)
        lows_highs = [bounds(arg) for arg in others]
        if name == "max":
            others = [arg for arg, (_, high) in zip(others, lows_highs, strict=True) if high > best]
            decided = any(low >= best for low, _ in lows_highs)
        else:
            others = [arg for arg, (low, _) in zip(others, lows_highs, strict=True) if low < best]
            decided = any(high <= best for _, high in lows_highs)
        if not decided:
            others = [best, *others]
    if len(others) == 1:
        return others[0]
    return _atom(Call(name, tuple(others)))


def _call(call: Call, bindings: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]] | None) -> Any:
    args = [evaluate(arg, bindings, functions) for arg in call.args]
    if call.function == "floordiv":
        return args[0] // args[1]
    if call.function == "mod":
        return args[0] % args[1]
    default: dict[str, Callable[..., Any]] = {"min": dim_min, "max": dim_max}
    return reduce((functions or default)[call.function], args)


def _atom_bounds(atom: Atom) -> tuple[float, float]:
    if isinstance(atom, Symbol):
        return atom.min, math.inf if atom.max is None else atom.max
    ranges = [bounds(arg) for arg in atom.args]
    if atom.function == "min":
        return min(low for low, _ in ranges), min(high for _, high in ranges)
    if atom.function == "max":
        return max(low for low, _ in ranges), max(high for _, high in ranges)
    (low, high), (small, large) = ranges
    if small <= 0:
        return -math.inf, math.inf
    if atom.function == "mod":
        return 0, large - 1
    return min(low // small, low // large if math.isfinite(large) else (-1 if low < 0 else 0)), (
        high // small if math.isfinite(high) else math.inf
    )


def _times(left: float, right: float) -> float:
    return 0.0 if left == 0 or right == 0 else left * right


def _needs_brackets(dim: Dim) -> bool:
    return isinstance(dim, DimExpr) and (len(dim.terms) > 1 or as_symbol(dim) is None)


def _factor_text(atom: Atom, in_product: bool) -> str:
    # `a*b//c` would read as `(a*b)//c`, so a division inside a product keeps its own brackets.
    text = str(atom)
    return f"({text})" if in_product and isinstance(atom, Call) and atom.function in ("floordiv", "mod") else text
