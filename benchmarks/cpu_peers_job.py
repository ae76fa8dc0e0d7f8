"""What every system of cpu_peers.py is given: one model as PyTorch and as ONNX, inputs, and the right outputs.

A job is a folder.  `write_job` fills it, in a process of its own, from a model; systems read from it what they need:

    model.onnx              torch's exporter
    model-primitive.onnx    torch's older exporter at an operator set that takes layer norms apart
    inputs.npz              in the order of forward
    expected.npz            outputs of the model in float64
    facts.json              `Facts`
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

PRIMITIVE_OPSET = 14
"""The last operator set of the older exporter without LayerNormalization."""


@dataclass(frozen=True)
class Facts:
    """The work of one evaluation.

    Attributes:
        kind: ``transformer`` or ``convolution``.
        macs: multiply-accumulates of matrix products and convolutions.
        weight_bytes: in float32, of all weights that are read as a whole; tables that are only gathered from are not.
        cache_bytes: of floating-point inputs.
    """

    kind: str
    macs: int
    weight_bytes: int
    cache_bytes: int


@dataclass(frozen=True)
class Job:
    """A folder filled by `write_job`, and how to compute.

    Attributes:
        folder: where the files are; systems may add their own.
        model: name of the benchmark model.
        threads: how many threads to compute with.
        target: target of Trimtab's code.
    """

    folder: Path
    model: str
    threads: int
    target: str = "native"

    @property
    def onnx(self) -> Path:
        return self.folder / "model.onnx"

    @property
    def primitive_onnx(self) -> Path:
        return self.folder / "model-primitive.onnx"

    @cached_property
    def inputs(self) -> dict[str, np.ndarray]:
        with np.load(self.folder / "inputs.npz") as file:
            return {name: file[name] for name in file.files}

    @cached_property
    def expected(self) -> list[np.ndarray]:
        with np.load(self.folder / "expected.npz") as file:
            return [file[name] for name in file.files]

    @cached_property
    def facts(self) -> Facts:
        return Facts(**json.loads((self.folder / "facts.json").read_text()))

    def torch_model(self) -> torch.nn.Module:
        """The module, built anew with the same weights; gradients are switched off for the whole process."""
        import torch

        torch.set_grad_enabled(False)
        torch.set_num_threads(self.threads)
        return find_model(self.model).build()

    def torch_inputs(self) -> tuple[torch.Tensor, ...]:
        import torch

        return tuple(torch.from_numpy(array) for array in self.inputs.values())


def find_model(name: str):
    """The benchmark model called ``name``."""
    from benchmark_models import BENCHMARK_MODELS, TINY_MODELS

    return {**BENCHMARK_MODELS, **TINY_MODELS}[name]


def write_job(job: Job) -> None:
    """Fill the folder of ``job``. The primitive ONNX file is left out where the older exporter cannot write it."""
    import torch

    import trimtab
    from measuring import as_arrays
    from trimtab.passes.samples import count_macs

    entry = find_model(job.model)
    model = job.torch_model()
    inputs = entry.inputs()
    np.savez(job.folder / "inputs.npz", **{name: value.numpy() for name, value in inputs.items()})
    sample = tuple(inputs.values())
    facts = Facts(
        kind=entry.kind,
        macs=count_macs(trimtab.trace(model, sample), {}),
        weight_bytes=_whole_weight_bytes(model),
        cache_bytes=sum(value.nbytes for value in sample if value.is_floating_point()),
    )
    (job.folder / "facts.json").write_text(json.dumps(asdict(facts)))
    names = list(inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, sample, job.onnx, dynamo=True, input_names=names, external_data=False, verbose=False)
        try:
            torch.onnx.export(
                model, sample, job.primitive_onnx, dynamo=False, input_names=names, opset_version=PRIMITIVE_OPSET
            )
        except Exception as error:  # whatever the exporter stumbles over; the systems that want the file say so
            job.primitive_onnx.unlink(missing_ok=True)
            print(f"{job.model}: no export at operator set {PRIMITIVE_OPSET}: {error}")
    exact = model.double()(*entry.inputs(torch.float64).values())
    np.savez(job.folder / "expected.npz", *as_arrays(exact))


def _whole_weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of the parameters of all modules but embeddings; a tied table counts, because a linear layer reads it."""
    import torch

    modules = [module for module in model.modules() if not isinstance(module, torch.nn.Embedding)]
    read = {id(weight): weight for module in modules for weight in module.parameters(recurse=False)}
    return sum(weight.nbytes for weight in read.values())
