"""Attention is found in every spelling, and left alone where something is not as in attention."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from pass_harness import Golden, check_case, read

from trimtab import optimize
from trimtab.ir import Builder, Dim, DType, Module, TensorType, Value, interpret, ops, symbol
from trimtab.ir.rewrite import Rule
from trimtab.passes.contracts import Exact, measure
from trimtab.passes.raise_attention import ReplacedScores, SoftmaxAttention
from trimtab.passes.unmerge_batch_axes import UnmergedMatmul, UnmergedSoftmax, UnmergedTranspose

F32, F16, BOOL = DType.F32, DType.F16, DType.BOOL
LOWEST = float(torch.finfo(torch.float32).min)
PIPELINE = "raise-attention,simplify-permutes,dce"
SCALE = 0.25


@dataclass(frozen=True)
class Sizes:
    """Shapes of q ``[*batch, heads, n, d]``, k ``[*batch, groups, m, d]`` and v ``[*batch, groups, m, e]``."""

    batch: tuple[Dim, ...] = (2,)
    heads: int = 4
    n: Dim = 5
    m: Dim = 5
    d: int = 6
    e: int = 6
    groups: int = 0

    @property
    def scores(self) -> tuple[Dim, ...]:
        return (*self.batch, self.heads, self.n, self.m)


SIZES = {
    "self": Sizes(),
    "cross": Sizes(n=5, m=7, e=3),
    "symbols": Sizes((symbol("batch", 1, 8),), n=symbol("length", 1), m=symbol("length", 1)),
    "no batch": Sizes(()),
    "two batch axes": Sizes((2, 3)),
    "one key head": Sizes(groups=1),
    "one query": Sizes(n=1, m=7),
}


class Writer(Builder):
    """A builder with the pieces of attention; q, k and v are inputs."""

    def __init__(self, sizes: Sizes = SIZES["self"], dtype: DType = F32) -> None:
        super().__init__()
        self.sizes, self.dtype = sizes, dtype
        groups = sizes.groups or sizes.heads
        self.q = self.input("q", TensorType(dtype, (*sizes.batch, sizes.heads, sizes.n, sizes.d)))
        self.k = self.input("k", TensorType(dtype, (*sizes.batch, groups, sizes.m, sizes.d)))
        self.v = self.input("v", TensorType(dtype, (*sizes.batch, groups, sizes.m, sizes.e)))

    def number(self, value: float) -> Value:
        return self.scalar(value, self.dtype)

    def times(self, x: Value, y: Value | float) -> Value:
        return self(ops.Mul(x, self.number(y) if isinstance(y, float) else y))

    def over(self, x: Value, y: float) -> Value:
        return self(ops.Div(x, self.number(y)))

    def plus(self, x: Value, y: Value) -> Value:
        return self(ops.Add(x, y))

    def turned(self, x: Value) -> Value:
        rank = x.type.rank
        return self(ops.Permute(x, dims=(*range(rank - 2), rank - 1, rank - 2)))

    def reshape(self, x: Value, *shape: Dim) -> Value:
        return self(ops.Reshape(x, shape=shape))

    def product(self) -> Value:
        return self(ops.Matmul(self.q, self.turned(self.k)))

    def softmax(self, x: Value) -> Value:
        return self(ops.Softmax(x, dim=x.type.rank - 1))

    def weighted(self, probabilities: Value) -> Value:
        return self(ops.Matmul(probabilities, self.v))

    def attended(self, scores: Value) -> Module:
        return self.done(self.weighted(self.softmax(scores)))

    def mask(self, name: str = "mask", *, dtype: DType | None = None, shape: tuple[Dim, ...] | None = None) -> Value:
        default = (*self.sizes.batch, 1, self.sizes.n, self.sizes.m)
        return self.input(name, TensorType(dtype or self.dtype, shape or default))

    def where(self, condition: Value, x: Value | float, y: Value | float) -> Value:
        return self(ops.Where(condition, *(self.number(z) if isinstance(z, float) else z for z in (x, y))))

    def done(self, *outputs: Value) -> Module:
        self.output(*outputs)
        return self.module


def raised(module: Module, pipeline: str = PIPELINE) -> ops.Attention:
    """The attention that is left of a module when the contract holds."""
    after = optimize(module, pipeline).module
    found = [op for op in after.walk() if isinstance(op, ops.Attention)]
    assert len(found) == 1, [op.name for op in after.walk()]
    return found[0]


def names(module: Module) -> list[str]:
    return [op.name for op in module.walk()]


# -- reviewed text -----------------------------------------------------------------------------------------------------

CASES = {
    "raise-attention": {
        "torch_decomposed": """
