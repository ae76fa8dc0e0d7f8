"""Dimensions: arithmetic against plain integers, sound bounds, text that reads back, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import ParseError, UsageError
from trimtab.ir.dims import (
    Dim,
    Symbol,
    as_symbol,
    bounds,
    dim_max,
    dim_min,
    evaluate,
    floordiv,
    mod,
    parse_dim,
    product,
    symbol,
    symbols_of,
)

A, B, C = symbol("a", 1, 40), symbol("b", 0, 7), symbol("c", 3)
SYMBOLS = {"a": Symbol("a", 1, 40), "b": Symbol("b", 0, 7), "c": Symbol("c", 3)}
VALUES = st.fixed_dictionaries({"a": st.integers(1, 40), "b": st.integers(0, 7), "c": st.integers(3, 500)})


class Both:
    """An expression built twice: as a dimension, and as a function of the symbols' values on plain integers."""

    def __init__(self, dim: Dim, number: Any) -> None:
        self.dim = dim
        self.number = number

    def __repr__(self) -> str:
        return str(self.dim)


LEAVES = st.one_of(
    st.integers(-9, 30).map(lambda n: Both(n, lambda v: n)),
    st.sampled_from("abc").map(lambda name: Both({"a": A, "b": B, "c": C}[name], lambda v: v[name])),
)


