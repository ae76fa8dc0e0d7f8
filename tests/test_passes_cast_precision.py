"""cast-precision: where values are rounded, which weights are stored, what stays, and the contract."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pass_harness import Golden, check_case, read, rewritten
from random_graphs import modules
from random_transformers import transformers

from trimtab.errors import ContractError
from trimtab.ir import Builder, DType, Module, TensorType, interpret, ops
from trimtab.ir.rewrite.log import Rewrites
from trimtab.ir.weights import ComputedSource, Weight
from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.cast_precision import CastPrecision, rounds_values
from trimtab.passes.contracts import Close, measure
from trimtab.passes.manager import PassManager

F32, BF16, F16 = DType.F32, DType.BF16, DType.F16
BF, HALF = "cast-precision", "cast-precision{to=f16-storage}"

CASES: dict[str, tuple[str, str]] = {
    # One rounding before each product and none in front of the sum, which stays in float32.
    "mlp": (
        BF,
        """
symbols n=1..64
weight @up: f32[16, 8]
weight @up_bias: f32[16]
weight @down: f32[8, 16]
graph main(%x: f32[n, 8]) {
  %normed = layer_norm(%x) : f32[n, 8]
  %h = linear(%normed, @up, @up_bias) : f32[n, 16]
  %a = gelu(%h) : f32[n, 16]
  %d = linear(%a, @down) : f32[n, 8]
  %y = add(%x, %d) : f32[n, 8]
  return y=%y
}""",
    ),
    # From the product of queries, keys and values to the next one nothing is widened. The lowest number of float32,
    # which hides keys, stays finite.
    "attention": (
        BF,
        """
symbols n=1..64
weight @qkv: f32[24, 8]
weight @out: f32[8, 8]
graph main(%x: f32[n, 8], %mask: f32[n, n]) {
  %p = linear(%x, @qkv) : f32[n, 24]
  %parts = reshape(%p) {shape=[n, 3, 2, 4]} : f32[n, 3, 2, 4]
  %turned = permute(%parts) {dims=[1, 2, 0, 3]} : f32[3, 2, n, 4]
  %q = select(%turned) {dim=0, index=0} : f32[2, n, 4]
  %k = select(%turned) {dim=0, index=1} : f32[2, n, 4]
  %v = select(%turned) {dim=0, index=2} : f32[2, n, 4]
  %a = attention(%q, %k, %v, %mask) {scale=0.5} : f32[2, n, 4]
  %back = permute(%a) {dims=[1, 0, 2]} : f32[n, 2, 4]
  %flat = reshape(%back) {shape=[n, 8]} : f32[n, 8]
  %o = linear(%flat, @out) : f32[n, 8]
  return o=%o
}""",
    ),
    "constant_masks": (
        BF,
        """
weight @bias: f32[2, 5, 5]
graph main(%q: f32[2, 5, 4], %keep: bool[5, 5]) {
  %a = attention(%q, %q, %q, @bias) {scale=0.5} : f32[2, 5, 4]
  %zero = full() {value=0.0, dtype=f32} : f32[]
  %never = full() {value=-inf, dtype=f32} : f32[]
  %m = where(%keep, %zero, %never) : f32[5, 5]
  %b = attention(%a, %q, %q, %m) {scale=0.5} : f32[2, 5, 4]
  return b=%b
}""",
    ),
    # Images: a maximum of rounded numbers is the rounded maximum, so what is stored between convolutions is bfloat16.
    "convolutions": (
        BF,
        """