symbols batch=1..8
graph main(%q: f32[batch, 4, 5, 8], %k: f32[batch, 4, 7, 8], %v: f32[batch, 4, 7, 8], %allowed: bool[batch, 1, 1, 7]) {
  %root = full() {value=0.5, dtype=f32} : f32[]
  %zero = full() {value=0.0, dtype=f32} : f32[]
  %low = full() {value=-inf, dtype=f32} : f32[]
  %mask = where(%allowed, %zero, %low) : f32[batch, 1, 1, 7]
  %qs = mul(%q, %root) : f32[batch, 4, 5, 8]
  %kt = permute(%k) {dims=[0, 1, 3, 2]} : f32[batch, 4, 8, 7]
  %ks = mul(%kt, %root) : f32[batch, 4, 8, 7]
  %product = matmul(%qs, %ks) : f32[batch, 4, 5, 7]
  %scores = add(%product, %mask) : f32[batch, 4, 5, 7]
  %p = softmax(%scores) {dim=3} : f32[batch, 4, 5, 7]
  %hidden = eq(%scores, %low) : bool[batch, 4, 5, 7]
  %seen = logical_not(%hidden) : bool[batch, 4, 5, 7]
  %some = any(%seen) {dims=[3], keepdim=true} : bool[batch, 4, 5, 1]
  %none = logical_not(%some) : bool[batch, 4, 5, 1]
  %safe = where(%none, %zero, %p) : f32[batch, 4, 5, 7]
  %y = matmul(%safe, %v) : f32[batch, 4, 5, 8]
  return y=%y
}""",
        "mpnet": """
weight @bias: f32[1, 4, 5, 5]
graph main(%q: f32[2, 4, 5, 8], %kt: f32[2, 4, 8, 5], %v: f32[2, 4, 5, 8], %mask: f32[2, 1, 1, 5]) {
  %c = full() {value=4.0, dtype=f32} : f32[]
  %product = matmul(%q, %kt) : f32[2, 4, 5, 5]
  %scaled = div(%product, %c) : f32[2, 4, 5, 5]
  %biased = add(%scaled, @bias) : f32[2, 4, 5, 5]
  %masked = add(%biased, %mask) : f32[2, 4, 5, 5]
  %p = softmax(%masked) {dim=3} : f32[2, 4, 5, 5]
  %y = matmul(%p, %v) : f32[2, 4, 5, 8]
  return y=%y
}""",
        "probabilities_are_returned": """
graph main(%q: f32[2, 4, 5, 8], %kt: f32[2, 4, 8, 5], %v: f32[2, 4, 5, 8]) {
  %scores = matmul(%q, %kt) : f32[2, 4, 5, 5]
  %p = softmax(%scores) {dim=3} : f32[2, 4, 5, 5]
  %y = matmul(%p, %v) : f32[2, 4, 5, 8]
  return y=%y, p=%p
}""",
    },
    "unmerge-batch-axes": {
        "bmm": """
