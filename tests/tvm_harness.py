"""Compiles modules with the TVM backend inside tests and runs them beside the interpreter."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trimtab.backends.tvm import build
from trimtab.ir import Builder, DType, Module, TensorType, Value, interpret
from trimtab.ir.op import Op


class Compiled:
    """A module compiled for this machine, callable with torch tensors."""

    def __init__(self, module: Module, target: str = "native", threads: int = 2) -> None:
        import tvm_ffi

        self.module = module
        self.code = build(module, target, threads)
        self.directory = tempfile.TemporaryDirectory(prefix="trimtab-test-")
        path = Path(self.directory.name) / "model.so"
        path.write_bytes(self.code.library)
        self.machine = tvm_ffi.load_module(str(path))["vm_load_executable"]()
        self.machine["vm_initialization"](1, 0, 2)
        self.weights = [_aligned(weight) for weight in self.code.weights]

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        import tvm_ffi

        given = [tvm_ffi.from_dlpack(_align(value)) for value in inputs]
        size = self.machine[self.code.arena](*given)
        arena = tvm_ffi.from_dlpack(_align(torch.full((size,), 255, dtype=torch.uint8)))  # floats of it are NaN
        return [torch.from_dlpack(value).clone() for value in self.machine["main"](*given, *self.weights, arena)]


def _align(value: torch.Tensor) -> torch.Tensor:
    """A contiguous copy whose data starts at a multiple of 64 bytes, which generated code relies on."""
    size = value.numel() * value.element_size()
    raw = torch.zeros(size + 64, dtype=torch.uint8)
    offset = -raw.data_ptr() % 64
    copy = raw[offset : offset + size].view(value.dtype).reshape(value.shape)
    copy.copy_(value)
    return copy


def _aligned(weight: Any) -> Any:
    import tvm_ffi

    data = bytearray(b"".join(bytes(block) for block in weight.blocks()))
    flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
    return tvm_ffi.from_dlpack(_align(flat.view(DType(weight.dtype).to_torch()).reshape(weight.shape)))


def module_of(inputs: Sequence[Value] | Sequence[TensorType], *outputs: Any) -> tuple[Module, list[Op]]:
    """A module with one output per op that ``outputs`` builds from the inputs' values.

    Each entry of ``outputs`` is a function of the input values that returns an op, or a list of ops in order of which
    the last one's results are the outputs.
    """
    builder = Builder()
    values = [builder.input(f"x{i}", type) for i, type in enumerate(inputs)]  # type: ignore[arg-type]
    results, made = [], []
    for make in outputs:
        op = builder.add(make(*values))
        made.append(op)
        results += op.results
    builder.output(*results)
    return builder.module, made


def assert_matches(
    module: Module,
    inputs: Sequence[torch.Tensor],
    *,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    compiled: Compiled | None = None,
) -> None:
    """Compile (unless given) and compare every output with the interpreter, NaN and infinity included."""
    code = compiled or Compiled(module)
    got = code(*inputs)
    expected = interpret(module, list(inputs))
    for name, mine, reference in zip(module.main.output_names, got, expected, strict=True):
        producer = module.main.outputs[module.main.output_names.index(name)].producer
        assert mine.dtype == reference.dtype, (name, producer, mine.dtype, reference.dtype)
        assert mine.shape == reference.shape, (name, producer, mine.shape, reference.shape)
        torch.testing.assert_close(
            mine,
            reference,
            rtol=rtol,
            atol=atol,
            equal_nan=True,
            msg=lambda text, p=producer, n=name: f"{n} {p!r}: {text}",
        )


def random(type: TensorType, generator: torch.Generator, scale: float = 1.0) -> torch.Tensor:
    """Random data of a static type: normal floats, small integers, fair coins."""
    shape = tuple(int(d) for d in type.shape)  # type: ignore[arg-type]
    dtype = type.dtype.to_torch()
    if type.dtype is DType.BOOL:
        return torch.rand(shape, generator=generator) < 0.5
    if type.dtype.is_floating:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)
    low = 0 if str(type.dtype).startswith("u") else -9
    return torch.randint(low, 10, shape, generator=generator).to(dtype)
