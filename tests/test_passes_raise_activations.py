"""Activations in decomposed form become one op, in every spelling, and what only looks like one stays."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from onnx import NodeProto
from onnx_models import info, model, names, node
from pass_harness import Golden, assert_same_results, check_case, read, rewritten

from trimtab import from_onnx
from trimtab.errors import ContractError
from trimtab.ir import Builder, DType, Module, Op, TensorType, Value, ops, symbol
from trimtab.passes.raise_gelu import GeluErf, GeluTanh

SIZES = ({"batch": 1, "seq": 2}, {"batch": 3, "seq": 7})
SLOPE = math.sqrt(2 / math.pi)

GOLDEN = {
    "raise-gelu-forms": """
symbols batch=1..8
graph main(%x: f32[batch, 4]) {
  %half = full() {value=0.5, dtype=f32} : f32[]
  %one = full() {value=1.0, dtype=f32} : f32[]
  %root = full() {value=1.4142135, dtype=f32} : f32[]
  %d = div(%x, %root) : f32[batch, 4]
  %e = erf(%d) : f32[batch, 4]
  %p = add(%e, %one) : f32[batch, 4]
  %q = mul(%x, %p) : f32[batch, 4]
  %erf_form = mul(%q, %half) : f32[batch, 4]
  %three = full() {value=3.0, dtype=f32} : f32[]
  %cubic = full() {value=0.044715, dtype=f32} : f32[]
  %slope = full() {value=0.79788456, dtype=f32} : f32[]
  %cube = pow(%erf_form, %three) : f32[batch, 4]
  %scaled = mul(%cubic, %cube) : f32[batch, 4]
  %sum = add(%erf_form, %scaled) : f32[batch, 4]
  %inner = mul(%slope, %sum) : f32[batch, 4]
  %t = tanh(%inner) : f32[batch, 4]
  %p2 = add(%one, %t) : f32[batch, 4]
  %h = mul(%erf_form, %half) : f32[batch, 4]
  %tanh_form = mul(%h, %p2) : f32[batch, 4]
  %quick = full() {value=1.702, dtype=f32} : f32[]
  %k = mul(%tanh_form, %quick) : f32[batch, 4]
  %s = sigmoid(%k) : f32[batch, 4]
  %y = mul(%s, %tanh_form) : f32[batch, 4]
  return y=%y
}""",
    "raise-gelu-near_misses": """
graph main(%x: f32[4], %z: f32[4]) {
  %half = full() {value=0.5, dtype=f32} : f32[]
  %quarter = full() {value=0.25, dtype=f32} : f32[]
  %one = full() {value=1.0, dtype=f32} : f32[]
  %root = full() {value=1.4142135, dtype=f32} : f32[]
  %coarse = full() {value=1.414, dtype=f32} : f32[]
  %a = div(%x, %root) : f32[4]
  %b = erf(%a) : f32[4]
  %gate = add(%b, %one) : f32[4]
  %c = mul(%x, %gate) : f32[4]
  %wrong_factor = mul(%c, %quarter) : f32[4]
  %d = mul(%z, %gate) : f32[4]
  %wrong_value = mul(%d, %half) : f32[4]
  %e = div(%x, %coarse) : f32[4]
  %f = erf(%e) : f32[4]
  %g = add(%f, %one) : f32[4]
  %h = mul(%x, %g) : f32[4]
  %wrong_root = mul(%h, %half) : f32[4]
  return wrong_factor=%wrong_factor, wrong_value=%wrong_value, wrong_root=%wrong_root
}""",
    "raise-silu-shared_sigmoid": """
graph main(%x: f32[2, 4], %z: f32[2, 4], %row: f32[4]) {
  %s = sigmoid(%x) : f32[2, 4]
  %silu = mul(%s, %x) : f32[2, 4]
  %gated = mul(%s, %z) : f32[2, 4]
  %t = sigmoid(%row) : f32[4]
  %other = mul(%t, %x) : f32[2, 4]
  return silu=%silu, gated=%gated, other=%other
}""",
    "raise-activations-forms": """
