"""Small ONNX models for tests, built with onnx.helper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from trimtab.frontend.onnx import from_onnx
from trimtab.ir import Module, interpret, verify

node = helper.make_node
_CODES = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64,
          np.dtype(np.bool_): TensorProto.BOOL, np.dtype(np.float64): TensorProto.DOUBLE}  # fmt: skip


def info(name: str, shape: Sequence[int | str | None] | None, code: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    """An input or output; a string is a named dynamic axis."""
    return helper.make_tensor_value_info(name, code, shape)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[str],
    weights: Mapping[str, Any] | None = None,
    *,
    opset: int = 20,
    functions: Sequence[onnx.FunctionProto] = (),
    codes: Mapping[str, int] | None = None,
    domains: Sequence[tuple[str, int]] = (),
) -> onnx.ModelProto:
    """A model whose outputs have no stated shapes."""
    initializers = [numpy_helper.from_array(np.asarray(data), name) for name, data in (weights or {}).items()]
    results = [info(name, None, (codes or {}).get(name, TensorProto.FLOAT)) for name in outputs]
    graph = helper.make_graph(list(nodes), "graph", list(inputs), results, initializers)
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(*domain) for domain in domains)]
    return helper.make_model(graph, opset_imports=imports, functions=list(functions))


def run(proto: onnx.ModelProto | Module, *inputs: Any, **options: Any) -> tuple[Any, ...]:
    """Import, verify and interpret."""
    module = proto if isinstance(proto, Module) else from_onnx(proto, **options)
    verify(module)
    return interpret(module, [torch.as_tensor(x) for x in inputs])


def names(module: Module) -> list[str]:
    """Mnemonics of the ops, in order."""
    return [op.name for op in module.walk()]


def normal(*shape: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
