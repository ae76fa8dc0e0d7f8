"""Load and call code for IREE's virtual machine. Only ``iree-base-runtime`` is needed; nothing of the compiler is."""

from __future__ import annotations

import importlib.metadata
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.errors import ArtifactError, MissingDependencyError
from trimtab.runtime.container import ArtifactReader
from trimtab.runtime.manifest import CodeVariant
from trimtab.runtime.profile import FunctionTime
from trimtab.runtime.signature import Signature
from trimtab.runtime.variants import variant_weights
from trimtab.tensor_file import STORAGE_TYPES

Array = npt.NDArray[Any]

PARAMETER_SCOPE = "model"
"""The scope in which the code asks for its weights, by name."""

_lock = threading.Lock()
_devices: dict[tuple[str, int], Any] = {}


def load_code(
    reader: ArtifactReader, variant: CodeVariant, signature: Signature, threads: int, *, prefer_carried: bool = False
) -> IreeCode:
    """See :func:`trimtab.runtime.variants.load_code`. Files carry no runtime of IREE."""
    _check_release(reader, variant)
    file = reader.weights()
    names = variant_weights(reader, variant)
    weights = {key: file[name].array for key, name in zip(variant.parameters or names, names, strict=True)}
    outputs = [spec.dtype for spec in signature.outputs]
    code = reader.view(variant.library)
    function = IreeFunction(code, weights, variant.entry, variant.driver, threads, outputs)
    return IreeCode(function, [spec.dtype for spec in signature.inputs])


def _check_release(reader: ArtifactReader, variant: CodeVariant) -> None:
    """Refuse code of another release: IREE promises nothing between them, and a wrong call may crash."""
    wanted = variant.requires.get("iree-base-runtime", "")
    try:
        present = importlib.metadata.version("iree-base-runtime")
    except importlib.metadata.PackageNotFoundError:
        return  # said where it is imported
    if wanted and wanted.split(".")[:2] != present.split(".")[:2]:
        raise MissingDependencyError(
            "the installed IREE runtime is of another release than the artifact's code",
            values={"file": reader.path, "built_for": wanted, "installed": present},
            rule="code of IREE runs in the release it was compiled with",
            fix=f"pip install iree-base-runtime=={wanted}, or compile the model again",
        )


class IreeCode:
    """A :class:`~trimtab.runtime.variants.ModelCode` that runs in IREE's virtual machine."""

    def __init__(self, function: IreeFunction, dtypes: Sequence[str]) -> None:
        self._function: IreeFunction | None = function
        self._dtypes = dtypes

    def __call__(self, arrays: Sequence[Array]) -> list[Array]:
        assert self._function is not None  # sessions do not call what they closed
        return self._function(list(zip(self._dtypes, arrays, strict=True)))

    def time_kernels(self, arrays: Sequence[Array], repeat: int) -> list[FunctionTime]:
        return []

    def close(self) -> None:
        self._function = None