symbols b=1..8
weight @first: f32[4, 3, 3, 3]
weight @bias: f32[4]
weight @second: f32[6, 4, 1, 1]
graph main(%x: f32[b, 3, 8, 8]) {
  %c = conv2d(%x, @first, @bias) {stride=[1, 1], padding=[1, 1], dilation=[1, 1]} : f32[b, 4, 8, 8]
  %r = relu(%c) : f32[b, 4, 8, 8]
  %m = max_pool2d(%r) {kernel=[2, 2], stride=[2, 2]} : f32[b, 4, 4, 4]
  %d = conv2d(%m, @second) {stride=[1, 1], padding=[0, 0], dilation=[1, 1]} : f32[b, 6, 4, 4]
  return d=%d
}""",
    ),
    # One table for both ends of a language model: it is looked up in bfloat16.
    "tied": (
        BF,
        """
symbols n=1..64
weight @table: f32[10, 8]
weight @positions: f32[64, 8]
graph main(%ids: i64[n]) {
  %e = embedding(@table, %ids) : f32[n, 8]
  %i = arange() {length=n, dtype=i64} : i64[n]
  %p = embedding(@positions, %i) : f32[n, 8]
  %x = add(%e, %p) : f32[n, 8]
  %logits = linear(%x, @table) : f32[n, 10]
  return logits=%logits
}""",
    ),
    "embeddings": (
        "cast-precision{embeddings=true}",
        """
symbols n=1..64
weight @table: f32[10, 8]
weight @w: f32[8, 8]
graph main(%ids: i64[n]) {
  %e = embedding(@table, %ids) : f32[n, 8]
  %y = linear(%e, @w) : f32[n, 8]
  %z = add(%e, %y) : f32[n, 8]
  return z=%z
}""",
    ),
    # Stacked and shared weights of a body, and what comes in from outside for products alone.
    "repeat": (
        BF,
        """
weight @stack: f32[3, 8, 8]
weight @shared: f32[8, 8]
graph main(%x: f32[2, 8], %memory: f32[2, 4, 8], %bias: f32[2, 8]) {
  %y = repeat([%x], [@stack], [%memory, %bias]) {n=3} : f32[2, 8] graph (%h: f32[2, 8],
      %w: f32[8, 8], %m: f32[2, 4, 8], %b: f32[2, 8]) {
    %g = linear(%h, %w) : f32[2, 8]
    %s = linear(%g, @shared) : f32[2, 8]
    %column = reshape(%s) {shape=[2, 8, 1]} : f32[2, 8, 1]
    %scores = matmul(%m, %column) : f32[2, 4, 1]
    %total = sum(%scores) {dims=[1]} : f32[2, 1]
    %t = add(%h, %total) : f32[2, 8]
    %u = add(%t, %b) : f32[2, 8]
    return output=%u
  }
  return y=%y
}""",
    ),
    # Positions times frequencies; integers; a weight that is also added, which two copies would make larger.
    "stays": (
        BF,
        """
symbols n=1..4096
weight @frequencies: f32[1, 4]
weight @both: f32[8, 8]
graph main(%x: f32[n, 8], %positions: i64[n]) {
  %p = cast(%positions) {dtype=f32} : f32[n]
  %column = reshape(%p) {shape=[n, 1]} : f32[n, 1]
  %angles = matmul(%column, @frequencies) : f32[n, 4]
  %row = reshape(%p) {shape=[1, n]} : f32[1, n]
  %moments = matmul(%row, %x) : f32[1, 8]
  %z = linear(%moments, @both) : f32[1, 8]
  %s = add(@both, %z) : f32[8, 8]
  return angles=%angles, s=%s
}""",
    ),
    "storage": (
        HALF,
        """
symbols n=1..64
weight @w: f32[16, 8]
weight @b: f32[16]
weight @turned: f32[4, 16]
weight @huge: f32[4, 4]
weight @tiny: f32[4, 4]
graph main(%x: f32[n, 8]) {
  %h = linear(%x, @w, @b) : f32[n, 16]
  %t = permute(@turned) {dims=[1, 0]} : f32[16, 4]
  %m = matmul(%h, %t) : f32[n, 4]
  %o = linear(%m, @huge) : f32[n, 4]
  %u = linear(%o, @tiny) : f32[n, 4]
  return u=%u
}""",
    ),
    "storage_in_a_region": (
        HALF,
        """
