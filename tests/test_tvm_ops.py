"""Every op: the TVM backend agrees with the reference interpreter on random, ragged, symbolic and special inputs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from op_examples import ALL_EXAMPLES, OpExample, f32, random_inputs
from tvm_harness import Compiled

from trimtab.backends.tvm import unsupported_ops
from trimtab.ir import Builder, DType, Module, Value, interpret, ops

pytest.importorskip("tvm")

UNLIKE_TORCH = {
    "gelu-special",  # torch's vectorised gelu turns infinity into NaN; ours gives the limit
    "layer_norm-large",  # torch loses digits to the large mean; see the test of its own below
}
COMPILED = [e for e in ALL_EXAMPLES if e.cls is not ops.Opaque]
GROUP = 12


def _tolerance(dtype: torch.dtype) -> tuple[float, float]:
    if dtype in (torch.float16, torch.bfloat16):
        return 1e-2, 1e-3
    return (1e-10, 1e-12) if dtype == torch.float64 else (1e-5, 5e-6)


def _joined(examples: Sequence[OpExample]) -> tuple[Module, list[int]]:
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
        from op_examples import BATCH, SEQ

        builder.input("sizes", f32(BATCH, SEQ))
    builder.output(*results)
    return builder.module, counts


def _batches() -> list[list[OpExample]]:
    """Examples in groups of one kind of shape, so that a group is one compilation."""
    groups = []
    for symbolic in (False, True):
        chosen = [example for example in COMPILED if example.is_symbolic == symbolic]
        groups += [chosen[i : i + GROUP] for i in range(0, len(chosen), GROUP)]
    return groups


@pytest.mark.parametrize("examples", _batches(), ids=lambda group: f"{group[0]}..{group[-1]}")
def test_examples_agree_with_the_interpreter(examples: list[OpExample]) -> None:
    module, counts = _joined(examples)
    assert not unsupported_ops(module)
    compiled = Compiled(module)
    for bindings in examples[0].bindings:
        for seed in (0, 1):
            inputs: list[torch.Tensor] = []
            for example in examples:
                inputs += random_inputs(example, bindings, seed)[: len(example.named_types)]
            if examples[0].is_symbolic:
                inputs.append(torch.zeros(bindings["batch"], bindings["seq"]))
            got, expected = iter(compiled(*inputs)), iter(interpret(module, inputs))
            for example, count in zip(examples, counts, strict=True):
                for _ in range(count):
                    mine, reference = next(got), next(expected)
                    if str(example) in UNLIKE_TORCH:
                        continue
                    rtol, atol = _tolerance(reference.dtype)
                    torch.testing.assert_close(
                        mine, reference, rtol=rtol, atol=atol * max(1.0, _size(reference)), equal_nan=True,
                        msg=lambda text, e=example, b=bindings: f"{e} {dict(b)}: {text}",
                    )  # fmt: skip


def _size(tensor: torch.Tensor) -> float:
    if not tensor.is_floating_point():
        return 1.0
    finite = tensor[torch.isfinite(tensor)]
    return float(finite.abs().max()) if finite.numel() and float(finite.abs().max()) < 1e4 else 1.0


def test_layer_norm_is_at_least_as_exact_as_torch_on_a_large_mean() -> None:
    builder = Builder()
    builder.output(builder(ops.LayerNorm(builder.input("x", f32(4, 33)))))
    x = torch.rand(4, 33, generator=torch.Generator().manual_seed(0)) * 2 + 9999
    exact = torch.nn.functional.layer_norm(x.double(), (33,))
    (mine,) = Compiled(builder.module)(x)
    (theirs,) = interpret(builder.module, [x])
    assert (mine - exact).abs().max() <= (theirs - exact).abs().max() + 1e-6


def test_half_types_compute_in_float32() -> None:
    builder = Builder()
    x = builder.input("x", f32(4, 33))
    outputs = []
    for dtype in (DType.F16, DType.BF16):
        half = builder(ops.Cast(x, dtype))
        outputs += [
            builder(ops.Softmax(half, 1)),
            builder(ops.Gelu(half)),
            builder(ops.Sum(half, (1,))),
            builder(ops.RmsNorm(half)),
        ]
    builder.output(*outputs)
    data = torch.randn(4, 33, generator=torch.Generator().manual_seed(1)) * 3
    for mine, reference in zip(Compiled(builder.module)(data), interpret(builder.module, [data]), strict=True):
        assert mine.dtype == reference.dtype
        eps = 2 ** (-10 if mine.dtype == torch.float16 else -7)
        torch.testing.assert_close(mine.float(), reference.float(), rtol=2 * eps, atol=1e-6)
