"""Analyses: cost against known counts, liveness against brute force, the networkx view, and op counts."""

from __future__ import annotations

from typing import Any

import networkx
import pytest
import torch
from op_examples import ALL_EXAMPLES, OpExample, build_module
from random_graphs import random_module

from trimtab.errors import UsageError
from trimtab.ir import Builder, Dim, DType, Graph, Module, TensorType, Value, symbol
from trimtab.ir.analysis import ENTRY, EXIT, Liveness, count_ops, executions, graph_view, module_cost
from trimtab.ir.analysis.expressions import same_expressions
from trimtab.ir.dims import evaluate, product
from trimtab.ir.fused import fuse
from trimtab.ir.ops import (
    Add,
    Attention,
    Conv2d,
    Einsum,
    Exp,
    Full,
    Linear,
    Matmul,
    Mul,
    Neg,
    Repeat,
    Reshape,
    Split,
    Sub,
    Tanh,
)
from trimtab.ir.weights import Weight

BATCH, SEQ = symbol("batch", 1, 8), symbol("seq", 1, 64)


def f32(*shape: Dim) -> TensorType:
    return TensorType(DType.F32, shape)


def looped(n: int) -> Module:
    """Linear, then n times ``x + tanh(x W^T)`` with the same weight, then Linear with it once more."""
    b = Builder()
    w = b.weight("w", torch.randn(4, 4))
    h = b(Linear(b.input("x", f32(BATCH, 4)), w))
    body = Graph()
    x = body.add_input(f32(BATCH, 4))
    t = body.ops.append(Tanh(body.ops.append(Linear(x, body.weight(b.module.weights["w"]))).result)).result
    body.set_outputs([body.ops.append(Add(x, t)).result])
    b.output(b(Linear(b(Repeat((h,), (), (), body, n)), w)))
    return b.module


# -- cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "macs"),
    [
        (lambda v: Linear(v(BATCH, SEQ, 32), v(10, 32), v(10)), BATCH * SEQ * 320),
        (lambda v: Matmul(v(BATCH, SEQ, 8), v(BATCH, 8, 5)), BATCH * SEQ * 40),
        (lambda v: Matmul(v(7), v(7)), 7),
        (lambda v: Attention(v(BATCH, 4, SEQ, 8), v(BATCH, 2, 9, 8), v(BATCH, 2, 9, 6), scale=1.0),
         BATCH * 4 * SEQ * 9 * (8 + 6)),
        (lambda v: Conv2d(v(2, 6, 8, 8), v(4, 3, 3, 3), stride=(2, 2), padding=(1, 1), dilation=(1, 1), groups=2),
         2 * 4 * 16 * 27),
        (lambda v: Einsum((v(3, 4), v(4, 5)), "ij,jk->ik"), 60),
        (lambda v: Einsum((v(2, 3, 7), v(7, 5)), "...j,jk->...k"), 2 * 3 * 7 * 5),
        (lambda v: Exp(v(3, 4)), 0),
    ],
)  # fmt: skip
def test_multiply_accumulates_follow_the_usual_count(op: object, macs: Dim) -> None:
    assert op(lambda *shape: Value(f32(*shape))).macs() == macs  # type: ignore[operator]


@pytest.mark.parametrize("example", ALL_EXAMPLES, ids=str)
def test_every_op_has_a_cost(example: OpExample) -> None:
    module = build_module(example)
    for bindings in example.bindings:
        cost = module_cost(module).bind(bindings)
        for row in cost.ops:
            assert all(isinstance(n, int) and n >= 0 for n in (row.macs, row.bytes_read, row.bytes_written))


def test_bytes_and_parameters_of_one_op() -> None:
    b = Builder()
    w = b.weight("w", torch.randn(10, 32))
    b.output(b(Linear(b.input("x", f32(BATCH, 32)), w, b.weight("b", torch.randn(10)))))
    (row,) = module_cost(b.module).ops
    assert (row.times, row.parameters, row.macs) == (1, 330, BATCH * 320)
    assert row.bytes_read == BATCH * 128 + 1320
    assert row.bytes_written == BATCH * 40
    assert row.bind({"batch": 3}).bytes_read == 3 * 128 + 1320


