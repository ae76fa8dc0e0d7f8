"""Patterns: what a rule looks for, written like the model that computes it.

A pattern is a small expression over variables.  Python operators and numbers mean what they mean on tensors, and
``op.<mnemonic>`` stands for every op of the IR::

    centred = x - op.mean(x, dims=axes, keepdim=True)
    centred / op.sqrt(op.mean(centred**2, dims=axes, keepdim=True) + eps)

An object that is used twice matches one value.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from types import EllipsisType
from typing import Any, TypeAlias, TypeVar

from trimtab.errors import UsageError
from trimtab.ir.core import Value
from trimtab.ir.op import Op, op_class
from trimtab.ir.ops import Add, Div, Matmul, Mul, Neg, Pow, Reciprocal, Rsqrt, Sqrt, Sub

Self = TypeVar("Self", bound="Pattern")


class Pattern:
    """Base of patterns: what a value must be."""

    bound_name: str = ""
    """Name under which the match holds the value; empty for none."""
    is_shared: bool = False
    """Whether the value may be read outside the match."""
    own_ops: int = 0
    """Ops that this pattern matches beside those of its children."""

    def bind(self: Self, name: str) -> Self:
        """The same pattern, whose value the match holds as ``name``."""
        named = copy.copy(self)
        named.bound_name = name
        return named

    def roots(self) -> frozenset[type[Op]] | None:
        """Classes of op whose result may match; None when any value may."""
        return None

    def children(self) -> tuple[Pattern, ...]:
        """The patterns directly inside this one."""
        return ()

    def __str__(self) -> str:
        return "any value"

    def __add__(self, other: Operand) -> Pattern:
        if isinstance(other, int | float):
            return PlusConstant(self, Number(other))
        return PlusConstant(self, other) if isinstance(other, Scalar) else OpPattern(Add, (self, other))

    def __radd__(self, other: float) -> Pattern:
        return self + other

    def __sub__(self, other: Operand) -> Pattern:
        return self + -other if isinstance(other, int | float) else OpPattern(Sub, (self, other))

    def __rsub__(self, other: float) -> Pattern:
        return OpPattern(Sub, (Number(other), self))

    def __mul__(self, other: Operand) -> Pattern:
        if isinstance(other, int | float):
            return TimesConstant(self, Number(other))
        if isinstance(other, Scalar):
            return TimesConstant(self, other)
        return OpPattern(Mul, (self, other))

    def __rmul__(self, other: float) -> Pattern:
        return self * other

    def __truediv__(self, other: Operand) -> Pattern:
        if isinstance(other, int | float):
            return TimesConstant(self, Number(1 / other))
        if isinstance(other, Scalar):
            return TimesConstant(self, other, inverse=True)
        return OpPattern(Div, (self, other), {"rounding": "none"})

    def __rtruediv__(self, other: float) -> Pattern:
        quotient = OpPattern(Div, (Number(other), self), {"rounding": "none"})
        return one_of(OpPattern(Reciprocal, (self,)), quotient) if other == 1 else quotient

    def __matmul__(self, other: Pattern) -> Pattern:
        return OpPattern(Matmul, (self, other))

    def __neg__(self) -> Pattern:
        return one_of(OpPattern(Neg, (self,)), TimesConstant(self, Number(-1)))

    def __pow__(self, power: float) -> Pattern:
        """A constant power, in the spellings that producers have for it."""
        spelled: list[Pattern] = [OpPattern(Pow, (self, Number(power)))]
        if power == 2:
            spelled.append(OpPattern(Mul, (self, self)))
        elif power == 3:
            spelled.append(OpPattern(Mul, (OpPattern(Mul, (self, self)), self)))
            spelled.append(OpPattern(Mul, (OpPattern(Pow, (self, Number(2))), self)))
        elif power == 0.5:
            spelled.append(OpPattern(Sqrt, (self,)))
        elif power == -0.5:
            spelled += [OpPattern(Rsqrt, (self,)), 1 / self**0.5]
        elif power == -1:
            spelled.append(1 / self)
        return one_of(*spelled)


Operand: TypeAlias = "Pattern | float"


class Variable(Pattern):
    """Something a rule's ``pattern`` takes as a parameter. Its class says what it may be."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __str__(self) -> str:
        return self.name


class Var(Variable):
    """Any value. Everywhere it stands it is the same value, or one that is computed equally."""


class Constant(Variable):
    """A weight, or a value filled with one number."""

    def __str__(self) -> str:
        return f"{self.name}, a constant"


class Scalar(Variable):
    """A constant of one element, held as a float."""

    def __str__(self) -> str:
        return f"{self.name}, a constant of one element"


class Attr:
    """An attribute of an op, held as it is. Not a value: it stands only where an attribute does."""

    def __init__(self, name: str) -> None:
        self.name = name


KINDS: dict[str, Callable[[str], Any]] = {kind.__name__: kind for kind in (Var, Constant, Scalar, Attr)}
"""Kinds of variables by the annotation that declares them."""


