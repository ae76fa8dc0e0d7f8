"""What a session takes and gives, and the check of what a caller passes against it.

Nothing is converted silently: a wrong name, dtype, rank or size is an :class:`InputError` that says which, what was
expected and how to get it.  The only things done to an input are copies that keep every value: to native byte order, to
row-major order, and to the 64-byte alignment that generated code assumes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab.errors import InputError
from trimtab.runtime.dimension import evaluate, is_symbol
from trimtab.runtime.manifest import SymbolRange, TensorSpec
from trimtab.tensor_file import STORAGE_TYPES

Array = np.ndarray[Any, Any]

ALIGNMENT = 64
# Memory that the processor can address: plain, and pinned by a CUDA or ROCm driver (DLDeviceType of dlpack.h).
_HOST_DEVICES = {1, 3, 11}

_NAMES = {storage.numpy_dtype: name for name, storage in STORAGE_TYPES.items() if name != "bf16"}


@dataclass(frozen=True)
class Signature:
    """Names, dtypes and shapes of a model's inputs and outputs, and the ranges of the symbols in the shapes."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    symbols: tuple[SymbolRange, ...] = ()

    def __str__(self) -> str:
        text = f"({', '.join(map(str, self.inputs))}) -> ({', '.join(map(str, self.outputs))})"
        return text + (f" where {', '.join(map(str, self.symbols))}" if self.symbols else "")

    def arrange(self, positional: Sequence[Any], named: Mapping[str, Any]) -> list[Any]:
        """The values for :attr:`inputs`, in order, from the arguments of a call.

        Raises:
            InputError: too many, unknown, repeated or missing inputs.
        """
        names = [spec.name for spec in self.inputs]
        if len(positional) > len(names):
            raise self._wrong("too many inputs", {"given": len(positional), "expected": len(names)})
        if not named and len(positional) == len(names):
            return list(positional)
        values = dict(zip(names, positional, strict=False))
        for name, value in named.items():
            if name not in names:
                raise self._wrong("unknown input", {"name": repr(name)})
            if name in values:
                raise self._wrong("an input is given twice", {"name": repr(name)})
            values[name] = value
        missing = [name for name in names if name not in values]
        if missing:
            raise self._wrong("inputs are missing", {"missing": ", ".join(missing)})
        return [values[name] for name in names]

    def check(self, arrays: Sequence[Array]) -> dict[str, int]:
        """Check the shapes of all inputs and return the value of every symbol.

        Raises:
            InputError: wrong rank or size, two sizes for one symbol, or a size out of range.
        """
        values: dict[str, int] = {}
        first: dict[str, str] = {}
        for spec, array in zip(self.inputs, arrays, strict=True):
            if array.ndim != len(spec.shape):
                raise self._wrong_shape("an input has the wrong rank", spec, array)
            for axis, (wanted, size) in enumerate(zip(spec.shape, array.shape, strict=True)):
                if isinstance(wanted, int):
                    if wanted != size:
                        raise self._wrong_shape("an input has the wrong size", spec, array, axis=axis)
                elif is_symbol(wanted) and values.setdefault(wanted, size) != size:
                    rule = f"'{wanted}' is {values[wanted]} in '{first[wanted]}', and must be the same everywhere"
                    raise self._wrong_shape("two inputs contradict each other", spec, array, rule, axis=axis)
                first.setdefault(str(wanted), spec.name)
        for symbol in self.symbols:
            size = values.get(symbol.name, symbol.min)
            if size < symbol.min or (symbol.max is not None and size > symbol.max):
                values_given = {"size": size, "allowed": symbol, "input": first[symbol.name]}
                raise InputError(
                    f"the size '{symbol.name}' is out of range",
                    values=values_given,
                    rule="the code was compiled for sizes in this range",
                    fix="give inputs of an allowed size, or compile the model with a wider range",
                )
        for spec, array in zip(self.inputs, arrays, strict=True):
            for axis, (wanted, size) in enumerate(zip(spec.shape, array.shape, strict=True)):
                if isinstance(wanted, str) and not is_symbol(wanted) and evaluate(wanted, values) != size:
                    rule = f"with the other sizes given, {wanted} is {evaluate(wanted, values)}"
                    raise self._wrong_shape("an input has the wrong size", spec, array, rule, axis=axis)
        return values

    def output_shapes(self, symbols: Mapping[str, int]) -> list[tuple[int, ...]]:
        """Shapes of the outputs for given values of the symbols."""
        return [tuple(evaluate(size, symbols) for size in spec.shape) for spec in self.outputs]

    def _wrong(self, what: str, values: Mapping[str, Any]) -> InputError:
        expected = ", ".join(map(str, self.inputs)) or "nothing"
        return InputError(what, values=values, rule=f"the model takes {expected}")

    def _wrong_shape(self, what: str, spec: TensorSpec, array: Array, rule: str = "", **values: Any) -> InputError:
        shapes = {"input": spec.name, **values, "given": list(array.shape), "expected": f"[{_shape_text(spec)}]"}
        return InputError(what, values=shapes, rule=rule, fix=f"pass an array of shape [{_shape_text(spec)}]")