symbols batch=1..8
graph main(%x: f32[batch, 4]) {
  %zero = full() {value=0.0, dtype=f32} : f32[]
  %relu = maximum(%zero, %x) : f32[batch, 4]
  %three = full() {value=3.0, dtype=f32} : f32[]
  %six = full() {value=6.0, dtype=f32} : f32[]
  %a = add(%x, %three) : f32[batch, 4]
  %b = clamp(%a) {min=0.0} : f32[batch, 4]
  %c = clamp(%b) {max=6.0} : f32[batch, 4]
  %hard_sigmoid = div(%c, %six) : f32[batch, 4]
  %d = add(%relu, %three) : f32[batch, 4]
  %e = clamp(%d) {min=0.0, max=6.0} : f32[batch, 4]
  %f = mul(%relu, %e) : f32[batch, 4]
  %hard_swish = div(%f, %six) : f32[batch, 4]
  %twenty = full() {value=20.0, dtype=f32} : f32[]
  %g = exp(%x) : f32[batch, 4]
  %h = log1p(%g) : f32[batch, 4]
  %i = gt(%x, %twenty) : bool[batch, 4]
  %softplus = where(%i, %x, %h) : f32[batch, 4]
  %j = tanh(%softplus) : f32[batch, 4]
  %mish = mul(%x, %j) : f32[batch, 4]
  %two = full() {value=2.0, dtype=f32} : f32[]
  %k = div(%x, %two) : f32[batch, 4]
  %l = expm1(%k) : f32[batch, 4]
  %m = mul(%l, %two) : f32[batch, 4]
  %n = gt(%x, %zero) : bool[batch, 4]
  %celu = where(%n, %x, %m) : f32[batch, 4]
  return relu=%relu, hard_sigmoid=%hard_sigmoid, hard_swish=%hard_swish, mish=%mish, celu=%celu
}""",
    "raise-activations-near_misses": """
