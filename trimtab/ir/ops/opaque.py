"""A torch operator that has no op of its own, riding along."""

from __future__ import annotations

import json
from typing import Any

import torch

from trimtab.errors import VerificationError
from trimtab.ir.core import Value
from trimtab.ir.op import Op


class Opaque(Op):
    """A call of the torch operator ``target`` (``aten.erfinv.default``), which is its own reference.

    ``call`` is the JSON text of the arguments in the order of the operator's schema, in which ``{"operand": i}``
    stands for tensor i and ``{"dtype": "float32"}`` for a dtype.  Backends lower it when they can, else report it.
    """

    tensors: tuple[Value, ...]
    target: str
    call: str

    @staticmethod
    def reference(tensors: list[Any], *, target: str, call: str) -> Any:
        operator = resolve_operator(target)
        values = _decode(json.loads(call), tensors)
        named = {a.name: v for a, v in zip(operator._schema.arguments, values, strict=False) if a.kwarg_only}
        return operator(*values[: len(values) - len(named)], **named)


def resolve_operator(target: str) -> Any:
    """The torch operator overload named ``namespace.name.overload``.

    Text of a module may come from anywhere, so only pure functions of tensors are found: never a Python function that
    hangs on ``torch.ops``, nor an operator that writes to its operands or reads files.

    Raises:
        VerificationError: there is none in this version of torch.
    """
    parts = target.split(".")
    found: Any = torch.ops if len(parts) == 3 and parts[0] not in _REFUSED_NAMESPACES else None
    for part in parts:
        found = getattr(found, part, None) if part.isidentifier() else None
    if not isinstance(found, torch._ops.OpOverload) or not _is_pure_function(found):
        raise VerificationError(
            "an opaque op names an unknown torch operator",
            values={"target": target},
            rule="its reference is an operator of torch that computes tensors from tensors and has no side effects",
            fix="use the torch version that made the module",
        )
    return found


# Attributes of ``torch.ops`` that are functions and modules of Python.
_REFUSED_NAMESPACES = frozenset({"load_library", "import_module", "loaded_libraries"})


def _is_pure_function(operator: torch._ops.OpOverload) -> bool:
    schema = operator._schema
    takes_tensors = any("Tensor" in str(argument.type) for argument in schema.arguments)
    gives_tensors = bool(schema.returns) and all("Tensor" in str(result.type) for result in schema.returns)
    return takes_tensors and gives_tensors and not schema.is_mutable


def encode_call(args: tuple[Any, ...], tensors: list[Any]) -> str:
    """The ``call`` text for arguments in the order of the operator's schema; values in ``tensors`` become
    ``{"operand": i}``.

    Raises:
        TypeError: an argument has no text form.
    """

    def encode(arg: Any) -> Any:
        for index, tensor in enumerate(tensors):
            if tensor is arg:
                return {"operand": index}
        if isinstance(arg, list | tuple):
            return [encode(item) for item in arg]
        if isinstance(arg, torch.dtype):
            return {"dtype": str(arg).removeprefix("torch.")}
        if arg is None or isinstance(arg, bool | int | float | str):
            return arg
        raise TypeError(f"a {type(arg).__name__} has no text form")

    return json.dumps([encode(arg) for arg in args])


def _decode(arg: Any, tensors: list[Any]) -> Any:
    if isinstance(arg, list):
        return [_decode(item, tensors) for item in arg]
    if isinstance(arg, dict):
        if "operand" in arg:
            return tensors[arg["operand"]]
        dtype = getattr(torch, str(arg.get("dtype")), None)
        if not isinstance(dtype, torch.dtype):
            raise VerificationError("an opaque op has a malformed argument", values={"argument": arg})
        return dtype
    return arg
