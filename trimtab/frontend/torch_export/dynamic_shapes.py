"""Symbolic dimensions at the border with torch: what the user declared, what torch made of it, and our symbols."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch.export import Dim as TorchDim
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from trimtab.ir.dims import Symbol


def torch_dynamic_shapes(given: Any) -> tuple[Any, dict[str, int]]:
    """The user's dynamic shapes with symbol names turned into torch Dims, and the minimum of each named Dim."""
    made: dict[str, Any] = {}
    minimums: dict[str, int] = {}

    def convert(spec: Any) -> Any:
        if isinstance(spec, str):
            return made.setdefault(spec, TorchDim(spec, min=1))
        if isinstance(spec, Mapping):
            return {key: convert(value) for key, value in spec.items()}
        if isinstance(spec, list | tuple):
            converted = [convert(value) for value in spec]
            return tuple(converted) if isinstance(spec, tuple) else converted
        if hasattr(spec, "__name__") and isinstance(getattr(spec, "min", None), int):
            minimums[spec.__name__] = max(spec.min, 1)
        return spec

    return (None if given is None else convert(given)), minimums


def widen_unit_axes(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Repeat examples along varying axes of size 1: torch would take the 1 for a constant."""

    def widen(example: Any, spec: Any) -> Any:
        if isinstance(example, torch.Tensor) and spec:
            axes = spec.items() if isinstance(spec, Mapping) else enumerate(spec)
            for axis, dim in axes:
                if dim is not None and not isinstance(dim, int) and example.shape[axis] == 1:
                    example = torch.cat([example, example], dim=axis)
            return example
        if isinstance(example, Mapping) and isinstance(spec, Mapping):
            return {key: widen(value, spec.get(key)) for key, value in example.items()}
        if isinstance(example, list | tuple) and isinstance(spec, list | tuple):
            return type(example)(widen(value, part) for value, part in zip(example, spec, strict=False))
        return example

    if isinstance(shapes, Mapping):
        names = list(inspect.signature(module.forward).parameters)
        args = tuple(widen(arg, shapes.get(name)) for arg, name in zip(args, names, strict=False)) + args[len(names) :]
        return args, {name: widen(value, shapes.get(name)) for name, value in kwargs.items()}
    return tuple(widen(arg, spec) for arg, spec in zip(args, shapes, strict=False)) + args[len(shapes) :], kwargs


def symbol_names(shapes: Any, program: ExportedProgram) -> dict[Any, str]:
    """The user's name for each of torch's symbols: found where a named Dim meets a symbolic size of an input."""
    if shapes is None:
        return {}
    metas = [
        node.meta["val"]
        for node, spec in zip(
            (n for n in program.graph_module.graph.nodes if n.op == "placeholder"),
            program.graph_signature.input_specs,
            strict=True,
        )
        if spec.kind is InputKind.USER_INPUT
    ]
    spec = program.call_spec.in_spec
    args, kwargs = pytree.tree_unflatten(metas, spec)
    if isinstance(shapes, Mapping):
        names = (
            list(program.module_call_graph[0].signature.forward_arg_names or [])
            if program.module_call_graph[0].signature
            else []
        )
        given = itertools.chain(zip(names, args, strict=False), kwargs.items())
        pairs = [(value, shapes.get(name)) for name, value in given]
        if not names:
            pairs = [(value, spec) for value, spec in zip([*args, *kwargs.values()], shapes.values(), strict=False)]
    else:
        pairs = list(zip([*args, *kwargs.values()], shapes, strict=False))
    found: dict[Any, str] = {}

    def walk(value: Any, spec: Any) -> None:
        if isinstance(value, torch.Tensor):
            for axis, dim in spec.items() if isinstance(spec, Mapping) else enumerate(spec or ()):
                size = value.shape[axis]
                name = getattr(dim, "__name__", None)
                if name and isinstance(size, torch.SymInt) and size.node.expr.is_Symbol and not hasattr(dim, "root"):
                    found[size.node.expr] = name
        elif isinstance(value, Mapping) and isinstance(spec, Mapping):
            for key, item in value.items():
                walk(item, spec.get(key))
        elif isinstance(value, list | tuple) and isinstance(spec, list | tuple):
            for item, part in zip(value, spec, strict=False):
                walk(item, part)

    for value, part in pairs:
        walk(value, part)
    return found


def symbols_of_program(
    program: ExportedProgram, names: Mapping[Any, str], minimums: Mapping[str, int]
) -> dict[Any, Symbol]:
    """Our symbol for each of torch's, with names and ranges."""
    found: dict[Any, Symbol] = {}
    for expression, limits in program.range_constraints.items():
        if not expression.is_Symbol:
            continue
        name = names.get(expression, str(expression))
        upper = int(limits.upper) if limits.upper.is_Integer and limits.upper < 2**31 else None
        # torch starts ranges at 2 to keep 0 and 1 apart from other sizes; our references are valid from 1.
        found[expression] = Symbol(name, minimums.get(name, 1), upper)
    return found
