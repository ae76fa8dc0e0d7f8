"""Masks, gathers and expands become simpler where that is known to change nothing."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from pass_harness import Golden, check_case, read

from trimtab import optimize
from trimtab.frontend.torch_export import import_program
from trimtab.ir import Builder, Dim, DType, Module, TensorType, Value, interpret, ops, symbol
from trimtab.ir.analysis.index_maps import IndexMap, index_map
from trimtab.ir.rewrite import Rule
from trimtab.passes.mask_facts import MaskFacts
from trimtab.passes.simplify_indexing import AllPositions, PartOfStack
from trimtab.passes.simplify_masks import BoolMask, CausalMask, NoMask, UniformTerm

F32, I64, BOOL = DType.F32, DType.I64, DType.BOOL
LOWEST = float(torch.finfo(torch.float32).min)
BATCH, LENGTH = symbol("batch", 1, 8), symbol("length", 1, 64)
PIPELINE = "simplify-indexing,simplify-masks,dce"


class Writer(Builder):
    """A builder of self-attention ``[batch, 4, length, 8]``; ``padding`` is an input ``bool[batch, 1, 1, length]``."""

    def __init__(self, batch: Dim = BATCH, length: Dim = LENGTH) -> None:
        super().__init__()
        self.batch, self.length = batch, length
        self.x = self.input("x", TensorType(F32, (batch, 4, length, 8)))
        self.padding = self.input("padding", TensorType(BOOL, (batch, 1, 1, length)))

    def number(self, value: float) -> Value:
        return self.scalar(value, F32)

    def integer(self, value: int) -> Value:
        return self.scalar(value, I64)

    def positions(self, *shape: Dim) -> Value:
        found = self(ops.Arange(length=self.length, dtype=I64))
        return self(ops.Reshape(found, shape=shape)) if shape else found

    @property
    def rows(self) -> Value:
        return self.positions(1, 1, self.length, 1)

    @property
    def columns(self) -> Value:
        return self.positions(1, 1, 1, self.length)

    def triangle(self) -> Value:
        return self(ops.Le(self.columns, self.rows))

    def both(self, x: Value, y: Value) -> Value:
        return self(ops.LogicalAnd(x, y))

    def no(self, x: Value) -> Value:
        return self(ops.LogicalNot(x))

    def added(self, allowed: Value, low: float = -math.inf) -> Value:
        return self(ops.Where(allowed, self.number(0.0), self.number(low)))

    def expand(self, x: Value, heads: int = 1) -> Value:
        return self(ops.Expand(x, shape=(self.batch, heads, self.length, self.length)))

    def constant(self, data: torch.Tensor) -> Value:
        return self.weight("constant", data)

    def attention(self, mask: Value | None, causal: bool = False) -> Module:
        self.output(self(ops.Attention(self.x, self.x, self.x, mask, scale=0.5, causal=causal)))
        return self.module


Mask = Callable[[Writer], Value]


def simplified(module: Module, pipeline: str = PIPELINE) -> ops.Attention:
    """The attention after the passes, which keep the results also of rows without keys."""
    after = optimize(module, pipeline).module
    sizes = dict.fromkeys(module.symbols(), 5)
    inputs = []
    for value in module.main.inputs:
        shape = value.type.bind(sizes).shape
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(len(inputs)))
        inputs.append(drawn if value.type.dtype is F32 else (drawn > 0).to(value.type.dtype.to_torch()))
        if value.type.dtype is not F32:
            inputs[-1][0] = 0  # nobody has a key here
    expected, found = (interpret(m, inputs, precision=torch.float64)[0] for m in (module, after))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    (op,) = (op for op in after.walk() if isinstance(op, ops.Attention))
    return op


def reason(rule: Rule, module: Module) -> str:
    return rule.explain(module).reason


# -- reviewed text -----------------------------------------------------------------------------------------------------

CASES = {
    "simplify-masks": {
        "causal_with_padding": """
