"""The pattern engine: what patterns match, why they do not, and how the driver applies rules."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from trimtab.errors import Location, PassError, UsageError
from trimtab.ir import Module, TensorType, ops, parse_module, print_graph
from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.dtypes import DType
from trimtab.ir.interpreter import interpret
from trimtab.ir.rewrite import (
    Attr,
    Constant,
    Match,
    Pattern,
    Rewrites,
    Rule,
    Scalar,
    Var,
    apply_rules,
    maybe,
    one_of,
    op,
    optional,
    product,
    repeated,
    scaled,
    shared,
)
from trimtab.ir.verifier import verify


def parse(body: str) -> Module:
    return parse_module("trimtab.ir 1\n" + body)


def graph(body: str, inputs: str = "%x: f32[2, 4]") -> Module:
    return parse(f"graph main({inputs}) {{\n{body}\n}}")


def rule(
    pattern: Callable[..., Pattern | tuple[Pattern, ...]],
    rewrite: Callable[[Match, Builder], Value | tuple[Value, ...]] = lambda m, build: build(ops.Relu(m.x)),
    check: Callable[[Match], str | None] = lambda m: None,
    *,
    private: bool = True,
    tolerance: float = 1e-6,
) -> Rule:
    """A rule from functions; ``pattern`` takes the variables as a rule's method does, without self."""

    class Made(Rule):
        name = "made"

        def check(self, m: Match) -> str | None:
            return check(m)

        def rewrite(self, m: Match, build: Builder) -> Value | tuple[Value, ...]:
            return rewrite(m, build)

        def pattern(self, *variables: Pattern) -> Pattern | tuple[Pattern, ...]:
            raise NotImplementedError

    Made.pattern = staticmethod(pattern)  # type: ignore[assignment, method-assign]
    Made.private, Made.tolerance = private, tolerance
    return Made()


def matches(pattern: Callable[..., Pattern], body: str, inputs: str = "%x: f32[2, 4]", **options: bool) -> bool:
    return rule(pattern, **options).explain(graph(body, inputs), at="%y").matches


CONSTANT = "  %c = full() {{value={}, dtype=f32}} : f32[]\n"


@pytest.mark.parametrize(
    ("name", "line", "value"),
    [
        ("right", "mul(%x, %c)", 0.5),
        ("left", "mul(%c, %x)", 0.5),
        ("division", "div(%x, %c)", 2.0),
    ],
)
def test_a_product_with_a_number_matches_its_spellings(name: str, line: str, value: float) -> None:
    def pattern(x: Var) -> Pattern:
        return x * 0.5

    body = CONSTANT + "  %y = " + line + " : f32[2, 4]\n  return y=%y"
    assert matches(pattern, body.format(value))
    assert not matches(pattern, body.format(value * 1.001))


@pytest.mark.parametrize(("line", "value"), [("add(%x, %c)", 3.0), ("add(%c, %x)", 3.0), ("sub(%x, %c)", -3.0)])
def test_a_sum_with_a_number_matches_its_spellings(line: str, value: float) -> None:
    body = (CONSTANT + "  %y = " + line + " : f32[2, 4]\n  return y=%y").format(value)
    assert matches(lambda x: x + 3, body)
    assert matches(lambda x: x - -3, body)
    assert not matches(lambda x: x + 2, body)


def test_constants_match_within_the_tolerance() -> None:
    body = CONSTANT.format(0.7071) + "  %y = mul(%x, %c) : f32[2, 4]\n  return y=%y"
    module = graph(body)
    wanted = math.sqrt(0.5)
    assert not rule(lambda x: x * wanted).explain(module, at="%y").matches
    assert rule(lambda x: x * wanted, tolerance=1e-4).explain(module, at="%y").matches
    assert rule(lambda x: x * wanted).explain(module).reason == "the constant is 0.7071, not 0.707106781"