symbols batch=1..8
graph main(%q: f32[batch, 4, 5, 8], %k: f32[batch, 4, 5, 8]) {
  %a = reshape(%q) {shape=[4*batch, 5, 8]} : f32[4*batch, 5, 8]
  %b = reshape(%k) {shape=[4*batch, 5, 8]} : f32[4*batch, 5, 8]
  %t = permute(%b) {dims=[0, 2, 1]} : f32[4*batch, 8, 5]
  %s = matmul(%a, %t) : f32[4*batch, 5, 5]
  %p = softmax(%s) {dim=2} : f32[4*batch, 5, 5]
  %y = reshape(%p) {shape=[batch, 4, 5, 5]} : f32[batch, 4, 5, 5]
  return y=%y
}""",
    },
}


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in CASES.items() for case in cases])
def test_rewrites_as_reviewed(name: str, case: str, golden: Golden) -> None:
    check_case(golden, f"{name}-{case}", name, read(CASES[name][case]))


# -- the scale and the keys --------------------------------------------------------------------------------------------

Scores = Callable[[Writer], Value]

SCALED: dict[str, Scores] = {
    "product": lambda f: f.times(f.product(), SCALE),
    "quotient": lambda f: f.over(f.product(), 1 / SCALE),
    "query": lambda f: f(ops.Matmul(f.times(f.q, SCALE), f.turned(f.k))),
    "divided query": lambda f: f(ops.Matmul(f.over(f.q, 1 / SCALE), f.turned(f.k))),
    "key": lambda f: f(ops.Matmul(f.q, f.turned(f.times(f.k, SCALE)))),
    "turned key": lambda f: f(ops.Matmul(f.q, f.times(f.turned(f.k), SCALE))),
    "both": lambda f: f(ops.Matmul(f.times(f.q, 0.5), f.times(f.turned(f.k), 0.5))),
    "everywhere": lambda f: f.over(f(ops.Matmul(f.times(f.q, 2.0), f.times(f.turned(f.over(f.k, 2.0)), 0.5))), 2.0),
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("place", SCALED)
def test_the_scale_may_stand_anywhere(place: str, sizes: str) -> None:
    f = Writer(SIZES[sizes])
    op = raised(f.attended(SCALED[place](f)))
    assert (op.q.name, op.k.name, op.v.name, op.mask, op.causal) == ("q", "k", "v", None, False)
    assert op.scale == pytest.approx(SCALE, rel=1e-12)
    assert op.made_by == "attention"


def test_without_a_scale() -> None:
    f = Writer()
    assert raised(f.attended(f.product())).scale == 1.0


def test_keys_that_are_turned_with_the_heads() -> None:
    """``[batch, m, heads, d]`` to ``[batch, heads, d, m]`` in one permute."""
    f = Writer()
    rows = f.input("rows", TensorType(F32, (2, 5, 4, 6)))
    module = f.attended(f(ops.Matmul(f.q, f(ops.Permute(rows, dims=(0, 2, 3, 1))))))
    after = optimize(module, PIPELINE).module
    assert names(after) == ["permute", "attention"]
    assert next(iter(after.main.ops)).attributes["dims"] == (0, 2, 1, 3)


def test_keys_that_come_turned() -> None:
    f = Writer()
    keys = f.input("keys", TensorType(F32, (2, 4, 6, 5)))
    assert names(optimize(f.attended(f(ops.Matmul(f.q, keys))), PIPELINE).module) == ["permute", "attention"]


def test_turned_keys_that_are_read_elsewhere() -> None:
    f = Writer()
    keys = f.turned(f.k)
    module = f.done(f.weighted(f.softmax(f(ops.Matmul(f.q, keys)))), f(ops.Tanh(keys)))
    after = optimize(module, PIPELINE).module
    assert sorted(names(after)) == ["attention", "permute", "tanh"]


# -- masks -------------------------------------------------------------------------------------------------------------


def masked_first(f: Writer) -> Value:
    return f.plus(f.mask(), f.times(f.product(), SCALE))


def masked_before_the_scale(f: Writer) -> Value:
    return f.times(f.plus(f.product(), f.mask()), SCALE)


def masked_twice(f: Writer) -> Value:
    bias = f.mask("bias", shape=(f.sizes.heads, f.sizes.n, f.sizes.m))
    return f.plus(f.plus(f.times(f.product(), SCALE), bias), f.mask())


def masked_three_times_with_scales_between(f: Writer) -> Value:
    first = f.plus(f.times(f.product(), 2.0), f.mask("a"))
    second = f.plus(f.times(first, 0.25), f.mask("b", shape=(f.sizes.n, f.sizes.m)))
    return f.plus(f.mask("c"), f.over(second, 2.0))


def masked_by_a_sum(f: Writer) -> Value:
    return f.plus(f.times(f.product(), SCALE), f.plus(f.mask("a"), f.mask("b")))


@pytest.mark.parametrize("sizes", ["self", "cross", "symbols", "no batch"])
@pytest.mark.parametrize(
    "masked",
    [masked_first, masked_before_the_scale, masked_twice, masked_three_times_with_scales_between, masked_by_a_sum],
    ids=lambda masked: masked.__name__,
)
def test_masks_are_added(masked: Scores, sizes: str) -> None:
    f = Writer(SIZES[sizes])
    op = raised(f.attended(masked(f)))
    assert op.scale == pytest.approx(SCALE)
    assert op.mask is not None


def test_masks_of_keys_alone_and_numbers_get_axes() -> None:
    f = Writer(SIZES["cross"])
    op = raised(f.attended(f.plus(f.product(), f.mask(shape=(7,)))))
    assert op.mask is not None
    assert op.mask.type.shape == (1, 7)
    f = Writer()
    module = f.attended(f.plus(f.product(), f.number(0.25)))
    assert raised(module).mask is not None
    assert names(optimize(module, f"{PIPELINE},simplify-masks").module) == ["attention"]


@pytest.mark.parametrize("low", [-math.inf, LOWEST, -1e4])
def test_rows_without_keys_stay_what_they_are(low: float) -> None:
    """Large numbers average the values there; minus infinity gives NaN, which attention replaces by zeros."""
    f = Writer()
    module = f.attended(masked_first(f))
    after = optimize(module, PIPELINE).module
    inputs = [torch.randn(value.type.bind({}).shape) for value in module.main.inputs]
    inputs[3] = torch.where(inputs[3] > 0, 0.0, low)
    inputs[3][0, 0, 2] = low
    expected, found = (interpret(m, inputs, precision=torch.float64)[0] for m in (module, after))
    torch.testing.assert_close(found, expected.nan_to_num(0.0), rtol=1e-6, atol=1e-6)


def test_what_was_nan_may_become_a_number_where_rounding_may_differ() -> None:
    f = Writer(Sizes((2,), n=1, m=1))
    allowed = f.mask("allowed", dtype=BOOL)
    module = f.attended(f.plus(f.product(), f.where(allowed, 0.0, -math.inf)))
    shapes = [value.type.bind({}).shape for value in module.main.inputs[:3]]
    batch = [*(torch.randn(shape) for shape in shapes), torch.tensor([True, False]).reshape(2, 1, 1, 1)]
    assert interpret(module, batch)[0].isnan().any()
    result = optimize(module, PIPELINE, calibration=[tuple(batch)])
    assert not interpret(result.module, batch)[0].isnan().any()

    drift = measure(torch.tensor([math.nan, 1.0]), torch.tensor([0.0, 1.0]))
    assert (drift.absolute, drift.differing) == (0.0, 1)
    assert Exact(rounding=True).holds(drift)
    assert not Exact().holds(drift)
    assert not Exact(rounding=True).holds(measure(torch.tensor([0.0, 1.0]), torch.tensor([math.nan, 1.0])))


def test_two_products_in_a_sum() -> None:
    """Relative positions as a second product: either can be the mask of the other."""
    f = Writer()
    positions = f.input("positions", TensorType(F32, (2, 4, 6, 5)))
    op = raised(f.attended(f.plus(f.product(), f(ops.Matmul(f.q, positions)))))
    assert op.mask is not None
    assert isinstance(op.mask.producer, ops.Matmul)


def guarded_by_nan(f: Writer, p: Value, scores: Value) -> Value:
    return f.where(f(ops.IsNan(p)), 0.0, p)


def guarded_by_any(f: Writer, p: Value, scores: Value) -> Value:
    """torch's decomposition, with zeros of the full shape."""
    seen = f(ops.LogicalNot(f(ops.Eq(scores, f.number(-math.inf)))))
    nothing = f(ops.LogicalNot(f(ops.Any(seen, dims=(scores.type.rank - 1,), keepdim=True))))
    return f.where(nothing, f(ops.Full(value=0.0, dtype=F32, shape=p.type.shape)), p)


