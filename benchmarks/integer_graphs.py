"""Random quantized graphs, on which the interpreter and compiled code must give identical integers.

    python benchmarks/integer_graphs.py [--graphs 1000] [--backend tvm] [--target native] [--seed 0]

A graph is a chain of one to four products of integers (linear layers, products of two activations, convolutions) with
what stands between them in quantized models: scales, zero points, biases, residual sums, ReLU, clamps. Every op of it
rounds in one way only, so that results are not close but equal.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import trimtab
from trimtab.ir import Builder, DType, Module, TensorType, Value, interpret, ops

GRAPHS_IN_A_MODULE = 25


class _Graph:
    """One random graph; ``draw`` decides about its form, torch's generator about its numbers."""

    def __init__(self, build: Builder, name: str, draw: random.Random, generator: torch.Generator) -> None:
        self._build = build
        self._draw = draw
        self._generator = generator
        is_image = draw.random() < 0.2
        rows, width = draw.choice((1, 2, 5, 8, 17, 33)), draw.choice((3, 8, 16, 20, 32, 64, 72))
        shape = (1, draw.choice((3, 4, 8)), 9, 7) if is_image else (draw.choice((1, 2)), rows, width)
        self._value = build.input(name, TensorType(DType.F32, shape))
        self._integers: Value | None = None

    def outputs(self) -> list[Value]:
        """The integers in the middle of the graph and at its end."""
        kept = []
        for _ in range(self._draw.randint(1, 4)):
            if self._value.type.rank == 4:
                sums = self._convolution()
            elif self._draw.random() < 0.25:
                sums = self._product_of_two()
            else:
                sums = self._linear()
            kept.append(self._after(sums))
        kept.append(self._rounded()[0])
        return list(dict.fromkeys(kept))

    def _uniform(self, low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self._generator) * (high - low) + low

    def _integers_of(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        limits = torch.iinfo(dtype)
        values = torch.randint(limits.min, limits.max + 1, shape, generator=self._generator)
        if self._draw.random() < 0.3:  # the largest sums that there can be
            values = torch.where(values > values.double().mean(), limits.max, limits.min)
        return values.to(dtype)

    def _rounded(self, dtype: DType | None = None) -> tuple[Value, Value, Value | None]:
        """The value in integers, with scale and zero point."""
        dtype = dtype or self._draw.choice((DType.U8, DType.I8))
        bits = self._draw.choice((8, 8, 8, 6, 4))
        low, high = (0, 2**bits - 1) if dtype is DType.U8 else (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
        by_row = self._draw.random() < 0.25 and self._value.type.rank == 3
        shape = (*self._value.type.shape[:-1], 1) if by_row else ()
        scale = self._build.weight("scale", self._uniform(0.5, 8, *shape) / 2**bits)  # type: ignore[arg-type]
        zero = None
        if dtype is DType.U8 or self._draw.random() < 0.3:
            zero = self._build.weight("zero", torch.tensor(self._draw.randint(low, high), dtype=dtype.to_torch()))
        return self._build(ops.Quantize(self._value, scale, zero, dtype=dtype, low=low, high=high)), scale, zero

    def _linear(self) -> Value:
        x = self._rounded()[0]
        outputs, depth = self._draw.choice((1, 7, 16, 40, 64, 100)), x.type.shape[-1]
        weight = self._integers_of(torch.int8, outputs, depth)  # type: ignore[arg-type]
        return self._build(ops.LinearInteger(x, self._build.weight("w", weight)))

    def _product_of_two(self) -> Value:
        x, y = self._rounded()[0], self._rounded(DType.I8)[0]
        return self._build(ops.MatmulInteger(x, self._build(ops.Permute(y, dims=(0, 2, 1)))))

    def _convolution(self) -> Value:
        x, _, zero = self._rounded()
        channels = int(x.type.shape[1])  # type: ignore[call-overload]
        weight = self._integers_of(torch.int8, self._draw.choice((2, 8, 12)), channels, 3, 3)
        return self._build(ops.ConvInteger(
            x, self._build.weight("w", weight), zero, stride=(1, 1), padding=(1, 1), dilation=(1, 1),
        ))  # fmt: skip

    def _after(self, sums: Value) -> Value:
        """What follows a product; the integers that it ends with."""
        shape = [int(size) for size in sums.type.shape]  # type: ignore[call-overload]
        outputs, tail = (shape[1], (1, 1)) if len(shape) == 4 else (shape[-1], ())
        build, draw = self._build, self._draw
        if draw.random() < 0.25:
            multiplier = torch.randint(1 << 30, (1 << 31) - 1, (outputs, *tail), generator=self._generator)
            shift = torch.randint(38, 46, (outputs, *tail), generator=self._generator)
            narrow = build(ops.Requantize(
                sums, build.weight("m", multiplier.int()), build.weight("s", shift.int()), zero=draw.randint(-9, 9),
                dtype=DType.I8, low=-128, high=127,
            ))  # fmt: skip
            self._value = build(ops.Dequantize(narrow, build.weight("scale", self._uniform(0.001, 0.1))))
            return narrow
        offset = None
        if draw.random() < 0.7:
            offset = torch.randint(-(1 << 20), 1 << 20, (outputs, *tail), generator=self._generator).int()
        scale = build.weight("scale", self._uniform(1e-5, 1e-3, outputs, *tail))
        y = build(ops.Dequantize(sums, scale, None if offset is None else build.weight("offset", offset)))
        before = y
        if draw.random() < 0.5:
            y = build(ops.Add(y, build.weight("bias", self._uniform(-1, 1, outputs, *tail))))
        if draw.random() < 0.4:
            y = build(draw.choice((ops.Relu, ops.Neg, ops.Abs))(y))
        if draw.random() < 0.3:
            y = build(ops.Maximum(y, before))
        if draw.random() < 0.3 and y.type == self._value.type:
            y = build(ops.Add(y, self._value))
        self._value = y
        return self._rounded()[0]


def random_modules(count: int, seed: int, at_once: int = GRAPHS_IN_A_MODULE) -> Iterator[tuple[Module, int]]:
    """Modules of ``at_once`` graphs each, ``count`` graphs in all, with the number of graphs."""
    for first in range(0, count, at_once):
        build, number = Builder(), min(at_once, count - first)
        outputs: list[Value] = []
        for graph in range(first, first + number):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + graph)
            its = _Graph(build, f"x{graph}", random.Random(seed * 1_000_003 + graph), generator).outputs()
            outputs += [value for value in its if value not in outputs]
        build.output(*outputs)
        yield build.module, number


def different_integers(module: Module, seed: int, backend: str, target: str) -> int:
    """How many integers of the outputs differ between the interpreter and compiled code, for random inputs."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [
        torch.randn([int(size) for size in value.type.shape], generator=generator) * 3  # type: ignore[call-overload]
        for value in module.main.inputs
    ]
    with tempfile.TemporaryDirectory(prefix="trimtab-integers-") as directory:
        made = trimtab.compile(module, target=target, backend=backend, pipeline="cleanup")
        with trimtab.load(made.save(Path(directory) / "graphs.trim", check=False)) as session:
            found = session(*(x.numpy() for x in inputs))
    found = found if isinstance(found, tuple | list) else (found,)
    expected = interpret(module, inputs)
    return sum(int((torch.as_tensor(a) != b).sum()) for a, b in zip(found, expected, strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--graphs", type=int, default=1000)
    parser.add_argument("--backend", default="tvm")
    parser.add_argument("--target", default="native")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    different = 0
    for module, _ in random_modules(options.graphs, options.seed):
        different += different_integers(module, options.seed, options.backend, options.target)
    print(f"{options.graphs} random quantized graphs, {options.backend} for {options.target}: "
          f"{different} integers differ from the interpreter's")  # fmt: skip
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
