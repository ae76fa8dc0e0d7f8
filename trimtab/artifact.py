"""What ``compile`` returns: code for one or several targets with its weights, ready to be written as one file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab import __version__
from trimtab.errors import ArtifactError, InternalError
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
    from trimtab.backends.base import CompiledCode, StoredWeight
    from trimtab.ir import Module
    from trimtab.ir.dims import Dim

# Outputs may differ from the float32 reference by this much: another order of summation, other polynomials.
TOLERANCE = Tolerance(rtol=1e-4, atol=1e-6)


@dataclass(frozen=True)
class Artifact:
    """A compiled module that has not been written yet.

    Attributes:
        module: the optimised module the code was made from.
        codes: the code for each target, with the weights as it reads them; the first that fits a machine best is used.
        samples: inputs and expected outputs for the self-check.
        pipeline: the passes that ran.
        report: their report, plain data.
        name: what the model is called.
        include_runtime: whether the file carries the runtime library.
        threads: what sessions use by default; None for the cores of their machine.
        seconds: time per stage of compilation.
        tolerance: how far outputs may be from the samples' in the self-check.
        measured: median seconds of a call on this machine by backend, where ``compile`` chose the fastest.
    """

    module: Module
    codes: tuple[CompiledCode, ...]
    samples: tuple[Sample, ...]
    pipeline: str = ""
    report: Any = None
    name: str = ""
    include_runtime: bool = True
    threads: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    tolerance: Tolerance = TOLERANCE
    measured: dict[str, float] = field(default_factory=dict)

    @property
    def precision(self) -> str:
        """One of :data:`trimtab.compiler.PRECISIONS`: what the passes that ran made of the module."""
        from trimtab.passes.cast_precision import CastPrecision
        from trimtab.passes.pipeline import parse_pipeline

        casts = [pass_.to for pass_ in parse_pipeline(self.pipeline).passes if isinstance(pass_, CastPrecision)]
        return casts[0] if casts else "f32"

    @property
    def code(self) -> CompiledCode:
        """The first of the codes."""
        return self.codes[0]

    @property
    def manifest(self) -> Manifest:
        """The manifest without hashes, which exist once the file is written."""
        main, stored = self.module.main, self._stored
        return Manifest(
            inputs=tuple(_tensor_spec(value.name, value.type) for value in main.inputs),
            outputs=tuple(_tensor_spec(n, v.type) for n, v in zip(main.output_names, main.outputs, strict=True)),
            variants=tuple(self._variant(number, code) for number, code in enumerate(self.codes)),
            name=self.name,
            symbols=tuple(SymbolRange(s.name, s.min, s.max) for s in self.module.symbols().values()),
            weights=tuple(
                WeightEntry(
                    name,
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
                for name, weight in stored.items()
            ),
            versions={
                "trimtab": __version__,
                **{name: version for code in self.codes for name, version in code.requires.items()},
            },
            pipeline=self.pipeline,
            report=self.report,
            memory={purpose: _count(nbytes) for purpose, nbytes in self.code.memory.items()},
            threads=self.threads,
            tolerance=self.tolerance,
            precision=self.precision,
        )

    def of_backend(self, name: str, measured: dict[str, float] | None = None) -> Artifact:
        """The artifact with the codes of one backend only."""
        codes = tuple(code for code in self.codes if code.backend == name)
        return replace(self, codes=codes, measured=measured or {})

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
            if check and self.runs_here():
                _check_in_fresh_process(draft)
            os.replace(draft, path)
        return path

    @property
    def _stored(self) -> dict[str, StoredWeight]:
        """The weights of the file by the name they have in it: what several codes read in one form is there once."""
        return {
            name: weight for code in self.codes for name, weight in zip(self._names(code), code.weights, strict=True)
        }

    def _names(self, code: CompiledCode) -> list[str]:
        """The names in the file of what ``code`` reads: a weight's own for the form that the first code reads."""
        forms: dict[str, list[Form]] = {}
        for other in self.codes:
            for weight in other.weights:
                known = forms.setdefault(weight.name, [])
                if _form(weight) not in known:
                    known.append(_form(weight))
        numbers = [forms[weight.name].index(_form(weight)) for weight in code.weights]
        return [
            w.name if number == 0 else f"{w.name}#{number}" for w, number in zip(code.weights, numbers, strict=True)
        ]

    def _variant(self, number: int, code: CompiledCode) -> CodeVariant:
        names = self._names(code)
        return CodeVariant(
            target=code.triple,
            library=_entry(number, code),
            backend=code.backend,
            entry=code.entry,
            features=code.features,
            runtime=tuple(f"code/{path.name}" for path in self._runtime_libraries(code)),
            weights=tuple(names) if len(self.codes) > 1 else None,
            parameters=tuple(weight.name for weight in code.weights) if len(self.codes) > 1 else (),
            requires=dict(code.requires),
            kernels=_kernel_calls(code),
            arena=code.arena,
            driver=code.driver,
        )

    def _runtime_libraries(self, code: CompiledCode) -> tuple[Path, ...]:
        return code.runtime_libraries if self.include_runtime else ()

    def _write(self, path: Path) -> None:
        stored = self._stored
        weights = {name: TensorSource(w.dtype, w.shape, w.blocks) for name, w in stored.items()}
        expected = sum(len(code.library) for code in self.codes) + sum(weight.nbytes for weight in stored.values())
        libraries = dict.fromkeys(library for code in self.codes for library in self._runtime_libraries(code))
        with ArtifactWriter(path, expected_bytes=expected) as writer:
            writer.add_bytes(MODULE_ENTRY, str(self.module).encode())
            for number, code in enumerate(self.codes):
                writer.add_bytes(_entry(number, code), code.library)
            for library in libraries:
                writer.add_file(f"code/{library.name}", library)
            writer.add_bytes(CHECK_ENTRY, encode_samples(self.samples))
            with writer.open_entry(WEIGHTS_ENTRY) as file:
                write_tensors(file, weights)
            writer.finish(self.manifest)

    def runs_here(self) -> bool:
        """Whether this machine can run one of the codes."""
        from trimtab.runtime.variants import select_variant

        try:
            select_variant(self.manifest.variants, self.name)
        except ArtifactError:
            return False
        return True


Form = tuple[str, tuple[int, ...], str]


def _form(weight: StoredWeight) -> Form:
    """What tells two ways to store a weight apart."""
    layout = "" if weight.layout is None else json.dumps(dict(weight.layout), sort_keys=True)
    return weight.dtype, weight.shape, layout


def _entry(number: int, code: CompiledCode) -> str:
    """Where the file keeps the code."""
    return f"code/model{f'-{number}' if number else ''}{code.suffix}"


SELF_CHECK_SECONDS = 1800
"""A self-check computes one small input; one that takes longer than this hangs, perhaps in a driver."""


def _check_in_fresh_process(path: Path) -> None:
    """Run ``trimtab.runtime.self_check``, which imports neither torch nor the compiler."""
    command = [sys.executable, "-m", "trimtab.runtime.self_check", str(path), "--json", "--carried"]
    package_root = str(Path(__file__).resolve().parent.parent)
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, timeout=SELF_CHECK_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise ArtifactError(
            "the self-check of the compiled model did not end",
            values={"file": path.name, "seconds": SELF_CHECK_SECONDS},
            rule="a file that does not run is not reported as built",
            fix="look whether the device is busy or its driver hangs; save(check=False) writes the file unchecked",
        ) from None
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
