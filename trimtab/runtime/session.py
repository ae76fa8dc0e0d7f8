"""Load an artifact and call it: ``session = load("model.trim"); y = session(x)``."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from trimtab.cores import check_thread_count
from trimtab.errors import InternalError, TrimtabError, UsageError
from trimtab.runtime.container import ArtifactReader, Verify
from trimtab.runtime.manifest import CodeVariant, Manifest
from trimtab.runtime.profile import Profile, Roofs, kernel_events
from trimtab.runtime.signature import Array, Outputs, Signature, as_array
from trimtab.runtime.threads import resolve_thread_count
from trimtab.runtime.variants import ModelCode, load_code, select_variant


def load(
    path: str | os.PathLike[str],
    threads: int | None = None,
    *,
    verify: Verify = "full",
    prefer_carried: bool = False,
) -> Session:
    """Load an artifact for this machine.

    Args:
        path: a ``.trim`` file.
        threads: threads to compute with, the caller's included; by default what the artifact was compiled for, and
            without that every core this process may use (:func:`trimtab.cores.usable_cores`).
        verify: ``"full"`` compares the SHA-256 of every entry; ``"code"`` leaves out weights and sample data, for files
            of many gigabytes from a source you trust.
        prefer_carried: use the runtime library carried in the file even where a ``tvm`` package is installed.

    Raises:
        UsageError: no such file, or a bad option.
        ArtifactError: the file is damaged or truncated, has an unknown schema, or does not fit this machine.
        MissingDependencyError: ``apache-tvm-ffi`` (or a runtime library the file leaves out) is not installed.
    """
    check_thread_count(threads)
    reader = ArtifactReader(path, verify=verify)
    count = resolve_thread_count(threads, reader.manifest.threads)
    variant = select_variant(reader.manifest.variants, reader.path)
    manifest = reader.manifest
    signature = Signature(manifest.inputs, manifest.outputs, manifest.symbols)
    code = load_code(reader, variant, signature, count, prefer_carried=prefer_carried)
    return Session(reader, code, variant, signature, count)


class Session:
    """A loaded model.

    Weights are mapped from the file, not copied: processes that load one file share them, and the file must not be
    changed in place while a session is open (replacing it is fine).

    A session may be used from several threads; calls wait for each other.  For calls that run at the same time load the
    file once per thread: code and weights are still shared, and each session has memory of its own for intermediate
    tensors, which it keeps until it is closed.  Made by :func:`load`.

    Attributes:
        signature: names, dtypes, shapes and symbol ranges.
        manifest: everything the artifact says about itself.
        variant: the code that runs, of those the artifact carries.
        threads: how many threads a call uses.
        path: the file.
    """

    def __init__(self, reader: ArtifactReader, code: ModelCode, variant: CodeVariant, signature: Signature,
                 threads: int) -> None:  # fmt: skip
        self.path = reader.path
        self.manifest: Manifest = reader.manifest
        self.variant = variant
        self.signature = signature
        self.threads = threads
        self._reader: ArtifactReader | None = reader
        self._code = code
        self._lock = threading.Lock()

    def __call__(self, *inputs: Any, **named_inputs: Any) -> Any:
        """Run the model.

        Args:
            inputs: arrays in the order of the signature: numpy, or anything with DLPack in host memory.
            named_inputs: arrays by input name; names that are no Python identifiers go through ``**{"a.b": x}``.

        Returns:
            One new array if the model has one output, else :class:`~trimtab.runtime.signature.Outputs`, a tuple that
            can be indexed by output name.  ``bf16`` outputs are ``uint16`` arrays of their bits.

        Raises:
            InputError: wrong names, dtypes, ranks or sizes.
            UsageError: the session is closed.
            InternalError: the compiled code failed.
        """
        arrays = self._check(inputs, named_inputs)
        with self._lock:
            outputs = self._run(arrays)
        return outputs[0] if len(outputs) == 1 else Outputs([spec.name for spec in self.signature.outputs], outputs)

    def profile(self, *inputs: Any, repeat: int = 20, roofs: Roofs | None = None, **named_inputs: Any) -> Profile:
        """Time calls: one to warm up, ``repeat`` whole calls, then as many with a timer around every kernel.

        Args:
            inputs, named_inputs: as for a call.
            repeat: how many calls of each sort.
            roofs: what this machine can do at most with as many threads, to compare with.

        Returns:
            Times per call, and the least time of every kernel, where the code calls its kernels through the virtual
            machine.

        Raises:
            UsageError: ``repeat`` is less than one; other errors as for a call.
        """
        if repeat < 1:
            raise UsageError("bad number of repetitions", values={"repeat": repeat}, rule="it must be at least 1")
        arrays = self._check(inputs, named_inputs)
        with self._lock:
            self._run(arrays)
            calls = []
            for _ in range(repeat):
                begin = time.perf_counter()
                self._run(arrays)
                calls.append(time.perf_counter() - begin)
            times = self._code.time_kernels(arrays, repeat)
        events = kernel_events(times, self.variant.kernels, self.signature.check(arrays))
        return Profile(tuple(calls), events, self.threads, roofs)

    def close(self) -> None:
        """Let go of the mapped file. Arrays returned by earlier calls stay valid; further calls are refused."""
        with self._lock:
            self._reader = None
            self._code.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "" if self._reader is not None else ", closed"
        return f"Session({self.path!r}, {self.signature}, threads={self.threads}{state})"

    def _check(self, positional: Sequence[Any], named: dict[str, Any]) -> list[Array]:
        values = self.signature.arrange(positional, named)
        arrays = [as_array(spec, value) for spec, value in zip(self.signature.inputs, values, strict=True)]
        self.signature.check(arrays)
        return arrays

    def _run(self, arrays: Sequence[Array]) -> list[Array]:
        """One call; the lock is held."""
        if self._reader is None:
            raise UsageError("the session is closed", values={"path": self.path}, fix="load the file again")
        try:
            return self._code(arrays)
        except TrimtabError:
            raise
        except Exception as error:
            raise self._failed(error, arrays) from error

    def _failed(self, error: Exception, arrays: Sequence[Array]) -> InternalError:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        shapes = ", ".join(f"{spec.name}{list(a.shape)}" for spec, a in zip(self.signature.inputs, arrays, strict=True))
        return InternalError(
            "the compiled code failed on inputs that fit its signature",
            values={"path": self.path, "inputs": shapes, "reason": lines[-1][:300]},
            rule="either memory ran out, or this is a bug in Trimtab",
            fix="if there is memory left, please report it with the artifact and these input shapes",
        )
