"""``compile``: optimise a module, generate code for a target, and put everything in one artifact file.

This is the one place where passes, backends and the runtime's file format meet.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab import __version__
from trimtab.cores import check_thread_count
from trimtab.errors import ArtifactError, InternalError, UsageError
from trimtab.runtime.container import ArtifactWriter
from trimtab.runtime.dimension import MAX_TEXT, Dimension
from trimtab.runtime.manifest import (
    CHECK_ENTRY,
    MODULE_ENTRY,
    WEIGHTS_ENTRY,
    CodeVariant,
    KernelCall,
    Manifest,
    SymbolRange,
    TensorSpec,
    Tolerance,
    WeightEntry,
    WeightLayout,
)
from trimtab.runtime.samples import Sample, encode_samples
from trimtab.tensor_file import TensorSource, write_tensors

if TYPE_CHECKING:
    from trimtab.backends.base import Backend, CompiledCode
    from trimtab.ir import Module
    from trimtab.ir.dims import Dim
    from trimtab.passes.observers import Observer

BACKENDS = {"tvm": "trimtab.backends.tvm.backend"}
"""Module of each code generator, by name."""

DEFAULT_PIPELINE = "cleanup,fuse"
PRECISIONS = {"f32": "", "bf16": "cast-precision", "f16-storage": "cast-precision{to=f16-storage}"}
"""What ``compile`` takes as precision, and the pass that it stands for."""
# Outputs may differ from the float32 reference by this much: another order of summation, other polynomials.
TOLERANCE = Tolerance(rtol=1e-4, atol=1e-6)
# Two computations that round the same values to 16 bits differ by no more than this many times what rounding costs.
_ROUNDING_MARGIN = 4
_LIBRARY_ENTRY = "code/model.so"
# More sample sizes are tried only while one evaluation costs less than this, about a minute on a small machine.
_SAMPLE_MACS = 1e12

Progress = Callable[[str, float], None]
"""Called with the name of a stage and the fraction of the whole work done before it."""


def find_backend(name: str) -> Backend:
    """The backend called ``name``.

    Raises:
        UsageError: there is no such backend.
    """
    if name not in BACKENDS:
        raise UsageError("unknown backend", values={"backend": name, "known": ", ".join(BACKENDS)})
    backend: Backend = import_module(BACKENDS[name]).BACKEND
    return backend


def compile(
    module: Module,
    target: str | None = None,
    backend: str = "tvm",
    threads: int | None = None,
    *,
    pipeline: str | None = DEFAULT_PIPELINE,
    precision: str = "f32",
    include_runtime: bool = True,
    name: str = "",
    progress: Progress | None = None,
    observers: Sequence[Observer] = (),
) -> Artifact:
    """Compile a module for a target.

    Args:
        module: from :func:`trimtab.trace`, :func:`trimtab.from_onnx` or :func:`trimtab.read`; it is not changed.
        target: ``native`` for this machine, or a name such as ``x86-64-v3``; None means the portable baseline of this
            machine's architecture.
        backend: the code generator.
        threads: threads to plan for, and what sessions of the file then use by default; None plans for the cores this
            process may use (:func:`trimtab.cores.usable_cores`), and sessions use those of the machine they run on.
        pipeline: passes to run first; None or an empty text for none but those that the backend itself asks for.
        precision: ``f32`` to compute as the module says; ``bf16`` for matrix products in bfloat16, whose sums and all
            else stay in float32; ``f16-storage`` for weights of products in float16 and all arithmetic in float32. It
            stands for the pass ``cast-precision`` at the end of ``pipeline``.
        include_runtime: carry the backend's runtime library in the file (3.4 MB for tvm), so that the device needs
            numpy and ``apache-tvm-ffi`` only.
        name: what the model is called, for people.
        progress: called at the start of each stage.
        observers: told about every pass; see :mod:`trimtab.passes.observers`.

    Returns:
        An artifact; :meth:`Artifact.save` writes the file and checks it in a fresh process.

    Raises:
        UnsupportedByBackendError: ops the backend cannot compile, all at once.
        PassError, BackendError, UsageError: see their classes.
    """
    from trimtab.passes.optimize import optimize

    check_thread_count(threads)
    stages = _Stages(progress)
    generator = find_backend(backend)
    report: Any = None
    pipeline = ",".join(filter(None, (pipeline, _precision_pass(precision))))
    passes = _with_passes_of(generator, pipeline)
    if pipeline:
        module = _without_groups(module)
    if passes:
        with stages("optimize", 0.0):
            result = optimize(module, passes, observers=observers)
        module, report = result.module, result.report.to_dict()
    with stages("check capabilities", 0.2):
        generator.check(module, target or "")
    with stages("generate code", 0.25):
        code = generator.build(module, target or "", threads)
    with stages("compute expected outputs", 0.9):
        samples, tolerance = _expected(module)
    return Artifact(module, code, samples, passes, report, name, include_runtime, threads, stages.seconds, tolerance)


def _precision_pass(precision: str) -> str:
    if precision not in PRECISIONS:
        raise UsageError("unknown precision", values={"precision": precision, "known": ", ".join(PRECISIONS)})
    return PRECISIONS[precision]


def _without_groups(module: Module) -> Module:
    """``module`` as passes expect it: kernels chosen for an earlier compilation become ops again."""
    from trimtab.ir.fused import ungroup
    from trimtab.ir.ops import Fused

    if any(isinstance(op, Fused) for op in module.walk()):
        module = module.copy()
        ungroup(module)
    return module


def _with_passes_of(backend: Backend, pipeline: str) -> str:
    """``pipeline``, and after it the passes that the backend asks for and that are not in it."""
    from trimtab.passes.pipeline import Pipeline, parse_pipeline

    given = parse_pipeline(pipeline)
    names = {pass_.name for pass_ in given.passes}
    own = (pass_ for pass_ in parse_pipeline(backend.passes).passes if pass_.name not in names)
    return str(Pipeline((*given.items, *own)))


@dataclass(frozen=True)
class Artifact:
    """A compiled module that has not been written yet.

    Attributes:
        module: the optimised module the code was made from.
        code: the code and the weights as it reads them.
        samples: inputs and expected outputs for the self-check.
        pipeline: the passes that ran.
        report: their report, plain data.
        name: what the model is called.
        include_runtime: whether the file carries the runtime library.
        threads: what sessions use by default; None for the cores of their machine.
        seconds: time per stage of compilation.
        tolerance: how far outputs may be from the samples' in the self-check.
    """

    module: Module
    code: CompiledCode
    samples: tuple[Sample, ...]
    pipeline: str = ""
    report: Any = None
    name: str = ""
    include_runtime: bool = True
    threads: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    tolerance: Tolerance = TOLERANCE

    @property
    def precision(self) -> str:
        """One of :data:`PRECISIONS`: what the passes that ran made of the module."""
        from trimtab.passes.cast_precision import CastPrecision
        from trimtab.passes.pipeline import parse_pipeline

        casts = [pass_.to for pass_ in parse_pipeline(self.pipeline).passes if isinstance(pass_, CastPrecision)]
        return casts[0] if casts else "f32"

    @property
    def manifest(self) -> Manifest:
        """The manifest without hashes, which exist once the file is written."""
        main, code = self.module.main, self.code
        return Manifest(
            inputs=tuple(_tensor_spec(value.name, value.type) for value in main.inputs),
            outputs=tuple(_tensor_spec(n, v.type) for n, v in zip(main.output_names, main.outputs, strict=True)),
            variants=(
                CodeVariant(
                    target=code.triple,
                    library=_LIBRARY_ENTRY,
                    backend=code.backend,
                    entry=code.entry,
                    features=code.features,
                    runtime=tuple(f"code/{path.name}" for path in self._runtime_libraries),
                    requires=dict(code.requires),
                    kernels=_kernel_calls(code),
                    arena=code.arena,
                ),
            ),
            name=self.name,
            symbols=tuple(SymbolRange(s.name, s.min, s.max) for s in self.module.symbols().values()),
            weights=tuple(
                WeightEntry(
                    weight.name,
                    weight.dtype,
                    weight.shape,
                    None
                    if weight.layout is None
                    else WeightLayout(
                        str(weight.layout["kind"]),
                        weight.plain_dtype,
                        weight.plain_shape,
                        {key: value for key, value in weight.layout.items() if key != "kind"},
                    ),
                )
                for weight in code.weights
            ),
            versions={"trimtab": __version__, **code.requires},
            pipeline=self.pipeline,
            report=self.report,
            memory={purpose: _count(nbytes) for purpose, nbytes in code.memory.items()},
            threads=self.threads,
            tolerance=self.tolerance,
            precision=self.precision,
        )

    def save(self, path: str | os.PathLike[str], *, check: bool = True) -> Path:
        """Write the file, and check it in a fresh process before it gets its name.

        Args:
            path: the file; an existing one is replaced at the end, or kept when anything fails.
            check: run the self-check. It is skipped for a target that is not of this machine's architecture.

        Raises:
            ArtifactError: the disk is full, the file cannot be written, or it does not run or gives wrong outputs.
        """
        path = Path(path)
        if not path.parent.is_dir():
            raise ArtifactError(
                "an artifact cannot be written", values={"path": path}, rule="its directory does not exist"
            )
        # A directory of its own beside the target: the final rename stays on one file system.
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
            draft = Path(scratch) / path.name
            self._write(draft)
            if check and self._runs_here():
                _check_in_fresh_process(draft)
            os.replace(draft, path)
        return path

    @property
    def _runtime_libraries(self) -> tuple[Path, ...]:
        return self.code.runtime_libraries if self.include_runtime else ()

    def _write(self, path: Path) -> None:
        weights = {w.name: TensorSource(w.dtype, w.shape, w.blocks) for w in self.code.weights}
        expected = len(self.code.library) + sum(weight.nbytes for weight in self.code.weights)
        with ArtifactWriter(path, expected_bytes=expected) as writer:
            writer.add_bytes(MODULE_ENTRY, str(self.module).encode())
            writer.add_bytes(_LIBRARY_ENTRY, self.code.library)
            for library in self._runtime_libraries:
                writer.add_file(f"code/{library.name}", library)
            writer.add_bytes(CHECK_ENTRY, encode_samples(self.samples))
            with writer.open_entry(WEIGHTS_ENTRY) as file:
                write_tensors(file, weights)
            writer.finish(self.manifest)

    def _runs_here(self) -> bool:
        from trimtab.runtime.variants import select_variant

        try:
            select_variant(self.manifest.variants, self.name)
        except ArtifactError:
            return False
        return True


def _check_in_fresh_process(path: Path) -> None:
    """Run ``trimtab.runtime.self_check``, which imports neither torch nor the compiler."""
    command = [sys.executable, "-m", "trimtab.runtime.self_check", str(path), "--json", "--carried"]
    package_root = str(Path(__file__).resolve().parent.parent)
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    )
    if done.returncode == 0:
        return
    detail = done.stderr.strip().splitlines()[-1:] or done.stdout.strip().splitlines()[-1:] or ["no output"]
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = None
    if done.returncode < 0:
        raise InternalError(
            "the compiled model crashed in its self-check",
            values={"signal": -done.returncode},
            rule="a file that does not run is not reported as built",
            fix="please report this with the model",
        )
    raise ArtifactError(
        "the compiled model failed its self-check",
        values={"exit code": done.returncode, "answer": answer if answer is not None else detail[0]},
        rule="outputs must be within the tolerance of the reference, in a fresh process",
        fix="please report this with the model",
    )


def _kernel_calls(code: CompiledCode) -> tuple[KernelCall, ...]:
    """What profiles are told about the code; nothing where a count is no expression that the runtime reads."""
    calls = []
    for call in code.calls:
        counts = (call.macs, call.bytes_read, call.bytes_written)
        macs, read, written = map(_count, counts)
        if any(isinstance(count, str) and len(count) > MAX_TEXT for count in (macs, read, written)):
            return ()
        calls.append(KernelCall(call.name, call.ops, macs, call.factors, read, written))
    return tuple(calls)


def _count(count: Dim) -> Dimension:
    """An integer, or the text of an expression, as manifests have them."""
    return count if isinstance(count, int) else str(count)


def _tensor_spec(name: str, type: Any) -> TensorSpec:
    return TensorSpec(name, str(type.dtype), tuple(map(_count, type.shape)))


def _expected(module: Module) -> tuple[tuple[Sample, ...], Tolerance]:
    """Random inputs at one or two bindings of the symbols with the outputs expected for them, and how far off code may
    be.

    Where ``module`` rounds values to 16 bits, the outputs are those without this rounding (of its weights as they are
    stored), so that no other program's rounding is taken for the truth.  The tolerance is then the bound of the pass
    that makes such modules, or a multiple of what rounding moves the reference interpreter's outputs, if that is more.
    """
    from trimtab.ir import interpret
    from trimtab.passes.base import Context
    from trimtab.passes.cast_precision import CastPrecision, rounds_values
    from trimtab.passes.contracts import measure
    from trimtab.passes.samples import generate_samples

    rounds, samples, cost = rounds_values(module), [], 0.0
    for sample in generate_samples(module, Context(), _SAMPLE_MACS):
        if sample.special:
            continue
        outputs = interpret(module, sample.inputs)
        if rounds:
            import torch

            wide = interpret(module, sample.inputs, precision=torch.float32)
            wide = tuple(exact.to(found.dtype) for exact, found in zip(wide, outputs, strict=True))
            drifts = [measure(exact, found) for exact, found in zip(wide, outputs, strict=True)]
            cost = max([cost, *(drift.relative for drift in drifts if drift.resolution)])
            outputs = wide
        samples.append(Sample(tuple(map(_to_numpy, sample.inputs)), tuple(map(_to_numpy, outputs))))
    if not rounds:
        return tuple(samples), TOLERANCE
    contract = CastPrecision.contract
    return tuple(samples), Tolerance(max(contract.rtol, _ROUNDING_MARGIN * cost), contract.atol, integers=False)


def _to_numpy(tensor: Any) -> Any:
    import torch

    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()


class _Stages:
    """Times stages and reports their start."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str, fraction: float) -> Iterator[None]:
        if self._progress is not None:
            self._progress(name, fraction)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


__all__ = ["BACKENDS", "PRECISIONS", "Artifact", "compile", "find_backend"]
