"""The systems that cpu_peers.py compares: how each takes a model, compiles it and is called.

Every system is given the same weights, inputs and number of threads, and the options its own documentation recommends
for latency.  Inputs are bound before the calls that are timed, where a system has a way to do so.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

from cpu_peers_job import Job

Precision = Literal["f32", "bf16"]
Call = Callable[[], Any]
"""Computes the outputs from inputs that are bound already."""


class System(ABC):
    """One contender.

    Attributes:
        name: what tables call it.
        precision: of the matrix products; inputs and outputs are float32 in any case.
        packages: distributions whose versions matter.
        compiles: whether anything is compiled, so that its time and memory mean something.
        note: after `compile`, what readers should know about how the model was compiled.
    """

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    modules: ClassVar[tuple[str, ...]]
    compiles: ClassVar[bool] = True
    note = ""

    def __init__(self, precision: Precision = "f32") -> None:
        self.precision: Precision = precision

    @property
    def label(self) -> str:
        return f"{self.name} {self.precision}"

    def unavailable(self) -> str | None:
        """Why the system cannot run here; None when it can."""
        missing = [name for name in self.modules if not _is_installed(name)]
        return f"not installed: {', '.join(missing)} (make peers)" if missing else None

    @abstractmethod
    def load(self, job: Job) -> Any:
        """The model as this system is given it; not part of the compile time."""

    @abstractmethod
    def compile(self, model: Any, job: Job) -> Call:
        """Make ``model`` ready to be called."""


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


class Trimtab(System):
    """This project: trace, compile for the processor, write the artifact, load it."""

    name, packages, modules = "trimtab", ("apache-tvm",), ("tvm",)

    def unavailable(self) -> str | None:
        import trimtab

        if self.precision != "f32" and "precision" not in inspect.signature(trimtab.compile).parameters:
            return "trimtab.compile has no argument precision"
        return super().unavailable()

    def load(self, job: Job) -> Any:
        return job.torch_model()

    def compile(self, model: Any, job: Job) -> Call:
        import trimtab

        options = {} if self.precision == "f32" else {"precision": self.precision}
        module = trimtab.trace(model, job.torch_inputs())
        artifact = trimtab.compile(module, target=job.target, threads=job.threads, **options)
        path = artifact.save(job.folder / f"{self.precision}.trim", check=False)
        session = trimtab.load(path, threads=job.threads)
        arrays = tuple(job.inputs.values())
        return lambda: session(*arrays)


class Eager(System):
    """PyTorch as it is; in bf16, with weights and inputs converted."""

    name, packages, modules, compiles = "eager", ("torch",), ("torch",), False

    def load(self, job: Job) -> Any:
        model = job.torch_model()
        return model.bfloat16() if self.precision == "bf16" else model

    def compile(self, model: Any, job: Job) -> Call:
        inputs = job.torch_inputs()
        if self.precision == "bf16":
            inputs = tuple(value.bfloat16() if value.is_floating_point() else value for value in inputs)
        return lambda: model(*inputs)


class TorchCompile(System):
    """``torch.compile`` with Inductor; freezing lets it pack weights."""

    name, packages, modules = "torch.compile", ("torch",), ("torch",)

    def unavailable(self) -> str | None:
        if not any(map(shutil.which, ("g++", "clang++"))):
            return "Inductor needs a C++ compiler, and neither g++ nor clang++ is on the PATH"
        return super().unavailable()

    def load(self, job: Job) -> Any:
        # Nothing may come from the cache of an earlier run: its compile time would not be one.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(job.folder / "inductor")
        return job.torch_model()

    def compile(self, model: Any, job: Job) -> Call:
        import torch
        import torch._inductor.config

        torch._inductor.config.freezing = True
        compiled, inputs = torch.compile(model), job.torch_inputs()
        compiled(*inputs)
        return lambda: compiled(*inputs)


class OnnxRuntime(System):
    """ONNX Runtime's CPU provider with all graph optimizations, which are its default."""

    name, packages, modules = "onnxruntime", ("onnxruntime",), ("onnxruntime",)

    def load(self, job: Job) -> Any:
        return job.onnx

    def compile(self, model: Any, job: Job) -> Call:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = job.threads
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        for name, array in job.inputs.items():
            binding.bind_cpu_input(name, array)
        for output in session.get_outputs():
            binding.bind_output(output.name)

        def call() -> list[Any]:
            session.run_with_iobinding(binding)
            return [value.numpy() for value in binding.get_outputs()]

        return call


