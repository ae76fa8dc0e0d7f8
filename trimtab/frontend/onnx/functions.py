"""Operators that the ONNX standard defines by a body of other operators: expanded where no handler knows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnx.defs
import onnx_ir

from trimtab.frontend.onnx.element_types import onnx_code
from trimtab.ir.core import Value
from trimtab.ir.types import TensorType


def schema_of(op: str, version: int, domain: str) -> Any | None:
    """The standard's definition of an operator as of opset ``version``; None when there is none."""
    try:
        return onnx.defs.get_schema(op, version, domain)
    except Exception:  # onnx raises SchemaError, a type of its C++ extension
        return None


@dataclass(frozen=True)
class StandardBody:
    """An operator's defining function, and for each of its outputs its place among the function's (None: not made)."""

    function: onnx_ir.Function
    outputs: tuple[int | None, ...]


def standard_body(
    node: onnx_ir.Node,
    attributes: Mapping[str, onnx_ir.Attr],
    version: int,
    domain: str,
    inputs: Sequence[Value | None],
) -> StandardBody | None:
    """The function that defines ``node``'s operator in the standard; None when it is a primitive operator.

    Some bodies depend on the types of the inputs and on attributes, hence the arguments.
    """
    schema = schema_of(node.op_type, version, domain)
    if schema is None:
        return None
    proto: onnx.FunctionProto | None = None
    if schema.has_function:
        proto = _newest_body(schema, version)
    elif schema.has_context_dependent_function:
        types = [_type_proto(None if value is None else value.type) for value in inputs]
        message = onnx.NodeProto(op_type=node.op_type, domain=domain)
        message.input.extend("" if value is None else f"input_{i}" for i, value in enumerate(inputs))
        message.output.extend(output.name or "" for output in node.outputs)
        message.attribute.extend(onnx_ir.serde.serialize_attribute(attr) for attr in attributes.values())
        versions = [v for v in schema.context_dependent_function_opset_versions if v <= version]
        if not versions:
            return None
        data = schema.get_context_dependent_function_with_opset_version(
            max(versions), message.SerializeToString(), [item.SerializeToString() for item in types]
        )
        proto = onnx.FunctionProto.FromString(data) if data else None
    if proto is None or not proto.node:
        return None
    if not proto.opset_import:
        proto.opset_import.add(domain="", version=version)
    # A body leaves out optional outputs that this node does not ask for.
    made = {name for step in proto.node for name in step.output} | set(proto.input)
    names = [name for name in proto.output if name in made]
    places = tuple(names.index(name) if name in made else None for name in proto.output)
    del proto.output[:]
    proto.output.extend(names)
    return StandardBody(onnx_ir.serde.deserialize_function(proto), places)


def schema_defaults(op: str, version: int, domain: str) -> dict[str, onnx_ir.Attr]:
    """The default values of an operator's attributes, which its body may refer to."""
    schema = schema_of(op, version, domain)
    if schema is None:
        return {}
    return {
        name: onnx_ir.serde.deserialize_attribute(attribute.default_value)
        for name, attribute in schema.attributes.items()
        if attribute.default_value.name
    }


def _newest_body(schema: Any, version: int) -> onnx.FunctionProto | None:
    versions = [candidate for candidate in schema.function_opset_versions if candidate <= version]
    if not versions:
        return schema.function_body
    body = schema.get_function_with_opset_version(max(versions))
    return onnx.FunctionProto.FromString(body) if isinstance(body, bytes) else body


def _type_proto(type: TensorType | None) -> onnx.TypeProto:
    proto = onnx.TypeProto()
    if type is not None:
        proto.tensor_type.elem_type = onnx_code(type.dtype)
        for dim in type.shape:
            entry = proto.tensor_type.shape.dim.add()
            if isinstance(dim, int):
                entry.dim_value = dim
            else:
                entry.dim_param = str(dim)
    return proto
