"""The pass raise-linear: products with a weight become linear, with their bias, and no weight is stored twice."""

from __future__ import annotations

import pytest
import torch
from pass_harness import Golden, assert_same_results, check_case, read, rewritten

from trimtab.frontend.torch_export.trace import import_program
from trimtab.ir.analysis import count_ops
from trimtab.ir.rewrite import Rewrites, apply_rules
from trimtab.passes.raise_linear import ProductWithWeight, RaiseLinear

CASES = {
    "as_transposed": """
symbols batch=1..8
weight @w: f32[6, 4] trainable
weight @b: f32[6]
graph main(%x: f32[batch, 5, 4]) {
  %t = permute(@w) {dims=[1, 0]} : f32[4, 6]
  %a = matmul(%x, %t) : f32[batch, 5, 6]
  %y = add(@b, %a) : f32[batch, 5, 6]
  return y=%y
}""",
    "as_it_is": """
symbols batch=1..8
weight @w: f32[4, 6] trainable
weight @b: f32[1, 1, 6]
graph main(%x: f32[batch, 5, 4]) {
  %a = matmul(%x, @w) : f32[batch, 5, 6]
  %y = add(%a, @b) : f32[batch, 5, 6]
  return y=%y
}""",
    "one_weight_in_two_layers": """
weight @w: f32[4, 4]
graph main(%x: f32[2, 4]) {
  %a = matmul(%x, @w) : f32[2, 4]
  %b = relu(%a) : f32[2, 4]
  %c = matmul(%b, @w) : f32[2, 4]
  %d = relu(%c) : f32[2, 4]
  %e = matmul(%d, @w) : f32[2, 4]
  return e=%e
}""",
    "read_both_ways": """
weight @w: f32[4, 4]
graph main(%x: f32[2, 4]) {
  %a = matmul(%x, @w) : f32[2, 4]
  %b = relu(%a) : f32[2, 4]
  %t = permute(@w) {dims=[1, 0]} : f32[4, 4]
  %c = linear(%b, %t) : f32[2, 4]
  %d = matmul(%c, %t) : f32[2, 4]
  return d=%d
}""",
    "tied_embedding": """
weight @w: f32[50, 4]
graph main(%i: i64[2, 3]) {
  %e = embedding(@w, %i) : f32[2, 3, 4]
  %t = permute(@w) {dims=[1, 0]} : f32[4, 50]
  %y = matmul(%e, %t) : f32[2, 3, 50]
  return y=%y
}""",
    "addmm": """
symbols batch=1..8, seq=1..32
weight @w: f32[6, 4]
weight @b: f32[6]
graph main(%x: f32[batch, seq, 4]) {
  %rows = reshape(%x) {shape=[batch*seq, 4]} : f32[batch*seq, 4]
  %t = permute(@w) {dims=[1, 0]} : f32[4, 6]
  %a = matmul(%rows, %t) : f32[batch*seq, 6]
  %c = add(%a, @b) : f32[batch*seq, 6]
  %d = reshape(%c) {shape=[batch, seq, 6]} : f32[batch, seq, 6]
  %y = linear(%rows, @w) : f32[batch*seq, 6]
  return d=%d, y=%y
}""",
    "read_otherwise": """
symbols batch=1..8
weight @w: f32[4, 4]
weight @batched: f32[3, 4, 4]
weight @vector: f32[4]
weight @u: f32[4, 4]
graph main(%x: f32[4, 4], %z: f32[4], %m: f32[4, 4]) {
  %a = matmul(%x, @w) : f32[4, 4]
  %b = add(%a, @w) : f32[4, 4]
  %c = matmul(%b, @batched) : f32[3, 4, 4]
  %d = matmul(%z, @u) : f32[4]
  %e = matmul(%x, @vector) : f32[4]
  %f = matmul(%x, %m) : f32[4, 4]
  %g = matmul(@u, %x) : f32[4, 4]
  return c=%c, d=%d, e=%e, f=%f, g=%g
}""",
    "sums_that_are_no_bias": """
weight @w: f32[6, 4]
weight @b: f32[6]
weight @shared: f32[1, 6]
weight @one: f32[1]
weight @rows: f32[2, 6]
weight @wide: f32[3, 1, 6]
graph main(%x: f32[2, 4]) {
  %a = linear(%x, @w) : f32[2, 6]
  %c = add(%a, @shared) : f32[2, 6]
  %d = mul(%c, @shared) : f32[2, 6]
  %e = linear(%x, @w) : f32[2, 6]
  %f = add(%e, @one) : f32[2, 6]
  %g = linear(%x, @w) : f32[2, 6]
  %h = add(%g, @rows) : f32[2, 6]
  %i = linear(%x, @w) : f32[2, 6]
  %j = add(%i, @wide) : f32[3, 2, 6]
  %k = linear(%x, @w) : f32[2, 6]
  %l = add(%k, @b) : f32[2, 6]
  %m = add(%k, %l) : f32[2, 6]
  %n = linear(%x, @w, @b) : f32[2, 6]
  %o = add(%n, @b) : f32[2, 6]
  return d=%d, f=%f, h=%h, j=%j, m=%m, o=%o
}""",
    "rows_of_others": """
weight @w: f32[6, 8]
graph main(%x: f32[2, 3, 2, 4]) {
  %rows = reshape(%x) {shape=[6, 8]} : f32[6, 8]
  %y = linear(%rows, @w) : f32[6, 6]
  return y=%y
}""",
}