symbols batch=1..8, n=1..64
graph main(%x: f32[batch, 4, n, 8], %padding: bool[batch, 1, 1, n]) {
  %zero = full() {value=0.0, dtype=f32} : f32[]
  %low = full() {value=-inf, dtype=f32} : f32[]
  %none = full() {value=0, dtype=i64} : i64[]
  %at = arange() {length=n, dtype=i64} : i64[n]
  %rows = reshape(%at) {shape=[1, 1, n, 1]} : i64[1, 1, n, 1]
  %columns = reshape(%at) {shape=[1, 1, 1, n]} : i64[1, 1, 1, n]
  %always = ge(%rows, %none) : bool[1, 1, n, 1]
  %past = le(%columns, %rows) : bool[1, 1, n, n]
  %both = bitwise_and(%always, %past) : bool[1, 1, n, n]
  %allowed = logical_and(%both, %padding) : bool[batch, 1, n, n]
  %wide = expand(%allowed) {shape=[batch, 4, n, n]} : bool[batch, 4, n, n]
  %mask = where(%wide, %zero, %low) : f32[batch, 4, n, n]
  %y = attention(%x, %x, %x, %mask) {scale=0.5} : f32[batch, 4, n, 8]
  return y=%y
}""",
        "queries_without_keys": """
symbols batch=1..8, n=1..64
graph main(%x: f32[batch, 4, n, 8], %padding: bool[batch, 1, 1, n]) {
  %zero = full() {value=0.0, dtype=f32} : f32[]
  %low = full() {value=-3.4028234663852886e+38, dtype=f32} : f32[]
  %wide = expand(%padding) {shape=[batch, 1, n, n]} : bool[batch, 1, n, n]
  %mask = where(%wide, %zero, %low) : f32[batch, 1, n, n]
  %y = attention(%x, %x, %x, %mask) {scale=0.5} : f32[batch, 4, n, 8]
  return y=%y
}""",
    },
    "simplify-indexing": {
        "positions": """
symbols batch=1..8, n=1..64
graph main(%x: bool[batch, n]) {
  %one = full() {value=1, dtype=i64} : i64[]
  %b = arange() {length=batch, dtype=i64} : i64[batch]
  %rows = reshape(%b) {shape=[batch, 1, 1, 1]} : i64[batch, 1, 1, 1]
  %at = arange() {length=n, dtype=i64} : i64[n]
  %columns = reshape(%at) {shape=[1, 1, 1, n]} : i64[1, 1, 1, n]
  %y = index(%x, [%rows, %columns]) : bool[batch, 1, 1, n]
  %turned = sub(%one, %columns) : i64[1, 1, 1, n]
  %z = index(%x, [%rows, %turned]) : bool[batch, 1, 1, n]
  return y=%y, z=%z
}""",
    },
    "simplify-expands": {
        "elementwise_and_products": """