@pytest.mark.parametrize("sizes", ["self", "symbols"])
@pytest.mark.parametrize("guard", [guarded_by_nan, guarded_by_any], ids=lambda guard: guard.__name__)
def test_guards_against_rows_without_keys(guard: Callable[[Writer, Value, Value], Value], sizes: str) -> None:
    f = Writer(SIZES[sizes])
    allowed = f.mask("allowed", dtype=BOOL)
    scores = f.plus(f.times(f.product(), SCALE), f.where(allowed, 0.0, -math.inf))
    raised(f.done(f.weighted(guard(f, f.softmax(scores), scores))))


@pytest.mark.parametrize("low", [-math.inf, LOWEST, -1e30])
@pytest.mark.parametrize("hidden", [False, True])
def test_a_mask_may_replace_the_scores(hidden: bool, low: float) -> None:
    f = Writer(SIZES["symbols"])
    condition, scores = f.mask("condition", dtype=BOOL), f.times(f.product(), SCALE)
    op = raised(f.attended(f.where(condition, low, scores) if hidden else f.where(condition, scores, low)))
    assert op.mask is not None
    assert isinstance(op.mask.producer, ops.Where)
    assert op.mask.producer.condition.name == "condition"


def test_a_mask_may_replace_scores_and_more_be_added() -> None:
    """GPT-J: the scores are replaced, then scaled, then a mask is added."""
    f = Writer()
    replaced = f.where(f.mask("condition", dtype=BOOL), f.product(), LOWEST)
    assert raised(f.attended(f.plus(f.times(replaced, SCALE), f.mask()))).scale == SCALE


