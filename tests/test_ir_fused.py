"""The fused op: made from ops of a graph, evaluated, verified, printed, counted, and inlined again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from trimtab.errors import InputError, VerificationError
from trimtab.ir import Builder, DType, Graph, Module, TensorType, interpret, ops, parse_module, print_module, verify
from trimtab.ir.analysis import Liveness, count_ops, module_cost
from trimtab.ir.fused import fuse, inline, ungroup
from trimtab.ir.op import Op
from trimtab.passes.samples import index_limits


def f32(*shape: int) -> TensorType:
    return TensorType(DType.F32, shape)


def skip_norm() -> tuple[Module, list[Op]]:
    """``s = x + y``, ``h = layer_norm(2 s) w``; both are outputs. Returns the ops without the constant."""
    b = Builder()
    x, y = b.input("x", f32(3, 8)), b.input("y", f32(3, 8))
    total = b(ops.Add(x, y), "total")
    two = b.scalar(2.0, DType.F32)
    h = b(ops.LayerNorm(b(ops.Mul(total, two)), b.weight("w", torch.rand(8))))
    b.output(total, h, names=["total", "h"])
    return b.module, [op for op in b.graph.ops if not isinstance(op, ops.Full)]


def test_fuse_and_inline_are_inverse() -> None:
    module, members = skip_norm()
    before, inputs = module.copy(), [torch.randn(3, 8), torch.randn(3, 8)]
    expected = interpret(before, inputs)
    fused = fuse(module, members, members[-1])
    verify(module)
    assert [op.name for op in module.main.ops] == ["fused"], "the constant went along"
    assert (fused.kind, len(fused.inputs), len(fused.results)) == ("add+mul+layer_norm", 2, 2)
    assert [value.weight for value in fused.body.weights] == ["w"]
    assert all(torch.equal(a, b) for a, b in zip(interpret(module, inputs), expected, strict=True))
    inline(module, fused)
    verify(module)
    assert module == before


def test_a_constant_that_others_read_stays() -> None:
    b = Builder()
    x, two = b.input("x", f32(3)), b.scalar(2.0, DType.F32)
    first = b.add(ops.Mul(x, two))
    second = b.add(ops.Exp(first.result))
    b.output(second.result, b(ops.Div(x, two)))
    fused = fuse(b.module, [first, second], second)
    verify(b.module)
    assert [op.name for op in b.module.main.ops] == ["full", "fused", "div"]
    assert fused.inputs == (x,)
    assert ungroup(b.module) == 1
    verify(b.module)


def test_the_fused_op_stands_at_its_anchor_and_keeps_names_and_locations() -> None:
    from trimtab.errors import Location

    b = Builder()
    x = b.input("x", f32(3))
    with b.at(Location("model.py", 5)):
        first = b.add(ops.Exp(x), "hot")
    between = b.add(ops.Cumsum(first.result, 0, DType.F32))
    last = b.add(ops.Sin(first.result), "wave")
    b.output(between.result, last.result)
    fused = fuse(b.module, [first, last], first)
    verify(b.module)
    assert [op.name for op in b.module.main.ops] == ["fused", "cumsum"]
    assert fused.location == Location("model.py", 5)
    assert [value.name for value in fused.results] == ["hot", "wave"]
    assert [op.location for op in fused.body.ops] == [Location("model.py", 5), None]


def test_its_text_reads_back() -> None:
    module, members = skip_norm()
    fuse(module, members, members[-1])
    text = print_module(module)
    assert '= fused([%x, %y]) {kind="add+mul+layer_norm"} : f32[3, 8], f32[3, 8] graph (%x: f32[3, 8]' in text
    parsed = parse_module(text, lambda id, type: module.weights[id].source)
    assert parsed == module
    assert print_module(parsed) == text


def test_observers_see_the_ops_inside() -> None:
    module, members = skip_norm()
    fuse(module, members, members[-1])
    seen: list[str] = []
    interpret(module, [torch.zeros(3, 8)] * 2, observer=lambda op, results: seen.append(op.name))
    assert seen == ["add", "full", "mul", "layer_norm", "fused"]


def test_gradients_flow_through_it() -> None:
    module, members = skip_norm()
    fuse(module, members, members[-1])
    x = torch.randn(3, 8, requires_grad=True)
    interpret(module, [x, torch.zeros(3, 8)], grad=True)[0].sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(3, 8))


def test_it_reads_and_writes_its_borders_only() -> None:
    module, members = skip_norm()
    apart = module_cost(module)
    fuse(module, members, members[-1])
    together = module_cost(module)
    row, value = 8 * 4, 3 * 8 * 4
    assert apart.bytes_read == 2 * value + (value + 4) + (value + row)
    assert apart.bytes_written == 3 * value + 4
    assert (together.bytes_read, together.bytes_written) == (2 * value + row, 2 * value)
    assert together.parameters == apart.parameters == 8
    assert count_ops(module, executed=True) == {"fused": 1, "add": 1, "full": 1, "mul": 1, "layer_norm": 1}


def test_what_it_keeps_inside_needs_no_memory() -> None:
    b = Builder()
    value = b.input("x", f32(8))
    members = [b.add(ops.Exp(value))]
    for _ in range(3):
        members.append(b.add(ops.Sin(members[-1].result)))
    b.output(members[-1].result)
    fuse(b.module, members, members[-1])
    assert Liveness(b.module.main).peak_bytes() == 2 * 8 * 4


def test_limits_of_indices_come_from_inside() -> None:
    b = Builder()
    ids = b.input("ids", TensorType(DType.I64, (3,)))
    rows = b.add(ops.Embedding(b.weight("table", torch.randn(50, 4)), ids))
    last = b.add(ops.Neg(rows.result))
    b.output(last.result)
    fuse(b.module, [rows, last], last)
    assert index_limits(b.module.main, {}) == {ids: 50}
    with pytest.raises(InputError, match="embedding cannot be evaluated"):
        interpret(b.module, [torch.full((3,), 50)])


def body_with(make: Callable[[Graph], None]) -> Graph:
    graph = Graph()
    make(graph)
    return graph


def neg(graph: Graph) -> None:
    graph.set_outputs([graph.ops.append(ops.Neg(graph.add_input(f32(4)))).result])


def nothing(graph: Graph) -> None:
    graph.ops.append(ops.Neg(graph.add_input(f32(3))))


def nested(graph: Graph) -> None:
    x = graph.add_input(f32(3))
    inner = body_with(lambda g: g.set_outputs([g.ops.append(ops.Neg(g.add_input(f32(3)))).result]))
    graph.set_outputs([graph.ops.append(ops.Fused((x,), inner, "neg")).result])


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (neg, "the body's inputs are the operands"),
        (nothing, "a kernel has a result"),
        (nested, "a kernel has no regions inside"),
    ],
)
def test_a_malformed_one_is_refused(make: Callable[[Graph], None], rule: str) -> None:
    b = Builder()
    x = b.input("x", f32(3))
    b.output(x, *b.add(ops.Fused((x,), body_with(make), "neg")).results)
    with pytest.raises(VerificationError, match=rule):
        verify(b.module)