def _shape_text(spec: TensorSpec) -> str:
    return ", ".join(map(str, spec.shape))


def as_array(spec: TensorSpec, value: Any) -> Array:
    """A caller's value as a numpy array of the input's dtype (raw ``uint16`` bits for ``bf16``), not copied.

    Accepts numpy arrays and scalars, and any object with DLPack in host memory.  A ``bf16`` input also takes a
    ``uint16`` array of raw bits.

    Raises:
        InputError: something else, memory of another device, or the wrong dtype.
    """
    if isinstance(value, np.ndarray):
        array = value
    elif isinstance(value, np.generic):
        array = np.asarray(value)
    elif hasattr(value, "__dlpack__"):
        array = _from_dlpack(spec, value)
    else:
        raise InputError(
            "an input is not an array",
            values={"input": spec.name, "type": type(value).__name__},
            rule="inputs are numpy arrays or objects with DLPack, such as torch tensors",
            fix=f"convert it: numpy.asarray(value, dtype={_numpy_name(spec.dtype)!r})",
        )
    expected = STORAGE_TYPES[spec.dtype].numpy_dtype
    if array.dtype == expected:
        return array
    if spec.dtype == "bf16" and array.dtype.name == "bfloat16":
        return array.view(expected)
    if array.dtype.newbyteorder("=") == expected:
        return array.astype(expected)
    raise _wrong_dtype(spec, _NAMES.get(array.dtype, array.dtype.name))


def _from_dlpack(spec: TensorSpec, value: Any) -> Array:
    kind = int(value.__dlpack_device__()[0])
    if kind not in _HOST_DEVICES:
        raise InputError(
            "an input lies in the memory of another device",
            values={"input": spec.name, "dlpack_device": kind},
            rule="this session computes on the CPU",
            fix="copy it to host memory first, for a torch tensor with .cpu()",
        )
    try:
        if "bfloat16" in str(getattr(value, "dtype", "")):
            if spec.dtype != "bf16":
                raise _wrong_dtype(spec, "bf16")
            return _bits_of_bfloat16(value)
        return np.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            "an input cannot be read through DLPack",
            values={"input": spec.name, "type": type(value).__name__, "reason": error},
            fix="pass a plain array; for a torch tensor that requires a gradient, .detach() it first",
        ) from error


def _bits_of_bfloat16(value: Any) -> Array:
    """A bfloat16 tensor as ``uint16``; numpy cannot read its DLPack form, so the bytes are viewed by their address."""
    import ctypes

    import tvm_ffi

    tensor = tvm_ffi.from_dlpack(value)
    shape, strides = tensor.shape, tuple(2 * stride for stride in tensor.strides)
    if 0 in shape:
        return np.empty(shape, np.uint16)
    extent = 2 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    memory = (ctypes.c_uint8 * extent).from_address(tensor.data_ptr())
    memory.owner = tensor  # keeps the tensor's memory alive as long as the view
    return np.ndarray(shape, np.uint16, buffer=memory, strides=strides)


def _wrong_dtype(spec: TensorSpec, given: str) -> InputError:
    return InputError(
        "an input has the wrong dtype",
        values={"input": spec.name, "given": given, "expected": spec.dtype},
        rule="values are never converted silently",
        fix=f"convert it yourself: value.astype({_numpy_name(spec.dtype)!r})",
    )


def _numpy_name(dtype: str) -> str:
    return "bfloat16" if dtype == "bf16" else STORAGE_TYPES[dtype].numpy_dtype.name


def is_ready(array: Array) -> bool:
    """Whether generated code can read an array where it is: row-major and 64-byte aligned."""
    return array.flags.c_contiguous and array.__array_interface__["data"][0] % ALIGNMENT == 0


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An uninitialized row-major array on a 64-byte boundary."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.__array_interface__["data"][0] % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


class Outputs(tuple[Array, ...]):
    """The outputs of a model with several: a tuple that can also be indexed by output name.

    ``a, b = session(x)`` and ``session(x)["logits"]`` both work.
    """

    names: tuple[str, ...]

    def __new__(cls, names: Sequence[str], arrays: Sequence[Array]) -> Outputs:
        outputs = super().__new__(cls, arrays)
        outputs.names = tuple(names)
        return outputs

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return super().__getitem__(key)
        if key not in self.names:
            raise InputError("no such output", values={"name": repr(key)}, rule=f"there are {', '.join(self.names)}")
        return super().__getitem__(self.names.index(key))

    def keys(self) -> tuple[str, ...]:
        """Output names in order; with them, ``dict(outputs)`` works."""
        return self.names

    def items(self) -> Iterator[tuple[str, Array]]:
        """Pairs of output name and array, in order."""
        return iter(zip(self.names, self, strict=True))