def test_a_constant_that_broadcasts_its_partner_is_no_factor() -> None:
    body = """
  %c = full() {value=0.5, dtype=f32, shape=[3, 2, 4]} : f32[3, 2, 4]
  %y = mul(%x, %c) : f32[3, 2, 4]
  return y=%y"""
    assert not matches(lambda x: x * 0.5, body)


@pytest.mark.parametrize(
    ("power", "body"),
    [
        (2, "  %c = full() {value=2.0, dtype=f32} : f32[]\n  %y = pow(%x, %c) : f32[2, 4]"),
        (2, "  %y = mul(%x, %x) : f32[2, 4]"),
        (3, "  %s = mul(%x, %x) : f32[2, 4]\n  %y = mul(%x, %s) : f32[2, 4]"),
        (0.5, "  %y = sqrt(%x) : f32[2, 4]"),
        (-0.5, "  %y = rsqrt(%x) : f32[2, 4]"),
        (-0.5, "  %s = sqrt(%x) : f32[2, 4]\n  %y = reciprocal(%s) : f32[2, 4]"),
        (
            -0.5,
            "  %o = full() {value=1.0, dtype=f32} : f32[]\n  %s = sqrt(%x) : f32[2, 4]\n  %y = div(%o, %s) : f32[2, 4]",
        ),
    ],
)
def test_powers_match_their_spellings(power: float, body: str) -> None:
    assert matches(lambda x: op.neg(x**power), body.replace("%y", "%p") + "\n  %y = neg(%p) : f32[2, 4]\n  return y=%y")


def test_commutative_operands_match_both_ways_and_others_do_not() -> None:
    swapped = "  %e = exp(%x) : f32[2, 4]\n  %y = {}(%z, %e) : f32[2, 4]\n  return y=%y"
    inputs = "%x: f32[2, 4], %z: f32[2, 4]"
    assert matches(lambda x, z: op.exp(x) * z, swapped.format("mul"), inputs)
    assert not matches(lambda x, z: op.exp(x) - z, swapped.format("sub"), inputs)


def test_a_variable_used_twice_is_one_value_or_computed_equally() -> None:
    inputs = "%x: f32[2, 4], %z: f32[2, 4]"
    body = "  %s = sigmoid({}) : f32[2, 4]\n  %y = mul(%x, %s) : f32[2, 4]\n  return y=%y"
    assert matches(lambda x: x * op.sigmoid(x), body.format("%x"), inputs)
    assert not matches(lambda x: x * op.sigmoid(x), body.format("%z"), inputs)
    twice = """
  %a = add(%x, %z) : f32[2, 4]
  %b = add(%x, %z) : f32[2, 4]
  %s = sigmoid(%b) : f32[2, 4]
  %y = mul(%a, %s) : f32[2, 4]
  return y=%y"""
    assert matches(lambda x: x * op.sigmoid(x), twice, inputs)


def test_optional_casts_and_alternatives() -> None:
    inputs = "%x: f16[2, 4]"
    cast = """
  %c = cast(%x) {dtype=f32} : f32[2, 4]
  %s = sigmoid(%c) : f32[2, 4]
  %y = neg(%s) : f32[2, 4]
  return y=%y"""
    plain = "  %s = sigmoid(%x) : f16[2, 4]\n  %y = neg(%s) : f16[2, 4]\n  return y=%y"

    def pattern(x: Var, wide: Attr) -> Pattern:
        return op.neg(op.sigmoid(optional(op.cast(x, dtype=wide))))

    assert matches(pattern, cast, inputs)
    assert matches(pattern, plain, inputs)
    either: Callable[..., Pattern] = lambda x: op.neg(one_of(op.tanh(x), op.sigmoid(x)))  # noqa: E731
    assert matches(either, plain, inputs)
    assert not matches(lambda x: op.neg(one_of(op.tanh(x), op.exp(x))), plain, inputs)