@pytest.mark.parametrize("case", CASES)
def test_rewrites_as_reviewed(case: str, golden: Golden) -> None:
    module = read(CASES[case])
    result = check_case(golden, f"raise-linear-{case}", "raise-linear", module)
    assert result.weight_bytes == module.weight_bytes
    assert_same_results(module, result, {"batch": 1, "seq": 1}, {"batch": 3, "seq": 7}, {"batch": 8, "seq": 32})


def test_a_transposed_weight_shares_the_data_and_keeps_its_flag() -> None:
    module = read(CASES["as_it_is"])
    result, _ = rewritten(module, "raise-linear")
    weight = result.weights["w.T"]
    assert weight.trainable
    assert weight.tensor().data_ptr() == module.weights["w"].tensor().data_ptr()
    assert torch.equal(weight.tensor(), module.weights["w"].tensor().T)


def test_weights_do_not_grow_wherever_the_rewrites_end() -> None:
    """Of the readers of one weight each may be the last that is rewritten."""
    whole = read(CASES["one_weight_in_two_layers"])
    applied = 0
    for limit in range(5):
        module = read(CASES["one_weight_in_two_layers"])
        applied = apply_rules(module, RaiseLinear().rules(), Rewrites(limit))
        module.drop_unused_weights()
        assert module.weight_bytes == whole.weight_bytes
        assert_same_results(whole, module)
    assert applied == 3


def test_a_weight_that_another_graph_reads_stays_as_it_is() -> None:
    module = read(
        """
weight @w: f32[4, 4]
graph main(%x: f32[2, 4]) {
  %a = matmul(%x, @w) : f32[2, 4]
  %y = repeat([%a], [], []) {n=2} : f32[2, 4] graph (%h: f32[2, 4]) {
    %b = matmul(%h, @w) : f32[2, 4]
    return output=%b
  }
  return y=%y
}"""
    )
    result, (row,) = rewritten(module, "raise-linear")
    assert count_ops(result)["matmul"] == 2
    reasons = ["the weight @w is also read by matmul: its transpose would be a second weight"]
    assert list(row.rules[0]["rejected"]) == reasons
    assert "also read by matmul" in str(ProductWithWeight().explain(module, "a"))


class _Layers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(8, 16)
        self.gate = torch.nn.Linear(8, 16, bias=False)
        self.down = torch.nn.Parameter(torch.randn(16, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(self.up(x) * self.gate(x), self.down) + torch.einsum("bnk->bnk", x)


def test_a_decomposed_program_has_the_linears_of_the_model() -> None:
    torch.manual_seed(0)
    batch = torch.export.Dim("batch", min=1, max=16)
    exported = torch.export.export(_Layers().eval(), (torch.randn(3, 5, 8),), dynamic_shapes=({0: batch},))
    decomposed = import_program(exported.run_decompositions())
    assert count_ops(decomposed)["linear"] == 0
    result, _ = rewritten(decomposed, "cleanup,raise-linear,cleanup")
    counts = count_ops(result)
    assert (counts["linear"], counts["matmul"], counts["reshape"], counts["permute"]) == (3, 0, 0, 0)
    assert all(op.x.type.rank == 3 for op in result.walk() if op.name == "linear")
    (symbol,) = decomposed.symbols()
    assert_same_results(decomposed, result, {symbol: 2}, {symbol: 5})