class IreeFunction:
    """One function of a compiled model.

    Weights are read where they lie in memory and must not change while this lives. Calls must not overlap.

    Args:
        code: the module, as ``iree-compile`` wrote it.
        weights: arrays by name, C-contiguous; ``bf16`` as the ``uint16`` of their bits.
        entry: the function.
        driver: of IREE's runtime, such as ``local-task`` or ``vulkan``.
        threads: worker threads of a processor; other drivers do not look at it.
        dtypes: the element types of the outputs, such as ``f32``.

    Raises:
        MissingDependencyError: ``iree-base-runtime`` is not installed, or has no such driver or device here.
        ArtifactError: the code does not load.
    """

    def __init__(
        self, code: bytes | memoryview, weights: Mapping[str, Array], entry: str, driver: str, threads: int,
        dtypes: Sequence[str],
    ) -> None:  # fmt: skip
        runtime = _import_runtime()
        device = _device(runtime, driver, threads)
        config = runtime.Config(device=device)
        index = runtime.ParameterIndex()
        # The index keeps a view of each array, not the array: hold them.
        self._weights = {
            name: np.ascontiguousarray(array).reshape(-1).view(np.uint8) for name, array in weights.items()
        }
        for name, data in self._weights.items():
            index.add_buffer(name, data)
        instance = config.vm_instance
        modules = [
            runtime.create_io_parameters_module(instance, index.create_provider(scope=PARAMETER_SCOPE)),
            runtime.create_hal_module(instance, device),
        ]
        try:
            modules.append(runtime.VmModule.copy_buffer(instance, bytes(code)))
            self._function = runtime.load_vm_modules(*modules, config=config)[-1][entry]
        except (RuntimeError, ValueError, KeyError) as error:
            raise ArtifactError(
                "the code for IREE does not load",
                values={"reason": str(error).strip().splitlines()[0][:300]},
                rule="the code must be complete and of the release of the installed iree-base-runtime",
                fix="compile the model again, or install the release named in the artifact",
            ) from error
        self._dtypes = tuple(dtypes)

    def __call__(self, inputs: Sequence[tuple[str, Array]]) -> list[Array]:
        """New output arrays for inputs given with their element types; ``bf16`` is ``uint16`` outside."""
        made = self._function(*(_inward(dtype, array) for dtype, array in inputs))
        outputs = made if isinstance(made, tuple | list) else [made]
        return [_outward(dtype, _to_host(o)) for dtype, o in zip(self._dtypes, outputs, strict=True)]


def _inward(dtype: str, array: Array) -> Array:
    if dtype == "bf16":
        import ml_dtypes

        return array.view(ml_dtypes.bfloat16)
    return array


def _to_host(result: Any) -> Array:
    """A copy of what the device computed."""
    try:
        return np.array(result.to_host())
    except ValueError:
        # IREE 3.13 asks Vulkan to write into an array, which must start at a page: go through memory of the device's.
        return np.array(_staged(result).to_host())


def _staged(result: Any) -> Any:
    """A device array whose memory this process can map, with the elements of ``result``."""
    from iree import runtime

    view, device = result._buffer_view, result._device
    source = view.get_buffer()
    copy = device.allocator.allocate_buffer(
        memory_type=int(runtime.MemoryType.HOST_LOCAL | runtime.MemoryType.DEVICE_VISIBLE),
        allowed_usage=int(runtime.BufferUsage.TRANSFER_TARGET | runtime.BufferUsage.MAPPING_SCOPED),
        allocation_size=source.byte_length(),
    )
    done = device.create_semaphore(0)
    before, after = (runtime.HalFence.create_at(done, value) for value in (0, 1))
    device.queue_copy(source, copy, wait_semaphores=before, signal_semaphores=after)
    after.wait()
    return runtime.DeviceArray(device, runtime.HalBufferView(copy, tuple(view.shape), view.element_type))


def _outward(dtype: str, array: Array) -> Array:
    """The array as callers get it: IREE's integers have no sign."""
    return array.view(STORAGE_TYPES[dtype].numpy_dtype)


def _import_runtime() -> Any:
    try:
        import iree.runtime
    except ImportError as error:
        raise MissingDependencyError(
            "a package that runs compiled models is not installed",
            values={"package": "iree-base-runtime", "reason": error},
            rule="code of the mlir backend runs in IREE's runtime",
            fix="pip install iree-base-runtime",
        ) from error
    return iree.runtime


def _device(runtime: Any, driver: str, threads: int) -> Any:
    """The device of a driver with as many worker threads; made once, as the threads live as long as the process."""
    from iree.runtime import _binding

    with _lock:
        key = driver, threads
        if key not in _devices:
            try:
                if driver == "local-task":
                    runtime.flags.parse_flags(f"--task_topology_group_count={threads}")
                _devices[key] = _binding.create_hal_driver(driver).create_default_device()
            except (RuntimeError, ValueError) as error:
                raise MissingDependencyError(
                    "this machine has no device for the code",
                    values={"driver": driver, "reason": str(error).strip().splitlines()[0][:200]},
                    rule="IREE's runtime found no such driver or no device of it",
                    fix="install the driver, or compile for a processor: --target native",
                ) from error
        return _devices[key]