class Number(Pattern):
    """A constant of one element near ``value``."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __str__(self) -> str:
        return f"the constant {self.value:.9g}"


class Maybe(Pattern):
    """An optional operand that may be absent."""

    def __init__(self, inner: Pattern) -> None:
        self.inner = inner

    def children(self) -> tuple[Pattern, ...]:
        return (self.inner,)


class Repeated(Pattern):
    """All operands of a variadic group, each matching ``inner``."""

    def __init__(self, inner: Pattern) -> None:
        self.inner = inner

    def children(self) -> tuple[Pattern, ...]:
        return (self.inner,)


class OpPattern(Pattern):
    """A result of an op of class ``cls``.

    Attributes:
        operands: a pattern per declared operand; None where it must be absent.
        attributes: what is asked of attributes: a value, an :class:`Attr` or a predicate.
        result: which of several results; None for any.
    """

    own_ops = 1

    def __init__(
        self,
        cls: type[Op],
        operands: tuple[Pattern | tuple[Pattern, ...] | None, ...],
        attributes: dict[str, Any] | None = None,
        result: int | None = 0,
    ) -> None:
        self.cls = cls
        self.operands = operands
        self.attributes = attributes or {}
        self.result = result

    def __getitem__(self, result: int | EllipsisType) -> OpPattern:
        """The pattern of one result of an op that has several, or, with ``...``, of any of them."""
        return OpPattern(self.cls, self.operands, self.attributes, None if result is ... else result)

    def __str__(self) -> str:
        return self.cls.name

    def roots(self) -> frozenset[type[Op]] | None:
        return frozenset({self.cls})

    def children(self) -> tuple[Pattern, ...]:
        groups = (operand if isinstance(operand, tuple) else (operand,) for operand in self.operands)
        return tuple(pattern for group in groups for pattern in group if pattern is not None)


class TimesConstant(Pattern):
    """``x * c``, ``c * x`` or ``x / (1 / c)``; with ``inverse`` the variable holds the divisor."""

    own_ops = 1

    def __init__(self, x: Pattern, constant: Number | Scalar, inverse: bool = False) -> None:
        self.x = x
        self.constant = constant
        self.inverse = inverse

    def __str__(self) -> str:
        return f"a product with {self.constant}"

    def roots(self) -> frozenset[type[Op]] | None:
        return frozenset({Mul, Div})

    def children(self) -> tuple[Pattern, ...]:
        return (self.x,)


class PlusConstant(Pattern):
    """``x + c``, ``c + x`` or ``x - (-c)``."""

    own_ops = 1

    def __init__(self, x: Pattern, constant: Number | Scalar) -> None:
        self.x = x
        self.constant = constant

    def __str__(self) -> str:
        return f"a sum with {self.constant}"

    def roots(self) -> frozenset[type[Op]] | None:
        return frozenset({Add, Sub})

    def children(self) -> tuple[Pattern, ...]:
        return (self.x,)


class OneOf(Pattern):
    """Whichever of several patterns matches first."""

    def __init__(self, alternatives: tuple[Pattern, ...]) -> None:
        self.alternatives = alternatives
        self._roots = tuple(alternative.roots() for alternative in alternatives)

    def fitting(self, value: Value) -> tuple[Pattern, ...]:
        """The alternatives that the op which computes ``value`` can be the root of."""
        cls = type(value.producer)
        pairs = zip(self.alternatives, self._roots, strict=True)
        return tuple(alternative for alternative, roots in pairs if roots is None or cls in roots)

    def __str__(self) -> str:
        results = dict.fromkeys(str(p) for p in self.alternatives if isinstance(p, OpPattern))
        others = dict.fromkeys(str(p) for p in self.alternatives if not isinstance(p, OpPattern))
        return " or ".join([f"a result of {' or '.join(results)}"] * bool(results) + list(others))

    def roots(self) -> frozenset[type[Op]] | None:
        return _union(self.alternatives)

    def children(self) -> tuple[Pattern, ...]:
        return self.alternatives


class Product(Pattern):
    """A tree of multiplications, divisions by constants and negations with exactly these factors, in any order and
    grouping.

    The inner products must be read once.
    """

    def __init__(self, factors: tuple[Pattern, ...], constant: Number | Scalar) -> None:
        self.factors = factors
        self.constant = constant
        self.own_ops = len(factors) - 1

    def __str__(self) -> str:
        return f"a product of {len(self.factors)} factors and {self.constant}"

    def roots(self) -> frozenset[type[Op]] | None:
        return frozenset({Mul, Div, Neg}) if len(self.factors) > 1 else None

    def children(self) -> tuple[Pattern, ...]:
        return self.factors


class Scaled(Pattern):
    """``x`` multiplied and divided by any number of constants, perhaps none."""

    def __init__(self, x: Pattern, by: Scalar) -> None:
        self.x = x
        self.by = by

    def __str__(self) -> str:
        return f"{self.x}, perhaps scaled"

    def roots(self) -> frozenset[type[Op]] | None:
        inner = self.x.roots()
        return None if inner is None else inner | {Mul, Div}

    def children(self) -> tuple[Pattern, ...]:
        return (self.x,)


class _Ops:
    """``op.<mnemonic>(...)`` makes the pattern of an op."""

    def __getattr__(self, name: str) -> Callable[..., OpPattern]:
        cls = op_class(name)
        if cls is None:
            raise UsageError("a pattern names an unknown op", values={"op": name}, fix="see the IR reference")
        return lambda *operands, **attributes: _op_pattern(cls, operands, attributes)


op = _Ops()


def _op_pattern(cls: type[Op], given: tuple[Any, ...], named: dict[str, Any]) -> OpPattern:
    fields = cls.operand_fields
    if len(given) > len(fields):
        raise UsageError(
            f"the pattern of {cls.name} has too many operands",
            values={"operands": len(given), "declared": [field.name for field in fields]},
            fix="give attributes by name",
        )
    held = dict(zip((field.name for field in fields), given, strict=False))
    attributes: dict[str, Any] = {}
    for name, value in named.items():
        if name in held or name not in cls.field_order():
            raise UsageError(
                f"the pattern of {cls.name} has an unknown or repeated argument",
                values={"argument": name, "known": cls.field_order()},
            )
        target = attributes if name in cls.attribute_fields else held
        target[name] = value
    operands: list[Pattern | tuple[Pattern, ...] | None] = []
    for field in fields:
        operand = held.get(field.name)
        if operand is None and field.kind == "one":
            raise UsageError(f"the pattern of {cls.name} needs the operand {field.name}")
        if isinstance(operand, list | tuple):
            operands.append(tuple(map(as_pattern, operand)))
        else:
            operands.append(None if operand is None else as_pattern(operand))
    return OpPattern(cls, tuple(operands), attributes)


def as_pattern(operand: Any) -> Pattern:
    """``operand`` if it is a pattern, the constant if it is a number."""
    if isinstance(operand, Pattern):
        return operand
    if isinstance(operand, int | float):
        return Number(operand)
    raise UsageError("an operand of a pattern is neither a pattern nor a number", values={"operand": repr(operand)})


def maybe(pattern: Pattern) -> Pattern:
    """An optional operand, which may be absent; its variables are then None."""
    return Maybe(pattern)


def repeated(pattern: Pattern) -> Pattern:
    """Every operand of a variadic group. Variables inside hold lists."""
    return Repeated(pattern)


def shared(pattern: Self) -> Self:
    """A value that may also be read outside the match."""
    marked = copy.copy(pattern)
    marked.is_shared = True
    return marked


def one_of(*alternatives: Pattern) -> Pattern:
    """The first of ``alternatives`` that matches."""
    flat = tuple(p for a in alternatives for p in (a.alternatives if type(a) is OneOf and not a.bound_name else (a,)))
    return OneOf(flat)


def optional(pattern: OpPattern) -> Pattern:
    """The op, or directly what its first operand matches."""
    inner = pattern.children()[0]
    return OneOf((pattern, inner))


def product(*factors: Pattern, constant: float | Scalar = 1.0) -> Pattern:
    """The product of ``factors`` and a constant, however it is ordered and grouped."""
    return Product(factors, constant if isinstance(constant, Scalar) else Number(constant))


def scaled(pattern: Pattern, *, by: Scalar) -> Pattern:
    """``pattern`` times a constant factor, which may be missing (1.0)."""
    return Scaled(pattern, by)


def _union(patterns: tuple[Pattern, ...]) -> frozenset[type[Op]] | None:
    found: frozenset[type[Op]] = frozenset()
    for pattern in patterns:
        roots = pattern.roots()
        if roots is None:
            return None
        found |= roots
    return found


def count_ops(pattern: Pattern, seen: set[int] | None = None) -> int:
    """How many distinct ops a complete match of ``pattern`` has; of alternatives the longest counts."""
    seen = set() if seen is None else seen
    if id(pattern) in seen:
        return 0
    seen.add(id(pattern))
    if isinstance(pattern, OneOf):
        return max(count_ops(alternative, seen) for alternative in pattern.alternatives)
    return pattern.own_ops + sum(count_ops(child, seen) for child in pattern.children())


def bound_names(patterns: Iterable[Pattern], seen: set[int] | None = None) -> tuple[str, ...]:
    """The names that :meth:`Pattern.bind` gave inside ``patterns``."""
    seen = set() if seen is None else seen
    names: list[str] = []
    for pattern in patterns:
        if id(pattern) not in seen:
            seen.add(id(pattern))
            names += [pattern.bound_name] if pattern.bound_name else []
            names += bound_names(pattern.children(), seen)
    return tuple(names)
