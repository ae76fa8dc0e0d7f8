"""The machinery that turns annotations into ops: arguments, attribute types, copies, and graph editing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.errors import InternalError, Location, UsageError
from trimtab.ir import OP_CLASSES, Builder, DType, Graph, Module, Op, TensorType, Use, Value, Weight, symbol, verify
from trimtab.ir.attributes import check_attribute
from trimtab.ir.ops import (
    Add,
    AvgPool2d,
    Cast,
    Clamp,
    Concat,
    Full,
    Gelu,
    LayerNorm,
    Linear,
    Neg,
    Repeat,
    Softmax,
    Split,
)  # fmt: skip


def value(*shape: object, dtype: DType = DType.F32) -> Value:
    return Value(TensorType(dtype, shape))  # type: ignore[arg-type]


def test_a_declared_op_has_accessors_defaults_and_a_mnemonic() -> None:
    class ScaledSum3(Op):
        """``scale * (x + sum(rest))``."""

        x: Value
        bias: Value | None = None
        rest: tuple[Value, ...]
        scale: float = 1.0
        tag: str | None = None

        @staticmethod
        def reference(x: Tensor, bias: Tensor | None, rest: list[Tensor], *, scale: float, tag: str | None) -> Tensor:
            return scale * sum(rest, x if bias is None else x + bias)  # type: ignore[no-any-return]

    try:
        assert OP_CLASSES["scaled_sum3"] is ScaledSum3
        a, b, c = value(2, 3), value(3), value(3)
        op = ScaledSum3(a, None, (b, c), scale=2)
        assert (op.x, op.bias, op.rest, op.scale, op.tag) == (a, None, (b, c), 2.0, None)
        assert isinstance(op.scale, float)
        assert op.operands == (a, b, c)
        assert op.result.type == TensorType(DType.F32, (2, 3))
        assert [field.kind for field in ScaledSum3.operand_fields] == ["one", "optional", "many"]
        assert ScaledSum3(a, b, ()).bias is b
        with pytest.raises(InternalError, match="share a mnemonic"):
            type("ScaledSum3", (Op,), {})
    finally:
        del OP_CLASSES["scaled_sum3"]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Add(value(2)), "add needs a value as y"),
        (lambda: Add(value(2), 3), "add takes a Value as y"),
        (lambda: Add(value(2), value(2), value(2)), "add takes at most 2 arguments"),
        (lambda: Add(value(2), value(2), scale=1), "unknown or repeated argument"),
        (lambda: Add(value(2), x=value(2)), "unknown or repeated argument"),
        (lambda: Softmax(value(2)), "softmax needs the attribute dim"),
        (lambda: Softmax(value(2), "0"), "dim is declared as int"),
        (lambda: Softmax(value(2), True), "dim is declared as int"),
        (lambda: Gelu(value(2), approximate="erf"), "gelu got a wrong attribute"),
        (lambda: Cast(value(2), dtype="f16"), "cast got a wrong attribute"),
        (lambda: Cast(value(2), dtype=torch.float16), "cast got a wrong attribute"),
        (lambda: AvgPool2d(value(1, 1, 4, 4), (2, 2, 2), (1, 1)), "avg_pool2d got a wrong attribute"),
        (lambda: LayerNorm(value(2), (value(2), value(2))), "at most one value as weight"),
        (lambda: Repeat((value(2),), (), ()), "repeat needs the regions"),
        (lambda: Concat((value(2), "x"), 0), "concat takes a Value as values"),
    ],
)
def test_wrong_arguments_are_usage_errors(build: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("declared", "given", "kept"),
    [
        (float, 1, 1.0), (int, 3, 3), (bool, True, True), (str, "a", "a"), (tuple[int, ...], [1, 2], (1, 2)),
        (tuple[int, int], (1, 2), (1, 2)), (float | int | bool, 1, 1), (float | int | bool, True, True),
        (float | None, None, None), (float | None, 2, 2.0), (tuple[int | None, ...], [None, 1], (None, 1)),
    ],
)  # fmt: skip
def test_attributes_take_their_canonical_form(declared: object, given: object, kept: object) -> None:
    result = check_attribute("op", "a", declared, given)
    assert result == kept
    assert type(result) is type(kept)


def test_dimensions_are_attributes() -> None:
    batch = symbol("batch", 1, 8)
    op = Full(value=0.5, dtype=DType.F32, shape=[batch, 4])
    assert op.shape == (batch, 4)
    assert op.result.type == TensorType(DType.F32, (batch, 4))


def test_a_failed_build_leaves_no_use_behind() -> None:
    x, y = value(3), value(4)
    with pytest.raises(Exception, match="does not accept"):
        Add(x, y)
    with pytest.raises(UsageError):
        Softmax(x, "0")
    good = Neg(x)
    with pytest.raises(Exception, match="does not accept"):
        Add(x, x).rebuilt(operands=[x, y])
    assert [use.user.name for use in x.uses] == ["neg", "add", "add"]
    assert y.uses == ()
    assert good.operands == (x,)


def test_fields_cannot_be_assigned() -> None:
    op = Softmax(value(2, 3), 1)
    with pytest.raises(InternalError, match="set_operand"):
        op.x = value(2, 3)
    with pytest.raises(InternalError, match=r"Op\.rebuilt"):
        op.dim = 0


def test_clone_and_rebuilt() -> None:
    x, y = value(2, 3), value(2, 3)
    op = Clamp(x, min=0.0)
    clone = op.clone([y])
    assert (type(clone), clone.operands, clone.attributes, clone.graph) == (Clamp, (y,), op.attributes, None)
    higher = op.rebuilt(max=6.0)
    assert (higher.min, higher.max, higher.operands) == (0.0, 6.0, (x,))
    wider = op.rebuilt(operands=[value(5)])
    assert wider.result.type.shape == (5,)
    with pytest.raises(UsageError, match="wrong attribute"):
        op.rebuilt(min="0")


def test_result_of_several_is_refused() -> None:
    with pytest.raises(InternalError, match="several results"):
        _ = Split(value(4), 0, (1, 3)).result


# -- values, graphs and modules ------------------------------------------------------------------------------------


def chain(n: int) -> tuple[Module, list[Op]]:
    b = Builder()
    h = b.input("x", TensorType(DType.F32, (2,)))
    for _ in range(n):
        h = b(Neg(h))
    b.output(h)
    return b.module, list(b.module.main.ops)


def test_uses_follow_operands_and_outputs() -> None:
    b = Builder()
    x = b.input("x", TensorType(DType.F32, (2,)))
    op = b.add(Add(x, x))
    b.output(x, op.result)
    graph = b.graph
    assert x.uses == (Use(op, 0), Use(op, 1), Use(graph, 0))
    assert (x.users, x.is_output) == ((op,), True)
    y = b.input("", TensorType(DType.F32, (2,)))
    x.replace_all_uses_with(y)
    assert (x.uses, op.operands, graph.outputs[0], y.name) == ((), (y, y), y, "x")
    op.set_operand(1, x)
    assert (op.operands, x.uses) == ((y, x), (Use(op, 1),))
    y.replace_all_uses_with(y)
    assert len(y.uses) == 2


def test_ops_can_be_edited_while_they_are_walked() -> None:
    module, ops = chain(5)
    seen = []
    for op in module.main.ops:
        seen.append(op)
        if op is ops[1]:
            op.result.replace_all_uses_with(op.operands[0])
            module.main.ops.remove(op)
        if op is ops[2]:
            module.main.ops.insert_after(op, extra := Neg(op.result))
    assert seen == [ops[0], ops[1], ops[2], extra, ops[3], ops[4]]
    assert list(module.main.ops) == [ops[0], ops[2], extra, ops[3], ops[4]]
    assert list(reversed(module.main.ops)) == [ops[4], ops[3], extra, ops[2], ops[0]]
    assert (len(module.main.ops), module.main.ops.first, module.main.ops.last) == (5, ops[0], ops[4])
    assert ops[0] in module.main.ops
    assert ops[1] not in module.main.ops


def test_a_builder_replaces_an_op_where_it_stands() -> None:
    module, ops = chain(3)
    ops[1].location = Location("model.py", 7)
    ops[1].result.name = "middle"
    new = Builder(module, made_by="a-rule").replace(ops[1], Gelu(ops[0].result))
    assert list(module.main.ops) == [ops[0], new, ops[2]]
    assert ops[2].operands == new.results
    assert (new.location, new.made_by, new.result.name) == (ops[1].location, "a-rule", "middle")
    verify(module)


def test_nested_graphs_and_readers_of_weights_are_found() -> None:
    b = Builder()
    x = b.input("x", TensorType(DType.F32, (2,)))
    w = Weight.from_tensor("w", torch.ones(2))
    b.module.add_weight(w)
    bodies = []
    for _ in range(2):
        body = Graph()
        body.set_outputs([body.ops.append(Add(body.add_input(x.type), body.weight(w))).result])
        bodies.append(body)
    second = b.add(Repeat((x,), (), (), bodies[1], n=2))
    first = b.graph.ops.insert_before(second, Repeat((x,), (), (), bodies[0], n=2))
    b.output(first.results[0], b(Add(second.results[0], b.graph.weight(w))))
    assert b.graph.ops.with_regions == [first, second]
    assert list(b.module.all_graphs()) == [b.graph, *bodies]
    assert [use.user.graph for use in b.module.readers("w")] == [b.graph, *bodies]
    first.results[0].replace_all_uses_with(x)
    b.graph.ops.remove(first)
    assert list(b.module.all_graphs()) == [b.graph, bodies[1]]
    assert len(list(b.module.readers("w"))) == 2
    assert list(b.module.readers("unknown")) == []


def test_editing_mistakes_are_internal_errors() -> None:
    module, ops = chain(2)
    with pytest.raises(InternalError, match="still read"):
        module.main.ops.remove(ops[0])
    with pytest.raises(InternalError, match="inserted twice"):
        module.main.ops.append(ops[0])
    with pytest.raises(InternalError, match="not in this graph"):
        Graph().ops.insert_before(ops[0], Neg(value(2)))
    with pytest.raises(InternalError, match="id is used twice"):
        module.add_weight(module.add_weight(Weight.from_tensor("w", torch.ones(2))))


def test_wrong_number_of_output_names() -> None:
    module, _ = chain(1)
    with pytest.raises(UsageError, match="wrong number of output names"):
        module.main.set_outputs(module.main.outputs, ["a", "b"])
    assert module.main.output_names == ["output"]


def test_weights_have_one_value_a_graph_and_unused_ones_go() -> None:
    b = Builder()
    w = b.weight("w", torch.ones(2))
    again = b.weight("w", torch.zeros(2))
    assert (w.weight, again.weight) == ("w", "w.1")
    assert b.graph.weight(b.module.weights["w"]) is w
    b.output(b(Neg(w)))
    assert [v.weight for v in b.graph.weights] == ["w"]
    assert b.module.weight_bytes == 16
    assert b.module.drop_unused_weights() == 1
    assert list(b.module.weights) == ["w"]


def test_a_copy_shares_only_data() -> None:
    module, ops = chain(3)
    Builder(module).weight("w", torch.ones(2))
    copy = module.copy()
    assert copy == module
    assert copy.weights["w"] is module.weights["w"]
    next(iter(copy.main.ops)).result.replace_all_uses_with(copy.main.inputs[0])
    assert copy != module
    verify(module)
    module.assign(copy)
    assert len(ops[0].result.uses) == 1
    assert module == copy


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b.graph.output_names.__setitem__(0, "z"),
        lambda b: setattr(b.graph.inputs[0], "name", "z"),
        lambda b: b.graph.ops.append(Neg(b.graph.inputs[0])),
        lambda b: b.module.weights.update(w=Weight.from_tensor("w", torch.zeros(3, 2))),
        lambda b: b.module.weights.update(w=b.module.weights["w"].renamed("w")) or setattr(
            b.module.weights["w"], "trainable", True),
        lambda b: b.weight("v", torch.ones(1)),
        lambda b: b.graph.ops.last.attributes.update(dim=0),
        lambda b: b.graph.ops.last.set_operand(0, b.graph.ops.first.operands[0]),
        lambda b: b.module.graphs.update(other=Graph("other")),
    ],
)  # fmt: skip
def test_modules_differ_by_what_counts(change: object) -> None:
    def build() -> Builder:
        b = Builder()
        x = b.input("x", TensorType(DType.F32, (3, 2)))
        b.output(b(Softmax(b(Linear(x, b.weight("w", torch.ones(3, 2)))), 1), "named"), names=["y"])
        return b

    b = build()
    assert b.module == build().module
    next(iter(b.module.main.ops)).results[0].name = "inner names do not count"
    assert b.module == build().module
    change(b)  # type: ignore[operator]
    assert b.module != build().module
