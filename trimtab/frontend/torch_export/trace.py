"""``trace``: a PyTorch module and example arguments in, a verified IR module out."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from trimtab.errors import ImportModelError, UsageError
from trimtab.frontend.torch_export.dynamic_shapes import (
    symbol_names,
    symbols_of_program,
    torch_dynamic_shapes,
    widen_unit_axes,
)
from trimtab.frontend.torch_export.importer import Importer
from trimtab.frontend.torch_export.registry import find_converter
from trimtab.ir.builder import Builder
from trimtab.ir.core import Module, Value
from trimtab.ir.dtypes import DType
from trimtab.ir.inference import dim_from_sympy
from trimtab.ir.types import TensorType
from trimtab.ir.verifier import verify


def trace(
    module: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> Module:
    """Import a PyTorch module.

    Args:
        module: the model, in eval mode; its parameters are shared with the result, not copied.
        args: example positional arguments: tensors, or lists, tuples and dicts of tensors.
        kwargs: example keyword arguments.
        dynamic_shapes: which axes may vary, as ``torch.export`` takes it (by argument name or position, an axis
            maps to a ``torch.export.Dim``), or simply axis to symbol name: ``{"x": {0: "batch"}}``. Axes with one
            name have one size. A varying axis may have any size from 1 (or the Dim's own minimum).

    Returns:
        A verified module. Inputs are named after the arguments (``images``, ``boxes.0``), outputs after the keys of
        the returned dict or dataclass, else ``output`` or ``output.0``, ``output.1``, ...

    Raises:
        ImportModelError: torch cannot export the model, or it changes its inputs or buffers.
        UnsupportedOpError: operators without a converter, all of them at once with their source lines.
    """
    if not isinstance(module, torch.nn.Module):
        raise UsageError("trace takes a torch.nn.Module", values={"given": type(module).__name__})
    if module.training:
        raise ImportModelError(
            "the model is in training mode",
            values={"model": type(module).__name__},
            rule="inference drops dropout and uses running statistics",
            fix="call .eval() first",
        )
    args = tuple(args) if isinstance(args, list | tuple) else (args,)
    kwargs = dict(kwargs or {})
    shapes, minimums = torch_dynamic_shapes(dynamic_shapes)
    if shapes is not None:
        args, kwargs = widen_unit_axes(module, args, kwargs, shapes)
    try:
        with _quiet():
            program = torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise ImportModelError(
            "torch.export cannot export the model",
            values={"model": type(module).__name__},
            rule=_first_lines(error),
            fix="make the model exportable: torch.export.export(model, args) must succeed",
        ) from error
    return import_program(program, names=symbol_names(shapes, program), minimums=minimums)


def import_program(
    program: ExportedProgram, *, names: Mapping[Any, str] | None = None, minimums: Mapping[str, int] | None = None
) -> Module:
    """Import an exported program, e.g. ``torch.export.load("model.pt2")``.

    Args:
        program: what ``torch.export.export`` returned.
        names: a name for each of torch's shape symbols; others are called ``s0``, ``s1``, ...
        minimums: the smallest size of a named symbol, 1 by default.
    """
    program = _prepare(program)
    _refuse_state_changes(program)
    symbols = symbols_of_program(program, names or {}, minimums or {})
    builder = Builder()
    importer = Importer(builder, symbols)
    arguments = _placeholders(program, builder, importer)
    returned = importer.run(program.graph_module, arguments)
    importer.raise_unsupported()
    outputs = {name: value for name, value in zip(_output_names(program), returned, strict=True) if value is not None}
    odd = [f"{name}={value!r}" for name, value in outputs.items() if not isinstance(value, Value)]
    if odd:
        raise ImportModelError(
            "the model returns something that is not a tensor",
            values={"returned": ", ".join(odd)},
            rule="outputs are tensors; a None among them is left out",
        )
    builder.output(*outputs.values(), names=list(outputs))
    builder.module.drop_unused_weights()
    verify(builder.module)
    return builder.module


def _prepare(program: ExportedProgram) -> ExportedProgram:
    """Functionalise when the program mutates, and decompose only operators that have no converter."""
    targets = {
        node.target for graph in _graphs(program.graph_module) for node in graph.nodes if node.op == "call_function"
    }
    overloads = {target for target in targets if isinstance(target, torch._ops.OpOverload)}
    mutates = any(target._schema.is_mutable and find_converter(str(target)) is None for target in overloads)
    missing = {target for target in overloads if find_converter(str(target)) is None}
    table: dict[Any, Any] = {}
    if missing:
        known = torch.export.default_decompositions()
        table = {target: known[target] for target in missing if target in known}
    if not mutates and not table:
        return program
    with _quiet():
        return program.run_decompositions(table)


def _graphs(module: torch.fx.GraphModule) -> Iterator[torch.fx.Graph]:
    for child in module.modules():
        if isinstance(child, torch.fx.GraphModule):
            yield child.graph


def _refuse_state_changes(program: ExportedProgram) -> None:
    signature = program.graph_signature
    changed = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if changed:
        raise ImportModelError(
            "the model changes state when it runs",
            values={"changed": ", ".join(changed)},
            rule="a compiled model is a function of its inputs: buffers and inputs keep their values",
            fix="return the new value as an output, or switch off the cache or statistics that change it",
        )


def _placeholders(program: ExportedProgram, builder: Builder, importer: Importer) -> list[Any]:
    """A value per placeholder: inputs become graph inputs, parameters and constants weights (shared ones once)."""
    seen: dict[Any, Value] = {}
    input_names = iter(_input_names(program))
    arguments: list[Any] = []
    nodes = [node for node in program.graph_module.graph.nodes if node.op == "placeholder"]
    for node, spec in zip(nodes, program.graph_signature.input_specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            name = next(input_names)
            meta = node.meta.get("val")
            if not isinstance(meta, torch.Tensor):
                arguments.append(meta)  # a constant argument (None, bool, str): export has already used it
                continue
            shape = tuple(
                dim_from_sympy(size.node.expr, importer.symbols) if isinstance(size, torch.SymInt) else int(size)
                for size in meta.shape
            )
            arguments.append(builder.input(name, TensorType(_dtype(meta, name), shape)))
            continue
        target = str(spec.target)
        data = program.state_dict.get(target)
        if data is None:
            data = program.constants.get(target)
        if not isinstance(data, torch.Tensor):
            raise ImportModelError(
                "the model holds a constant that is not a tensor", values={"name": target, "type": type(data).__name__}
            )
        arguments.append(_weight(target, data, spec.kind is InputKind.PARAMETER, builder, seen))
    return arguments


def _weight(name: str, data: torch.Tensor, trainable: bool, builder: Builder, seen: dict[Any, Value]) -> Value:
    _dtype(data, name)
    if data.dim() == 0 and not trainable:
        return builder.scalar(data.item(), DType.from_torch(data.dtype))
    key = (data.untyped_storage().data_ptr(), data.storage_offset(), tuple(data.shape), data.stride(), data.dtype)
    if data.numel() == 0 or key not in seen:
        seen[key] = builder.weight(name, data, trainable=trainable)
    return seen[key]


def _dtype(tensor: torch.Tensor, name: str) -> DType:
    try:
        return DType.from_torch(tensor.dtype)
    except ValueError as error:
        raise ImportModelError(
            "a tensor has a dtype that the IR lacks",
            values={"tensor": name, "dtype": tensor.dtype},
            rule=f"known dtypes: {' '.join(map(str, DType))}",
        ) from error


def _input_names(program: ExportedProgram) -> list[str]:
    """Names of the flattened inputs: the argument's name, then the path inside it."""
    spec = program.call_spec.in_spec
    dummy = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    args, kwargs = dummy
    positional = (
        list(program.module_call_graph[0].signature.forward_arg_names or [])
        if program.module_call_graph[0].signature
        else []
    )
    names: list[str] = []
    for index, arg in enumerate(args):
        label = positional[index] if index < len(positional) else f"input.{index}" if len(args) > 1 else "input"
        names += [_path(label, path) for path, _ in pytree.tree_leaves_with_path(arg)]
    for label, arg in kwargs.items():
        names += [_path(label, path) for path, _ in pytree.tree_leaves_with_path(arg)]
    return names


def _output_names(program: ExportedProgram) -> list[str]:
    """Names of the flattened outputs: keys of a returned dict or dataclass, else ``output`` with an index."""
    spec = program.call_spec.out_spec
    dummy = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    named = [_path("", path).lstrip(".") for path, _ in pytree.tree_leaves_with_path(dummy)]
    if all(name and not name[0].isdigit() for name in named):
        return named
    return ["output"] if len(named) == 1 else [f"output.{name}" for name in named]


def _path(label: str, path: Sequence[Any]) -> str:
    """A pytree path as dotted text."""
    parts = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
    return ".".join([label, *parts])


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return " ".join(lines[:3]) or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's export chatter off the user's terminal; problems reach the user as errors."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