def test_attributes_may_be_given_captured_or_asked() -> None:
    body = "  %y = softmax(%x) {dim=1} : f32[2, 4]\n  return y=%y"
    assert matches(lambda x: op.softmax(x, dim=-1), body)
    assert matches(lambda x: op.softmax(x, dim=1), body)
    assert matches(lambda x: op.softmax(x), body)
    assert matches(lambda x: op.softmax(x, dim=lambda dim: dim > 0), body)
    explanation = rule(lambda x: op.softmax(x, dim=0)).explain(graph(body), at="%y")
    assert explanation.reason == "softmax has dim=1, not 0"

    def captured(x: Var, dim: Attr) -> Pattern:
        return op.softmax(op.softmax(x, dim=dim), dim=dim)

    two = "  %s = softmax(%x) {{dim={}}} : f32[2, 4]\n  %y = softmax(%s) {{dim=1}} : f32[2, 4]\n  return y=%y"
    assert matches(captured, two.format(1))
    assert not matches(captured, two.format(0))


@pytest.mark.parametrize("order", ["mul(%h, %g)", "mul(%g, %h)"])
@pytest.mark.parametrize("first", ["mul(%c, %x)", "mul(%x, %c)", "div(%x, %two)"])
def test_a_product_matches_in_any_grouping(order: str, first: str) -> None:
    def pattern(x: Var) -> Pattern:
        return product(x, op.sigmoid(x), constant=0.5)

    head = """
  %c = full() {value=0.5, dtype=f32} : f32[]
  %two = full() {value=2.0, dtype=f32} : f32[]
  %g = sigmoid(%x) : f32[2, 4]
"""
    grouped = f"{head}  %h = {first} : f32[2, 4]\n  %y = {order} : f32[2, 4]\n  return y=%y"
    assert matches(pattern, grouped)
    last = first.replace("%x", "%p")
    late = f"{head}  %p = mul(%x, %g) : f32[2, 4]\n  %y = {last} : f32[2, 4]\n  return y=%y"
    assert matches(pattern, late)
    assert not matches(lambda x: product(x, op.sigmoid(x)), late)


def test_scaled_takes_off_every_constant_factor() -> None:
    body = """
  %a = full() {value=0.5, dtype=f32} : f32[]
  %b = full() {value=4.0, dtype=f32} : f32[]
  %e = exp(%x) : f32[2, 4]
  %p = mul(%e, %a) : f32[2, 4]
  %q = div(%p, %b) : f32[2, 4]
  %y = tanh(%q) : f32[2, 4]
  return y=%y"""
    found: list[float] = []

    def rewrite(m: Match, build: Builder) -> Value:
        found.append(m.s)
        return build(ops.Tanh(m.x))

    def pattern(x: Var, s: Scalar) -> Pattern:
        return op.tanh(scaled(op.exp(x), by=s))

    assert apply_rules(graph(body), [rule(pattern, rewrite)]) == 1
    assert found == [0.125]
    assert (
        apply_rules(
            graph("  %e = exp(%x) : f32[2, 4]\n  %y = tanh(%e) : f32[2, 4]\n  return y=%y"), [rule(pattern, rewrite)]
        )
        == 1
    )
    assert found == [0.125, 1.0]


def test_optional_operands() -> None:
    weights = "weight @w: f32[4, 4]\nweight @b: f32[4]\n"

    def linear(bias: str) -> Module:
        return parse(
            f"{weights}graph main(%x: f32[2, 4]) {{\n  %y = linear(%x, @w{bias}) : f32[2, 4]\n  return y=%y\n}}"
        )

    def with_maybe(x: Var, w: Constant, b: Constant) -> Pattern:
        return op.linear(x, w, maybe(b))

    def without(x: Var, w: Constant) -> Pattern:
        return op.linear(x, w)

    assert rule(with_maybe).explain(linear("")).matches
    assert rule(with_maybe).explain(linear(", @b")).matches
    absent = rule(with_maybe, check=lambda m: None if m.b is None else "there is a bias")
    assert absent.explain(linear("")).matches
    assert absent.explain(linear(", @b")).reason == "there is a bias"
    assert rule(without).explain(linear("")).matches
    assert rule(without).explain(linear(", @b")).reason == "linear has an operand bias"


