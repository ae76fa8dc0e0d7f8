"""The examples of all ops in groups that one compilation runs, for the tests of every backend."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from op_examples import ALL_EXAMPLES, BATCH, SEQ, OpExample, f32, random_inputs

from trimtab.ir import Builder, Module, Value, interpret, ops

GROUP = 12

COMPILED = [example for example in ALL_EXAMPLES if example.cls is not ops.Opaque]

Run = Callable[..., Sequence[torch.Tensor]]


def batches() -> list[list[OpExample]]:
    """Examples in groups of one kind of shape, so that a group is one compilation."""
    groups = []
    for symbolic in (False, True):
        chosen = [example for example in COMPILED if example.is_symbolic == symbolic]
        groups += [chosen[i : i + GROUP] for i in range(0, len(chosen), GROUP)]
    return groups


def joined(examples: Sequence[OpExample]) -> tuple[Module, list[int]]:
    """One module that runs all examples, each on inputs of its own, and the number of outputs of each."""
    builder, counts, results = Builder(), [], []
    symbolic = any(example.is_symbolic for example in examples)
    for n, example in enumerate(examples):
        flat = iter([builder.input(f"x{n}_{i}", type) for i, (_, type) in enumerate(example.named_types)])
        groups: list[Value | tuple[Value, ...] | None] = []
        for given in example.operands:
            many = isinstance(given, tuple)
            groups.append(tuple(next(flat) for _ in given) if many else None if given is None else next(flat))
        regions = [example.body()] if example.body is not None else []
        op = builder.add(example.cls(*groups, *regions, **example.attributes))
        counts.append(len(op.results))
        results += op.results
    if symbolic:
        builder.input("sizes", f32(BATCH, SEQ))
    builder.output(*results)
    return builder.module, counts


def assert_examples_agree(
    examples: Sequence[OpExample], module: Module, counts: Sequence[int], run: Run, unlike: Collection[str] = ()
) -> None:
    """Compare ``run`` with the interpreter for every example but those named in ``unlike``, at several sizes."""
    for bindings in examples[0].bindings:
        for seed in (0, 1):
            inputs: list[torch.Tensor] = []
            for example in examples:
                inputs += random_inputs(example, bindings, seed)[: len(example.named_types)]
            if examples[0].is_symbolic:
                inputs.append(torch.zeros(bindings["batch"], bindings["seq"]))
            got, expected = iter(run(*inputs)), iter(interpret(module, inputs))
            for example, count in zip(examples, counts, strict=True):
                for _ in range(count):
                    mine, reference = next(got), next(expected)
                    if str(example) in unlike:
                        continue
                    rtol, atol = tolerance(reference.dtype)
                    torch.testing.assert_close(
                        mine, reference, rtol=rtol, atol=atol * max(1.0, _size(reference)), equal_nan=True,
                        msg=lambda text, e=example, b=bindings: f"{e} {dict(b)}: {text}",
                    )  # fmt: skip


def tolerance(dtype: torch.dtype) -> tuple[float, float]:
    """Relative and absolute difference allowed between two ways to compute in a type."""
    if dtype in (torch.float16, torch.bfloat16):
        return 1e-2, 1e-3
    return (1e-10, 1e-12) if dtype == torch.float64 else (1e-5, 5e-6)


def _size(tensor: torch.Tensor) -> float:
    if not tensor.is_floating_point():
        return 1.0
    finite = tensor[torch.isfinite(tensor)]
    return float(finite.abs().max()) if finite.numel() and float(finite.abs().max()) < 1e4 else 1.0
