"""Call the code of the tvm backend: arrays to tensors of TVM and back, weights mapped, one arena a session."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trimtab.errors import InternalError
from trimtab.runtime.arena import Arena
from trimtab.runtime.container import ArtifactReader
from trimtab.runtime.manifest import CodeVariant, TensorSpec
from trimtab.runtime.native_code import Executable, load_executable
from trimtab.runtime.profile import FunctionTime, KernelTimer, best_times
from trimtab.runtime.signature import Array, Signature, aligned_empty, is_ready
from trimtab.runtime.variants import variant_weights
from trimtab.tensor_file import STORAGE_TYPES


def load_code(
    reader: ArtifactReader, variant: CodeVariant, signature: Signature, threads: int, *, prefer_carried: bool = False
) -> TvmCode:
    """See :func:`trimtab.runtime.variants.load_code`."""
    executable = load_executable(reader, variant, prefer_carried=prefer_carried)
    return TvmCode(executable, reader, variant_weights(reader, variant), signature, threads)


class TvmCode:
    """A :class:`~trimtab.runtime.variants.ModelCode` that runs in TVM's virtual machine.

    Attributes:
        runtime: the loaded runtime of TVM.
    """

    def __init__(
        self, executable: Executable, reader: ArtifactReader, weights: Sequence[str], signature: Signature, threads: int
    ) -> None:
        self.runtime = executable.runtime
        self._executable = executable
        self._machine = executable.new_machine()
        self._signature = signature
        self._threads = threads
        self._scratch: dict[int, tuple[Array, Any]] = {}
        self._weights = self._map_weights(reader, weights)
        self._arena_size = executable.arena_size()
        self._arena = Arena()
        self._arena_tensors: list[Any] = []
        self._arena_shapes: list[tuple[int, ...]] | None = None
        self._weight_addresses = frozenset(tensor.data_ptr() for tensor in self._weights)

    def __call__(self, arrays: Sequence[Array]) -> list[Array]:
        try:
            return self._run(self._machine, arrays)
        except InternalError:
            raise
        except Exception:
            # What the failed call left in the machine must not meet the next one.
            self._machine = self._executable.new_machine()
            raise

    def time_kernels(self, arrays: Sequence[Array], repeat: int) -> list[FunctionTime]:
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
        self._weights = []
        self._scratch = {}
        self._arena, self._arena_tensors, self._arena_shapes = Arena(), [], None

    def _map_weights(self, reader: ArtifactReader, names: Sequence[str]) -> list[Any]:
        file = reader.weights()
        arrays = [(file[name].dtype, file[name].array) for name in names]
        # Weights of foreign files may be unaligned: those are copied once.
        return [self._to_tensor(dtype, array if is_ready(array) else _aligned_copy(array)) for dtype, array in arrays]

    def _run(self, machine: Any, arrays: Sequence[Array]) -> list[Array]:
        tensors = [self._input_tensor(index, array) for index, array in enumerate(arrays)]
        arena = self._arena_for(arrays, tensors)
        result = self.runtime.pools.run(self._threads, machine, *tensors, *self._weights, *arena)
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
        dtype = self._signature.inputs[index].dtype
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
        runtime = self.runtime
        # Asking for DLPack 1.0 lets numpy hand out read-only arrays, which mapped weights are.
        tensor = runtime.ffi.from_dlpack(array.__dlpack__(max_version=(1, 0)))
        if dtype == "bf16":
            tensor = runtime.view(tensor, "bfloat16")
        return tensor

    def _to_outputs(self, result: Any, inputs: Sequence[Any]) -> list[Array]:
        specs = self._signature.outputs
        tensors = [result] if hasattr(result, "data_ptr") else list(result)
        if len(tensors) != len(specs):
            raise InternalError(
                "the compiled code returned another number of outputs than its signature has",
                values={"returned": len(tensors), "signature": len(specs)},
            )
        # An output may be an input or a weight passed through, whose memory is not the caller's to keep or write.
        taken = {tensor.data_ptr() for tensor in inputs}
        arrays: list[Array] = []
        for spec, tensor in zip(specs, tensors, strict=True):
            array, address = self._output_array(spec, tensor), tensor.data_ptr()
            arrays.append(array.copy() if address in taken or address in self._weight_addresses else array)
            taken.add(address)
        return arrays

    def _output_array(self, spec: TensorSpec, tensor: Any) -> Array:
        if spec.dtype == "bf16":
            tensor = self.runtime.view(tensor, "uint16")
        array = np.from_dlpack(tensor)
        if array.dtype != STORAGE_TYPES[spec.dtype].numpy_dtype:
            raise InternalError(
                "the compiled code returned another dtype than its signature has",
                values={"output": spec.name, "returned": array.dtype, "signature": spec.dtype},
            )
        return array


def _aligned_copy(array: Array) -> Array:
    copy = aligned_empty(array.shape, array.dtype)
    np.copyto(copy, array)
    return copy