def _combine(children: st.SearchStrategy[Both]) -> st.SearchStrategy[Both]:
    divisors = st.integers(-7, 9).filter(bool)
    pairs = st.tuples(children, children)
    return st.one_of(
        pairs.map(lambda p: Both(p[0].dim + p[1].dim, lambda v: p[0].number(v) + p[1].number(v))),
        pairs.map(lambda p: Both(p[0].dim - p[1].dim, lambda v: p[0].number(v) - p[1].number(v))),
        pairs.map(lambda p: Both(p[0].dim * p[1].dim, lambda v: p[0].number(v) * p[1].number(v))),
        pairs.map(lambda p: Both(dim_min(p[0].dim, p[1].dim), lambda v: min(p[0].number(v), p[1].number(v)))),
        pairs.map(lambda p: Both(dim_max(p[0].dim, p[1].dim), lambda v: max(p[0].number(v), p[1].number(v)))),
        st.tuples(children, divisors).map(lambda p: Both(floordiv(p[0].dim, p[1]), lambda v: p[0].number(v) // p[1])),
        st.tuples(children, divisors).map(lambda p: Both(mod(p[0].dim, p[1]), lambda v: p[0].number(v) % p[1])),
        # A symbolic divisor: a and c are never 0.
        children.map(lambda p: Both(floordiv(p.dim, A), lambda v: p.number(v) // v["a"])),
        children.map(lambda p: Both(mod(p.dim, A * C), lambda v: p.number(v) % (v["a"] * v["c"]))),
    )


EXPRESSIONS = st.recursive(LEAVES, _combine, max_leaves=6)


@given(EXPRESSIONS, VALUES)
@settings(max_examples=600)
def test_arithmetic_agrees_with_integers(expression: Both, values: dict[str, int]) -> None:
    assert evaluate(expression.dim, values) == expression.number(values)


@given(EXPRESSIONS, VALUES)
@settings(max_examples=600)
def test_bounds_hold_for_every_value(expression: Both, values: dict[str, int]) -> None:
    low, high = bounds(expression.dim)
    assert low <= expression.number(values) <= high


@given(EXPRESSIONS)
@settings(max_examples=400)
def test_text_reads_back(expression: Both) -> None:
    assert parse_dim(str(expression.dim), SYMBOLS) == expression.dim


@given(EXPRESSIONS, EXPRESSIONS)
@settings(max_examples=100)
def test_equal_dimensions_hash_alike(left: Both, right: Both) -> None:
    assert left.dim + right.dim == right.dim + left.dim
    assert hash(left.dim * right.dim) == hash(right.dim * left.dim)
    assert left.dim - left.dim == 0


@given(EXPRESSIONS, VALUES)
@settings(max_examples=100)
def test_evaluation_on_part_of_the_symbols_leaves_the_others(expression: Both, values: dict[str, int]) -> None:
    partly = evaluate(expression.dim, {"a": values["a"], "b": B, "c": C})
    assert evaluate(partly, values) == expression.number(values)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (4 * A * 49, A * 196),
        ((A * 32) // 32, A),
        ((A * C) // A, C),
        (floordiv(C - 1, 2) + 1, floordiv(C + 1, 2)),
        ((6 * A + 3) // 3, 2 * A + 1),
        ((2 * A) // 4, A // 2),
        ((A // 2) // 3, A // 6),
        ((((C - 10) // 5 + 1) - 3) // 2 + 1, (C - 10) // 10),
        ((A * 8) % 8, 0),
        ((A * 8 + 3) % 8, 3),
        (dim_max(A, 1), A),
        (dim_min(A, 40), A),
        (dim_max(A, A + 1, C), dim_max(C, A + 1)),
        (dim_min(dim_min(A, B), C), dim_min(A, dim_min(B, C))),
        (product([A, 2, C]), C * A * 2),
        (product([]), 1),
    ],
)
def test_normal_forms_are_equal(left: Dim, right: Dim) -> None:
    assert left == right


@pytest.mark.parametrize(
    ("dim", "low", "high"),
    [
        (7, 7, 7),
        (A, 1, 40),
        (A - A // 2, 1, 20),
        (A * C - A, 2, float("inf")),
        (40 - A, 0, 39),
        (A - dim_min(A, 5), 0, 35),
        (dim_max(A, 5) - A, 0, 4),
        (A % 8, 0, 7),
        (B % 9, 0, 7),
        ((A - 41) // 4, -10, -1),
    ],
)
def test_bounds_are_tight_where_shapes_need_it(dim: Dim, low: int, high: float) -> None:
    assert bounds(dim) == (low, high)


@pytest.mark.parametrize(
    ("dim", "text"),
    [
        (A * 197 + 1, "197*a + 1"),
        ((C - 1) // 2 + 1, "(c + 1)//2"),
        (A - C, "a - c"),
        (-A, "-a"),
        (2 * (A // 3), "2*(a//3)"),
        (A * C // 7, "(a*c)//7"),
        (dim_max(A, 5), "max(5, a)"),
        ((A + 1) % 4, "(a + 1)%4"),
    ],
)
def test_text_is_what_people_would_write(dim: Dim, text: str) -> None:
    assert str(dim) == text


def test_symbols_are_found_everywhere() -> None:
    assert symbols_of(A + (B * 3) // C) == {SYMBOLS["a"], SYMBOLS["b"], SYMBOLS["c"]}
    assert symbols_of(5) == frozenset()
    assert as_symbol(A) == SYMBOLS["a"]
    assert as_symbol(A + 1) is None
    assert as_symbol(2 * A) is None
    assert as_symbol(A * A) is None
    assert as_symbol(3) is None


@pytest.mark.parametrize(
    "text",
    [
        "", "1 +", "d", "a.b", "a[1]", "a**2", "1.5", "a/2", "f(a)", "min()", "True", "a if a else b", "1//0", "a % 0",
        "(" * 500 + ")" * 500, "+".join("1" * 900), "9" * 5000, "\0", "a,b", "lambda: 1", '"a"',
        "(a+b+c+1)*" * 60 + "1", "max(" + ",".join(f"a+{i}*b" for i in range(80)) + ")", "*a", "min(*a)", "min(a=1)",
    ],
)  # fmt: skip
def test_bad_text_is_refused(text: str) -> None:
    with pytest.raises(ParseError):
        parse_dim(text, SYMBOLS)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("", 1, None), ("2x", 1, None), ("a b", 1, None), ("if", 1, None), ("f32", 1, None), ("min", 1, None),
     ("a", -1, None), ("a", 5, 4)],
)  # fmt: skip
def test_bad_symbols_are_refused(name: str, low: int, high: int | None) -> None:
    with pytest.raises(UsageError, match="cannot have this name or range"):
        Symbol(name, low, high)


def test_division_by_zero_and_missing_values_are_usage_errors() -> None:
    for divide in (floordiv, mod):
        with pytest.raises(UsageError, match="divides by zero"):
            divide(A, 0)
        with pytest.raises(UsageError, match="divides by zero"):
            divide(3, 0)
        with pytest.raises(UsageError, match="divides by zero"):
            evaluate(divide(C, B), {"b": 0, "c": 3})
    with pytest.raises(UsageError, match="a symbol has no value: symbol=c"):
        evaluate(A + C, {"a": 1})