def test_a_repeated_operand_binds_lists() -> None:
    body = """
  %a = exp(%x) : f32[2, 4]
  %b = exp(%z) : f32[2, 4]
  %y = concat([%a, %b, %a]) {dim=0} : f32[6, 4]
  return y=%y"""
    inputs = "%x: f32[2, 4], %z: f32[2, 4]"

    def pattern(x: Var) -> Pattern:
        return op.concat(repeated(op.exp(x)), dim=0)

    def rewrite(m: Match, build: Builder) -> Value:
        assert [value.name for value in m.x] == ["x", "z", "x"]
        return build(ops.Exp(build(ops.Concat(m.x, dim=0))))

    module = graph(body, inputs)
    before, samples = module.copy(), [torch.randn(2, 4), torch.randn(2, 4)]
    assert apply_rules(module, [rule(pattern, rewrite)]) == 1
    verify(module)
    assert [o.name for o in module.walk()] == ["concat", "exp"]
    assert torch.equal(interpret(module, samples)[0], interpret(before, samples)[0])
    assert not matches(pattern, body.replace("exp(%z)", "tanh(%z)"), inputs)


# -- several outputs -----------------------------------------------------------------------------------------------


def test_siblings_are_replaced_together_where_all_their_inputs_are_known() -> None:
    module = parse(
        """
weight @a: f32[3, 4]
weight @b: f32[5, 4]
graph main(%x: f32[2, 4]) {
  %p = linear(%x, @a) : f32[2, 3]
  %e = exp(%p) : f32[2, 3]
  %q = linear(%x, @b) : f32[2, 5]
  return e=%e, q=%q
}"""
    )
    module.weights["a"].source, module.weights["b"].source = _source(3, 4), _source(5, 4)

    def pattern(x: Var, a: Constant, b: Constant) -> tuple[Pattern, Pattern]:
        return op.linear(x, a), op.linear(x, b)

    def rewrite(m: Match, build: Builder) -> tuple[Value, ...]:
        packed = build(ops.Linear(m.x, build(ops.Concat([m.a, m.b], dim=0))))
        sizes = [value.type.shape[-1] for value in m.outputs]
        return build.add(ops.Split(packed, dim=1, sizes=sizes)).results

    before, x = module.copy(), torch.randn(2, 4)
    assert apply_rules(module, [rule(pattern, rewrite)]) == 1
    verify(module)
    assert [o.name for o in module.walk()] == ["concat", "linear", "split", "exp"]
    for old, new in zip(interpret(before, [x]), interpret(module, [x]), strict=True):
        assert torch.allclose(old, new)


def test_an_output_that_is_computed_later_moves_the_rewrite_down() -> None:
    body = """
  %p = add(%x, %x) : f32[2, 4]
  %t = tanh(%p) : f32[2, 4]
  %z = exp(%x) : f32[2, 4]
  %q = sub(%x, %z) : f32[2, 4]
  return q=%q, t=%t"""

    def pattern(x: Var, z: Var) -> tuple[Pattern, Pattern]:
        return op.sub(x, z), op.add(x, x)

    def rewrite(m: Match, build: Builder) -> tuple[Value, Value]:
        return build(ops.Mul(m.z, m.x)), build(ops.Mul(m.x, m.x))

    module = graph(body)
    rejected = rule(pattern, rewrite).explain(module, at="%q")
    assert not rejected.matches
    assert rejected.reason == "no place in the graph has all inputs of the match before it and all readers after it"
    later = graph(
        body.replace("  %t = tanh(%p) : f32[2, 4]\n", "").replace("return", "%t = tanh(%p) : f32[2, 4]\n  return")
    )
    assert apply_rules(later, [rule(pattern, rewrite)]) == 1
    verify(later)