def test_a_moderate_number_replaces_scores_where_every_query_has_a_key() -> None:
    """GPT-2: ``where(triangle, scores, -10000)``"""
    f = Writer()
    triangle = f.weight("triangle", torch.ones(1, 1, 5, 5).tril().bool())
    assert raised(f.attended(f.where(triangle, f.product(), -1e4))).mask is not None


# -- types and layouts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_half_precision_with_a_softmax_in_float32(masked: bool) -> None:
    f = Writer(dtype=F16)
    scores = f.plus(f.times(f.product(), SCALE), f.mask()) if masked else f.product()
    wide = f.softmax(f(ops.Cast(scores, dtype=F32)))
    op = raised(f.done(f.weighted(f(ops.Cast(wide, dtype=F16)))))
    assert op.result.type.dtype is F16


def merged(f: Writer, x: Value) -> Value:
    return f.reshape(x, x.type.shape[0] * x.type.shape[1], *x.type.shape[2:])


@pytest.mark.parametrize("sizes", ["self", "cross", "symbols"])
@pytest.mark.parametrize(("mask", "merged_softmax", "transposed"), list(itertools.product([False, True], repeat=3)))
def test_batch_and_heads_merged_for_the_products(
    mask: bool, merged_softmax: bool, transposed: bool, sizes: str
) -> None:
    f = Writer(SIZES[sizes])
    q, k, v = f.times(f.q, SCALE), f.k, f.v
    keys = f.turned(merged(f, k)) if transposed else merged(f, f.turned(k))
    scores = f(ops.Matmul(merged(f, q), keys))
    if mask:
        scores = f.plus(f.reshape(scores, *f.sizes.scores), f.mask())
        scores = merged(f, scores) if merged_softmax else scores
    p = f.softmax(scores)
    p = p if p.type.rank == 3 else merged(f, p)
    result = f(ops.Matmul(p, merged(f, v)))
    module = f.done(f.reshape(result, *f.q.type.shape[:3], f.sizes.e))
    assert names(optimize(module, f"unmerge-batch-axes,cleanup,{PIPELINE}").module) == ["attention"]


