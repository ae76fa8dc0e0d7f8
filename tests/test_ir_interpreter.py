"""The interpreter: inputs checked in words, symbols bound, precision, gradients, repeats, and freeing."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from trimtab.errors import InputError, Location
from trimtab.ir import Builder, DType, Graph, Module, Op, TensorType, interpret, symbol, verify
from trimtab.ir.interpreter import bind_symbols, evaluate_op
from trimtab.ir.ops import Add, Arange, Cast, DimValue, Embedding, Exp, Full, Linear, Mul, Neg, Repeat, Reshape, Split

BATCH, SEQ = symbol("batch", 1, 8), symbol("seq", 2, 16)


def f32(*shape: object) -> TensorType:
    return TensorType(DType.F32, shape)  # type: ignore[arg-type]


def two_inputs() -> Module:
    b = Builder()
    x, y = b.input("x", f32(BATCH, SEQ)), b.input("y", f32(BATCH, 2 * SEQ))
    b.output(b(Reshape(b(Neg(y)), (BATCH * 2, SEQ))), b(Exp(x)), names=["negated", "exponential"])
    return b.module


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([torch.zeros(2, 3)], "wrong number of inputs: expected=['x', 'y'], given=1"),
        ({"x": torch.zeros(2, 3), "z": torch.zeros(1)}, "wrong input names: missing=['y'], unknown=['z']"),
        ([torch.zeros(2, 3).double(), torch.zeros(2, 6)], "input=x, expected=f32[batch, seq], given=float64[2, 3]"),
        ([torch.zeros(2), torch.zeros(2, 6)], "input=x, expected=f32[batch, seq], given=float32[2]"),
        ([torch.zeros(2, 3, dtype=torch.complex64), torch.zeros(2, 6)], "given=complex64[2, 3]"),
        ([torch.zeros(2, 3), torch.zeros(3, 6)], "disagree about a dimension: symbol=batch, sizes=2 and 3, input=y"),
        ([torch.zeros(2, 3), torch.zeros(2, 7)], "wrong shape: input=y, expected=f32[batch, 2*seq]"),
        ([torch.zeros(9, 3), torch.zeros(9, 6)], "out of its range: symbol=batch, size=9, range=1..8"),
        ([torch.zeros(2, 1), torch.zeros(2, 2)], "out of its range: symbol=seq, size=1, range=2..16"),
        (["text", torch.zeros(2, 6)], "an input cannot be made a tensor: input=x, given=str"),
    ],
)
def test_wrong_inputs_are_named(inputs: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        interpret(two_inputs(), inputs)
    assert message in str(caught.value)


def test_inputs_by_order_by_name_and_from_numpy() -> None:
    module = two_inputs()
    x, y = torch.randn(2, 3), torch.randn(2, 6)
    expected = (-y.reshape(4, 3), x.exp())
    for inputs in ([x, y], (x, y), {"y": y, "x": x}, [x.numpy(), y.numpy()]):
        for got, want in zip(interpret(module, inputs), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert bind_symbols(module.main, [x, y]) == {"batch": 2, "seq": 3}


def test_a_symbol_that_stands_alone_nowhere_is_named() -> None:
    b = Builder()
    b.output(b(Neg(b.input("x", f32(2 * BATCH)))))
    with pytest.raises(InputError, match="cannot be found from the inputs: symbol=batch"):
        interpret(b.module, [torch.zeros(4)])


def test_symbols_reach_attributes() -> None:
    b = Builder()
    b.input("x", f32(BATCH, SEQ))
    counted = b(Arange(length=SEQ - 1, dtype=DType.I64))
    b.output(counted, b(DimValue(BATCH * SEQ, DType.I32)), b(Full(value=1.5, dtype=DType.F32, shape=(BATCH,))))
    verify(b.module)
    count, size, full = interpret(b.module, [torch.zeros(3, 5)])
    assert (count.tolist(), int(size), full.tolist()) == ([0, 1, 2, 3], 15, [1.5] * 3)


def test_bad_values_are_input_errors_with_the_users_line() -> None:
    b = Builder()
    ids = b.input("ids", TensorType(DType.I64, (3,)))
    with b.at(Location("model.py", 5)):
        b.output(b(Embedding(b.weight("table", torch.zeros(4, 2)), ids)))
    with pytest.raises(InputError, match="embedding cannot be evaluated on these values") as caught:
        interpret(b.module, [torch.tensor([0, 9, 1])])
    assert caught.value.location == Location("model.py", 5)
    assert "index out of range" in caught.value.rule


def test_precision_widens_floats_and_nothing_else() -> None:
    b = Builder()
    x = b.input("x", f32(4, 3))
    ids = b.input("ids", TensorType(DType.I64, (4,)))
    h = b(Linear(x, b.weight("w", torch.randn(5, 3))))
    half = b(Cast(h, dtype=DType.F16))
    b.output(b(Add(h, b(Cast(half, dtype=DType.F32)))), b(Add(ids, ids)))
    data, w = torch.randn(4, 3), b.module.weights["w"].tensor()
    wide, doubled = interpret(b.module, [data, torch.arange(4)], precision=torch.float64)
    torch.testing.assert_close(wide, 2 * (data.double() @ w.double().T), rtol=1e-12, atol=1e-12)
    assert doubled.tolist() == [0, 2, 4, 6]


def test_gradients_flow_to_weights_and_inputs() -> None:
    b = Builder()
    x = b.input("x", f32(BATCH, 3))
    body = Graph()
    c = body.add_input(f32(BATCH, 3))
    b.weight("w", torch.randn(3, 3))
    body.set_outputs([body.ops.append(Linear(c, body.weight(b.module.weights["w"]))).result])
    b.output(b(Repeat((x,), (), (), body, 3)))
    w = b.module.weights["w"].tensor().clone().requires_grad_()
    data = torch.randn(2, 3, requires_grad=True)
    (result,) = interpret(b.module, [data], weights={"w": w}, grad=True)
    result.sum().backward()
    other, again = w.detach().clone().requires_grad_(), data.detach().clone().requires_grad_()
    (again @ other.T @ other.T @ other.T).sum().backward()
    torch.testing.assert_close(w.grad, other.grad)
    torch.testing.assert_close(data.grad, again.grad)
    (result,) = interpret(b.module, [data], weights={"w": w})
    assert not result.requires_grad


def test_nested_repeats_with_stacked_shared_and_invariant_values() -> None:
    b = Builder()
    x, k = b.input("x", f32(4)), b.input("k", f32(4))
    stack = torch.randn(3, 4)
    shared = b.module.weights[b.weight("shared", torch.randn(4)).weight]
    inner = Graph()
    a, slope = inner.add_input(f32(4)), inner.add_input(f32(4))
    product = inner.ops.append(Mul(a, slope)).result
    inner.set_outputs([inner.ops.append(Add(product, inner.weight(shared))).result])
    outer = Graph()
    c, part, constant = (outer.add_input(f32(4)) for _ in range(3))
    looped = outer.ops.append(Repeat((c,), (), (part,), inner, 2)).result
    outer.set_outputs([outer.ops.append(Add(looped, constant)).result])
    b.output(b(Repeat((x,), (b.weight("stack", stack),), (k,), outer, 3)))
    verify(b.module)
    data, constant_data = torch.randn(4), torch.randn(4)
    (result,) = interpret(b.module, [data, constant_data])
    expected = data
    for i in range(3):
        for _ in range(2):
            expected = expected * stack[i] + shared.tensor()
        expected = expected + constant_data
    torch.testing.assert_close(result, expected)


def test_an_observer_sees_every_run_of_every_op() -> None:
    b = Builder()
    body = Graph()
    c = body.add_input(f32(2))
    body.set_outputs([body.ops.append(Neg(c)).result])
    b.output(b(Exp(b(Repeat((b.input("x", f32(2)),), (), (), body, 3)))))
    seen: list[tuple[str, int]] = []

    def observe(op: Op, results: Sequence[Any]) -> None:
        seen.append((op.name, len(results)))

    interpret(b.module, [torch.zeros(2)], observer=observe)
    assert seen == [("neg", 1)] * 3 + [("repeat", 1), ("exp", 1)]


def test_values_are_freed_after_their_last_use() -> None:
    b = Builder()
    h = b.input("x", f32(1000))
    for _ in range(6):
        h = b(Neg(h))
    b.output(h)
    alive: list[int] = []
    made: list[weakref.ref[Any]] = []

    def observe(op: Op, results: Sequence[Any]) -> None:
        made.append(weakref.ref(results[0]))
        alive.append(sum(ref() is not None for ref in made))

    interpret(b.module, [torch.zeros(1000)], observer=observe)
    assert max(alive) <= 2


def test_outputs_may_repeat_and_may_be_inputs_or_weights() -> None:
    b = Builder()
    x = b.input("x", f32(2))
    w = b.weight("w", torch.ones(2))
    left, _ = b.add(Split(x, 0, (1, 1))).results
    b.output(x, w, left, left)
    verify(b.module)
    outputs = interpret(b.module, [torch.tensor([3.0, 4.0])])
    assert [t.tolist() for t in outputs] == [[3.0, 4.0], [1.0, 1.0], [3.0], [3.0]]


@pytest.mark.parametrize("row_major", [False, True])
def test_strides_of_inputs_do_not_change_results(row_major: bool) -> None:
    b = Builder()
    x = b.input("x", f32(3, 4))
    b.output(b(Reshape(b(Exp(x)), (12,))))
    data = torch.randn(4, 3).T
    (strided,) = interpret(b.module, [data], row_major=row_major)
    (dense,) = interpret(b.module, [data.contiguous()], row_major=row_major)
    torch.testing.assert_close(strided, dense, rtol=1e-6, atol=0)


def test_one_op_is_evaluated_with_bindings() -> None:
    (result,) = evaluate_op(Arange(length=SEQ, dtype=DType.I32), [], {"seq": 3})
    assert result.tolist() == [0, 1, 2]
    assert result.dtype is torch.int32
    total = evaluate_op(Add(*(Builder().input("x", f32(2)) for _ in range(2))), [torch.ones(2), torch.ones(2)])
    assert np.array_equal(total[0].numpy(), [2, 2])
