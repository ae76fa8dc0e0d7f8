"""ONNX models to IR.

The way of a model: ``loading`` opens and checks the file, ``importer`` walks the graph and calls a handler a node
(``ops/``, found through ``registry``), ``emitter`` builds the ops and computes what is known.  Layers that the file has
in pieces stay in pieces here: passes put them together, the same for every producer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trimtab.errors import MissingDependencyError, UsageError

if TYPE_CHECKING:
    import onnx
    import onnx_ir
    import torch

    from trimtab.frontend.onnx.signature import DimSpec
    from trimtab.ir.core import Module


def from_onnx(
    model: str | os.PathLike[str] | onnx.ModelProto | onnx_ir.Model,
    *,
    dims: Mapping[str, DimSpec] | None = None,
    constants: Mapping[str, Any] | None = None,
) -> Module:
    """Import an ONNX model, opset 11 or newer.

    Args:
        model: a path, or a loaded model. Weights stay in the file until they are read: external data is
            memory-mapped, and a model of more than 2 GB needs no copy of itself.
        dims: sizes or ranges of named dynamic axes: ``{"batch": (1, 64), "sequence": 128}``. By default a dynamic axis
            has at least one element and no upper limit, unless the model makes sense only within one.
        constants: contents of inputs that are fixed at import, by name (numpy arrays or tensors). An input that holds a
            shape, axes or a number of elements must be fixed, because shapes are known when a model is imported.

    Returns:
        A module that verifies. Values, weights, inputs and outputs keep the names they have in the file.

    Raises:
        UnsupportedOpError: operators that are not imported, all of them at once.
        ImportModelError: the file is broken, contradicts itself, or is hostile.
        UsageError: no such file, or ``dims`` and ``constants`` that do not fit the model.
    """
    try:
        from trimtab.frontend.onnx.importer import import_model
        from trimtab.frontend.onnx.loading import open_model
        from trimtab.frontend.onnx.parameters import mark_parameters
        from trimtab.ir.dead_code import remove_dead_ops
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "importing ONNX models needs more packages",
            values={"missing": error.name},
            fix='pip install "trimtab[onnx]"',
        ) from error

    opened = open_model(model)
    module = import_model(opened, dims or {}, {name: _tensor(name, data) for name, data in (constants or {}).items()})
    remove_dead_ops(module)
    module.drop_unused_weights()
    mark_parameters(module)
    return module


def _tensor(name: str, data: Any) -> torch.Tensor:
    import numpy as np
    import torch

    try:
        if isinstance(data, torch.Tensor):
            return data
        array = np.array(data)
        if array.dtype.name == "bfloat16":  # numpy knows this type only through ml_dtypes, torch not at all
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(array)
    except TypeError as error:
        raise UsageError("a constant is not a tensor", values={"name": name, "type": type(data).__name__}) from error


__all__ = ["from_onnx"]