def test_an_inner_value_may_be_an_output() -> None:
    body = """
  %s = add(%x, %z) : f32[2, 4]
  %n = layer_norm(%s) : f32[2, 4]
  %e = exp(%s) : f32[2, 4]
  return n=%n, e=%e"""

    def pattern(x: Var, z: Var) -> tuple[Pattern, Pattern]:
        total = x + z
        return op.layer_norm(total), total

    def rewrite(m: Match, build: Builder) -> tuple[Value, Value]:
        total = build(ops.Add(m.z, m.x))
        return build(ops.LayerNorm(total)), total

    assert rule(pattern, rewrite).explain(graph(body, "%x: f32[2, 4], %z: f32[2, 4]")).matches
    alone = rule(lambda x, z: op.layer_norm(x + z)).explain(graph(body, "%x: f32[2, 4], %z: f32[2, 4]"))
    assert alone.reason == "an inner value, the result of add, is also read by exp"
    assert rule(lambda x, z: op.layer_norm(shared(x + z))).explain(graph(body, "%x: f32[2, 4], %z: f32[2, 4]")).matches
    assert (
        rule(lambda x, z: op.layer_norm(x + z), private=False)
        .explain(graph(body, "%x: f32[2, 4], %z: f32[2, 4]"))
        .matches
    )


# -- the driver ----------------------------------------------------------------------------------------------------


class DoubleNeg(Rule):
    """``-(-x)``"""

    def pattern(self, x: Var) -> Pattern:
        return op.neg(op.neg(x))

    def rewrite(self, m: Match, build: Builder) -> Value:
        return m.x  # type: ignore[no-any-return]


def _chain(length: int) -> Module:
    build = Builder()
    value = build.input("x", TensorType(DType.F32, (4,)))
    for _ in range(length):
        value = build(ops.Neg(value))
    build.output(value)
    return build.module


def test_rules_apply_until_none_matches_and_leave_nothing_behind() -> None:
    module = _chain(301)
    assert apply_rules(module, [DoubleNeg()]) == 150
    assert len(module.main.ops) == 1


def test_the_work_is_proportional_to_the_graph() -> None:
    tried = []
    for length in (100, 800):
        rewrites = Rewrites()
        apply_rules(_chain(length), [DoubleNeg()], rewrites)
        tried.append(rewrites.log["double-neg"].tried / length)
    assert tried[1] <= 1.1 * tried[0]


def test_what_a_rewrite_makes_is_rewritten_before_what_comes_after_it() -> None:
    """The root of the last rule is two ops behind what the others make, so nothing would offer it again."""
    steps = [
        rule(lambda x: op.tanh(x), lambda m, build: build(ops.Sigmoid(m.x))),
        rule(lambda x: op.sigmoid(x), lambda m, build: build(ops.Erf(m.x))),
        rule(lambda x: op.abs(op.exp(op.erf(x))), lambda m, build: build(ops.Relu(m.x))),
    ]
    module = graph(
        """
  %t = tanh(%x) : f32[2, 4]
  %e = exp(%t) : f32[2, 4]
  %y = abs(%e) : f32[2, 4]
  return y=%y"""
    )
    assert apply_rules(module, steps) == 3
    assert [found.name for found in module.walk()] == ["relu"]


def test_a_rule_that_loops_is_an_error_that_names_it() -> None:
    class Swap(Rule):
        """Exchanges operands for ever."""

        def pattern(self, x: Var, y: Var) -> Pattern:
            return op.sub(x, y)

        def rewrite(self, m: Match, build: Builder) -> Value:
            return build(ops.Neg(build(ops.Sub(m.y, m.x))))

    with pytest.raises(PassError) as caught:
        apply_rules(graph("  %y = sub(%x, %x) : f32[2, 4]\n  return y=%y"), [Swap()])
    assert caught.value.what == "the rule swap loops"
    assert caught.value.values["rules"] == "swap"