symbols batch=1..8
weight @w: f32[4, 6]
graph main(%x: f32[batch, 5, 4], %y: f32[5, 1]) {
  %wide = expand(%y) {shape=[batch, 5, 4]} : f32[batch, 5, 4]
  %root = sqrt(%wide) : f32[batch, 5, 4]
  %a = mul(%x, %root) : f32[batch, 5, 4]
  %matrices = expand(@w) {shape=[batch, 4, 6]} : f32[batch, 4, 6]
  %b = matmul(%a, %matrices) : f32[batch, 5, 6]
  %c = sum(%wide) {dims=[1], keepdim=false} : f32[batch, 4]
  return b=%b, c=%c
}""",
    },
}


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in CASES.items() for case in cases])
def test_rewrites_as_reviewed(name: str, case: str, golden: Golden) -> None:
    check_case(golden, f"{name}-{case}", name, read(CASES[name][case]))


# -- masks that hide nothing -------------------------------------------------------------------------------------------

ALL_TRUE: dict[str, Mask] = {
    "full": lambda f: f(ops.Full(value=True, dtype=BOOL, shape=(f.length, f.length))),
    "stored": lambda f: f.expand(f.constant(torch.ones(1, 1, 1, 1, dtype=torch.bool))),
    "not nothing": lambda f: f.expand(f.no(f.constant(torch.zeros(1, 1, 1, 1, dtype=torch.bool)))),
    "compared": lambda f: f.expand(f(ops.Ge(f.rows, f.integer(0)))),
    "within the length": lambda f: f.expand(f(ops.Lt(f.columns, f(ops.DimValue(dim=f.length, dtype=I64))))),
    "a window that is never left": lambda f: f(ops.Gt(f.columns, f(ops.Sub(f.rows, f.integer(64))))),
    "either": lambda f: f(ops.LogicalOr(f.padding, f(ops.Ge(f.rows, f.integer(0))))),
    "selected": lambda f: f.expand(f(ops.Index(f.constant(torch.ones(9, dtype=torch.bool)), [f.columns], dim=0))),
}


@pytest.mark.parametrize("mask", ALL_TRUE)
def test_a_condition_that_always_holds_is_no_mask(mask: str) -> None:
    length = 9 if mask == "selected" else LENGTH
    f = Writer(length=length)
    assert simplified(f.attention(ALL_TRUE[mask](f))).mask is None
    f = Writer(length=length)
    assert simplified(f.attention(f.added(ALL_TRUE[mask](f), LOWEST))).mask is None


UNIFORM: dict[str, Mask] = {
    "zeros": lambda f: f(ops.Full(value=0.0, dtype=F32, shape=(f.length, f.length))),
    "stored": lambda f: f.expand(f.constant(torch.full((1, 1, 1, 1), 3.0))),
    "stored rows": lambda f: f.constant(torch.full((1, 4, 1, 1), -2.0)),
    "a bool as a number": lambda f: f(ops.Cast(f.expand(f.constant(torch.ones(1, 1, 1, 1).bool())), dtype=F32)),
}


@pytest.mark.parametrize("mask", UNIFORM)
def test_what_is_added_everywhere_is_no_mask(mask: str) -> None:
    f = Writer()
    assert simplified(f.attention(UNIFORM[mask](f))).mask is None


def test_what_is_added_everywhere_is_taken_off_a_sum() -> None:
    """BEiT adds a bool mask to a bias."""
    f = Writer(length=5)
    bias = f.weight("bias", torch.randn(1, 4, 5, 5))
    op = simplified(f.attention(f(ops.Add(bias, UNIFORM["a bool as a number"](f)))))
    assert op.mask is not None
    assert op.mask.weight == "bias"


def test_minus_infinity_everywhere_stays() -> None:
    f = Writer()
    module = f.attention(f(ops.Full(value=-math.inf, dtype=F32, shape=(f.length, f.length))))
    assert reason(NoMask(), module) == "the mask is not known to be uniform and finite"
    assert simplified(module).mask is not None


def test_a_mask_of_true_and_false_stays() -> None:
    f = Writer(length=5)
    module = f.attention(f.constant(torch.rand(5, 5) > 0.3))
    assert reason(NoMask(), module) == "the mask is not known to be true everywhere"
    assert simplified(module).mask is not None


# -- bool masks --------------------------------------------------------------------------------------------------------


def test_minus_infinity_becomes_a_bool_mask() -> None:
    f = Writer()
    op = simplified(f.attention(f.added(f.padding)))
    assert op.mask is f_input(op, 1)


def test_hidden_keys_become_a_bool_mask() -> None:
    f = Writer()
    module = f.attention(f(ops.Where(f.padding, f.number(-math.inf), f.number(0.0))))
    op = simplified(module)
    assert op.mask is not None
    assert isinstance(op.mask.producer, ops.LogicalNot)


@pytest.mark.parametrize("low", [-1e4, LOWEST])
def test_large_numbers_stay_where_a_query_may_have_no_key(low: float) -> None:
    f = Writer()
    module = f.attention(f.added(f.padding, low))
    assert reason(BoolMask(), module) == (
        f"a query without keys gets the mean of all values by {low}, and zeros by a bool mask"
    )
    assert simplified(module).mask is not f_input(simplified(module), 1)


def test_numbers_that_are_not_low_enough_stay() -> None:
    f = Writer()
    module = f.attention(f.added(f.triangle(), -100.0))
    assert reason(BoolMask(), module) == "-100.0 is not low enough to hide a score"
    assert not simplified(module).causal


def test_large_numbers_become_a_bool_mask_where_every_query_has_a_key() -> None:
    f = Writer(length=5)
    rows = torch.rand(5, 5) > 0.5
    rows[:, 2] = True
    op = simplified(f.attention(f.added(f.constant(rows), LOWEST)))
    assert op.mask is not None
    assert op.mask.weight == "constant"


def test_masks_are_not_expanded() -> None:
    f = Writer()
    op = simplified(f.attention(f.expand(f.padding, heads=4)))
    assert op.mask is f_input(op, 1)
    f = Writer()
    op = simplified(f.attention(f.added(f.no(f.expand(f.no(f.padding))), LOWEST)))
    assert op.mask is not None
    assert op.mask.type.shape == (BATCH, 1, 1, LENGTH)


def f_input(op: ops.Attention, index: int) -> Value:
    assert op.graph is not None
    return op.graph.inputs[index]


# -- causal masks ------------------------------------------------------------------------------------------------------


def _slices(f: Writer, x: Value) -> Value:
    for dim in (2, 3):
        x = f(ops.Slice(x, dim=dim, start=0, stop=f.length))
    return x


TRIANGLES: dict[str, Mask] = {
    "le": lambda f: f.triangle(),
    "ge": lambda f: f(ops.Ge(f.rows, f.columns)),
    "lt": lambda f: f(ops.Lt(f.columns, f(ops.Add(f.rows, f.integer(1))))),
    "gt": lambda f: f.no(f(ops.Gt(f.columns, f.rows))),
    "difference": lambda f: f(ops.Ge(f(ops.Sub(f.rows, f.columns)), f.integer(0))),
    "multiples": lambda f: f(ops.Le(f(ops.Mul(f.columns, f.integer(1))), f(ops.Neg(f(ops.Neg(f.rows)))))),
    "expanded": lambda f: f(ops.Le(f(ops.Expand(f.columns, shape=(1, 1, f.length, f.length))), f.rows)),
    "permuted": lambda f: f(ops.Le(f(ops.Permute(f.rows, dims=(0, 1, 3, 2))), f.rows)),
    "matrix": lambda f: f(ops.Le(f.positions(1, f.length), f.positions(f.length, 1))),
    "bytes cut from a buffer": lambda f: f(
        ops.Cast(_slices(f, f.constant(torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril())), dtype=BOOL)
    ),
    "not zero": lambda f: f(ops.Ne(_slices(f, f.constant(torch.ones(1, 1, 64, 64).tril())), f.number(0.0))),
    "zeros above": lambda f: f(ops.Eq(_slices(f, f.constant(torch.ones(1, 1, 64, 64).triu(1))), f.number(0.0))),
    "tril": lambda f: f(ops.Tril(f(ops.Full(value=True, dtype=BOOL, shape=(f.length, f.length))))),
    "not triu": lambda f: f.no(
        f(ops.Triu(f(ops.Full(value=True, dtype=BOOL, shape=(f.length, f.length))), diagonal=1))
    ),
}


@pytest.mark.parametrize("triangle", TRIANGLES)
def test_the_lower_triangle_is_causal(triangle: str) -> None:
    f = Writer()
    op = simplified(f.attention(TRIANGLES[triangle](f)))
    assert (op.causal, op.mask) == (True, None)


@pytest.mark.parametrize("low", [-math.inf, LOWEST, -1e4])
@pytest.mark.parametrize("triangle", TRIANGLES)
def test_the_lower_triangle_as_numbers_is_causal(triangle: str, low: float) -> None:
    f = Writer()
    op = simplified(f.attention(f.added(TRIANGLES[triangle](f), low)))
    assert (op.causal, op.mask) == (True, None)


@pytest.mark.parametrize("low", [-math.inf, LOWEST])
def test_numbers_above_the_diagonal_are_causal(low: float) -> None:
    """``torch.full((n, n), -inf).triu(1)``, stored or computed."""
    f = Writer()
    full = f(ops.Full(value=low, dtype=F32, shape=(f.length, f.length)))
    op = simplified(f.attention(f(ops.Triu(full, diagonal=1))))
    assert (op.causal, op.mask) == (True, None)
    f = Writer()
    stored = torch.zeros(1, 1, 64, 64).masked_fill(torch.ones(64, 64).triu(1).bool(), low)
    op = simplified(f.attention(_slices(f, f.constant(stored))))
    assert (op.causal, op.mask) == (True, None)


@pytest.mark.parametrize("order", range(4))
def test_padding_beside_the_triangle_stays_as_the_mask(order: int) -> None:
    f = Writer()
    window = f(ops.Gt(f.columns, f(ops.Sub(f.rows, f.integer(3)))))
    mask = [
        lambda: f.both(f.triangle(), f.padding),
        lambda: f.both(f.padding, f.triangle()),
        lambda: f.both(f.both(window, f.triangle()), f.padding),
        lambda: f.both(f.padding, f.both(f.triangle(), window)),
    ][order]()
    op = simplified(f.attention(mask))
    assert op.causal
    assert op.mask is not None
    assert (op.mask is f_input(op, 1)) == (order < 2)


def test_a_window_around_the_diagonal_leaves_every_query_a_key() -> None:
    """The sliding window of Mistral, as large negative numbers."""
    f = Writer()
    window = f(ops.Gt(f.columns, f(ops.Sub(f.rows, f.integer(3)))))
    op = simplified(f.attention(f.added(f.both(window, f.triangle()), LOWEST)))
    assert op.causal
    assert op.mask is not None
    assert isinstance(op.mask.producer, ops.Gt)


NOT_CAUSAL: dict[str, Mask] = {
    "strictly lower": lambda f: f(ops.Lt(f.columns, f.rows)),
    "one more": lambda f: f(ops.Le(f.columns, f(ops.Add(f.rows, f.integer(1))))),
    "every second": lambda f: f(ops.Le(f(ops.Mul(f.columns, f.integer(2))), f.rows)),
    "upper": lambda f: f(ops.Ge(f.columns, f.rows)),
    "shifted buffer": lambda f: _shifted(f, f.constant(torch.ones(1, 1, 64, 64).tril().bool())),
    "one hole": lambda f: _slices(f, f.constant(_with_a_hole())),
    "tril of another diagonal": lambda f: f(
        ops.Tril(f(ops.Full(value=True, dtype=BOOL, shape=(f.length, f.length))), diagonal=1)
    ),
}


def _shifted(f: Writer, x: Value) -> Value:
    rows = f(ops.Slice(x, dim=2, start=0, stop=f.length))
    return f(ops.Slice(rows, dim=3, start=64 - f.length, stop=64))


def _with_a_hole() -> torch.Tensor:
    triangle = torch.ones(1, 1, 64, 64).tril().bool()
    triangle[0, 0, 3, 1] = False
    return triangle


@pytest.mark.parametrize("mask", NOT_CAUSAL)
def test_what_is_not_quite_the_triangle_stays(mask: str) -> None:
    f = Writer()
    module = f.attention(NOT_CAUSAL[mask](f))
    assert reason(CausalMask(), module) == "no condition is known to be the lower triangle"
    op = simplified(module)
    assert (op.causal, op.mask is None) == (False, False)


def test_numbers_above_the_diagonal_that_hide_little_stay() -> None:
    f = Writer(length=5)
    module = f.attention(f.constant(torch.full((5, 5), -2.0).triu(1)))
    assert reason(CausalMask(), module) == "the mask is not known to hide the future and no more"
    assert not simplified(module).causal


def test_what_is_left_of_a_mask_has_queries_and_keys() -> None:
    f = Writer()
    keys = f.input("keys", TensorType(BOOL, (LENGTH,)))
    module = f.attention(f.both(f.triangle(), keys))
    assert reason(CausalMask(), module) == "bool[length] has no axes for queries and keys"
    assert simplified(module).mask is not None
    f = Writer()
    bias = f.input("bias", TensorType(F32, (LENGTH,)))
    module = f.attention(f(ops.Add(bias, UNIFORM["zeros"](f))))
    assert reason(UniformTerm(), module) == "f32[length] has no axes for queries and keys"
    assert simplified(module).mask is not None


def test_a_mask_that_is_no_sum_keeps_its_terms() -> None:
    f = Writer(length=5)
    module = f.attention(f(ops.Add(f.constant(torch.randn(5, 5)), f.added(f.padding, LOWEST))))
    assert reason(UniformTerm(), module) == "no term is known to be uniform and finite"
    mask = simplified(module).mask
    assert mask is not None
    assert isinstance(mask.producer, ops.Add)


def test_masks_of_several_layers_are_simplified_once_each() -> None:
    f = Writer()
    mask = f.expand(f(ops.BitwiseAnd(f.triangle(), f.padding)))
    x = f.x
    for _ in range(3):
        x = f(ops.Attention(x, x, x, mask, scale=0.5))
    f.output(x)
    after = optimize(f.module, PIPELINE).module
    assert [op.name for op in after.walk()] == ["attention"] * 3


# -- gathers -----------------------------------------------------------------------------------------------------------


def gathered(x: TensorType, write: Callable[[Builder, Value], Value]) -> tuple[Module, list[str]]:
    """A module that gathers from x, and its ops after simplification."""
    b = Builder()
    b.output(write(b, b.input("x", x)))
    after = optimize(b.module, "simplify-indexing,dce").module
    return b.module, [op.name for op in after.walk()]


def arange(b: Builder, length: Dim, *shape: Dim, start: int = 0, step: int = 1) -> Value:
    return b(ops.Reshape(b(ops.Arange(length=length, dtype=I64, start=start, step=step)), shape=shape))


MATRIX = TensorType(BOOL, (BATCH, LENGTH))


def test_a_gather_of_every_position_is_a_reshape() -> None:
    """Padding masks of Hugging Face: ``mask[batch[:, None, None, None], keys]``"""
    _, names = gathered(
        MATRIX,
        lambda b, x: b(ops.Index(x, [arange(b, BATCH, BATCH, 1, 1, 1), arange(b, LENGTH, 1, 1, 1, LENGTH)], dim=0)),
    )
    assert names == ["reshape"]


def test_a_gather_of_flat_positions_is_a_reshape() -> None:
    """The same through the legacy exporter: ``mask.reshape(-1, 1)[keys + batch * length]``"""

    def write(b: Builder, x: Value) -> Value:
        flat = b(ops.Reshape(x, shape=(BATCH * LENGTH, 1)))
        size = b(ops.Reshape(b(ops.DimValue(dim=LENGTH, dtype=I64)), shape=(1,)))
        start = b(ops.Mul(arange(b, BATCH, BATCH, 1, 1, 1), size))
        return b(ops.IndexSelect(flat, b(ops.Add(arange(b, LENGTH, 1, 1, 1, LENGTH), start)), dim=0))

    assert gathered(MATRIX, write)[1] == ["reshape", "reshape"]


def test_indices_that_were_stacked_are_read_where_they_come_from() -> None:
    """torch.onnx.export(dynamo=True) concatenates indices and takes them apart again."""

    def write(b: Builder, x: Value) -> Value:
        shape = (BATCH, 1, 1, LENGTH)
        parts = [arange(b, BATCH, BATCH, 1, 1, 1), arange(b, LENGTH, 1, 1, 1, LENGTH)]
        wide = [b(ops.Reshape(b(ops.Expand(part, shape=shape)), shape=(*shape, 1))) for part in parts]
        stacked = b(ops.Concat(wide, dim=4))
        return b(ops.Index(x, [b(ops.Select(stacked, dim=4, index=i)) for i in (0, 1)], dim=0))

    assert gathered(MATRIX, write)[1] == ["reshape"]


ONE_AXIS = TensorType(F32, (3, 6, 2))


@pytest.mark.parametrize(
    ("indices", "reshaped"),
    [
        (lambda b: arange(b, 6, 6), True),
        (lambda b: arange(b, 6, 1, 6), True),
        (lambda b: b.weight("w", torch.arange(6)), True),
        (lambda b: b.weight("w", torch.arange(6).reshape(2, 3)), True),
        (lambda b: b.weight("w", torch.tensor([0, 1, 2, 3, 5, 4])), False),
        (lambda b: b.weight("w", torch.arange(6).reshape(3, 2).T.contiguous()), False),
        (lambda b: arange(b, 5, 5), False),
        (lambda b: arange(b, 5, 5, start=1), False),
        (lambda b: arange(b, 3, 3, step=2), False),
        (lambda b: b(ops.Flip(arange(b, 6, 6), dims=(0,))), False),
    ],
)
def test_only_all_positions_in_their_order_are_a_reshape(indices: Callable[[Builder], Value], reshaped: bool) -> None:
    _, names = gathered(ONE_AXIS, lambda b, x: b(ops.IndexSelect(x, indices(b), dim=1)))
    assert names[-1] == ("reshape" if reshaped else "index_select")


def test_why_a_gather_stays() -> None:
    module, _ = gathered(ONE_AXIS, lambda b, x: b(ops.IndexSelect(x, arange(b, 5, 5), dim=1)))
    assert reason(AllPositions(), module) == "the indices are not all positions in their order"
    module, _ = gathered(ONE_AXIS, lambda b, x: b(ops.IndexSelect(x, b.input("i", TensorType(I64, (6,))), dim=1)))
    assert reason(AllPositions(), module) == "the index i64[6] is not known to be affine"


def test_a_part_of_values_that_are_longer_stays() -> None:
    module, names = gathered(ONE_AXIS, lambda b, x: b(ops.Select(b(ops.Concat([x, x], dim=1)), dim=1, index=3)))
    assert names == ["concat", "select"]
    assert reason(PartOfStack(), module) == "the value f32[3, 6, 2] has not size 1 along axis 1"


# -- index maps --------------------------------------------------------------------------------------------------------


def test_the_map_of_a_computed_index() -> None:
    b = Builder()
    rows, columns = arange(b, LENGTH, LENGTH, 1, start=2), arange(b, 5, 1, 5, step=3)
    total = b(ops.Sub(b(ops.Mul(rows, b(ops.DimValue(dim=BATCH, dtype=I64)))), columns))
    found = index_map(b.module, b(ops.Slice(total, dim=1, start=1, stop=5, step=2)))
    assert found == IndexMap((LENGTH, 2), 2 * BATCH - 3, (BATCH, -6))


def test_the_range_of_a_map_holds_for_all_sizes() -> None:
    below = IndexMap((LENGTH,), LENGTH, (-1,))
    assert below.range() == (1, 64)
    assert IndexMap((LENGTH, LENGTH), 0, (1, -1)).range() == (-63, 63)
    diagonal = IndexMap((LENGTH, LENGTH), 0, (1, -1)).on_diagonal()
    assert diagonal is not None
    assert diagonal.range() == (0, 0)
    assert IndexMap((LENGTH, BATCH), 0, (1, -1)).on_diagonal() is None


def test_facts_hold_on_random_masks() -> None:
    """What is told of a random expression of comparisons is what its evaluation shows."""
    told: Counter[str] = Counter()
    triangle = torch.ones(5, 5).tril().bool().expand(2, 1, 5, 5)
    for seed in range(100):
        f = Writer(2, 5)
        f.output(*_RandomMasks(f, random.Random(seed)).masks(6))
        facts = MaskFacts(f.module)
        values = interpret(f.module, [torch.zeros(2, 4, 5, 8), torch.ones(2, 1, 1, 5, dtype=torch.bool)])
        for mask, value in zip(f.graph.outputs, values, strict=True):
            known = facts.truth(mask)
            told[f"always {known}"] += 1
            assert known is None or bool((value == known).all())
            if facts.is_causal(mask):
                told["causal"] += 1
                assert torch.equal(value, triangle)
            if facts.is_causal(mask, hidden=True):
                told["the future"] += 1
                assert torch.equal(value, ~triangle)
            if facts.rows_have_a_key(mask):
                told["keys"] += 1
                assert bool(value.any(-1).all())
    assert all(told[fact] >= 5 for fact in ("always True", "always False", "causal", "the future", "keys")), told


class _RandomMasks:
    def __init__(self, f: Writer, rng: random.Random) -> None:
        self.f, self.rng = f, rng

    def masks(self, count: int) -> list[Value]:
        return [self.condition(self.rng.randrange(3)) for _ in range(count)]

    def index(self, depth: int) -> Value:
        f, rng = self.f, self.rng
        if depth == 0:
            return rng.choice((f.rows, f.columns, f.integer(rng.randint(-3, 3))))
        kind = rng.choice((ops.Add, ops.Sub, ops.Mul))
        return f(kind(self.index(depth - 1), f.integer(rng.randint(-1, 2))))

    def condition(self, depth: int) -> Value:
        f, rng = self.f, self.rng
        if depth == 0:
            compare = rng.choice((ops.Le, ops.Lt, ops.Ge, ops.Gt))
            return f.expand(f(compare(self.index(rng.randrange(2)), self.index(rng.randrange(2)))))
        if rng.random() < 0.3:
            return f.no(self.condition(depth - 1))
        return f(rng.choice((ops.LogicalAnd, ops.LogicalOr))(self.condition(depth - 1), self.condition(depth - 1)))


# -- expands -----------------------------------------------------------------------------------------------------------


def test_elementwise_ops_read_what_was_expanded() -> None:
    b = Builder()
    x, y = b.input("x", TensorType(F32, (BATCH, 1, 5))), b.input("y", TensorType(F32, (3, 5)))
    wide = b(ops.Expand(x, shape=(BATCH, 3, 5)))
    b.output(b(ops.Add(wide, b(ops.Expand(y, shape=(BATCH, 3, 5))))), b(ops.Tanh(wide)))
    after = optimize(b.module, "simplify-expands,dce").module
    assert [(op.name, op.result.type.shape) for op in after.walk()] == [
        ("add", (BATCH, 3, 5)), ("tanh", (BATCH, 1, 5)), ("expand", (BATCH, 3, 5)),
    ]  # fmt: skip


def test_a_matrix_repeated_for_a_batched_product() -> None:
    """What torch's decomposition makes of a linear layer without a bias."""
    b = Builder()
    x = b.input("x", TensorType(F32, (BATCH, LENGTH, 4)))
    w = b.weight("w", torch.randn(4, 6))
    b.output(b(ops.Matmul(x, b(ops.Expand(w, shape=(BATCH, 4, 6))))))
    after = optimize(b.module, "simplify-expands,dce,raise-linear").module
    assert [op.name for op in after.walk()] == ["linear"]


