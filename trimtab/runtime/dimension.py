"""Dimension expressions of a signature: ``batch``, ``length // 2``, ``4 * (n + 1)``.

A dimension is an integer, a symbol, or integer arithmetic over symbols with ``+ - * // %``, ``min()``, ``max()`` and
parentheses, kept as text in the manifest.  Text is checked when a manifest is read, so evaluation later can only fail
on a division by zero.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from functools import lru_cache

from trimtab.errors import ArtifactError

Dimension = int | str

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, Callable[..., int]] = {"min": min, "max": max}
MAX_TEXT = 1000
"""Characters of the longest expression that is read; evaluating one recurses into it."""


def symbols_of(dimension: Dimension) -> frozenset[str]:
    """Names of the symbols in a dimension; raises :class:`ArtifactError` if its text is not such an expression."""
    if isinstance(dimension, int):
        return frozenset()
    names = frozenset(node.id for node in ast.walk(_parse(dimension)) if isinstance(node, ast.Name))
    return names - _FUNCTIONS.keys()


def is_symbol(dimension: Dimension) -> bool:
    """Whether a dimension is one symbol and nothing else."""
    return isinstance(dimension, str) and dimension.isidentifier()


def evaluate(dimension: Dimension, symbols: Mapping[str, int]) -> int:
    """The value of a dimension; every symbol in it must have a value.

    Raises:
        ArtifactError: the expression divides by zero, or is malformed.
    """
    if isinstance(dimension, int):
        return dimension
    if dimension in symbols:
        return symbols[dimension]
    return _evaluate(_parse(dimension), symbols, dimension)


def _evaluate(node: ast.expr, symbols: Mapping[str, int], text: str) -> int:
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id=name):
            return symbols[name]
        case ast.UnaryOp(operand=operand):
            return -_evaluate(operand, symbols, text)
        case ast.BinOp(left=left, op=sign, right=right):
            try:
                return _OPERATORS[type(sign)](_evaluate(left, symbols, text), _evaluate(right, symbols, text))
            except ZeroDivisionError:
                raise ArtifactError(
                    "a dimension divides by zero", values={"dimension": text, **symbols}, rule="the manifest is wrong"
                ) from None
        case ast.Call(func=ast.Name(id=name), args=args):
            return _FUNCTIONS[name](*(_evaluate(arg, symbols, text) for arg in args))
    raise _malformed(text)


@lru_cache(maxsize=1024)
def _parse(text: str) -> ast.expr:
    if len(text) > MAX_TEXT:
        raise _malformed(text[:40] + "...")
    try:
        body = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _malformed(text) from None
    pending = [body]
    while pending:
        match pending.pop():
            case ast.Constant(value=value) if type(value) is int:
                pass
            case ast.Name():
                pass
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                pending.append(operand)
            case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATORS:
                pending += [left, right]
            case ast.Call(func=ast.Name(id=name), args=[_, _, *_] as args, keywords=[]) if name in _FUNCTIONS:
                pending += args
            case _:
                raise _malformed(text)
    return body


def _malformed(text: str) -> ArtifactError:
    return ArtifactError(
        "a dimension cannot be read",
        values={"dimension": repr(text)},
        rule="a dimension is an integer, a symbol, or + - * // % min() max() over them",
        fix="compile the model again: its manifest is damaged",
    )