def test_two_rules_that_undo_each_other_are_both_named() -> None:
    there = rule(lambda x: op.exp(x), lambda m, build: build(ops.Tanh(m.x)))
    back = rule(lambda x: op.tanh(x), lambda m, build: build(ops.Exp(m.x)))
    type(there).name, type(back).name = "there", "back"
    with pytest.raises(PassError) as caught:
        apply_rules(graph("  %y = exp(%x) : f32[2, 4]\n  return y=%y"), [there, back])
    assert caught.value.values["rules"] in ("there, back", "back, there")


def test_a_rule_that_builds_another_type_is_an_error_that_names_it() -> None:
    wrong = rule(lambda x: op.exp(x), lambda m, build: build(ops.Reshape(m.x, shape=(8,))))
    with pytest.raises(PassError, match="the rule made built values of other types than it replaces"):
        apply_rules(graph("  %y = exp(%x) : f32[2, 4]\n  return y=%y"), [wrong])


def test_the_first_rule_that_matches_wins() -> None:
    first = rule(lambda x: op.exp(x), lambda m, build: build(ops.Tanh(m.x)))
    second = rule(lambda x: op.exp(x), lambda m, build: build(ops.Relu(m.x)))
    module = graph("  %y = exp(%x) : f32[2, 4]\n  return y=%y")
    apply_rules(module, [first, second])
    assert [o.name for o in module.walk()] == ["tanh"]


def test_new_ops_carry_their_rule_and_the_source_line() -> None:
    module = graph("  %a = neg(%x) : f32[2, 4]\n  %y = exp(%a) : f32[2, 4]\n  return y=%y")
    for line, found in enumerate(module.walk()):
        found.location = Location("model.py", line, "forward")
    apply_rules(module, [rule(lambda x: op.exp(op.neg(x)))])
    made = module.main.ops.first
    assert made is not None
    assert (made.made_by, made.location, made.result.name) == ("made", Location("model.py", 1, "forward"), "y")
    assert module.copy().main.ops.first.made_by == "made"


def test_the_bodies_of_repeats_are_rewritten() -> None:
    module = parse(
        """
graph main(%x: f32[2, 4]) {
  %y = repeat([%x], [], []) {n=3} : f32[2, 4] graph (%h: f32[2, 4]) {
    %a = neg(%h) : f32[2, 4]
    %b = neg(%a) : f32[2, 4]
    %c = exp(%b) : f32[2, 4]
    return output=%c
  }
  return y=%y
}"""
    )
    assert apply_rules(module, [DoubleNeg()]) == 1
    verify(module)
    assert [o.name for o in module.walk()] == ["repeat", "exp"]


def test_the_gate_allows_the_first_applications_only() -> None:
    module = _chain(20)
    rewrites = Rewrites(limit=3)
    assert apply_rules(module, [DoubleNeg()], rewrites) == 3
    assert len(module.main.ops) == 14
    log = rewrites.log["double-neg"]
    assert (log.applied, rewrites.applied) == (3, 3)
    assert log.matched > 3


def test_the_log_says_what_was_tried_and_why_not() -> None:
    body = """
  %s = sigmoid(%x) : f32[2, 4]
  %m = mul(%x, %s) : f32[2, 4]
  %t = sigmoid(%m) : f32[2, 4]
  %n = mul(%m, %t) : f32[2, 4]
  %e = exp(%t) : f32[2, 4]
  %y = mul(%e, %x) : f32[2, 4]
  return n=%n, y=%y"""

    class RaiseSilu(Rule):
        """``x * sigmoid(x)``"""

        def pattern(self, x: Var) -> Pattern:
            return x * op.sigmoid(x)

        def rewrite(self, m: Match, build: Builder) -> Value:
            return build(ops.Silu(m.x))

    rewrites = Rewrites()
    apply_rules(graph(body), [RaiseSilu()], rewrites)
    log = rewrites.log["raise-silu"].to_dict()
    assert log["applied"] == log["matched"] == 1
    assert log["rejected"]["an inner value, the result of sigmoid, is also read by exp"] >= 1
    miss = log["near_misses"][0]
    assert (miss["matched"], miss["of"]) == (2, 2)
    assert "mul" in miss["at"]


