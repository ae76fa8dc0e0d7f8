"""Dimensions: an int, or an integer expression over named symbols such as ``batch*197`` or ``(seq - 1)//2 + 1``.

Expressions are kept in a normal form, a polynomial with integer coefficients over symbols and irreducible calls
(``//``, ``%``, ``min``, ``max``), so that equal expressions compare equal and ``4*batch*49 == batch*196`` holds
without a solver.  Arithmetic that becomes constant returns a plain ``int``.
"""

from __future__ import annotations

import ast
import keyword
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial, reduce
from typing import Any, TypeAlias

from trimtab.errors import ParseError, TrimtabError, UsageError
from trimtab.ir.dtypes import DType

RESERVED_WORDS = frozenset({"true", "false", "none", "inf", "nan", "min", "max", *map(str, DType)})
"""Words with a meaning of their own in the text form, which no symbol may have as its name."""

# Real shapes have a few terms; without bounds a hostile text would make polynomials that fill the memory.
_MAX_TERMS = 256
_MAX_TEXT = 1000


@dataclass(frozen=True)
class Symbol:
    """A named dimension with an inclusive range; ``max=None`` means unbounded.

    Raises:
        UsageError: the name is no identifier or is reserved, or the range is empty or negative.
    """

    name: str
    min: int = 1
    max: int | None = None

    def __post_init__(self) -> None:
        problem = ""
        if not self.name.isidentifier() or keyword.iskeyword(self.name) or self.name in RESERVED_WORDS:
            known = ", ".join(sorted(RESERVED_WORDS))
            problem = f"a name is an identifier, and not a keyword of Python or one of {known}"
        elif self.min < 0 or (self.max is not None and self.max < self.min):
            problem = "a range is `min..max` or `min..`, with 0 <= min <= max"
        if problem:
            raise UsageError(
                "a dimension cannot have this name or range",
                values={"name": repr(self.name), "range": self.range_text},
                rule=problem,
            )

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
            # `-1//a` would read as `(-1)//a`, so a leading minus makes a product of a division too.
            in_product = sum(n for _, n in monomial) > 1 or abs(coefficient) != 1 or (coefficient < 0 and not text)
            factors = [_factor_text(atom, in_product) for atom, n in monomial for _ in range(n)]
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
    """``left // right``, rounding towards minus infinity. Raises :class:`UsageError` when ``right`` is 0."""
    _refuse_zero(left, right)
    if isinstance(right, int) and right < 0:
        left, right = -left, -right
    if right == 1:
        return left
    whole, rest = _divide(left, right)
    if rest == 0:
        return whole
    if isinstance(right, int):
        if isinstance(rest, int):
            return whole + rest // right
        # floor((g*r + c) / (g*m)) == floor((r + floor(c / g)) / m)
        common = math.gcd(right, *(coefficient for monomial, coefficient in rest.terms if monomial))
        if common > 1:
            return whole + floordiv(_from_terms((m, c // common) for m, c in rest.terms), right // common)
        inner = _sole_floordiv(rest)
        if inner is not None:
            # floor((floor(e / a) + c) / b) == floor((e + a*c) / (a*b))
            numerator, divisor, constant = inner
            return whole + floordiv(numerator + constant * divisor, divisor * right)
    return whole + _atom(Call("floordiv", (rest, right)))


def mod(left: Dim, right: Dim) -> Dim:
    """``left % right`` with the sign of ``right``. Raises :class:`UsageError` when ``right`` is 0."""
    _refuse_zero(left, right)
    _, rest = _divide(left, right)
    if rest == 0 or right in (1, -1):
        return 0
    if isinstance(rest, int) and isinstance(right, int):
        return rest % right
    return _atom(Call("mod", (rest, right)))


def dim_min(*args: Dim) -> Dim:
    """The smallest of ``args``; those that are never smaller than another are left out."""
    return _extremum("min", args)


def dim_max(*args: Dim) -> Dim:
    """The largest of ``args``; those that are never larger than another are left out."""
    return _extremum("max", args)


def product(dims: Iterable[Dim]) -> Dim:
    """The product of ``dims``; 1 when empty."""
    total: Dim = 1
    for dim in dims:
        total = total * dim
    return total


def evaluate(dim: Dim, bindings: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]] | None = None) -> Any:
    """The value of ``dim`` with symbols replaced by ``bindings`` (ints, other dims, or torch SymInts).

    ``functions`` overrides ``min`` and ``max`` for number types that need their own.

    Raises:
        UsageError: a symbol has no value, or the values make a divisor 0.
    """
    if isinstance(dim, int):
        return dim
    total: Any = 0
    for monomial, coefficient in dim.terms:
        term: Any = coefficient
        for atom, power in monomial:
            value = _lookup(atom, bindings) if isinstance(atom, Symbol) else _call(atom, bindings, functions)
            for _ in range(power):
                term = term * value
        total = total + term
    return total


@lru_cache(maxsize=1 << 16)
def bounds(dim: Dim) -> tuple[int, float]:
    """Numbers that ``dim`` never falls below nor exceeds (``inf`` when unbounded) over the symbols' ranges.

    Both are sound but need not be reached.  Interval arithmetic is tightened by measuring symbols from the ends of
    their ranges, so that ``batch*seq - batch >= 0`` is seen, and by ``e//k <= e/k``, so that ``n - n//2 >= 0`` is.
    """
    if isinstance(dim, int):
        return dim, dim
    low, high = _lower(dim, _SUBSTITUTIONS), -_lower(-dim, _SUBSTITUTIONS)
    return (int(low) if math.isfinite(low) else -(2**62)), high


def parse_dim(text: str, symbols: Mapping[str, Symbol]) -> Dim:
    """Read a dimension expression; ``symbols`` gives the ranges of the names in it.

    Raises:
        ParseError: not a dimension, an unknown symbol, a division by zero, or an absurdly long expression.
    """

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
            case ast.Call(func=ast.Name(id="min"), args=[_, *_] as args, keywords=[]):
                return dim_min(*map(build, args))
            case ast.Call(func=ast.Name(id="max"), args=[_, *_] as args, keywords=[]):
                return dim_max(*map(build, args))
        raise ParseError(
            "cannot read a dimension",
            values={"dimension": repr(text)},
            rule="a dimension uses integers, symbols, + - * // % min() and max()",
        )

    if len(text) > _MAX_TEXT:
        raise ParseError("a dimension is too long", values={"characters": len(text), "limit": _MAX_TEXT})
    try:
        return build(ast.parse(text.strip(), mode="eval").body)
    except ParseError:
        raise
    except TrimtabError as error:
        raise ParseError(error.what, values={**error.values, "dimension": repr(text)}, rule=error.rule) from error
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ParseError("cannot read a dimension", values={"dimension": repr(text)}, rule=str(error)) from error


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
    if len(collected) > _MAX_TERMS:
        raise UsageError("a dimension is too complex", values={"terms": len(collected), "limit": _MAX_TERMS})
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
        if not divisor:
            # An integer takes its multiple out of every coefficient; only constants leave a non-negative remainder.
            quotient = coefficient // scale if not monomial or coefficient * scale >= 0 else -(-coefficient // scale)
            whole.append((monomial, quotient))
            rest.append((monomial, coefficient - quotient * scale))
        elif divisible and coefficient % scale == 0:
            for atom, power in divisor:
                powers[atom] -= power
            left_over = tuple((atom, powers[atom]) for atom, _ in monomial if powers[atom])
            whole.append((left_over, coefficient // scale))
        else:
            rest.append((monomial, coefficient))
    return _from_terms(whole), _from_terms(rest)


def _refuse_zero(left: Dim, right: Dim) -> None:
    if isinstance(right, int) and right == 0:
        raise UsageError("a dimension divides by zero", values={"dividend": left})


def _sole_floordiv(dim: DimExpr) -> tuple[Dim, int, int] | None:
    """``(e, a, c)`` when ``dim`` is ``e//a + c`` with a positive integer a."""
    constant = sum(coefficient for monomial, coefficient in dim.terms if not monomial)
    rest = [(monomial, coefficient) for monomial, coefficient in dim.terms if monomial]
    if len(rest) == 1 and rest[0][1] == 1 and len(rest[0][0]) == 1:
        atom, power = rest[0][0][0]
        if power == 1 and isinstance(atom, Call) and atom.function == "floordiv":
            numerator, divisor = atom.args
            if isinstance(divisor, int) and divisor > 0:
                return numerator, divisor, constant
    return None


def _extremum(name: str, args: Iterable[Dim]) -> Dim:
    """``min`` or ``max`` of ``args``, nested ones flattened and those that never win left out."""
    candidates = sorted({leaf for arg in args for leaf in _leaves(name, arg)}, key=_extremum_order)
    if len(candidates) > _MAX_ARGUMENTS:
        raise UsageError("a dimension is too complex", values={"arguments": len(candidates), "limit": _MAX_ARGUMENTS})
    sign = 1 if name == "max" else -1
    kept = list(candidates)
    for arg in candidates:
        if any(other != arg and bounds(sign * (other - arg))[0] >= 0 for other in kept):
            kept.remove(arg)
    return kept[0] if len(kept) == 1 else _atom(Call(name, tuple(kept)))


def _leaves(name: str, dim: Dim) -> tuple[Dim, ...]:
    if isinstance(dim, DimExpr) and len(dim.terms) == 1:
        ((monomial, coefficient),) = dim.terms
        if coefficient == 1 and len(monomial) == 1 and monomial[0][1] == 1:
            atom = monomial[0][0]
            if isinstance(atom, Call) and atom.function == name:
                return atom.args
    return (dim,)


def _extremum_order(dim: Dim) -> tuple[bool, str]:
    return (not isinstance(dim, int), str(dim))


def _raw_extremum(name: str, *args: Dim) -> Dim:
    """Like :func:`_extremum` but without comparing arguments, for use while bounds are being computed."""
    numbers = [arg for arg in args if isinstance(arg, int)]
    if len(numbers) == len(args):
        return min(numbers) if name == "min" else max(numbers)
    return _atom(Call(name, args))


_RAW = {"min": partial(_raw_extremum, "min"), "max": partial(_raw_extremum, "max")}


def _lookup(symbol: Symbol, bindings: Mapping[str, Any]) -> Any:
    try:
        return bindings[symbol.name]
    except KeyError:
        raise UsageError(
            "a symbol has no value", values={"symbol": symbol, "known": sorted(bindings)}, fix="give it a value"
        ) from None


def _call(call: Call, bindings: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]] | None) -> Any:
    args = [evaluate(arg, bindings, functions) for arg in call.args]
    if call.function in ("floordiv", "mod"):
        if isinstance(args[1], int):
            _refuse_zero(args[0], args[1])
        return args[0] // args[1] if call.function == "floordiv" else args[0] % args[1]
    default: dict[str, Callable[..., Any]] = {"min": dim_min, "max": dim_max}
    return reduce((functions or default)[call.function], args)


_SUBSTITUTIONS = 3
_MAX_ARGUMENTS = 16


def _lower(dim: Dim, substitutions: int) -> float:
    """A number that ``dim`` never falls below; ``-inf`` when none is known."""
    if isinstance(dim, int):
        return dim
    symbols = symbols_of(dim)
    best = _interval(dim)[0]
    from_min = {s.name: s.min + symbol(s.name, 0, None if s.max is None else s.max - s.min) for s in symbols}
    from_max = {s.name: s.max - symbol(s.name, 0, s.max - s.min) for s in symbols if s.max is not None}
    for shifted in (from_min, from_min | from_max):
        best = max(best, _interval(evaluate(dim, shifted, _RAW))[0])
    if substitutions:
        for alternatives, divisor in _relaxations(dim):
            low = min(_lower(alternative, substitutions - 1) for alternative in alternatives)
            best = max(best, -(-low // divisor) if math.isfinite(low) else low)
    return best


def _relaxations(dim: DimExpr) -> Iterator[tuple[list[Dim], int]]:
    """Pairs ``(es, k)`` with ``min(es) / k <= dim`` everywhere, in which a call has been replaced by its bounds."""
    for monomial, coefficient in dim.terms:
        if len(monomial) != 1 or monomial[0][1] != 1 or not isinstance(call := monomial[0][0], Call):
            continue
        rest = dim - _atom(call) * coefficient
        if call.function in ("min", "max"):
            replaced = [rest + arg * coefficient for arg in call.args]
            if (call.function == "min") == (coefficient > 0):
                yield replaced, 1  # one of them is the value
            else:
                yield from (([each], 1) for each in replaced)  # each of them is a bound
        elif isinstance(divisor := call.args[1], int) and divisor > 0:
            numerator = call.args[0]
            if call.function == "floordiv":
                slack = 0 if coefficient < 0 else divisor - 1
                yield [rest * divisor + (numerator - slack) * coefficient], divisor
            elif coefficient < 0 and bounds(numerator)[0] >= 0:
                yield [rest + numerator * coefficient], 1


def _interval(dim: Dim) -> tuple[float, float]:
    """Bounds by interval arithmetic on the terms, as integers where finite."""
    if isinstance(dim, int):
        return dim, dim
    low: float = 0
    high: float = 0
    for monomial, coefficient in dim.terms:
        a: float = coefficient
        b: float = coefficient
        for atom, power in monomial:
            x, y = _atom_interval(atom)
            for _ in range(power):
                corners = [_times(a, x), _times(a, y), _times(b, x), _times(b, y)]
                a, b = min(corners), max(corners)
        low, high = low + a, high + b
    return low, high


def _atom_interval(atom: Atom) -> tuple[float, float]:
    if isinstance(atom, Symbol):
        return atom.min, math.inf if atom.max is None else atom.max
    ranges = [_interval(arg) for arg in atom.args]
    if atom.function == "min":
        return min(low for low, _ in ranges), min(high for _, high in ranges)
    if atom.function == "max":
        return max(low for low, _ in ranges), max(high for _, high in ranges)
    (low, high), (small, large) = ranges
    if small <= 0:
        return -math.inf, math.inf
    if atom.function == "mod":
        return 0, min(large - 1, high if low >= 0 else math.inf)
    return _quotient(low, small if low < 0 else large), _quotient(high, large if high < 0 else small)


def _quotient(dividend: float, divisor: float) -> float:
    """``dividend // divisor`` in the limit where either is infinite; ``divisor > 0``."""
    if math.isinf(dividend):
        return dividend
    return dividend // divisor if math.isfinite(divisor) else (-1 if dividend < 0 else 0)


def _times(left: float, right: float) -> float:
    return 0 if left == 0 or right == 0 else left * right


def _needs_brackets(dim: Dim) -> bool:
    return isinstance(dim, DimExpr) and (len(dim.terms) > 1 or as_symbol(dim) is None)


def _factor_text(atom: Atom, in_product: bool) -> str:
    # `a*b//c` would read as `(a*b)//c`, so a division inside a product keeps its own brackets.
    text = str(atom)
    return f"({text})" if in_product and isinstance(atom, Call) and atom.function in ("floordiv", "mod") else text