weight @stack: f32[3, 8, 8]
graph main(%x: f32[2, 8]) {
  %y = repeat([%x], [@stack], []) {n=3} : f32[2, 8] graph (%h: f32[2, 8], %w: f32[8, 8]) {
    %g = linear(%h, %w) : f32[2, 8]
    return output=%g
  }
  return y=%y
}""",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str, golden: Golden) -> None:
    passes, text = CASES[case]
    special = {"huge": torch.full((4, 4), 1e5), "tiny": torch.full((4, 4), 1e-6)}
    module = read(text, **{id: data for id, data in special.items() if f"@{id}:" in text})
    result = check_case(golden, f"cast-precision-{case}", passes, module)
    assert result.weight_bytes <= module.weight_bytes


# -- where values are rounded ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["bf16", "f16-storage"])
@settings(max_examples=10, suppress_health_check=list(HealthCheck), deadline=None)
@given(module=st.one_of(transformers(), modules()), prepared=st.booleans(), embeddings=st.booleans())
def test_no_value_is_rounded_twice_or_for_nothing(to: str, module: Module, prepared: bool, embeddings: bool) -> None:
    if prepared:
        module, _ = PassManager("cleanup,raise", check="never").run(module)
    pass_ = CastPrecision(to=to, embeddings=embeddings)  # type: ignore[arg-type]
    own = {op.made_by for op in module.walk()}
    assert pass_.name not in own
    result, report = PassManager([pass_]).run(module)  # verifies, and checks the contract
    casts = [op for op in result.walk() if isinstance(op, ops.Cast) and op.made_by == pass_.name]
    for op in casts:
        assert op.result.uses, "a cast that nothing reads"
        inner = op.x.producer
        assert not (isinstance(inner, ops.Cast) and inner.x.type.dtype is op.dtype), "there and back"
    rounded = [op for op in casts if op.dtype is not F32]
    assert len({op.x for op in rounded}) == len(rounded), "one value is rounded twice"
    assert to == "bf16" or not rounded
    assert rounds_values(result) == (to == "bf16" and bool(report.applied)) or rounds_values(module)
    assert result.weight_bytes <= module.weight_bytes


def test_a_table_that_is_tied_is_stored_once() -> None:
    module = read(CASES["tied"][1])
    for passes in (BF, HALF):
        result, _ = rewritten(module, passes)
        (table,) = [w for id, w in result.weights.items() if id.startswith("table")]
        assert table.type.dtype in (BF16, F16)
        assert result.weight_bytes == module.weight_bytes - 10 * 8 * 2


def test_weights_are_rounded_when_they_are_asked_for() -> None:
    asked = []

    def compute() -> torch.Tensor:
        asked.append(True)
        return torch.eye(4)

    b = Builder()
    weight = b.module.add_weight(Weight("w", TensorType(F32, (4, 4)), ComputedSource(compute)))
    b.output(b(ops.Linear(b.input("x", TensorType(F32, (2, 4))), b.graph.weight(weight))))
    result, _ = PassManager(BF, check="never").run(b.module)
    assert not asked
    (stored,) = result.weights.values()
    assert stored.tensor().dtype is torch.bfloat16
    assert asked


def test_constant_folding_leaves_weights_as_they_are_stored() -> None:
    module, _ = rewritten(read(CASES["storage"][1]), HALF)
    again, _ = rewritten(module, "cleanup,fuse")
    assert {w.type.dtype for w in again.weights.values() if w.type.rank == 2} == {F16}
    assert again.weight_bytes <= module.weight_bytes


def test_groups_are_left_alone() -> None:
    grouped, _ = rewritten(read(CASES["mlp"][1]), "group-fusions")
    assert any(isinstance(op, ops.Fused) for op in grouped.walk())
    result, rows = rewritten(grouped, BF)
    left = [op for op in result.walk() if isinstance(op, ops.Linear) and op.x.type.dtype is F32]
    assert left
    assert "it is in a group: groups are formed last" in rows[0].rules[0]["rejected"]
    assert result.weight_bytes <= grouped.weight_bytes


def test_a_limit_stops_after_so_many_products() -> None:
    module = read(CASES["mlp"][1])
    assert CastPrecision().run(module, Context(rewrites=Rewrites(limit=1)))
    dtypes = [op.x.type.dtype for op in module.walk() if isinstance(op, ops.Linear)]
    assert dtypes == [BF16, F32]


# -- results -----------------------------------------------------------------------------------------------------------


def test_rows_hidden_by_the_lowest_number_still_average() -> None:
    """finfo.min rounds to minus infinity in bfloat16, which would hide the whole row: zeros instead of an average."""
    lowest = torch.finfo(torch.float32).min
    x, mask = torch.randn(5, 8), torch.zeros(5, 5)
    mask[1] = lowest
    mask[2, 3:] = lowest
    mask[3] = -math.inf
    module = read(CASES["attention"][1])
    result, _ = rewritten(module, BF)
    for constant in (False, True):
        if constant:
            b = Builder()
            q = b.input("q", TensorType(F32, (1, 5, 8)))
            b.output(b(ops.Attention(q, q, q, b.weight("mask", mask), scale=0.3)))
            module, inputs = b.module, [x.reshape(1, 5, 8)]
            result, _ = rewritten(module, BF)
        else:
            inputs = [x, mask]
        (before,), (after,) = interpret(module, inputs), interpret(result, inputs)
        assert before.abs().amax(-1).flatten()[1] > 0
        assert measure(before, after).relative < 2**-5


# -- the contract ------------------------------------------------------------------------------------------------------


def _linear(weight: torch.Tensor, *behind: Callable[[object], object]) -> Module:
    b = Builder()
    y = b(ops.Linear(b.input("x", TensorType(F32, (3, weight.shape[1]))), b.weight("w", weight)))
    for make in behind:
        y = b(make(y))  # type: ignore[arg-type]
    b.output(y)
    return b.module


@dataclass(frozen=True)
class _Scale(Pass):
    """Multiplies every weight by ``factor``, and claims to round it."""

    name: ClassVar[str] = "scale"
    contract: ClassVar[Close] = CastPrecision.contract
    factor: float = 1.0

    def run(self, module: Module, ctx: Context) -> Changed:
        for id, weight in module.weights.items():
            module.weights[id] = Weight.from_tensor(id, weight.tensor() * self.factor)
        return True


def test_a_pass_that_does_more_than_round_breaks_the_contract() -> None:
    module = _linear(torch.randn(4, 8))
    PassManager([_Scale(1 + 2**-7)]).run(module)
    with pytest.raises(ContractError, match="the pass scale broke its contract"):
        PassManager([_Scale(1.25)]).run(module)


def test_the_bound_grows_with_what_a_module_makes_of_its_own_rounding() -> None:
    """sin(1000 x): rounding x to 8 bits turns the result around, and so does any change of that size."""
    module = _linear(1000 * torch.eye(8), lambda y: ops.Sin(y))
    _, rows = rewritten(module, BF)
    assert rows[0].drift is not None
    assert rows[0].drift.relative > 10 * CastPrecision.contract.rtol


def test_decisions_are_not_bounded() -> None:
    weight = torch.cat([torch.ones(1, 8), torch.ones(1, 8) * (1 + 1e-6)])
    module = _linear(weight, lambda y: ops.Argmax(y, 1))
    _, rows = rewritten(module, BF)
    assert rows[0].drift is not None
    assert rows[0].drift.differing


def test_contracts_with_a_unit_say_so() -> None:
    assert str(CastPrecision.contract) == "close (rtol=0.03125, atol=1e-06, or 16 times the effect of 0.0039)"