# -- explanations --------------------------------------------------------------------------------------------------


def test_an_explanation_shows_the_deepest_partial_match() -> None:
    module = graph(
        CONSTANT.format(1.5) + "  %d = exp(%x) : f32[2, 4]\n  %e = erf(%d) : f32[2, 4]\n"
        "  %y = add(%e, %c) : f32[2, 4]\n  %z = add(%x, %x) : f32[2, 4]\n  return y=%y, z=%z"
    )
    for line, found in enumerate(module.walk(), start=10):
        found.location = Location("model.py", line, "forward")
    gelu_gate = rule(lambda x: op.erf(op.tanh(x)) + 1.5)
    assert str(gelu_gate.explain(module)) == (
        "made does not match at\n"
        "  %y = add(%e, %c) : f32[2, 4]   # model.py:13 in forward\n"
        "2 of 3 ops match, but\n"
        "  an exp is not a result of tanh\n"
        "  %d = exp(%x) : f32[2, 4]   # model.py:11 in forward"
    )
    assert str(rule(lambda x: op.erf(x)).explain(module, at="%e")) == (
        "made matches 1 ops at\n  %e = erf(%d) : f32[2, 4]   # model.py:12 in forward"
    )
    assert str(rule(lambda x: op.relu(x)).explain(module)) == "made does not match: the module has no relu"


def test_an_explanation_tells_the_condition_that_failed() -> None:
    refuse = rule(lambda x: op.exp(x), check=lambda m: f"x has {m.x.type.rank} axes, not 3")
    found = refuse.explain(graph("  %y = exp(%x) : f32[2, 4]\n  return y=%y"))
    assert (found.matches, found.matched, found.of, found.reason) == (False, 1, 1, "x has 2 axes, not 3")


def test_reasons_show_attributes_as_the_text_of_modules_does() -> None:
    body = "  %y = reshape(%x) {shape=[2*batch, 2]} : f32[2*batch, 2]\n  return y=%y"
    module = parse(f"symbols batch=1..64\ngraph main(%x: f32[batch, 4]) {{\n{body}\n}}")
    fixed = rule(lambda x: op.reshape(x, shape=(8, 2)))
    assert fixed.explain(module).reason == "reshape has shape=[2*batch, 2], not [8, 2]"
    body = (
        "  %a = reshape(%x) {shape=[2*batch, 2]} : f32[2*batch, 2]\n"
        "  %y = reshape(%a) {shape=[4*batch]} : f32[4*batch]\n  return y=%y"
    )
    twice = rule(lambda x: op.reshape(op.reshape(x, shape=Attr("shape")), shape=Attr("shape")))
    module = parse(f"symbols batch=1..64\ngraph main(%x: f32[batch, 4]) {{\n{body}\n}}")
    reason = twice.explain(module).reason
    assert reason == "shape would have two values, [4*batch] and [2*batch, 2]"


def test_a_partial_match_has_at_most_the_ops_of_its_pattern() -> None:
    """The scaling covers three multiplications, and the pattern has none of its own for it."""
    scales = "".join(f"  %s{i + 1} = mul(%s{i}, %c{i}) : f32[2, 4]\n" for i in range(3))
    constants = "".join(CONSTANT.format(1.5 + i).replace("%c", f"%c{i}") for i in range(3))
    body = f"{constants}  %s0 = exp(%x) : f32[2, 4]\n{scales}  %y = tanh(%s3) : f32[2, 4]\n  return y=%y"

    def pattern(x: Var, by: Scalar) -> Pattern:
        return op.tanh(scaled(op.erf(x), by=by))

    found = rule(pattern).explain(graph(body))
    assert (found.matches, found.matched, found.of) == (False, 2, 2)
    rewrites = Rewrites()
    apply_rules(graph(body), [rule(pattern)], rewrites)
    assert [(miss.matched, miss.of) for miss in rewrites.log["made"].near_misses] == [(2, 2)]