graph main(%x: f32[2, 4], %z: f32[2, 4]) {
  %row = full() {value=0.0, dtype=f32, shape=[3, 2, 4]} : f32[3, 2, 4]
  %broadcast = maximum(%x, %row) : f32[3, 2, 4]
  %r = relu(%x) : f32[2, 4]
  %negative_bound = clamp(%r) {max=-1.0} : f32[2, 4]
  %two = full() {value=2.0, dtype=f32} : f32[]
  %a = mul(%x, %two) : f32[2, 4]
  %b = gt(%a, %two) : bool[2, 4]
  %c = softplus(%x) : f32[2, 4]
  %other_multiple = where(%b, %x, %c) : f32[2, 4]
  %d = softplus(%z) : f32[2, 4]
  %e = tanh(%d) : f32[2, 4]
  %other_value = mul(%x, %e) : f32[2, 4]
  return broadcast=%broadcast, bound=%negative_bound, multiple=%other_multiple, value=%other_value
}""",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_pass_rewrites_as_reviewed(name: str, golden: Golden) -> None:
    module = read(GOLDEN[name])
    passes = next(p for p in ("raise-gelu", "raise-silu", "raise-activations") if name.startswith(p))
    result = check_case(golden, name, passes + ",dce", module)
    assert_same_results(module, result, *(SIZES if module.symbols() else ()), tolerance=1e-6)


# -- every order and grouping ---------------------------------------------------------------------------------------


class Spelling:
    """Builds the pieces of one activation of ``x``, ``f32[batch, seq, 3]``."""

    def __init__(self) -> None:
        self.builder = Builder()
        sizes = symbol("batch", 1, 8), symbol("seq", 2, 8)
        self.x = self.builder.input("x", TensorType(DType.F32, (*sizes, 3)))

    def __call__(self, cls: type[Op], *operands: Value | float) -> Value:
        return self.builder(cls(*(self.number(v) if isinstance(v, float) else v for v in operands)))

    def number(self, value: float) -> Value:
        return self.builder.scalar(value, DType.F32)

    def times(self, *factors: Value | float) -> Value:
        """The product, from left to right."""
        return functools.reduce(lambda x, y: self(ops.Mul, x, y), factors)

    def module(self, output: Value) -> Module:
        self.builder.output(output)
        return self.builder.module


Form = Callable[[Spelling, Value], Value]

HALVES: dict[str, Callable[[Spelling, Value, Value], Value]] = {
    "(x g) h": lambda s, x, g: s.times(x, g, 0.5),
    "(g x) h": lambda s, x, g: s.times(g, x, 0.5),
    "h (x g)": lambda s, x, g: s.times(0.5, s.times(x, g)),
    "(x h) g": lambda s, x, g: s.times(x, 0.5, g),
    "(h x) g": lambda s, x, g: s.times(0.5, x, g),
    "g (x h)": lambda s, x, g: s.times(g, s.times(x, 0.5)),
    "x (h g)": lambda s, x, g: s.times(x, s.times(0.5, g)),
    "(g h) x": lambda s, x, g: s.times(g, 0.5, x),
    "(x g) / 2": lambda s, x, g: s(ops.Div, s.times(x, g), 2.0),
    "(x / 2) g": lambda s, x, g: s.times(s(ops.Div, x, 2.0), g),
    "x (g / 2)": lambda s, x, g: s.times(x, s(ops.Div, g, 2.0)),
}
ONES: dict[str, Form] = {
    "v + 1": lambda s, v: s(ops.Add, v, 1.0),
    "1 + v": lambda s, v: s(ops.Add, 1.0, v),
    "v - -1": lambda s, v: s(ops.Sub, v, -1.0),
}
ROOTS: dict[str, Form] = {
    "x / sqrt 2": lambda s, x: s(ops.Div, x, math.sqrt(2)),
    "x sqrt .5": lambda s, x: s.times(x, math.sqrt(0.5)),
    "sqrt .5 x": lambda s, x: s.times(math.sqrt(0.5), x),
    "x 0.7071": lambda s, x: s.times(x, 0.7071),
}
CUBES: dict[str, Callable[[Spelling, Value, float], Value]] = {
    "pow3": lambda s, x, c: s.times(s(ops.Pow, x, 3.0), c),
    "xxxc": lambda s, x, c: s.times(x, x, x, c),
    "cxxx": lambda s, x, c: s.times(c, x, x, x),
    "x(c(xx))": lambda s, x, c: s.times(x, s.times(c, s.times(x, x))),
    "c(pow2 x)": lambda s, x, c: s.times(c, s.times(s(ops.Pow, x, 2.0), x)),
    "(cx)pow2": lambda s, x, c: s.times(s.times(c, x), s(ops.Pow, x, 2.0)),
}
SQUARES: dict[str, Callable[[Spelling, Value, float], Value]] = {
    "pow2": lambda s, x, c: s.times(s(ops.Pow, x, 2.0), c),
    "xxc": lambda s, x, c: s.times(x, x, c),
    "cxx": lambda s, x, c: s.times(c, x, x),
}
INNER: dict[str, Form] = {}
"""The arguments of tanh."""
for _name, _cube in CUBES.items():
    INNER[f"(x + {_name}) s"] = lambda s, x, cube=_cube: s.times(s(ops.Add, x, cube(s, x, 0.044715)), SLOPE)
    INNER[f"s ({_name} + x)"] = lambda s, x, cube=_cube: s.times(SLOPE, s(ops.Add, cube(s, x, 0.044715), x))
    INNER[f"x s + {_name} s"] = lambda s, x, cube=_cube: s(ops.Add, s.times(x, SLOPE), cube(s, x, SLOPE * 0.044715))
for _name, _square in SQUARES.items():
    INNER[f"x s (1 + {_name})"] = lambda s, x, square=_square: s.times(
        x, SLOPE, s(ops.Add, 1.0, square(s, x, 0.044715))
    )
    INNER[f"x ({_name} + 1) s"] = lambda s, x, square=_square: s.times(
        x, s(ops.Add, square(s, x, 0.044715), 1.0), SLOPE
    )


def check_gelu(module: Module, approximate: str, tolerance: float = 1e-7) -> None:
    result, _ = rewritten(module, "raise-gelu,dce")
    (op,) = result.walk()
    assert isinstance(op, ops.Gelu)
    assert op.approximate == approximate
    assert_same_results(module, result, *SIZES, tolerance=tolerance)


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("half", HALVES)
def test_gelu_with_erf_in_every_order(half: str, root: str) -> None:
    for one in ONES.values():
        s = Spelling()
        gate = one(s, s(ops.Erf, ROOTS[root](s, s.x)))
        check_gelu(s.module(HALVES[half](s, s.x, gate)), "none", 1e-5 if "0.7071" in root else 1e-7)


@pytest.mark.parametrize("inner", INNER)
def test_gelu_with_tanh_in_every_form(inner: str) -> None:
    for half, one in (("(x g) h", "v + 1"), ("x (h g)", "1 + v")):
        s = Spelling()
        gate = ONES[one](s, s(ops.Tanh, INNER[inner](s, s.x)))
        check_gelu(s.module(HALVES[half](s, s.x, gate)), "tanh")


@pytest.mark.parametrize("half", HALVES)
def test_gelu_with_tanh_in_every_order(half: str) -> None:
    s = Spelling()
    gate = ONES["1 + v"](s, s(ops.Tanh, INNER["(x + pow3) s"](s, s.x)))
    check_gelu(s.module(HALVES[half](s, s.x, gate)), "tanh")


SIGMOIDS: dict[str, Callable[[Spelling], Value]] = {
    "x sigmoid(x c)": lambda s: s.times(s.x, s(ops.Sigmoid, s.times(s.x, 1.702))),
    "sigmoid(c x) x": lambda s: s.times(s(ops.Sigmoid, s.times(1.702, s.x)), s.x),
    "x sigmoid(x / c)": lambda s: s.times(s.x, s(ops.Sigmoid, s(ops.Div, s.x, 1 / 1.702))),
}


@pytest.mark.parametrize("spelling", SIGMOIDS)
def test_gelu_with_sigmoid(spelling: str) -> None:
    s = Spelling()
    check_gelu(s.module(SIGMOIDS[spelling](s)), "sigmoid")


# -- what is not one ------------------------------------------------------------------------------------------------


def erf_form(half: float = 0.5, root: float = math.sqrt(2), one: float = 1.0, function: type[Op] = ops.Erf) -> Module:
    s = Spelling()
    return s.module(s.times(s.x, s(ops.Add, s(function, s(ops.Div, s.x, root)), one), half))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (erf_form(half=0.25), "the constant is 0.25, not 0.5"),
        (erf_form(one=1.5), "the constant is 1.5, not 1"),
        (erf_form(root=1.4), "the constant is 0.714285714, not 0.707106781"),
        (erf_form(function=ops.Sin), "a sin is not a result of erf"),
    ],
)
def test_almost_gelu_stays_and_the_reason_is_told(module: Module, reason: str) -> None:
    assert rewritten(module, "raise-gelu,raise-silu,raise-activations")[0] == module
    assert GeluErf().explain(module).reason == reason


def test_gelu_of_another_approximation_is_told_apart() -> None:
    assert GeluTanh().explain(erf_form()).reason == "an erf is not a result of tanh"


def test_a_wider_tolerance_takes_coarser_constants() -> None:
    module = erf_form(root=1.414)
    assert rewritten(module, "raise-gelu")[0] == module
    assert names(rewritten(module, "raise-gelu{tolerance=0.001},dce")[0]) == ["gelu"]


def test_the_contract_bounds_what_a_tolerance_may_change() -> None:
    with pytest.raises(ContractError, match="raise-gelu broke its contract"):
        rewritten(erf_form(root=1.38), "raise-gelu{tolerance=0.05}")


def test_a_factor_that_broadcasts_x_is_refused() -> None:
    s = Spelling()
    gate = s(ops.Add, s(ops.Erf, s(ops.Div, s.x, math.sqrt(2))), 1.0)
    half = s.builder(ops.Full(value=0.5, dtype=DType.F32, shape=(5, 1, 1, 1)))
    module = s.module(s(ops.Mul, s(ops.Mul, s.x, gate), half))
    assert rewritten(module, "raise-gelu")[0] == module
    assert GeluErf().explain(module).reason == (
        "a factor broadcasts x from f32[batch, seq, 3] to f32[5, batch, seq, 3]"
    )


@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16])
def test_half_types_keep_the_contract(dtype: DType) -> None:
    b = Builder()
    x = b.input("x", TensorType(dtype, (4, 64)))
    rounded = float(torch.tensor(math.sqrt(0.5)).to(dtype.to_torch()))
    gate = b(ops.Add(b(ops.Erf(b(ops.Mul(x, b.scalar(rounded, dtype))))), b.scalar(1.0, dtype)))
    b.output(b(ops.Mul(b(ops.Mul(x, gate)), b.scalar(0.5, dtype))))
    assert names(rewritten(b.module, "raise-gelu,dce")[0]) == ["gelu"]


def test_softplus_keeps_the_lower_limit() -> None:
    s = Spelling()
    whole = s.builder(ops.Softplus(s(ops.Mul, s.x, 2.0), threshold=20.0))
    limited = s(ops.Where, s(ops.Gt, s(ops.Mul, s.x, 2.0), 8.0), s.x, s(ops.Div, whole, 2.0))
    module = s.module(limited)
    (op,) = rewritten(module, "raise-activations,dce")[0].walk()
    assert isinstance(op, ops.Softplus)
    assert (op.beta, op.threshold) == (2.0, 8.0)


# -- forms that exporters wrote in ONNX -----------------------------------------------------------------------------


@pytest.mark.parametrize("order", range(3))
def test_gelu_with_erf_in_onnx(order: int) -> None:
    head = [node("Div", ["x", "root"], ["a"]), node("Erf", ["a"], ["e"]), node("Add", ["e", "one"], ["p"])]
    tails = [
        [node("Mul", ["x", "p"], ["q"]), node("Mul", ["q", "half"], ["y"])],
        [node("Mul", ["half", "x"], ["q"]), node("Mul", ["q", "p"], ["y"])],
        [node("Mul", ["p", "half"], ["q"]), node("Mul", ["q", "x"], ["y"])],
    ]
    weights = {"root": np.float32(math.sqrt(2)), "one": np.float32(1), "half": np.float32(0.5)}
    assert raised_names(head + tails[order], weights) == ["gelu"]


def test_gelu_with_tanh_in_onnx() -> None:
    nodes = [node("Pow", ["x", "three"], ["c"]), node("Mul", ["c", "k"], ["kc"]), node("Add", ["x", "kc"], ["i"]),
             node("Mul", ["i", "slope"], ["u"]), node("Tanh", ["u"], ["t"]), node("Add", ["t", "one"], ["p"]),
             node("Mul", ["x", "half"], ["h"]), node("Mul", ["h", "p"], ["y"])]  # fmt: skip
    weights = {"three": np.float32(3), "k": np.float32(0.044715), "one": np.float32(1),
               "slope": np.float32(SLOPE), "half": np.float32(0.5)}  # fmt: skip
    assert raised_names(nodes, weights) == ["gelu"]


@pytest.mark.parametrize(("name", "value"), [("half", 0.25), ("root", 1.4), ("one", 1.5)])
def test_almost_gelu_in_onnx_stays(name: str, value: float) -> None:
    nodes = [node("Div", ["x", "root"], ["a"]), node("Erf", ["a"], ["e"]), node("Add", ["e", "one"], ["p"]),
             node("Mul", ["x", "p"], ["q"]), node("Mul", ["q", "half"], ["y"])]  # fmt: skip
    weights = {"root": np.float32(math.sqrt(2)), "one": np.float32(1), "half": np.float32(0.5)}
    assert "gelu" not in raised_names(nodes, weights | {name: np.float32(value)})


def test_silu_in_onnx() -> None:
    assert raised_names([node("Sigmoid", ["x"], ["s"]), node("Mul", ["s", "x"], ["y"])], {}) == ["silu"]


def test_quick_gelu_of_onnx_runtime() -> None:
    nodes = [node("QuickGelu", ["x"], ["y"], domain="com.microsoft", alpha=1.702)]
    assert raised_names(nodes, {}, domains=[("com.microsoft", 1)]) == ["gelu"]


def raised_names(nodes: list[NodeProto], weights: dict[str, np.float32], **options: Any) -> list[str]:
    """Ops after the import of a graph of ``x``, batch by 8, and the raising of its activations."""
    proto = model(nodes, [info("x", ["batch", 8])], ["y"], weights, **options)
    module = from_onnx(proto)
    result, _ = rewritten(module, "cleanup,raise-activations,raise-gelu,raise-silu,dce")
    assert_same_results(module, result, {"batch": 3}, {"batch": 1}, tolerance=1e-6)
    return names(result)