def test_keys_turned_on_merged_axes() -> None:
    """torch.onnx.export(dynamo=True): reshape, transpose, reshape."""
    f = Writer(SIZES["symbols"])
    batch, heads, length, depth = f.k.type.shape
    keys = f.reshape(f.turned(merged(f, f.k)), batch, heads, depth, length)
    module = f.attended(f(ops.Matmul(f.q, keys)))
    assert names(optimize(module, f"unmerge-batch-axes,cleanup,{PIPELINE}").module) == ["attention"]


def test_values_repeated_for_the_heads() -> None:
    """The values are merged from ``[batch, groups, times, m, e]`` at once."""
    f = Writer(SIZES["symbols"])
    batch, _, m, e = f.v.type.shape
    wide = f.input("wide", TensorType(F32, (batch, 2, 2, m, e)))
    values = f.reshape(wide, batch * 4, m, e)
    result = f(ops.Matmul(merged(f, f.softmax(f.product())), values))
    module = f.done(f.reshape(result, batch, 4, m, e))
    assert names(optimize(module, f"unmerge-batch-axes,cleanup,{PIPELINE}").module) == ["reshape", "attention"]


def test_one_head_with_a_batch_is_attention_of_rank_3() -> None:
    f = Writer(SIZES["no batch"])
    assert raised(f.attended(f.product())).q.type.rank == 3


def test_the_body_of_a_repeat() -> None:
    from trimtab.ir import parse_module

    module = parse_module("""trimtab.ir 1
graph main(%x: f32[2, 4, 5, 6]) {
  %y = repeat([%x], [], []) {n=3} : f32[2, 4, 5, 6] graph (%h: f32[2, 4, 5, 6]) {
    %t = permute(%h) {dims=[0, 1, 3, 2]} : f32[2, 4, 6, 5]
    %s = matmul(%h, %t) : f32[2, 4, 5, 5]
    %p = softmax(%s) {dim=3} : f32[2, 4, 5, 5]
    %o = matmul(%p, %h) : f32[2, 4, 5, 6]
    return output=%o
  }
  return y=%y
}""")
    assert names(optimize(module, PIPELINE).module) == ["repeat", "attention"]


# -- what is no attention ----------------------------------------------------------------------------------------------


def reason(rule: Rule, module: Module, op: str) -> str:
    """Why the rule does not match at the last op of this name."""
    return rule.explain(module, at=[found for found in module.walk() if found.name == op][-1]).reason


def stays(module: Module, because: str) -> None:
    assert reason(SoftmaxAttention(), module, "matmul") == because
    assert "attention" not in names(optimize(module, PIPELINE).module)


def test_probabilities_that_are_returned() -> None:
    f = Writer()
    p = f.softmax(f.product())
    stays(f.done(f.weighted(p), p), "an inner value, the result of softmax, is also read by the graph's outputs")


def test_scores_that_are_read_elsewhere() -> None:
    f = Writer()
    scores = f.product()
    stays(
        f.done(f.weighted(f.softmax(scores)), f(ops.Exp(scores))),
        "an inner value, the result of matmul, is also read by exp",
    )


def test_a_softmax_over_the_queries() -> None:
    f = Writer()
    stays(f.done(f.weighted(f(ops.Softmax(f.product(), dim=2)))), "softmax has dim=2, not -1")


