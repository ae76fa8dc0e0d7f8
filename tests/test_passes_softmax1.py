"""The pass softmax1: one more in the denominator of softmax, against the formula."""

from __future__ import annotations

import pytest
import torch
from calibrated_models import Decoder, language_model, token_ids, vision_model
from pass_harness import read
from torch import Tensor

from trimtab.errors import PassError, UsageError
from trimtab.ir import Module, interpret, ops
from trimtab.passes import PassManager, load_pass
from trimtab.passes.base import Context

HEADER = "symbols batch=1..8, n=1..32, m=1..32\n"


def attention_module(kind: str, mask: str = "", causal: bool = False, groups: int = 4, keys: str = "m") -> Module:
    """Attention of 4 heads over symbolic sizes, with a mask of the type given."""
    operands = "%q, %k, %v, %mask" if mask else "%q, %k, %v"
    return read(
        HEADER
        + f"""graph main(%q: {kind}[batch, 4, n, 3], %k: {kind}[batch, {groups}, {keys}, 3],
  %v: {kind}[batch, {groups}, {keys}, 5]{f", %mask: {mask}" if mask else ""}) {{
  %y = attention({operands}) {{scale=0.7{", causal=true" if causal else ""}}} : {kind}[batch, 4, n, 5]
  return y=%y
}}"""
    )


def rewritten(module: Module, passes: str = "softmax1") -> Module:
    result, _ = PassManager(passes, check="never").run(module)
    return result


def formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """exp(s - m) / (exp(-m) + sum exp(s - m)) V with m = max(0, max s), row by row."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = 0.7 * torch.einsum("bhnd,bhmd->bhnm", q, k)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if causal:
        rows, columns = torch.arange(scores.shape[-2]), torch.arange(scores.shape[-1])
        scores = scores.masked_fill(columns > rows[:, None], -torch.inf)
    top = scores.amax(-1, keepdim=True).clamp(min=0)
    shares = torch.exp(scores - top)
    return torch.einsum("bhnm,bhme->bhne", shares / (torch.exp(-top) + shares.sum(-1, keepdim=True)), v)


@pytest.mark.parametrize("sizes", [(2, 5, 7), (1, 1, 1), (3, 6, 6), (2, 9, 4)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "mask",
    ["", "bool[batch, 1, n, m]", "f64[batch, 4, n, m]", "bool[batch, 1, 1, m]", "bool[batch, 1, n, 1]", "f64[n, m]"],
)
def test_attention_follows_the_formula(mask: str, causal: bool, sizes: tuple[int, int, int]) -> None:
    module = attention_module("f64", mask, causal, groups=2)
    result = rewritten(module)
    batch, n, m = sizes
    q, k, v = (
        torch.randn(shape, dtype=torch.float64) * 2 for shape in ((batch, 4, n, 3), (batch, 2, m, 3), (batch, 2, m, 5))
    )
    inputs, given = [q, k, v], None
    if mask:
        shape = [{"batch": batch, "n": n, "m": m}.get(s) or int(s) for s in mask[:-1].split("[")[1].split(", ")]
        given = torch.rand(shape) < 0.6
        if mask.startswith("f64"):
            given = torch.where(given, torch.randn(shape, dtype=torch.float64), -torch.inf)
        inputs.append(given)
    (y,) = interpret(result, inputs)
    torch.testing.assert_close(y, formula(q, k, v, given, causal), rtol=1e-12, atol=1e-12)


def test_a_causal_attention_stays_causal_without_a_mask() -> None:
    result = rewritten(attention_module("f32", causal=True))
    (attention,) = [op for op in result.main.ops if isinstance(op, ops.Attention)]
    assert attention.causal
    assert attention.mask is None


@pytest.mark.parametrize("dim", [1, 3])
def test_softmax_that_a_product_reads(dim: int) -> None:
    module = read(
        HEADER
        + f"""graph main(%s: f64[batch, 4, n, m], %v: f64[batch, 4, m, 5]) {{
  %p = softmax(%s) {{dim={dim}}} : f64[batch, 4, n, m]
  %y = matmul(%p, %v) : f64[batch, 4, n, 5]
  %c = softmax(%y) {{dim=3}} : f64[batch, 4, n, 5]
  return y=%y, c=%c
}}"""
    )
    result = rewritten(module)
    s, v = torch.randn(2, 4, 5, 7, dtype=torch.float64) * 3, torch.randn(2, 4, 7, 5, dtype=torch.float64)
    s[0, :, 2] = -torch.inf
    y, c = interpret(result, (s, v))
    expected = (torch.exp(s) / (1 + torch.exp(s).sum(dim, keepdim=True))) @ v
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    # A classifier's softmax is none of attention.
    torch.testing.assert_close(c, torch.softmax(expected, -1), rtol=1e-12, atol=1e-12)


def test_layers_are_numbered_in_order() -> None:
    module, _ = PassManager("cleanup,raise").run(vision_model())
    every, first_and_last = rewritten(module), rewritten(module, "softmax1{layers=[0, 2]}")

    def sizes(changed: Module) -> list[object]:
        return [op.k.type.shape[-2] for op in changed.main.ops if isinstance(op, ops.Attention)]

    assert sizes(every) == [27, 27, 27]
    assert sizes(first_and_last) == [27, 26, 27]
    with pytest.raises(PassError, match="a layer that the model does not have") as failure:
        rewritten(module, "softmax1{layers=[3]}")
    assert isinstance(failure.value.__cause__, UsageError)


def test_the_manager_takes_it_as_lossy() -> None:
    module, _ = PassManager("cleanup,fuse").run(language_model(Decoder))
    result, report = PassManager("softmax1").run(module, Context(((token_ids(2, 7),),)))
    assert report.rows[-1].drift is not None
    assert report.rows[-1].drift.relative > 1e-4
    assert load_pass("softmax1")().grows_weights is False
    assert result.weight_bytes == module.weight_bytes
