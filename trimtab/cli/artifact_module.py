"""The module inside an artifact, with its weights in their plain form, to compile it again for another target."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import ArtifactError

if TYPE_CHECKING:
    import torch

    from trimtab.ir import Module


def module_from_artifact(path: Path) -> Module:
    """The optimized module of a ``.trim`` file. Weights stay in the mapped file until they are used.

    Raises:
        ArtifactError: the file is damaged, or carries no module.
        UsageError: no such file.
    """
    from trimtab.ir import DType, parse_module
    from trimtab.ir.weights import ArraySource, ComputedSource
    from trimtab.runtime import ArtifactReader
    from trimtab.runtime.manifest import MODULE_ENTRY

    reader = ArtifactReader(path, verify="full")
    if MODULE_ENTRY not in reader:
        raise ArtifactError(
            "the artifact carries no module",
            values={"file": path},
            rule="without it there is nothing to compile again",
            fix="compile the original model",
        )
    stored = reader.weights()
    layouts = {weight.name: weight.layout for weight in reader.manifest.weights}

    def source(id: str, type: Any) -> Any:
        if id not in stored or id not in layouts:
            raise ArtifactError(
                "the artifact lacks a weight of its module",
                values={"file": path, "weight": id},
                fix="compile the original model",
            )
        record, layout = stored[id], layouts[id]
        plain = ArraySource(record.array, DType(record.dtype), record.shape)
        if layout is None:
            return plain
        return ComputedSource(lambda: _unpack(plain.tensor(), layout, tuple(int(size) for size in type.shape)))

    text = bytes(reader.view(MODULE_ENTRY)).decode("utf-8")
    return parse_module(text, source, file=f"{path}/{MODULE_ENTRY}")


def _unpack(stored: torch.Tensor, layout: Any, shape: tuple[int, ...]) -> torch.Tensor:
    from trimtab.backends.tvm.layouts import Layout

    return Layout.from_dict({"kind": layout.kind, **layout.parameters}).unpack(stored, shape)
