"""Opens a model: from a path, a ``ModelProto`` or an ``onnx_ir.Model`` to an ``onnx_ir.Model`` that can be trusted to
hang together."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir

from trimtab.errors import ImportModelError, TrimtabError, UsageError
from trimtab.frontend.onnx.embedded_data import read_without_weights
from trimtab.frontend.onnx.external_data import ExternalFiles
from trimtab.frontend.onnx.structure import check_structure

PROTOBUF_LIMIT = 2**31


@dataclass(frozen=True)
class OpenedModel:
    """A model with the name of its file (for messages) and access to its data files."""

    model: onnx_ir.Model
    file: str
    files: ExternalFiles


def open_model(source: str | os.PathLike[str] | onnx.ModelProto | onnx_ir.Model) -> OpenedModel:
    """Read and check a model.

    Raises:
        UsageError: ``source`` is something else, or no such file.
        ImportModelError: the file is not a sound ONNX model.
    """
    if isinstance(source, onnx_ir.Model):
        return OpenedModel(source, "model.onnx", ExternalFiles(_directory_of(source)))
    if isinstance(source, onnx.ModelProto):
        return OpenedModel(_from_proto(source, None), "model.onnx", ExternalFiles(None))
    if not isinstance(source, str | os.PathLike):
        raise UsageError(
            "from_onnx got something that is not a model",
            values={"type": type(source).__name__},
            rule="a model is a path, an onnx.ModelProto or an onnx_ir.Model",
        )
    path = Path(source)
    if not path.is_file():
        raise UsageError("no such file", values={"path": path}, fix="check the path of the model")
    try:
        proto = _read(path)
        return OpenedModel(_from_proto(proto, path), path.name, ExternalFiles(path.parent))
    except ImportModelError as error:
        error.where = error.where or f"file {path.name}"
        raise type(error)(
            error.what, values=error.values, rule=error.rule, fix=error.fix, where=error.where, location=error.location
        ) from error


def _read(path: Path) -> onnx.ModelProto:
    size = path.stat().st_size
    data = read_without_weights(path)
    if len(data) >= PROTOBUF_LIMIT:
        raise ImportModelError(
            "the model file is too large for its format",
            values={"bytes": size},
            rule="a protobuf message holds less than 2 GiB besides its weights",
            fix="save it with external data",
        )
    try:
        proto = onnx.ModelProto.FromString(data)
    except Exception as error:  # protobuf's DecodeError differs between its implementations
        raise ImportModelError(
            "the file is not an ONNX model, or is damaged",
            values={"bytes": size},
            rule=f"it does not decode as protobuf ({error})",
            fix="export or download the model again",
        ) from error
    return proto


def _from_proto(proto: onnx.ModelProto, path: Path | None) -> onnx_ir.Model:
    try:
        check_structure(proto)
        model = onnx_ir.from_proto(proto)
    except TrimtabError:
        raise
    except RecursionError as error:
        raise ImportModelError("the model is nested too deep", rule="graphs inside graphs have a limit") from error
    except Exception as error:  # onnx_ir reports damage by many kinds of exceptions
        reason = str(error.__cause__ or error).strip().splitlines()
        raise ImportModelError(
            "the model is malformed",
            rule=reason[0][:300] if reason else type(error).__name__,
            fix="export the model again",
        ) from error
    if path is not None:
        onnx_ir.external_data.set_base_dir(model.graph, path.parent)
    return model


def _directory_of(model: onnx_ir.Model) -> Path | None:
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, onnx_ir.ExternalTensor) and str(value.const_value.base_dir):
            return Path(value.const_value.base_dir)
    return None