def test_a_shared_weight_counts_once_and_a_body_as_often_as_it_runs() -> None:
    cost = module_cost(looped(5))
    assert (cost.parameters, cost.weight_bytes) == (16, 64)
    assert cost.macs == BATCH * 16 * 7
    assert [(row.op.name, row.times) for row in cost.ops] == [
        ("linear", 1), ("repeat", 1), ("linear", 5), ("tanh", 5), ("add", 5), ("linear", 1),
    ]  # fmt: skip
    bound = cost.bind({"batch": 2})
    assert bound.macs == 224
    assert bound.bytes_written == 2 * 16 * (1 + 15 + 1)
    assert evaluate(cost.bytes_read, {"batch": 2}) == bound.bytes_read


def test_cost_of_an_unbound_symbol_is_refused() -> None:
    with pytest.raises(UsageError, match="a symbol has no value: symbol=batch"):
        module_cost(looped(2)).bind({})


# -- counts -----------------------------------------------------------------------------------------------------------


def test_ops_are_counted_as_they_stand_or_as_they_run() -> None:
    module = looped(5)
    assert count_ops(module) == {"linear": 3, "tanh": 1, "add": 1, "repeat": 1}
    assert count_ops(module, executed=True) == {"linear": 7, "tanh": 5, "add": 5, "repeat": 1}


def test_nested_repeats_multiply() -> None:
    inner_module = looped(3)
    inner = next(op for op in inner_module.main.ops if isinstance(op, Repeat))
    body = Graph()
    x = body.add_input(f32(BATCH, 4))
    body.set_outputs([body.ops.append(Repeat((x,), (), (), inner.body.copy(), 3)).result])
    b = Builder(Module(weights=inner_module.weights.values()))
    b.output(b(Repeat((b.input("x", f32(BATCH, 4)),), (), (), body, 4)))
    assert {op.name: times for op, times in executions(b.module.main)} == {
        "repeat": 4, "linear": 12, "tanh": 12, "add": 12,
    }  # fmt: skip
    assert module_cost(b.module).macs == BATCH * 16 * 12


# -- liveness ---------------------------------------------------------------------------------------------------------


def brute_force(graph: Graph, bindings: dict[str, int]) -> list[int]:
    """Bytes alive at each op, straight from the definition: written before or here, and read here or later."""
    ops = list(graph.ops)
    storage = {value: value for value in graph.inputs}
    written = dict.fromkeys(graph.inputs, -1)
    for position, op in enumerate(ops):
        for value in op.results:
            if isinstance(op, Reshape):
                storage[value] = storage.get(op.x, op.x)
            else:
                storage[value] = value
                written[value] = position
    sizes = []
    for position, op in enumerate(ops):
        reads = [v for later in ops[position:] for v in later.operands] + list(graph.outputs)
        needed = {storage[v] for v in reads if v in storage} | {storage[v] for v in op.results}
        alive = {v for v in needed if written.get(v, position + 1) <= position}
        sizes.append(sum(int(evaluate(v.type.bytes, bindings)) for v in alive))
    return sizes


@pytest.mark.parametrize("seed", range(25))
def test_live_bytes_agree_with_the_definition(seed: int) -> None:
    module = random_module(seed, 25)
    bindings = {name: min(s.min + 2, s.max or 9) for name, s in module.symbols().items()}
    assert list(Liveness(module.main).live_bytes(bindings)) == brute_force(module.main, bindings)


def test_intervals_of_a_diamond() -> None:
    b = Builder()
    x = b.input("x", f32(6))
    left, right = b.add(Split(x, 0, (2, 4))).results
    doubled = b(Add(left, left))
    shaped = b(Reshape(doubled, (2, 1)))
    unused = b(Neg(right))
    b.output(shaped, x)
    live = Liveness(b.module.main)
    spans = {i.value: (i.start, i.end) for i in live.intervals}
    assert spans == {x: (-1, 4), left: (0, 1), right: (0, 3), doubled: (1, 4), unused: (3, 3)}
    assert live.storage(shaped) is doubled
    assert set(live.live_at(1)) == {x, left, right, doubled}
    assert live.live_bytes() == (48, 56, 48, 64)
    assert live.peak_bytes() == 64


def test_a_region_counts_while_it_runs_and_symbols_count() -> None:
    module = looped(4)
    live = Liveness(module.main)
    row = 2 * 16  # bytes of one value at batch 2
    # The body needs W x and tanh(W x) beside its input and output, which are the operand and result of the repeat.
    assert live.live_bytes({"batch": 2}) == (2 * row, 4 * row, 2 * row)
    assert live.peak_bytes({"batch": 2}) == 4 * row


def test_an_empty_graph_needs_its_inputs() -> None:
    b = Builder()
    b.output(b.input("x", f32(3)))
    b.input("unused", f32(5))
    assert Liveness(b.module.main).live_bytes() == ()
    assert Liveness(b.module.main).peak_bytes() == 32


