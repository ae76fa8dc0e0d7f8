"""Options of passes: the fields of their dataclasses, as text such as ``{bits=8, mode=fast}`` and back.

A value is an int, a float, ``true``, ``false``, ``none``, a word, a "quoted string", or ``[a list]``.  The text has no
types of its own: a value must be of the type the field declares.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import typing
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from trimtab.errors import TrimtabError, UsageError

if TYPE_CHECKING:
    from trimtab.passes.base import Pass

P = TypeVar("P", bound="Pass")

WORD = re.compile(r"[A-Za-z_][\w.-]*")
_CONSTANTS: Mapping[str, Any] = {
    "true": True, "false": False, "none": None, "inf": math.inf, "-inf": -math.inf, "nan": math.nan,
}  # fmt: skip


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``did you mean `x``` for the nearest known word, else "" """
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean `{near[0]}`" if near else ""


def read_value(text: str) -> Any:
    """The value of an option's text outside brackets: a constant, a number, or a word as a string."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if text.startswith('"'):
        return json.loads(text)
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def print_value(value: Any) -> str:
    """The text of an option's value; reading it gives the value back."""
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(print_value, value)) + "]"
    if isinstance(value, str):
        return value if WORD.fullmatch(value) and read_value(value) == value else json.dumps(value)
    for text, constant in _CONSTANTS.items():
        if value is constant or (isinstance(value, float) and isinstance(constant, float) and repr(value) == text):
            return text
    return repr(value)


def print_options(pass_: Pass) -> str:
    """``{name=value, ...}`` with the options that are not at their default, or ""."""
    shown = [
        f"{field.name}={print_value(value)}"
        for field in dataclasses.fields(pass_)
        if (value := getattr(pass_, field.name)) != _default(field)
    ]
    return "{" + ", ".join(shown) + "}" if shown else ""


def describe_options(cls: type[Pass]) -> list[dict[str, Any]]:
    """Name, type and default of each option, as text."""
    hints = typing.get_type_hints(cls)
    return [
        {
            "name": field.name,
            "type": _type_text(hints[field.name]),
            "default": None if _default(field) is dataclasses.MISSING else print_value(_default(field)),
        }
        for field in dataclasses.fields(cls)
    ]


def build_pass(cls: type[P], options: Mapping[str, Any]) -> P:
    """The pass with these options.

    Raises:
        UsageError: an option is unknown, missing or of the wrong type.
    """
    from trimtab.ir.attributes import check_attribute

    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    checked = {}
    for name, value in options.items():
        if name not in fields:
            raise UsageError(
                f"the pass {cls.name} has no option {name}",
                values={"options": ", ".join(fields) or "none"},
                fix=did_you_mean(name, fields),
            )
        try:
            checked[name] = check_attribute(cls.name, name, hints[name], value)
        except UsageError as error:
            raise UsageError(
                f"the pass {cls.name} got a wrong option",
                values={name: print_value(value)},
                rule=f"{name} is {_type_text(hints[name])}",
                fix=f"for example {name}={print_value(_default(fields[name]))}"
                if _default(fields[name]) is not dataclasses.MISSING
                else "",
            ) from error
    missing = [name for name, field in fields.items() if name not in checked and _default(field) is dataclasses.MISSING]
    if missing:
        raise UsageError(
            f"the pass {cls.name} needs the option {missing[0]}", fix=f"write {cls.name}{{{missing[0]}=...}}"
        )
    try:
        return cls(**checked)
    except TrimtabError:
        raise
    except (ValueError, TypeError) as error:  # from the pass's own __post_init__
        raise UsageError(
            f"the pass {cls.name} does not accept its options",
            values={name: print_value(value) for name, value in checked.items()},
            rule=str(error),
        ) from error


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _type_text(declared: Any) -> str:
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a word or quoted string",
             type(None): "none"}  # fmt: skip
    if declared in names:
        return names[declared]
    origin, args = typing.get_origin(declared), typing.get_args(declared)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(print_value, args))
    if origin is tuple:
        return f"a list of {_type_text(args[0])}" if Ellipsis in args else f"a list of {len(args)} values"
    return " or ".join(map(_type_text, args)) if args else str(getattr(declared, "__name__", declared))