def test_a_product_over_an_expanded_axis_stays() -> None:
    b = Builder()
    x, y = b.input("x", TensorType(F32, (3, 1))), b.input("y", TensorType(F32, (5, 4)))
    b.output(b(ops.Matmul(b(ops.Expand(x, shape=(3, 5))), y)))
    assert [op.name for op in optimize(b.module, "simplify-expands").module.walk()] == ["expand", "matmul"]


def test_other_ops_read_what_is_expanded() -> None:
    b = Builder()
    x = b.input("x", TensorType(F32, (BATCH, 1, 5)))
    b.output(b(ops.Sum(b(ops.Expand(x, shape=(BATCH, 3, 5))), dims=(1,))))
    assert [op.name for op in optimize(b.module, "simplify-expands").module.walk()] == ["expand", "sum"]


# -- whole models ------------------------------------------------------------------------------------------------------


class SelfAttention(torch.nn.Module):
    """Masks as models of PyTorch write them."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        length = x.shape[2]
        allowed = mask.bool()[:, None, None, :].expand(-1, 1, length, length)
        if self.causal:
            allowed = allowed & torch.ones(length, length, dtype=torch.bool).tril()
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=allowed)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("decomposed", [False, True])
def test_masks_of_a_traced_model(causal: bool, decomposed: bool) -> None:
    model = SelfAttention(causal).eval()
    batch, length = torch.export.Dim("batch", min=1, max=8), torch.export.Dim("length", min=2, max=64)
    example = (torch.randn(2, 4, 6, 8), torch.ones(2, 6, dtype=torch.int64))
    program = torch.export.export(model, example, dynamic_shapes=({0: batch, 2: length}, {0: batch, 1: length}))
    module = import_program(program.run_decompositions() if decomposed else program)
    steps = "cleanup,simplify-expands,unmerge-batch-axes,cleanup,raise-attention,simplify-masks,cleanup"
    op = simplified(module, steps)
    assert op.causal == causal
    assert op.mask is not None
    assert op.mask.type.shape[1:3] == (1, 1)
