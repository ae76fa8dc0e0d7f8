"""Load an artifact and call it: ``session = load("model.trim"); y = session(x)``."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np

from trimtab.cores import check_thread_count
from trimtab.errors import InternalError, UsageError
from trimtab.runtime.arena import Arena
from trimtab.runtime.container import ArtifactReader, Verify
from trimtab.runtime.manifest import CodeVariant, Manifest, TensorSpec
from trimtab.runtime.native_code import Executable, load_executable, select_variant
from trimtab.runtime.profile import FunctionTime, KernelTimer, Profile, Roofs, best_times, kernel_events
from trimtab.runtime.signature import Array, Outputs, Signature, aligned_empty, as_array, is_ready
from trimtab.runtime.threads import resolve_thread_count
from trimtab.tensor_file import STORAGE_TYPES


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
    executable = load_executable(reader, variant, prefer_carried=prefer_carried)
    return Session(reader, executable, variant, count)


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
        threads: how many threads a call uses.
        path: the file.
    """

    def __init__(self, reader: ArtifactReader, executable: Executable, variant: CodeVariant, threads: int) -> None:
        manifest = reader.manifest
        self.path = reader.path
        self.manifest: Manifest = manifest
        self.signature = Signature(manifest.inputs, manifest.outputs, manifest.symbols)
        self.threads = threads
        self._reader: ArtifactReader | None = reader
        self._executable = executable
        self._machine = executable.new_machine()
        self._lock = threading.Lock()
        self._scratch: dict[int, tuple[Array, Any]] = {}
        self._kernels = variant.kernels
        self._weights = self._map_weights(reader, variant.weights)
        self._arena_size = executable.arena_size()
        self._arena = Arena()
        self._arena_tensors: list[Any] = []
        self._arena_shapes: list[tuple[int, ...]] | None = None
        self._weight_addresses = frozenset(tensor.data_ptr() for tensor in self._weights)

    def _map_weights(self, reader: ArtifactReader, names: Sequence[str] | None) -> list[Any]:
        file = reader.weights()
        wanted = [weight.name for weight in self.manifest.weights] if names is None else names
        arrays = [(file[name].dtype, file[name].array) for name in wanted]
        # Weights of foreign files may be unaligned: those are copied once.
        return [self._to_tensor(dtype, array if is_ready(array) else _aligned_copy(array)) for dtype, array in arrays]

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
            return self._run(self._machine, arrays)

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
            self._run(self._machine, arrays)
            calls = []
            for _ in range(repeat):
                begin = time.perf_counter()
                self._run(self._machine, arrays)
                calls.append(time.perf_counter() - begin)
            times = self._time_kernels(arrays, repeat)
        events = kernel_events(times, self._kernels, self.signature.check(arrays))
        return Profile(tuple(calls), events, self.threads, roofs)

    def _time_kernels(self, arrays: Sequence[Array], repeat: int) -> list[FunctionTime]:
        """The functions that a call runs, each with the least time it took in ``repeat`` calls; the lock is held."""
        timer = KernelTimer()
        instrumented = self._executable.new_machine(timer)
        self._run(instrumented, arrays)
        timer.take()
        runs = []
        for _ in range(repeat):
            self._run(instrumented, arrays)
            runs.append(timer.take())
        return best_times(runs)

    def close(self) -> None:
        """Let go of the mapped file. Arrays returned by earlier calls stay valid; further calls are refused."""
        with self._lock:
            self._reader = None
            self._weights = []
            self._scratch = {}
            self._arena, self._arena_tensors, self._arena_shapes = Arena(), [], None

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

    def _run(self, machine: Any, arrays: Sequence[Array]) -> Any:
        """One call; the lock is held."""
        if self._reader is None:
            raise UsageError("the session is closed", values={"path": self.path}, fix="load the file again")
        tensors = [self._input_tensor(index, array) for index, array in enumerate(arrays)]
        pools = self._executable.runtime.pools
        try:
            arena = self._arena_for(arrays, tensors)
            result = pools.run(self.threads, machine, *tensors, *self._weights, *arena)
        except Exception as error:
            # What the failed call left in the machine must not meet the next one.
            self._machine = self._executable.new_machine()
            raise self._failed(error, arrays) from error
        return self._to_outputs(result, tensors)

    def _arena_for(self, arrays: Sequence[Array], tensors: Sequence[Any]) -> list[Any]:
        """The arena as an argument, large enough for these inputs; nothing when the code takes none."""
        if self._arena_size is None:
            return []
        shapes = [array.shape for array in arrays]
        if shapes != self._arena_shapes:
            nbytes = self._arena_size(*tensors)
            if not self._arena_tensors or not self._arena.fits(nbytes):
                self._arena_tensors = []
                self._arena.grow(nbytes)
                self._arena_tensors = [self._to_tensor("u8", self._arena.memory)]
            self._arena_shapes = shapes
        return self._arena_tensors

    def _input_tensor(self, index: int, array: Array) -> Any:
        dtype = self.signature.inputs[index].dtype
        if is_ready(array):
            return self._to_tensor(dtype, array)
        buffer, tensor = self._scratch.get(index, (None, None))
        if buffer is None or buffer.shape != array.shape:
            buffer = aligned_empty(array.shape, array.dtype)
            tensor = self._to_tensor(dtype, buffer)
            self._scratch[index] = buffer, tensor
        np.copyto(buffer, array)
        return tensor

    def _to_tensor(self, dtype: str, array: Array) -> Any:
        runtime = self._executable.runtime
        # Asking for DLPack 1.0 lets numpy hand out read-only arrays, which mapped weights are.
        tensor = runtime.ffi.from_dlpack(array.__dlpack__(max_version=(1, 0)))
        if dtype == "bf16":
            tensor = runtime.view(tensor, "bfloat16")
        return tensor

    def _to_outputs(self, result: Any, inputs: Sequence[Any]) -> Any:
        specs = self.signature.outputs
        tensors = [result] if hasattr(result, "data_ptr") else list(result)
        if len(tensors) != len(specs):
            raise InternalError(
                "the compiled code returned another number of outputs than its signature has",
                values={"path": self.path, "returned": len(tensors), "signature": len(specs)},
            )
        # An output may be an input or a weight passed through, whose memory is not the caller's to keep or write.
        taken = {tensor.data_ptr() for tensor in inputs}
        arrays: list[Array] = []
        for spec, tensor in zip(specs, tensors, strict=True):
            array, address = self._output_array(spec, tensor), tensor.data_ptr()
            arrays.append(array.copy() if address in taken or address in self._weight_addresses else array)
            taken.add(address)
        return arrays[0] if len(arrays) == 1 else Outputs([spec.name for spec in specs], arrays)

    def _output_array(self, spec: TensorSpec, tensor: Any) -> Array:
        if spec.dtype == "bf16":
            tensor = self._executable.runtime.view(tensor, "uint16")
        array = np.from_dlpack(tensor)
        if array.dtype != STORAGE_TYPES[spec.dtype].numpy_dtype:
            raise InternalError(
                "the compiled code returned another dtype than its signature has",
                values={"path": self.path, "output": spec.name, "returned": array.dtype, "signature": spec.dtype},
            )
        return array

    def _failed(self, error: Exception, arrays: Sequence[Array]) -> InternalError:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        shapes = ", ".join(f"{spec.name}{list(a.shape)}" for spec, a in zip(self.signature.inputs, arrays, strict=True))
        return InternalError(
            "the compiled code failed on inputs that fit its signature",
            values={"path": self.path, "inputs": shapes, "reason": lines[-1][:300]},
            rule="either memory ran out, or this is a bug in Trimtab",
            fix="if there is memory left, please report it with the artifact and these input shapes",
        )


def _aligned_copy(array: Array) -> Array:
    copy = aligned_empty(array.shape, array.dtype)
    np.copyto(copy, array)
    return copy
