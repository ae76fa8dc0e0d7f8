"""``compile``: optimise a module, generate code for a target, and put everything in one artifact file.

This is the one place where passes, backends and the runtime's file format meet.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.artifact import Artifact
from trimtab.cores import check_thread_count
from trimtab.errors import UsageError

if TYPE_CHECKING:
    from trimtab.backends.base import Backend
    from trimtab.ir import Module
    from trimtab.passes.observers import Observer
    from trimtab.runtime.session import Session

BACKENDS = {"tvm": "trimtab.backends.tvm.backend", "mlir": "trimtab.backends.mlir.backend"}
"""Module of each code generator, by name."""
AUTO = "auto"
"""What stands for the backend whose code is the fastest on this machine."""

DEFAULT_PIPELINE = "cleanup,fuse"
PRECISIONS = {"f32": "", "bf16": "cast-precision", "f16-storage": "cast-precision{to=f16-storage}"}
"""What ``compile`` takes as precision, and the pass that it stands for."""
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
    target: str | Sequence[str] | None = None,
    backend: str | Sequence[str] = "tvm",
    threads: int | None = None,
    *,
    pipeline: str | None = DEFAULT_PIPELINE,
    calibration: Iterable[Any] | None = None,
    precision: str = "f32",
    include_runtime: bool = True,
    name: str = "",
    progress: Progress | None = None,
    observers: Sequence[Observer] = (),
) -> Artifact:
    """Compile a module for one target or several.

    Args:
        module: from :func:`trimtab.trace`, :func:`trimtab.from_onnx` or :func:`trimtab.read`; it is not changed.
        target: ``native`` for this machine, or a name such as ``x86-64-v3``; None means the portable baseline of this
            machine's architecture. Several names, in a sequence or with commas between them, give one file with code
            for each, of which a machine takes what suits it best.
        backend: the code generator, or several, whose codes are put side by side; ``auto`` builds with each, times
            their code on this machine and keeps the fastest.
        threads: threads to plan for, and what sessions of the file then use by default; None plans for the cores this
            process may use (:func:`trimtab.cores.usable_cores`), and sessions use those of the machine they run on.
        pipeline: passes to run first; None or an empty text for none but those that the backend itself asks for.
        calibration: batches of real inputs for these passes; see :func:`trimtab.optimize`.
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
        PassError, CalibrationError, BackendError, UsageError: see their classes.
    """
    from trimtab.expected_outputs import expected_outputs
    from trimtab.passes.optimize import optimize

    check_thread_count(threads)
    stages = _Stages(progress)
    names = _listed(backend)
    chosen = names == [AUTO]
    generators = _working_backends() if chosen else [find_backend(name) for name in names]
    targets = _listed(target)
    report: Any = None
    pipeline = ",".join(filter(None, (pipeline, _precision_pass(precision))))
    passes = _with_passes_of(generators, pipeline)
    if pipeline:
        module = _without_groups(module)
    if passes:
        with stages("optimize", 0.0):
            timer = _timer(next(iter(BACKENDS)) if chosen else names[0], targets[0], threads)
            result = optimize(module, passes, calibration, observers=observers, seconds=timer)
        module, report = result.module, result.report.to_dict()
    with stages("check capabilities", 0.2):
        for generator in generators:
            for wanted in targets:
                generator.check(module, wanted)
    with stages("generate code", 0.25):
        codes = [generator.build(module, wanted, threads) for generator in generators for wanted in targets]
    with stages("compute expected outputs", 0.9):
        samples, tolerance = expected_outputs(module)
    made = Artifact(
        module, tuple(codes), samples, passes, report, name, include_runtime, threads, stages.seconds, tolerance
    )
    return _fastest(made, stages) if chosen else made


def _listed(names: str | Sequence[str] | None) -> list[str]:
    """Names given as a sequence or with commas between them, each once; an empty one for none."""
    parts = (names or "").split(",") if names is None or isinstance(names, str) else names
    return list(dict.fromkeys(part.strip() for part in parts)) or [""]


def _working_backends() -> list[Backend]:
    """Every backend that works on this machine.

    Raises:
        UsageError: none does.
    """
    found, reasons = [], {}
    for name in BACKENDS:
        generator = find_backend(name)
        status = generator.status()
        reasons[name] = f"{status.reason}: {status.fix}"
        if status.works:
            found.append(generator)
    if not found:
        raise UsageError("no backend works on this machine", values=reasons, fix="trimtab doctor says what to install")
    return found


def _timer(backend: str, target: str, threads: int | None) -> Callable[[Module], float]:
    """What compiles a module for a target and times a call of it.

    It raises a UsageError where this machine cannot run the code.
    """

    def seconds(module: Module) -> float:
        from trimtab.runtime.session import load

        made = compile(module, target or None, backend, threads, pipeline="")
        if not made.runs_here():
            raise UsageError(
                "layers cannot be timed on this machine",
                values={"target": made.code.triple},
                rule="their code must run to be timed",
                fix="compile on a machine of the target's kind, or leave the measuring out",
            )
        with tempfile.TemporaryDirectory(prefix="trimtab-timing-") as directory:
            path = made.save(Path(directory) / "module.trim", check=False)
            with load(path, verify="code", threads=threads) as session:
                return _median_seconds(session, made.samples[0].inputs)

    return seconds


_LEAST_SECONDS, _MOST_CALLS = 0.5, 200


def _fastest(made: Artifact, stages: _Stages) -> Artifact:
    """The artifact with the codes of the backend whose code takes the least time here, measured on the samples.

    Raises:
        UsageError: some code does not run on this machine, so that it cannot be timed.
    """
    from trimtab.runtime.session import load

    measured: dict[str, float] = {}
    with stages("time the backends", 0.95), tempfile.TemporaryDirectory(prefix="trimtab-auto-") as directory:
        for name in dict.fromkeys(code.backend for code in made.codes):
            only = made.of_backend(name)
            if not only.runs_here():
                raise UsageError(
                    "the backends cannot be compared",
                    values={"backend": name, "target": only.code.triple},
                    rule="`auto` times the code, so it must run on this machine",
                    fix="name a backend, or a target of this machine",
                )
            with load(only.save(Path(directory) / f"{name}.trim", check=False), verify="code") as session:
                measured[name] = _median_seconds(session, made.samples[0].inputs)
    return made.of_backend(min(measured, key=measured.__getitem__), measured)


def _median_seconds(session: Session, inputs: Sequence[Any]) -> float:
    session(*inputs)
    times: list[float] = []
    while len(times) < _MOST_CALLS and (len(times) < 3 or sum(times) < _LEAST_SECONDS):
        begin = time.perf_counter()
        session(*inputs)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


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


def _with_passes_of(backends: Sequence[Backend], pipeline: str) -> str:
    """``pipeline``, and after it the passes that the backends ask for and that are not in it."""
    from trimtab.passes.pipeline import Pipeline, parse_pipeline

    given = parse_pipeline(pipeline)
    wanted = {pass_.name: pass_ for backend in backends for pass_ in parse_pipeline(backend.passes).passes}
    known = {pass_.name for pass_ in given.passes}
    return str(Pipeline((*given.items, *(pass_ for name, pass_ in wanted.items() if name not in known))))


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
