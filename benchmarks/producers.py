"""Ways from a PyTorch model to a module of ours, with attention, norms and activations more or less taken apart.

    from producers import PRODUCERS, Source

    source = Source(get("bert"))                    # one model; exported once for all the producers that share it
    module = PRODUCERS["decomposed"](source)

A module comes as its frontend reads it: nothing is raised yet.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import onnx
import torch
from torch import Tensor, nn
from torch._decomp import get_decompositions
from torch.export import ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from trimtab import Module, from_onnx
from trimtab.frontend.torch_export import import_program
from zoo_models import ZooModel

LEGACY_OPSET = 14
"""The last operator set of the legacy exporter without LayerNormalization and with all that the zoo needs."""

_aten = torch.ops.aten
_WHOLE_IN_CORE = (_aten.native_layer_norm, _aten.native_group_norm, _aten.gelu, _aten._fused_rms_norm)
"""Norms and activations that torch's core operator set keeps whole."""


Result = TypeVar("Result")


class Source:
    """A model of the zoo, and the program that torch exports for it.

    Args:
        entry: the model.
        eager: attention written out as matrix products and a softmax, instead of one call of torch.
    """

    def __init__(self, entry: ZooModel, eager: bool = False) -> None:
        self.entry = entry
        self.eager = eager

    @cached_property
    def model(self) -> nn.Module:
        model = self.entry.build()
        if self.eager:
            for part in model.modules():
                if hasattr(part, "set_attn_implementation"):
                    part.set_attn_implementation("eager")
        return model

    @cached_property
    def sample(self) -> tuple[Tensor, ...]:
        return tuple(self.entry.inputs(2, 12).values())

    @cached_property
    def program(self) -> ExportedProgram:
        with _quiet():
            return torch.export.export(
                self.model, self.sample, dynamic_shapes=self.entry.dynamic_shapes(), strict=False
            )

    def convert(self, use: Callable[[ExportedProgram], Result]) -> Result:
        """``use(program)``. Where torch cannot take fused attention apart, because a view relies on how its kernel lays
        the result out, the model is exported for the kernel that consists of matrix products."""
        with _quiet():
            try:
                return use(self.program)
            except (ValueError, torch.onnx.errors.OnnxExporterError):
                with sdpa_kernel(SDPBackend.MATH):
                    return use(Source(self.entry, self.eager).program)


Producer = Callable[[Source], Module]


def exported(source: Source) -> Module:
    """torch.export, read before decomposition: what ``trimtab.trace`` does."""
    return import_program(source.program)


def decomposed(source: Source) -> Module:
    """torch.export and ``run_decompositions()``: torch's core operators, which attention is not among."""
    return import_program(source.convert(lambda program: program.run_decompositions()))


def decomposed_fully(source: Source) -> Module:
    """The same, with the norms and activations among the core operators taken apart as well."""
    table: dict[Any, Any] = dict(torch.export.default_decompositions().items())
    table.update(get_decompositions(_WHOLE_IN_CORE))
    return import_program(source.convert(lambda program: program.run_decompositions(table)))


def onnx_dynamo(source: Source) -> Module:
    """``torch.onnx.export(dynamo=True)``."""
    return _by_file(write_dynamo, source)


def onnx_legacy(source: Source) -> Module:
    """``torch.onnx.export(dynamo=False)``, through TorchScript."""
    return _by_file(write_legacy, source)


PRODUCERS: Mapping[str, Producer] = MappingProxyType(
    {
        "export": exported,
        "decomposed": decomposed,
        "decomposed fully": decomposed_fully,
        "onnx dynamo": onnx_dynamo,
        "onnx legacy": onnx_legacy,
    }
)


def write_dynamo(source: Source, path: Path) -> None:
    """Write the model with torch's exporter to ``path``."""

    names = list(source.entry.dynamic_axes)
    source.convert(lambda program: torch.onnx.export(program, f=str(path), input_names=names, verbose=False))


def write_legacy(source: Source, path: Path) -> None:
    """Write the model with torch's exporter of before 2.5 to ``path``."""
    axes = source.entry.dynamic_axes
    with _quiet():
        torch.onnx.export(source.model, source.sample, str(path), dynamo=False, opset_version=LEGACY_OPSET,
                          dynamic_axes=axes, input_names=list(axes))  # fmt: skip


def _by_file(write: Callable[[Source, Path], None], source: Source) -> Module:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write(source, path)
        model = onnx.load(path)  # into memory: the folder goes, and weights are read when they are needed
    return from_onnx(model)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the chatter of torch's exporters off the terminal."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