# -- networkx ---------------------------------------------------------------------------------------------------------


def test_nodes_and_edges_of_the_view() -> None:
    b = Builder()
    x = b.input("x", f32(4))
    w = b.weight("w", torch.randn(4))
    split = b.add(Split(x, 0, (2, 2)))
    total = b.add(Add(*split.results))
    scaled = b.add(Add(w, x))
    b.output(total.result, scaled.result)
    view = graph_view(b.module.main)
    assert {data["label"]: data["kind"] for _, data in view.nodes(data=True)} == {
        "x": "input", "@w": "weight", "split": "op", "add": "op",
    }  # fmt: skip
    assert view.edges[split, total]["values"] == split.results
    assert set(view.edges) == {(x, split), (split, total), (w, scaled), (x, scaled)}
    assert w not in graph_view(b.module.main, weights=False)
    assert list(networkx.topological_sort(view))


def test_dominators_of_a_diamond() -> None:
    b = Builder()
    x = b.input("x", f32(4))
    top = b.add(Neg(x))
    left, right = b.add(Exp(top.result)), b.add(Tanh(top.result))
    join = b.add(Add(left.result, right.result))
    b.output(join.result)
    view = graph_view(b.module.main, boundary=True)
    dominators = networkx.immediate_dominators(view, ENTRY)
    assert dominators[join] is top
    assert dominators[left] is top
    after = networkx.immediate_dominators(view.reverse(copy=False), EXIT)
    assert after[top] is join
    assert after[x] is top


@pytest.mark.parametrize("seed", range(10))
def test_every_node_lies_between_entry_and_exit(seed: int) -> None:
    graph = random_module(seed, 20).main
    view = graph_view(graph, boundary=True)
    assert networkx.is_directed_acyclic_graph(view)
    assert networkx.descendants(view, ENTRY) == set(view) - {ENTRY}
    assert networkx.ancestors(view, EXIT) == set(view) - {EXIT}
    assert len(view) == len(graph.ops) + len(graph.inputs) + len(graph.weights) + 2


def test_the_view_of_nothing_has_a_border() -> None:
    assert set(graph_view(Graph("main"), boundary=True).edges) == {(ENTRY, EXIT)}


def test_elements_are_products() -> None:
    assert product(f32(BATCH, 3).shape) == f32(BATCH, 3).elements


# -- expressions ------------------------------------------------------------------------------------------------------


def _expression(*, swap: bool = False, scale: float = 2.0, group: bool = False, dead: bool = False) -> Module:
    """``tanh(x) * scale - w``."""
    b = Builder()
    x, w = b.input("x", f32(BATCH, 4)), b.module.main.weight(b.module.add_weight(_W))
    if dead:
        b(Exp(x))
    y = b(Mul(b(Tanh(x)), b.scalar(scale, DType.F32)))
    b.output(b(Sub(w, y) if swap else Sub(y, w)), names=["y"])
    if group:
        members = [op for op in b.module.main.ops if not isinstance(op, Full)]
        fuse(b.module, members, members[-1])
    return b.module


_W = Weight.from_tensor("w", torch.randn(4))


def test_modules_of_the_same_expressions_are_recognised() -> None:
    plain = _expression()
    assert same_expressions(plain, plain.copy())
    assert same_expressions(plain, _expression(dead=True))
    assert same_expressions(_expression(group=True, dead=True), plain)


@pytest.mark.parametrize("other", [{"swap": True}, {"scale": -2.0}, {"swap": True, "group": True}], ids=str)
def test_modules_of_other_expressions_are_told_apart(other: dict[str, Any]) -> None:
    assert not same_expressions(_expression(), _expression(**other))


def test_weights_of_other_data_and_outputs_of_other_names_are_other_expressions() -> None:
    plain, other = _expression(), _expression()
    other.weights["w"] = Weight.from_tensor("w", torch.zeros(4))
    assert not same_expressions(plain, other)
    renamed = _expression()
    renamed.main.set_outputs(renamed.main.outputs, ["z"])
    assert not same_expressions(plain, renamed)


def test_repeated_bodies_are_not_looked_into() -> None:
    module = looped(3)
    assert not same_expressions(module, module.copy())


@pytest.mark.parametrize("seed", range(5))
def test_random_modules_are_the_same_expressions_as_their_copies(seed: int) -> None:
    module = random_module(seed, 40)
    repeats = any(isinstance(op, Repeat) for op in module.walk())
    assert same_expressions(module, module.copy()) is not repeats
