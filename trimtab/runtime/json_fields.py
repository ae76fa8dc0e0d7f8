"""Decode JSON values into dataclasses by their annotations, naming the field that does not fit."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from typing import Any, TypeVar, Union, cast

from trimtab.errors import ArtifactError

T = TypeVar("T")

_WORDS = {str: "text", int: "an integer", float: "a number", bool: "true or false", dict: "an object", tuple: "a list"}


def decode_fields(cls: type[T], value: Any, where: str) -> T:
    """Build the dataclass ``cls`` from a JSON object.

    Fields with defaults may be missing, fields the class does not have are ignored.  Understood annotations: str, int,
    float, bool, Any, ``tuple[X, ...]``, ``dict[str, X]``, dataclasses, and unions of these (None included).

    Raises:
        ArtifactError: a field is missing or has a value of another type; the message gives its path.
    """
    if not isinstance(value, dict):
        raise _mismatch(where, "an object", value)
    hints = _type_hints(cast(Any, cls))
    arguments: dict[str, Any] = {}
    for item in dataclasses.fields(cast(Any, cls)):
        if item.name in value:
            arguments[item.name] = _decode(hints[item.name], value[item.name], f"{where}.{item.name}")
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise ArtifactError(
                "the manifest of the artifact is not valid",
                values={"field": f"{where}.{item.name}"},
                rule="the field is missing",
                fix="compile the model again: trimtab compile MODEL -o model.trim",
            )
    return cls(**arguments)


@functools.cache
def _type_hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _decode(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _decode_union(typing.get_args(hint), value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise _mismatch(where, "a list", value)
        element = typing.get_args(hint)[0]
        return tuple(_decode(element, item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise _mismatch(where, "an object", value)
        element = typing.get_args(hint)[1]
        return {key: _decode(element, item, f"{where}[{key!r}]") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return decode_fields(cast(type[Any], hint), value, where)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:  # so that true is not taken for 1
        raise _mismatch(where, _WORDS.get(hint, str(hint)), value)
    return value


def _decode_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    rest = [option for option in options if option is not type(None)]
    if len(rest) == 1:
        return _decode(rest[0], value, where)
    for option in rest:
        if type(value) is option:
            return value
    raise _mismatch(where, " or ".join(_WORDS.get(option, str(option)) for option in rest), value)


def _mismatch(where: str, expected: str, value: Any) -> ArtifactError:
    return ArtifactError(
        "the manifest of the artifact is not valid",
        values={"field": where, "value": repr(value)[:80]},
        rule=f"{expected} is expected there",
        fix="compile the model again: trimtab compile MODEL -o model.trim",
    )
