"""The reducer keeps what fails and drops the rest: outputs, ops, inputs, operands, regions, symbols, sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from random_graphs import modules, random_module
from test_bisect import zoo_module

import trimtab
from trimtab.debug.resize import fix_symbols, resized
from trimtab.errors import TrimtabError, UsageError
from trimtab.ir import Builder, DType, Graph, Module, TensorType, interpret, ops, symbol, verify
from trimtab.passes import Context
from trimtab.passes.samples import generate_samples


def has(*names: str) -> Callable[[Module], bool]:
    """Whether a module has ops of these kinds, one reading another's result in this order."""

    def fails(module: Module) -> bool:
        for op in module.walk():
            chain = [op]
            for name in names:
                if not chain or chain[-1].name != name:
                    break
                chain.append(next((user for value in chain[-1].results for user in value.users), None))  # type: ignore[arg-type]
            else:
                return True
        return False

    return fails


def evaluable(module: Module) -> bool:
    """Whether the reference can evaluate the module on a sample."""
    for sample in generate_samples(module, Context(), 1e9):
        interpret(module, sample.inputs)
    return True


@pytest.mark.parametrize("name", ["vit", "bert", "llama", "swin"])
def test_a_model_is_reduced_to_the_ops_that_matter(name: str) -> None:
    module = zoo_module(name)
    before = module.copy()
    wanted = has("layer_norm", "linear") if name != "llama" else has("rms_norm", "linear")
    if not wanted(module):
        wanted = has("linear")
    count = 0

    def fails(candidate: Module) -> bool:
        nonlocal count
        count += 1
        return wanted(candidate) and evaluable(candidate)

    small = trimtab.reduce(module, fails)
    verify(small)
    assert wanted(small)
    assert len(small.main.ops) <= 2
    assert len(small.main.outputs) == 1
    assert not small.symbols()
    assert small.weight_bytes <= 100
    assert module == before
    assert count <= 400


@settings(max_examples=40)
@given(modules())
def test_any_module_is_reduced_to_one_op(module: Module) -> None:
    last = list(module.main.ops)[-1].name
    small = trimtab.reduce(module, lambda candidate: any(op.name == last for op in candidate.walk()))
    verify(small)
    assert [op.name for op in small.main.ops].count(last) == 1
    # An operand that its op cannot do without stays: it became an input where an input can have its type.
    assert len(small.main.ops) == 1
    assert all(value.uses for value in small.main.inputs)
    assert set(small.weights) == {value.weight for value in small.main.weights}


def test_evaluations_are_bounded_and_told() -> None:
    module = zoo_module("vit")
    told: list[float] = []
    asked = 0

    def fails(candidate: Module) -> bool:
        nonlocal asked
        asked += 1
        return has("softmax")(candidate) or has("attention")(candidate)

    small = trimtab.reduce(module, fails, evaluations=10, progress=lambda stage, part: told.append(part))
    assert asked == 11  # the module itself, and ten candidates
    assert told == sorted(told)
    assert told[-1] == 0.9
    assert len(small.main.ops) < len(module.main.ops)


def test_a_module_that_does_not_fail_is_refused() -> None:
    with pytest.raises(UsageError, match="there is nothing to reduce"):
        trimtab.reduce(random_module(0, 5), lambda module: False)


def test_an_exception_is_no_failure() -> None:
    module = random_module(1, 8)
    count = len(module.main.ops)

    def fails(candidate: Module) -> bool:
        if len(candidate.main.ops) < count:
            raise KeyError("too small")
        return True

    assert len(trimtab.reduce(module, fails).main.ops) == count


def test_where_the_signature_must_stay_values_become_constants() -> None:
    build = Builder()
    x = build.input("x", TensorType(DType.F32, (4, 4)))
    y = build.input("y", TensorType(DType.F32, (4, 4)))
    h = build(ops.Exp(build(ops.Tanh(build(ops.Sin(x))))))
    build.output(build(ops.Maximum(h, build(ops.Cos(y)))))

    def fails(candidate: Module) -> bool:
        inputs = {"x": torch.ones(4, 4), "y": torch.ones(4, 4)}
        return len(interpret(candidate, inputs)) == 1 and has("maximum")(candidate)

    small = trimtab.reduce(build.module, fails)
    assert [value.name for value in small.main.inputs] == ["x", "y"]
    assert {op.name for op in small.main.ops} <= {"maximum", "full"}


def test_the_body_of_a_region_becomes_the_module() -> None:
    body = Graph()
    carried = body.add_input(TensorType(DType.F32, (8, 8)))
    build = Builder(Module(), body)
    body.set_outputs([build(ops.Tanh(build(ops.Neg(carried))))])
    outer = Builder()
    x = outer.input("x", TensorType(DType.F32, (8, 8)))
    outer.output(outer(ops.Repeat([x], [], [], body, 3)))
    small = trimtab.reduce(outer.module, has("tanh"))
    assert [op.name for op in small.walk()] == ["tanh"]


def test_other_graphs_are_left_out() -> None:
    module = random_module(3, 6)
    module.graphs["other"] = random_module(4, 6).main
    module.graphs["other"].name = "other"
    module.weights |= random_module(4, 6).weights
    assert list(trimtab.reduce(module, lambda candidate: True).graphs) == ["main"]


# -- sizes -----------------------------------------------------------------------------------------------------------


def attention_like() -> Module:
    """``softmax(reshape(linear(x)))`` over a symbolic batch, with sizes in types, weights and attributes."""
    build = Builder()
    x = build.input("x", TensorType(DType.F32, (symbol("batch", 1, 16), 12, 64)))
    weight = build.weight("w", torch.arange(64 * 64, dtype=torch.float32).reshape(64, 64))
    h = build(ops.Reshape(build(ops.Linear(x, weight)), (symbol("batch", 1, 16), 12, 4, 16)))
    build.output(build(ops.Softmax(build(ops.Slice(h, dim=3, start=8, stop=16)), dim=3)))
    return build.module


def test_sizes_change_together() -> None:
    module = attention_like()
    before = module.copy()
    small = resized(module, lambda dim: dim // 8 if isinstance(dim, int) and dim >= 8 and dim % 8 == 0 else dim)
    verify(small)
    assert [str(value.type) for value in (*small.main.inputs, *small.main.outputs)] == [
        "f32[batch, 12, 8]",
        "f32[batch, 12, 4, 1]",
    ]
    assert torch.equal(small.weights["w"].tensor(), module.weights["w"].tensor()[:8, :8])
    assert small.weights["w"].tensor().untyped_storage().nbytes() == 8 * 8 * 4
    assert module == before


def test_symbols_become_numbers() -> None:
    module = attention_like()
    fixed = fix_symbols(module, {"batch": 3})
    verify(fixed)
    assert not fixed.symbols()
    x = torch.randn(3, 12, 64)
    assert torch.equal(interpret(fixed, [x])[0], interpret(module, [x])[0])
    assert fix_symbols(module, {}) == module


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(TrimtabError):
        resized(attention_like(), lambda dim: 7 if dim == 16 else dim)


@settings(max_examples=40)
@given(modules())
def test_a_module_resized_by_nothing_is_the_same(module: Module) -> None:
    assert resized(module, lambda dim: dim) == module