def test_a_condition_that_fails_lets_the_search_go_on() -> None:
    """Two values commute; the condition holds for one order only."""
    body = "  %e = exp(%x) : f32[2, 4]\n  %y = add(%x, %e) : f32[2, 4]\n  return y=%y"

    def pattern(a: Var, b: Var) -> Pattern:
        return op.add(a, b)

    chosen = rule(pattern, check=lambda m: None if m.a.name == "e" else "a is not e")
    assert chosen.explain(graph(body), at="%y").matches


def test_mistakes_in_rules_are_errors_in_words() -> None:
    module = graph("  %y = exp(%x) : f32[2, 4]\n  return y=%y")
    with pytest.raises(UsageError, match="a pattern names an unknown op"):
        apply_rules(module, [rule(lambda x: op.expp(x))])
    with pytest.raises(UsageError, match="has too many operands"):
        apply_rules(module, [rule(lambda x: op.exp(x, x))])
    with pytest.raises(UsageError, match="unknown or repeated argument"):
        apply_rules(module, [rule(lambda x: op.softmax(x, axis=1))])
    with pytest.raises(UsageError, match="declares a variable that cannot be one"):
        apply_rules(module, [rule(lambda root: op.exp(root))])
    with pytest.raises(UsageError, match="asks its match for a variable that the pattern does not have"):
        apply_rules(module, [rule(lambda x: op.exp(x), check=lambda m: m.y)])
    with pytest.raises(UsageError, match="no value of the module has this name"):
        DoubleNeg().explain(module, at="%nowhere")


def test_a_rule_may_have_options() -> None:
    @dataclass(frozen=True)
    class TimesNumber(Rule):
        """``x * number``"""

        number: float = 2.0

        def pattern(self, x: Var) -> Pattern:
            return x * self.number

        def rewrite(self, m: Match, build: Builder) -> Value:
            return build(ops.Add(m.x, m.x))

    module = graph(CONSTANT.format(3.0) + "  %y = mul(%x, %c) : f32[2, 4]\n  return y=%y")
    assert TimesNumber.name == "times-number"
    assert apply_rules(module, [TimesNumber()]) == 0
    assert apply_rules(module, [TimesNumber(3.0)]) == 1
    assert "full" not in print_graph(module.main)


# -- order numbers -------------------------------------------------------------------------------------------------


def test_order_numbers_follow_the_list_through_edits() -> None:
    draw = random.Random(0)
    build = Builder()
    x = build.input("x", TensorType(DType.F32, (2,)))
    first = build.add(ops.Exp(x))
    for _ in range(600):
        anchor = draw.choice([first, *list(build.graph.ops)[:3]])
        insert = draw.choice([build.graph.ops.insert_before, build.graph.ops.insert_after])
        insert(anchor, ops.Exp(x))
        if draw.random() < 0.1:
            build.graph.ops.remove(next(o for o in build.graph.ops if o is not first))
    in_order = list(build.graph.ops)
    for earlier, later in itertools.pairwise(in_order):
        assert earlier.is_before(later)
        assert not later.is_before(earlier)


def _source(*shape: int) -> object:
    from trimtab.ir.weights import TorchSource

    return TorchSource(torch.randn(*shape))


@pytest.mark.parametrize(("result", "replaced"), [(0, {"a"}), (2, {"c"}), (..., {"a", "b", "c"})])
def test_a_pattern_names_one_of_several_results_or_any(result: int, replaced: set[str]) -> None:
    module = graph("""
  %a, %b, %c = split(%x) {dim=1, sizes=[1, 1, 2]} : f32[2, 1], f32[2, 1], f32[2, 2]
  return a=%a, b=%b, c=%c""")
    found = rule(lambda x: op.split(x)[result], private=False)
    (split,) = module.walk()
    assert {value.name for value in split.results if found.explain(module, at=value).matches} == replaced