class OpenVino(System):
    """OpenVINO's CPU plugin with its latency hint."""

    name, packages, modules = "openvino", ("openvino",), ("openvino",)

    def load(self, job: Job) -> Any:
        return job.onnx

    def compile(self, model: Any, job: Job) -> Call:
        import openvino

        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": job.threads,
            "INFERENCE_PRECISION_HINT": self.precision,
        }
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(model), "CPU", options)
        used = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if used != self.precision:
            raise ValueError(f"OpenVINO computes in {used} on this processor when asked for {self.precision}")
        request = compiled.create_infer_request()
        inputs = dict(job.inputs)

        def call() -> list[Any]:
            results = request.infer(inputs, share_inputs=True, share_outputs=True)
            return [results[output] for output in compiled.outputs]

        return call


class Iree(System):
    """IREE's llvm-cpu through torch-mlir's ONNX importer.

    Data tiling makes matrix products two to three times as fast.  IREE 3.13 refuses it beside whole layer norms, whose
    kernels then exceed its limit for stack memory; so the file without them is tried first, at the level of
    optimization that does not fuse them again.  Where that fails too, the plain file is compiled without data tiling.
    """

    TARGET = (
        "--iree-hal-target-device=local",
        "--iree-hal-local-target-device-backends=llvm-cpu",
        "--iree-llvmcpu-target-cpu=host",
    )

    name, packages = "iree", ("iree-base-compiler", "iree-base-runtime")
    modules = ("iree.compiler", "iree.runtime")

    def load(self, job: Job) -> Any:
        tiled = (job.primitive_onnx, ["--iree-opt-level=O1", "--iree-opt-data-tiling"])
        plain = (job.onnx, ["--iree-opt-level=O3"])
        return [(path, options) for path, options in (tiled, plain) if path.exists()]

    def compile(self, model: Any, job: Job) -> Call:
        reasons = []
        for path, options in model:
            try:
                call = self._bind(*self._compile_file(path, options), job)
                self.note = f"compiled with {' '.join(options)} because {reasons[0]}" if reasons else ""
                return call
            except (subprocess.CalledProcessError, ValueError) as error:
                reasons.append(f"{path.name} {' '.join(options)}: {_why(error)}")
        raise ValueError("; ".join(reasons))

    def _compile_file(self, path: Path, options: list[str]) -> tuple[Path, Path]:
        """The code and the weights of one ONNX file."""
        imported, weights, code = (path.with_suffix(suffix) for suffix in (".mlir", ".irpa", ".vmfb"))
        _run("iree.compiler.tools.import_onnx", path, "-o", imported, "--opset-version", "17",
             "--externalize-params", "--save-params-to", weights)  # fmt: skip
        _run("iree.compiler.tools.scripts.iree_compile", imported, "-o", code, *self.TARGET, *options)
        return code, weights

    def _bind(self, code: Path, weights: Path, job: Job) -> Call:
        import iree.runtime as runtime
        from iree.runtime import flags

        flags.parse_flags(f"--task_topology_group_count={job.threads}")
        config = runtime.Config("local-task")
        index = runtime.ParameterIndex()
        index.load(str(weights))
        modules = runtime.load_vm_modules(
            runtime.create_io_parameters_module(config.vm_instance, index.create_provider(scope="model")),
            runtime.create_hal_module(config.vm_instance, config.device),
            runtime.VmModule.mmap(config.vm_instance, str(code)),
            config=config,
        )
        main = modules[-1][_entry_point(modules[-1].vm_module.function_names)]
        inputs = [runtime.asdevicearray(config.device, array) for array in job.inputs.values()]

        def call() -> list[Any]:
            outputs = main(*inputs)
            return [value.to_host() for value in (outputs if isinstance(outputs, tuple | list) else (outputs,))]

        return call


def _entry_point(names: list[str]) -> str:
    """The one function that is for callers."""
    return next(name for name in names if not name.startswith("__") and not name.endswith("$async"))


def _run(module: str, *arguments: str | Path) -> None:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, text=True)


def _why(error: Exception) -> str:
    """The line of a failed command's output that says what is wrong."""
    if not isinstance(error, subprocess.CalledProcessError):
        return str(error)
    lines = [line.strip() for line in error.stderr.splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), lines[-1] if lines else str(error))


SYSTEMS: tuple[System, ...] = (
    Trimtab("f32"),
    Eager("f32"),
    TorchCompile("f32"),
    OnnxRuntime("f32"),
    OpenVino("f32"),
    Iree("f32"),
    Trimtab("bf16"),
    Eager("bf16"),
    OpenVino("bf16"),
)
"""All contenders, in the order of the tables."""