def test_a_mask_that_enlarges_the_scores() -> None:
    f = Writer(Sizes((1,)))
    f.v = f.input("more", TensorType(F32, (3, 4, 5, 6)))
    scores = f.plus(f.product(), f.mask(shape=(3, 1, 5, 5)))
    stays(
        f.attended(scores),
        "q, k and v have the same batch axes and heads, or k and v one head, but they are (1, 4), (1, 4) and (3, 4)",
    )
    f = Writer(Sizes((1,), n=1))
    stays(
        f.attended(f.plus(f.product(), f.mask(shape=(5, 5)))),
        "the result is f32[1, 4, 5, 6]: a mask or a cast changes the type of the scores f32[1, 4, 1, 5]",
    )


def test_one_key_that_the_mask_repeats() -> None:
    f = Writer(Sizes(m=1))
    f.v = f.input("more", TensorType(F32, (2, 4, 5, 6)))
    stays(f.attended(f.plus(f.product(), f.mask(shape=(5, 5)))), "there are 1 keys but 5 values")


def test_matrices_without_heads() -> None:
    f = Writer(SIZES["no batch"])
    q, k, v = (f.input(name, TensorType(F32, (5, 6))) for name in "abc")
    p = f.softmax(f(ops.Matmul(q, f.turned(k))))
    stays(
        f.done(f(ops.Matmul(p, v))),
        "the ranks of q, f32[5, 6], k, f32[6, 5], and v, f32[5, 6], are not one rank of 3 or more",
    )


def test_a_product_that_is_no_scale() -> None:
    f = Writer()
    scores = f.times(f.product(), f.mask())
    stays(f.attended(scores), "a mul is not a result of matmul")


def test_a_low_number_that_is_not_low_enough() -> None:
    f = Writer()
    module = f.attended(f.where(f.mask("c", dtype=BOOL), f.product(), -100.0))
    assert reason(ReplacedScores(), module, "where") == "-100.0 is not low enough to hide a score"
    assert "attention" not in names(optimize(module, PIPELINE).module)


def test_a_moderate_number_where_rows_may_be_empty() -> None:
    f = Writer()
    module = f.attended(f.where(f.mask("c", dtype=BOOL), f.product(), -1e4))
    assert reason(ReplacedScores(), module, "where") == (
        "a row of which everything is replaced by -10000.0 would have equal weights"
    )
    assert "attention" not in names(optimize(module, PIPELINE).module)


def test_a_moderate_number_and_another_mask() -> None:
    f = Writer()
    triangle = f.weight("triangle", torch.ones(5, 5).tril().bool())
    module = f.attended(f.plus(f.where(triangle, f.product(), -1e4), f.mask()))
    assert reason(ReplacedScores(), module, "where") == "what is added to -10000.0 afterwards might outweigh it"
    assert "attention" not in names(optimize(module, PIPELINE).module)


def test_a_guard_of_other_scores() -> None:
    f = Writer()
    scores = f.product()
    other = f.mask(shape=f.sizes.scores)
    module = f.done(f.weighted(guarded_by_any(f, f.softmax(scores), other)))
    assert "attention" not in names(optimize(module, PIPELINE).module)


def test_reshapes_that_move_more_than_batch_axes() -> None:
    f = Writer()
    x, y = f.reshape(f.q, 2, 20, 6), f.reshape(f.turned(f.k), 2, 6, 20)
    module = f.done(f(ops.Matmul(x, y)), f.softmax(f.reshape(f.q, 2, 4, 30)), f(ops.Permute(x, dims=(0, 2, 1))))
    assert reason(UnmergedMatmul(), module, "matmul") == "neither reshape only merges batch axes"
    assert reason(UnmergedSoftmax(), module, "softmax") == (
        "the reshape from f32[2, 4, 5, 6] to f32[2, 4, 30] is no merge of axes"
    )
    assert reason(UnmergedTranspose(), module, "permute") == "the reshape does more than to merge batch axes"
    assert not optimize(module, "unmerge-batch-axes").report.applied
