"""Every op: the TVM backend agrees with the reference interpreter on random, ragged, symbolic and special inputs."""

from __future__ import annotations

import pytest
import torch
from backend_examples import assert_examples_agree, batches, joined
from op_examples import OpExample, f32
from tvm_harness import Compiled

from trimtab.backends.tvm import unsupported_ops
from trimtab.ir import Builder, DType, interpret, ops

pytest.importorskip("tvm")

UNLIKE_TORCH = {
    "gelu-special",  # torch's vectorised gelu turns infinity into NaN; ours gives the limit
    "layer_norm-large",  # torch loses digits to the large mean; see the test of its own below
}


@pytest.mark.parametrize("examples", batches(), ids=lambda group: f"{group[0]}..{group[-1]}")
def test_examples_agree_with_the_interpreter(examples: list[OpExample]) -> None:
    module, counts = joined(examples)
    assert not unsupported_ops(module)
    assert_examples_agree(examples, module, counts, Compiled(module), UNLIKE_TORCH)


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
