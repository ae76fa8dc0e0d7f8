"""The verifier: one broken module for each way to break a rule, with the error's text reviewed as a golden file."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from trimtab.errors import Location, VerificationError
from trimtab.ir import Builder, DType, Graph, Module, Op, TensorType, Use, Value, Weight, symbol, verify
from trimtab.ir.ops import Add, Attention, Full, Linear, Neg, Repeat, Reshape, Slice, Softmax
from trimtab.ir.verifier import RULES
from trimtab.ir.weights import TorchSource

BATCH = symbol("batch", 1, 8)


def f32(*shape: object) -> TensorType:
    return TensorType(DType.F32, shape)  # type: ignore[arg-type]


def sound() -> tuple[Module, list[Op]]:
    """``softmax(relu-less linear)``: three ops, a weight, an input, source lines."""
    b = Builder()
    x = b.input("x", f32(BATCH, 4))
    with b.at(Location("model.py", 7, "forward")):
        h = b(Linear(x, b.weight("w", torch.eye(4))), "h")
        n = b(Neg(h), "n")
        b.output(b(Softmax(n, 1), "y"), names=["y"])
    return b.module, list(b.module.main.ops)


def with_repeat() -> tuple[Module, Repeat]:
    b = Builder()
    x, s = b.input("x", f32(4)), b.input("s", f32(3, 4))
    body = Graph()
    c, part = body.add_input(f32(4), "c"), body.add_input(f32(4), "part")
    body.set_outputs([body.ops.append(Add(c, part)).result])
    repeat = Repeat((x,), (s,), (), body, 3)
    b.output(b(repeat))
    return b.module, repeat


BREAKS: dict[str, Callable[[], Module]] = {}


def breaks(make: Callable[[], Module]) -> Callable[[], Module]:
    BREAKS[make.__name__.replace("_", "-")] = make
    return make


@breaks
def use_before_definition() -> Module:
    module, (_, second, third) = sound()
    module.main.ops.unlink(second)
    module.main.ops.insert_after(third, second)
    return module


@breaks
def value_of_another_graph() -> Module:
    module, (_, second, _) = sound()
    other = Graph("other")
    second.set_operand(0, other.add_input(f32(BATCH, 4), "foreign"))
    return module


@breaks
def returned_value_of_another_graph() -> Module:
    module, _ = sound()
    module.main.set_outputs([Graph("other").add_input(f32(2), "foreign")], ["y"])
    return module


@breaks
def body_that_reads_outside() -> Module:
    module, repeat = with_repeat()
    next(iter(repeat.body.ops)).set_operand(0, module.main.inputs[0])
    return module


@breaks
def op_without_its_graph() -> Module:
    module, (_, second, _) = sound()
    second.graph = Graph("other")
    return module


@breaks
def use_not_recorded() -> Module:
    module, (first, second, _) = sound()
    first.result._remove_use(Use(second, 0))
    return module


@breaks
def output_not_recorded() -> Module:
    module, (*_, third) = sound()
    third.result._remove_use(Use(module.main, 0))
    return module


@breaks
def use_that_is_not_there() -> Module:
    module, (first, second, _) = sound()
    first.result._add_use(Use(second, 5))
    return module


@breaks
def use_by_an_op_in_no_graph() -> Module:
    module, (first, *_) = sound()
    Neg(first.result)
    return module


@breaks
def use_of_a_weight_by_an_op_in_no_graph() -> Module:
    module, _ = sound()
    Neg(module.main.weight(module.weights["w"]))
    return module


@breaks
def result_of_another_op() -> Module:
    module, (first, second, _) = sound()
    first.results[0].producer = second
    return module


@breaks
def input_with_a_wrong_place() -> Module:
    module, _ = sound()
    module.main.inputs[0].index = 3
    return module


@breaks
def weight_not_in_the_table() -> Module:
    module, _ = sound()
    del module.weights["w"]
    return module


@breaks
def weight_of_another_type() -> Module:
    module, _ = sound()
    module.weights["w"] = Weight.from_tensor("w", torch.eye(4, dtype=torch.float64))
    return module


@breaks
def weight_value_of_another_graph() -> Module:
    module, (first, *_) = sound()
    first.set_operand(1, Graph("other").weight(module.weights["w"]))
    return module


@breaks
def returned_weight_of_another_graph() -> Module:
    module, _ = sound()
    module.main.set_outputs([Graph("other").weight(module.weights["w"])], ["y"])
    return module


@breaks
def weight_with_a_symbolic_shape() -> Module:
    b = Builder()
    b.input("x", f32(BATCH))
    weight = b.module.add_weight(Weight("w", f32(BATCH), TorchSource(torch.ones(2))))
    b.output(b.graph.weight(weight))
    return b.module


@breaks
def negative_dimension() -> Module:
    b = Builder()
    x = b.input("x", f32(2, 3))
    op = b.add(Reshape(x, (6,)))
    op.results[0].type = f32(-6)
    b.output(op.result)
    return b.module


@breaks
def wrong_result_type() -> Module:
    module, (first, *_) = sound()
    first.results[0].type = f32(BATCH, 5)
    return module


@breaks
def operand_that_the_reference_refuses() -> Module:
    module, _ = sound()
    module.main.inputs[0].type = f32(BATCH, 3)
    return module


@breaks
def operand_that_the_op_refuses() -> Module:
    b = Builder()
    q = b.input("q", f32(2, 4, 8))
    op = b.add(Attention(q, q, q, scale=1.0))
    q.type = f32(4, 8)
    op.results[0].type = f32(4, 8)
    b.output(op.result)
    return b.module


@breaks
def slice_out_of_range() -> Module:
    b = Builder()
    x = b.input("x", f32(9))
    b.output(b(Slice(x, 0, 2, 8)))
    x.type = f32(7)
    return b.module


@breaks
def body_with_other_inputs() -> Module:
    module, repeat = with_repeat()
    repeat.body.inputs[1].type = f32(5)
    return module


@breaks
def body_with_other_outputs() -> Module:
    module, repeat = with_repeat()
    repeat.body.set_outputs([])
    return module


@breaks
def repeat_of_no_iterations() -> Module:
    module, repeat = with_repeat()
    repeat.attributes = {"n": 0}
    return module


@breaks
def stack_of_another_length() -> Module:
    module, repeat = with_repeat()
    repeat.attributes = {"n": 4}
    return module


@breaks
def symbol_that_no_input_has() -> Module:
    b = Builder()
    b.input("x", f32(BATCH))
    b.output(b(Full(value=0.0, dtype=DType.F32, shape=(BATCH, symbol("free")))))
    return b.module


@breaks
def symbol_with_another_range() -> Module:
    b = Builder()
    x = b.input("x", f32(BATCH))
    op = b.add(Neg(x))
    op.results[0].type = f32(symbol("batch", 1, 9))
    x.type = f32(symbol("batch", 1, 9))
    b.output(op.result)
    x.type = f32(BATCH)
    return b.module


@breaks
def symbol_with_two_ranges() -> Module:
    module, _ = sound()
    module.graphs["other"] = Graph("other")
    module.graphs["other"].add_input(f32(symbol("batch", 1, 9)), "x")
    return module


@breaks
def inputs_of_one_name() -> Module:
    module, _ = sound()
    module.main.add_input(f32(2), "x")
    return module


@breaks
def output_without_a_name() -> Module:
    module, _ = sound()
    module.main.output_names = [""]
    return module


def test_the_modules_are_sound_before_they_are_broken() -> None:
    verify(sound()[0])
    verify(with_repeat()[0])


def test_each_break_is_reported(golden: Callable[[str, str], None]) -> None:
    lines = []
    for name, make in BREAKS.items():
        module = make()
        with pytest.raises(VerificationError) as caught:
            verify(module)
        lines += [f"# {name}", caught.value.message, ""]
    golden("ir/verifier_errors.txt", "\n".join(lines))


def test_every_rule_is_broken_by_some_module() -> None:
    broken = set()
    for make in BREAKS.values():
        module = make()
        for graph in module.all_graphs():
            for rule in RULES:
                try:
                    if any(True for _ in rule(module, graph)):
                        broken.add(rule.__name__)
                except VerificationError:
                    broken.add(rule.__name__)
    assert broken == {rule.__name__ for rule in RULES}


def test_an_error_has_the_users_line() -> None:
    with pytest.raises(VerificationError) as caught:
        verify(wrong_result_type())
    assert caught.value.location == Location("model.py", 7, "forward")
    assert "from model.py:7 in forward" in str(caught.value)


def test_values_know_their_type_by_name() -> None:
    assert repr(Value(f32(2), name="x")) == "%x: f32[2]"
